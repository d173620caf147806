"""Merging of checkpoints: exact, streamed from files to files, usable alone."""

from gtr_turbo.merging.merge import Plan, Report, merge
from gtr_turbo.merging.shards import MergeError

__all__ = ["MergeError", "Plan", "Report", "merge"]
