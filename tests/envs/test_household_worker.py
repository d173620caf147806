"""Engines that crash, hang, eat memory or differ: what the agent and the run see of it. No ALFWorld is needed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gtr_turbo.envs import ContractError, check_env, make_env
from gtr_turbo.envs.household import files, textworld, thor
from gtr_turbo.envs.household.generator import generate
from gtr_turbo.envs.household.worker import Limits, Worker, WorkerError, resident


def alive(pid):
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
def beside(monkeypatch):
    """Make a textworld environment whose worker runs a fake engine."""
    made = []

    def make(engine, **options):
        monkeypatch.setattr(textworld, "ENGINE", f"fake_engines:{engine}")
        made.append(make_env("Household", backend="textworld", **options))
        return made[-1]

    yield make
    for env in made:
        env.close()


def worker_of(env):
    return env.unwrapped._backend.worker


FAULTS = {
    "help": (
        "crash: the process ended with 6 (SIGABRT)",
        "it printed: ...a game starts out of luck",
    ),
    "inventory": ("timeout: no answer within 1 s", "Failing"),
    "look": ("memory: ", "more than limits.memory_mb=300"),
    "examine": ("error: ValueError: no such rule", "a game starts"),
}


@pytest.mark.parametrize("command", FAULTS)
def test_a_fault_truncates_the_episode_says_why_and_the_next_one_has_a_new_worker(beside, command):
    env = beside("Failing", limits={"memory_mb": 300})
    _, info = env.reset(seed=3)
    first = worker_of(env).pid
    _, _, _, _, info = env.step(next(a for a in info["actions"] if a.startswith("go to")))
    if command == "inventory":
        worker_of(env)._limits = Limits(step=1)
    command = next(a for a in info["actions"] if a.startswith(command))
    with pytest.warns(UserWarning, match="the episode is truncated"):
        observation, reward, terminated, truncated, info = env.step(command)
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, True, False)
    for part in FAULTS[command.split()[0]]:
        assert part in info["fault"]
    assert not alive(first)
    assert np.array_equal(observation["image"], env.render())
    with pytest.warns(UserWarning, match="no process runs this game any more"):
        env.step("help")
    _, info = env.reset(seed=4)
    assert worker_of(env).pid not in (None, first)
    _, reward, _, truncated, info = env.step(
        next(a for a in info["actions"] if a.startswith("go to"))
    )
    assert not truncated
    assert "fault" not in info


def test_memory_that_grows_while_the_engine_answers_at_once_is_seen_too(beside):
    env = beside("Growing", limits={"memory_mb": 400})
    env.reset(seed=0)

    def play():
        for command in ["help", "inventory"] * 10:
            *_, truncated, info = env.step(command)
            if truncated:
                return info["fault"]

    with pytest.warns(UserWarning, match="memory"):
        fault = play()
    assert fault.startswith("memory: ")


def test_the_memory_of_its_children_counts():
    child = "x = b'1' * 100_000_000; import time; time.sleep(60)"
    code = "import subprocess, sys, time; x = b'1' * 50_000_000; "
    code += f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    end = time.monotonic() + 20
    while resident(process.pid) < 150_000_000 and time.monotonic() < end:
        time.sleep(0.05)
    assert 150_000_000 < resident(process.pid) < 250_000_000
    os.killpg(process.pid, 9)
    process.wait()
    assert resident(process.pid) == 0


def test_a_game_that_fails_twice_at_the_start_stops_the_run_in_one_sentence(beside):
    env = beside("NeverStarting")
    with (
        pytest.warns(UserWarning, match="the game is started again"),
        pytest.raises(ContractError, match=r"the planner is tired.* a second time.*raise limits"),
    ):
        env.reset(seed=0)
    assert worker_of(env).pid is None


def test_what_is_not_installed_is_told_at_once(beside):
    with pytest.raises(ContractError, match="Household: it needs pip install something"):
        beside("Missing").reset(seed=0)


def test_a_difference_between_the_engines_stops_the_run(beside):
    env = beside("Differing")
    _, info = env.reset(seed=0)
    go = next(a for a in info["actions"] if a.startswith("go to"))
    with pytest.raises(textworld.DifferenceError, match=r"the feedback of ALFWorld's .*lost"):
        env.step(go)
    assert worker_of(env).pid is None


@pytest.mark.parametrize("given", [False, True])
def test_an_agent_sees_the_same_through_native_and_textworld(beside, given, tmp_path):
    options = {"describe": True}
    if given:
        for i in range(3):
            files.export(generate(np.random.default_rng(i)), tmp_path, f"g{i}", [])
        options["games"] = str(tmp_path)
    pair = [make_env("Household", **options), beside("Ours", **options)]
    rng = np.random.default_rng(1)
    for seed in range(2):
        shown = [env.reset(seed=seed) for env in pair]
        assert shown[0][1] == shown[1][1]
        for _ in range(6):
            some = shown[0][-1]["actions"]
            action = "jump" if rng.random() < 0.2 else str(some[rng.integers(len(some))])
            reply = {"thoughts": "egg 1", "action": action}
            assert len({str(env.unwrapped.judge(reply)) for env in pair}) == 1
            assert len({str(env.unwrapped.demonstrate(rng)) for env in pair}) == 1
            shown = [env.step(action) for env in pair]
            assert shown[0][1:] == shown[1][1:]
            assert shown[0][0]["prompt"] == shown[1][0]["prompt"]
            assert np.array_equal(shown[0][0]["image"], shown[1][0]["image"])


def test_the_contract_holds_with_a_worker_and_one_process_serves_all_games(beside):
    env = beside("Ours")
    env.reset(seed=0)
    pid, folder = worker_of(env).pid, env.unwrapped._backend._folder
    check_env(env, episodes=1)
    assert worker_of(env).pid == pid
    assert list(folder.iterdir()) == []  # a game's file is removed once it is loaded
    env.close()
    assert not alive(pid)
    assert not folder.exists()


def test_a_given_game_is_played(beside):
    env = beside("Ours")
    game = generate(np.random.default_rng(5))
    env.reset(seed=0, options={"game": game})
    assert env.unwrapped.engine.game is game


ORPHAN = """
import os, sys
from gtr_turbo.envs.household import worker
worker.GRACE = 1.0
it = worker.Worker("fake_engines:Failing", {}, worker.Limits(step=1))
it.reset(path=sys.argv[1])
print(it.pid, flush=True)
if sys.argv[2] == "hung":
    it._process.stdin.write(b'{"do": "step", "command": "inventory", "seconds": 1}\\n')
    it._process.stdin.flush()
