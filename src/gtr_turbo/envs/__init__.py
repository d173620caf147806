"""Visual-text environments. Importing this package registers them with Gymnasium; no torch here."""

from gymnasium.envs.registration import register

from gtr_turbo.envs.contract import ContractError, check_env, make_env
from gtr_turbo.envs.discrete import wrap_discrete

__all__ = ["ContractError", "check_env", "make_env", "wrap_discrete"]

_CARDS = "gtr_turbo.envs.cards"
register(id="gtr/NumberLine-v0", entry_point=f"{_CARDS}.numberline:NumberLineEnv")
register(id="gtr/EZPoints-v0", entry_point=f"{_CARDS}.points:EZPointsEnv")
register(id="gtr/Points24-v0", entry_point=f"{_CARDS}.points:Points24Env")
register(id="gtr/Blackjack-v0", entry_point=f"{_CARDS}.blackjack:BlackjackEnv")

_HOUSEHOLD = "gtr_turbo.envs.household.env:HouseholdEnv"
register(id="gtr/Household-v0", entry_point=_HOUSEHOLD)
for _task in ("place", "two", "light", "clean", "heat", "cool"):
    _id = f"gtr/Household-{_task.title()}-v0"
    register(id=_id, entry_point=_HOUSEHOLD, kwargs={"task": _task})
