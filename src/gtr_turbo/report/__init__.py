"""A run, or several, as one HTML file: curves, settings, and a replay of what the agent saw and thought.

The file loads nothing. What the model wrote is untrusted text and reaches the page as text only. No torch.
"""

from gtr_turbo.report.page import ReportInfo, write_report
from gtr_turbo.report.read import ReportError

__all__ = ["ReportError", "ReportInfo", "write_report"]