os._exit(0)
"""


@pytest.mark.parametrize("how", ["idle", "hung"])
def test_a_worker_does_not_outlive_a_parent_that_was_killed(tmp_path, how):
    path = files.export(generate(np.random.default_rng(0)), tmp_path, "g", [])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, str(path), how],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    pid, end = int(done.stdout), time.monotonic() + 10
    while alive(pid) and resident(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not resident(pid)


def test_an_engine_that_answers_no_object_is_a_fault(tmp_path):
    path = files.export(generate(np.random.default_rng(0)), tmp_path, "g", [])
    worker = Worker("fake_engines:Ours", {}, Limits())
    worker.reset(path=str(path))
    worker._buffer = b"[1]\n"
    with pytest.raises(WorkerError, match="no JSON object"):
        worker.step("look")
    assert worker.pid is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "unity"}, "backend='unity' is not one of native, textworld, thor"),
        ({"limits": {"step": 3}}, "are of a worker, and backend='native' has none"),
        ({"backend": "textworld", "limits": {"steps": 3}}, "any of start, reset, step, memory_mb"),
        ({"backend": "textworld", "limits": {"step": "3"}}, "must give numbers"),
        ({"backend": "textworld", "limits": {"step": 0}}, "limits.step=0 must be above 0"),
        ({"backend": "thor"}, "plays tasks of ALFRED; give games=FOLDER"),
        ({"backend": "thor", "games": "/nowhere"}, "no traj_data.json at /nowhere"),
    ],
)
def test_a_wrong_option_is_told(options, message):
    with pytest.raises(ContractError, match=message):
        make_env("Household", **options)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.4.2", "put egg 1 in/on table 2"),
        ("0.3.5", "put egg 1 in/on table 2"),
        ("0.5.0", "move egg 1 to table 2"),
        ("1.0", "move egg 1 to table 2"),
    ],
)
def test_commands_for_thor_are_put_as_the_version_understands_them(version, said):
    assert thor.understood("move egg 1 to table 2", version) == said
    assert thor.understood("go to table 2", version) == "go to table 2"
