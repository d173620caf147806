import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from hypothesis import given, settings
from hypothesis import strategies as st

import gtr_turbo.envs
from gtr_turbo.envs import ContractError, check_env, make_env, wrap_discrete
from gtr_turbo.envs.contract import AnyText, observation_space, resolve_id

OURS = sorted(key for key in gymnasium.registry if key.startswith("gtr/"))
CARDS = ["gtr/Blackjack-v0", "gtr/EZPoints-v0", "gtr/NumberLine-v0", "gtr/Points24-v0"]
VARIANTS = [(name, {"prompt": style}) for name in OURS for style in ("full", "compact")]
VARIANTS += [
    ("Points24", {"granularity": granularity, "prompt": style})
    for granularity in ("reduction", "formula")
    for style in ("full", "compact")
]


def test_the_card_games_are_registered():
    assert set(CARDS) <= set(OURS)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_every_registered_environment_keeps_the_contract(name, options):
    check_env(make_env(name, **options))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_seed_fixes_every_frame_of_an_episode(name, options):
    def episode(seed):
        env = make_env(name, **options)
        observation, info = env.reset(seed=seed)
        frames, rng = [observation["image"]], np.random.default_rng(5)
        for _ in range(4):
            observation, _, terminated, truncated, info = env.step(
                str(rng.choice(info["actions"])) if "actions" in info else "1+1"
            )
            frames.append(observation["image"])
            if terminated or truncated:
                break
        return b"".join(frame.tobytes() for frame in frames)

    assert episode(11) == episode(11)
    assert len({episode(seed) for seed in range(8)}) > 4


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@settings(max_examples=15, deadline=None)
@given(action=st.text(max_size=30) | st.text("0123456789+-*/()= ", max_size=40))
def test_no_string_makes_step_raise(name, options, action):
    env = make_env(name, **options)
    env.reset(seed=1)
    observation, reward, *_ = env.step(action)
    assert observation["image"].dtype == np.uint8
    assert reward in (-1.0, 0.0, 1.0, 10.0)


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Points24", "gtr/Points24-v0", "gtr_turbo.envs:Points24", "Points24-v0"]
)
def test_a_bare_name_a_full_id_and_a_module_name_are_one_environment(name):
    assert resolve_id(name) == "gtr/Points24-v0"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("Point24", "Points24"), ("ezpoint", "EZPoints"), ("BlackJack", "Blackjack")],
)
def test_an_unknown_name_is_answered_with_the_closest_one(wrong, meant):
    with pytest.raises(ContractError, match=f"Did you mean '{meant}'"):
        make_env(wrong)


def test_a_module_that_cannot_be_imported_is_named():
    with pytest.raises(ContractError, match=r"cannot import module 'no_such_module'.*PYTHONPATH"):
        make_env("no_such_module:Env-v0")


