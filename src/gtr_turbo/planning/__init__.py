"""What a run will take, before it is begun: `gtr-turbo plan`."""

from gtr_turbo.planning.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