def test_a_module_of_this_folder_is_found_as_python_m_finds_it(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('MineAlone-v0', 'gtr_turbo.envs.cards.points:EZPoints')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert resolve_id("mine_alone:MineAlone-v0") == "MineAlone-v0"
    del gymnasium.registry["MineAlone-v0"]


def test_an_unknown_option_is_named():
    known = "prompt, early_truncation, split, render_mode"
    with pytest.raises(ContractError, match=f"gtr/NumberLine-v0 does not take.*colour.*{known}"):
        make_env("NumberLine", colour="red")
    with pytest.raises(ContractError, match=r"takes: prompt, gran.*solvable_only.*'granularity'"):
        make_env("Points24", granularty="token", prompt="full")  # what the base class takes too


def test_an_environment_of_gymnasium_is_told_how_it_becomes_one_of_ours():
    with pytest.raises(ContractError, match=r"got None\. .* `wrap_discrete`"):
        check_env(make_env("CartPole-v1", render_mode="rgb_array"))


# -- broken environments: check_env names the broken rule and its likely cause ---------------------


class Sound(gymnasium.Env):
    """Two turns of a grey frame; each broken environment below breaks one thing."""

    fields = ("thoughts", "action")

    def __init__(self):
        self.observation_space = observation_space(16, 16)
        self.action_space = AnyText()

    def observe(self):
        return {"image": np.full((16, 16, 3), self.grey, np.uint8), "prompt": "go"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turns, self.grey = 0, int(self.np_random.integers(256))
        return self.observe(), {"actions": ["a", "b"]}

    def step(self, action):
        self.turns += 1
        done = self.turns == 2
        info = {"actions": ["a", "b"], **({"success": True} if done else {})}
        return self.observe(), 0.0, done, False, info


def test_the_environment_the_broken_ones_are_made_of_is_sound():
    check_env(Sound())
    plain = Sound()
    del plain.observation_space, plain.action_space
    check_env(plain)  # nothing asks for its spaces


def broken(**changes):
    return type("Broken", (Sound,), changes)()


def changed_step(position, value):
    def step(self, action):
        result = list(Sound.step(self, action))
        result[position] = value
        return tuple(result)

    return step


def observing(**change):
    return {"observe": lambda self: {**Sound.observe(self), **change}}


def drops_prompt(self):
    return {"image": Sound.observe(self)["image"]}


def raises_on_unknown(self, action):
    return Sound.step(self, ("a", "b")[["a", "b"].index(action)])


def own_generator(self, *, seed=None, options=None):
    observation, info = Sound.reset(self, seed=seed)
    return {**observation, "image": np.random.default_rng().bytes(768)}, info


def unseeded(self, *, seed=None, options=None):
    return Sound.reset(self, seed=None)


def by_chance(self, action):
    observation, _, *rest = Sound.step(self, action)
    return observation, np.random.default_rng().random(), *rest


def into_one_buffer(self):
    self.buffer = getattr(self, "buffer", np.zeros((16, 16, 3), np.uint8))
    self.buffer[:] = self.grey
    return {"image": self.buffer, "prompt": "go"}


BROKEN = {
    "one buffer": ({"observe": into_one_buffer}, r"each must be an array of its own.*image\.copy"),
    "no success": ({"step": changed_step(4, {})}, "must hold success=True or False, got None"),
    "success is 1": ({"step": changed_step(4, {"success": 1})}, "success=True or False, got 1"),
    "unseeded": ({"reset": unseeded}, r"does not call super\(\).reset\(seed=seed\)"),
    "raises": ({"step": raises_on_unknown}, "raised ValueError.*answer every action"),
    "float image": (observing(image=np.zeros((16, 16, 3))), "must be a uint8 array, got float64"),
    "bytes": ({"reset": own_generator}, "must be a uint8 array, got bytes"),
    "grey image": (observing(image=np.zeros((16, 16), np.uint8)), r"got shape \(16, 16\)"),
    "channels first": (observing(image=np.zeros((3, 16, 16), np.uint8)), r"shape \(3, 16, 16\)"),
    "empty prompt": (observing(prompt=""), "non-empty str, got ''"),
    "no prompt": ({"observe": drops_prompt}, r"image and prompt, got \['image'\]"),
    "no action": ({"fields": ("thoughts",)}, "'action' last"),
    "action first": ({"fields": ("action", "thoughts")}, "'action' last"),
    "no fields": ({"fields": None}, "'action' last, got None"),
    "NaN": ({"step": changed_step(1, float("nan"))}, "finite number, got nan"),
    "text reward": ({"step": changed_step(1, "1")}, "finite number, got '1'"),
    "flag is 0": ({"step": changed_step(2, 0)}, "terminated must be a bool, got 0"),
    "endless": ({"step": changed_step(2, False)}, "did not end in 200 turns"),
    "task is 3": ({"step": changed_step(4, {"task": 3})}, "must be a str, .* got 3"),
    "met in percent": ({"step": changed_step(4, {"goal_conditions": 50})}, "0 to 1, got 50"),
    "met as text": ({"step": changed_step(4, {"goal_conditions": "1"})}, "0 to 1, got '1'"),
    "met is NaN": ({"step": changed_step(4, {"goal_conditions": np.nan})}, "0 to 1, got nan"),
    "task is a list at reset": (
        {"reset": lambda self, **_: (Sound.reset(self, seed=1)[0], {"task": ["a"]})},
        r"must be a str, .* got \['a'\]",
    ),
    "unseeded steps": (
        {"step": by_chance},
        r"step\('.'\) gave something else .* another generator",
    ),
    "judge raises": (
        {"judge": lambda self, reply: {"plan": len(reply["thoughts"].split()) > 1}},
        r"judge\(\{'thoughts': \['\?'\].* raised AttributeError.*do not raise",
    ),
    "judge counts": ({"judge": lambda self, reply: {"plan": 3}}, "True and False, got .*3"),
    "NumPy's numbers": (
        {"demonstrate": lambda self, rng: {"thoughts": "", "action": rng.integers(3)}},
        "what JSON can hold, got .*make plain values",
    ),
    "half a demonstration": (
        {"demonstrate": lambda self, rng: {"action": "a"}},
        r"must give \['thoughts', 'action'\], the action last.*got \{'action': 'a'\}",
    ),
    "a demonstration whose action comes first": (
        {"demonstrate": lambda self, rng: {"action": "a", "thoughts": ""}},
        "the action last and as text",
    ),
    "a demonstrated list": (
        {"demonstrate": lambda self, rng: {"thoughts": "", "action": ["a"]}},
        "the action last and as text",
    ),
    "an action that no reply can give": (
        {"reset": lambda self, **_: (Sound.reset(self, seed=1)[0], {"actions": ["a", "b "]})},
        "lists 'b ', which no reply can give: they are read",
    ),
    "actions are numbers": (
        {"reset": lambda self, **_: (Sound.reset(self, seed=1)[0], {"actions": [0, 1]})},
        r"must list strings, got \[0, 1\]",
    ),
}


def test_an_expert_may_not_be_there():
    def none(self, rng):
        raise ContractError("no expert with these options")

    check_env(broken(demonstrate=none))


def test_frames_of_a_simulator_may_differ_where_it_says_so():
    class Simulator(Sound):
        same_frames = False

        def observe(self):
            image = np.random.default_rng().integers(256, size=(16, 16, 3), dtype=np.uint8)
            return {"image": image, "prompt": "go"}

    check_env(Simulator())
    Simulator.same_frames = True
    with pytest.raises(ContractError, match="played again from the same seed"):
        check_env(Simulator())


@pytest.mark.parametrize("name", BROKEN)
def test_check_env_names_the_broken_rule(name):
    changes, message = BROKEN[name]
    with pytest.raises(ContractError, match=message):
        check_env(broken(**changes))


# -- wrap_discrete ---------------------------------------------------------------------------------


class DrawnLake(FrozenLakeEnv):
    """Gymnasium's FrozenLake, its frames drawn by us: its own renderer needs pygame."""

    def render(self):
        frame = np.full((4, 4, 3), 255, np.uint8)
        frame[divmod(int(self.s), 4)] = 0
        return frame.repeat(8, axis=0).repeat(8, axis=1)


NAMES = ("left", "down", "right", "up")  # FrozenLake's 0, 1, 2, 3


def lake(actions=NAMES, render_mode="rgb_array", **options):
    env = DrawnLake(render_mode=render_mode, is_slippery=False)
    return wrap_discrete(env, actions=actions, prompt="cross the lake", **options)


def test_a_wrapped_frozen_lake_keeps_the_contract():
    check_env(lake())


@pytest.mark.parametrize("other", ["left", "", "up "])
def test_names_that_no_reply_can_tell_are_refused(other):
    with pytest.raises(ContractError, match="must differ and be neither empty nor begin or end"):
        lake(("left", "down", "right", other))


def test_a_wrapped_environment_keeps_the_contract_when_made_by_its_registered_name():
    gymnasium.register(id="WrappedLake-v0", entry_point=lake)
    try:
        env = make_env("WrappedLake-v0", max_turns=7)
        check_env(env)
        assert env.unwrapped.fields == ("thoughts", "action")
    finally:
        del gymnasium.registry["WrappedLake-v0"]


def test_the_known_way_over_the_lake_wins():
    # S F F F / F H F H / F F F H / H F F G
    env = lake()
    env.reset(seed=0)
    way = ["right", "right", "down", "down", "down", "right"]
    rewards, ends, successes = [], [], []
    for action in way:
        observation, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        ends.append((terminated, truncated))
        successes.append(info.get("success"))
    assert rewards == [0, 0, 0, 0, 0, 1]
    assert ends == [(False, False)] * 5 + [(True, False)]
    assert successes == [False] * 5 + [True]
    assert (observation["image"][24:, 24:] == 0).all()


def test_falling_into_a_hole_is_no_success():
    env = lake()
    env.reset(seed=0)
    env.step("right")
    _, reward, terminated, _, info = env.step("down")
    assert (reward, terminated, info["success"]) == (0.0, True, False)


def test_an_unknown_action_pays_and_moves_nothing_and_counts_as_a_turn():
    env = lake(illegal_reward=-3.0, max_turns=2)
    before, _ = env.reset(seed=0)
    after, reward, terminated, truncated, _ = env.step("jump")
    assert (reward, terminated, truncated) == (-3.0, False, False)
    assert np.array_equal(before["image"], after["image"])
    _, _, terminated, truncated, info = env.step("jump")
    assert (terminated, truncated, info["success"]) == (False, True, False)


def test_a_step_limit_outside_ends_an_episode_that_says_it_failed():
    env = gymnasium.wrappers.TimeLimit(lake(), 2)
    env.reset(seed=0)
    assert env.step("down")[4]["success"] is False
    _, _, terminated, truncated, info = env.step("down")
    assert (terminated, truncated, info["success"]) == (False, True, False)


def test_is_success_of_the_environment_goes_before_the_sign_of_the_reward():
    class Says(DrawnLake):
        def step(self, action):
            return 0, 1.0, True, False, {"is_success": False}

    env = wrap_discrete(Says(render_mode="rgb_array"), actions=NAMES, prompt="go")
    env.reset(seed=0)
    assert env.step("up")[4]["success"] is False


def test_frames_of_an_environment_that_draws_into_one_buffer_stay_apart():
    class OneBuffer(DrawnLake):
        buffer = np.zeros((32, 32, 3), np.uint8)

        def render(self):
            self.buffer[:] = super().render()
            return self.buffer

    env = wrap_discrete(OneBuffer(render_mode="rgb_array"), actions=NAMES, prompt="go")
    first, _ = env.reset(seed=0)
    env.step("right")
    assert (first["image"][:8, :8] == 0).all()


def test_actions_that_begin_at_another_number_than_zero_are_counted_from_it():
    class FromFive(DrawnLake):
        def __init__(self):
            super().__init__(render_mode="rgb_array", is_slippery=False)
            self.action_space = spaces.Discrete(4, start=5)

        def step(self, action):
            return 0, float(action), False, False, {}

    env = wrap_discrete(FromFive(), actions=NAMES, prompt="go")
    env.reset(seed=0)
    assert env.step("down")[1] == 6.0


def test_an_environment_without_frames_is_refused():
    with pytest.raises(ContractError, match=r"render_mode='rgb_array'.*it has None"):
        lake(render_mode=None)


def test_float_frames_are_refused_and_not_cast_to_black():
    class Bright(DrawnLake):
        def render(self):
            return super().render() / 255

    with pytest.raises(ContractError, match="uint8 array, got float64"):
        wrap_discrete(Bright(render_mode="rgb_array"), actions=NAMES, prompt="go")


def test_names_must_fit_the_action_space():
    with pytest.raises(ContractError, match=r"3 action names were given for Discrete\(4\)"):
        lake(actions=NAMES[:3])


def test_importing_the_environments_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, gtr_turbo.envs.cards.points; sys.exit('torch' in sys.modules)"
    assert gtr_turbo.envs.make_env is make_env
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("attribute", "value", "told"),
    [("tools", (print,), "contract.Tool"), ("field_schemas", {"crads": {}}, "crads")],
)
def test_what_a_corrector_is_offered_is_checked(attribute, value, told):
    env = make_env("NumberLine")
    setattr(env.unwrapped, attribute, value)
    with pytest.raises(ContractError, match=told):
        check_env(env)
