"""Two processes beside one: same turns, same update; checkpoints, evaluations, and ranks that die."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from job import sft_settings

from gtr_turbo import checkpoint, trainer
from gtr_turbo.checkpoint import own_folder
from gtr_turbo.checks import ConfigError
from gtr_turbo.cli import main
from gtr_turbo.config import DistributedConfig, EnvConfig, ModelConfig, RolloutConfig, VllmConfig
from gtr_turbo.distributed import launch as launching
from gtr_turbo.distributed.launch import Launch, launch
from gtr_turbo.distributed.ranks import Ranks
from gtr_turbo.settings import dump_config
from gtr_turbo.teacher.collection import Memory
from gtr_turbo.teaching_config import ExternalConfig, GuidanceConfig
from tiny import Silent, scripted, settings

HERE = Path(__file__).parent
FORMS = ["full/ddp", "full/fsdp", "lora/ddp", "lora/fsdp", "sft/ddp", "sft/fsdp"]


def environment(**more):
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join(["src", "tests", *sys.path])
    return {**own, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **more}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(*command, **more):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process, seconds=600):
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


def two_ranks(out, *job):
    """What two ranks of a script left in OUT/found.json."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    both = [start(*job, RANK=str(rank), **place) for rank in range(2)]
    told = [end(process) for process in both]
    codes = [process.returncode for process in both]  # a killed rank says nothing
    assert (out / "found.json").exists(), "\n".join([f"exit codes {codes}", *told])
    return json.loads((out / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
    """What the two ranks of job.py found."""
    out = tmp_path_factory.mktemp("ranks")
    run = out / "run"
    with pytest.MonkeyPatch.context() as patch, own_folder(run):
        for module in ("collect", "teacher.imitation"):
            patch.setattr(f"gtr_turbo.{module}.generate", scripted)
        trainer.train(sft_settings(tiny, env_steps=4), run, Silent())
    return two_ranks(out, HERE / "job.py", tiny, run, out) | {"run": run}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_turns_give_the_same_update_on_one_and_two_ranks(found, form):
    case = found["update"][form]
    assert case["moved"] > 1e-3
    assert case["apart"] <= 1e-6
    assert case["credit"] <= 1e-6


@pytest.mark.parametrize("form", ["full", "lora", "sft"])
def test_sharded_weights_and_whole_ones_learn_the_same(found, form):
    ddp, fsdp = (found["update"][f"{form}/{kind}"]["stats"] for kind in ("ddp", "fsdp"))
    assert fsdp == pytest.approx(ddp, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_of_an_update_are_those_of_one_process(found, form):
    ours, single = found["update"][form]["stats"], found["update"][form]["reference"]
    assert {"ppo/approx_kl", "ppo/first_log_ratio", "thought/entropy"} < set(single)
    assert ("imitation/loss" in single) == form.startswith("sft")
    assert ours == pytest.approx(single, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("form", ["full/ddp", "lora/ddp", "sft/ddp"])
def test_what_is_sent_is_the_gradients_and_little_more(found, form):
    """8 turns, 4 a step, 2 epochs: 4 steps of everything, 2 more of the critic; float32."""
    case = found["update"][form]
    plan = 4 * (4 * (case["trained"] + case["critic"]) + 2 * case["critic"])
    assert plan <= case["sent"] <= plan + 40_000


def test_collected_thoughts_are_stored_as_by_one_process_and_shared_by_environment(found):
    """Of 8 turns in 2 updates: environment 0 has a thought for each of its 4, environment 1 for one."""
    case = found["collections"]
    alone, both = case["files"]
    assert {"000001.jsonl", "000002.jsonl"} < set(alone)
    assert both == alone
    assert case["ranks"] == [0, 0, 1, 0, 0] * 2
    assert case["frames"] == [sorted(set(names)) for names in case["names"]]
    assert len(case["frames"][1]) == 1


def test_a_corrector_is_asked_the_same_by_two_ranks_as_by_one_process(found):
    """7 of 8 turns are valid, .67 of them are sent: 5; the first rank sends, equal questions once."""
    case = found["corrections"]
    assert case["alone"]["external/asked"] == 5
    assert case["both"] == case["alone"]
    assert 0 < case["both calls"] == case["alone calls"] <= 5
    assert case["both targets"] == case["alone targets"] != ""
    assert case["both stopped"] == [None, None]


def test_the_budget_of_a_corrector_is_that_of_all_ranks(found):
    case = found["corrections"]
    assert case["short calls"] == case["short"]["external/calls_so_far"] == 3
    assert case["short"]["external/skipped"] == 2
    first, second = case["short stopped"]
    assert first == second
    assert "budget.calls=3 is spent" in first


def test_a_spent_budget_stops_all_ranks_when_the_checkpoint_is_there(found):
    for said, there in found["spent"]:
        assert "stopped after update 1: guidance.external.budget.calls=1 is spent" in said
        assert there == ["000001"]


def test_the_collection_goes_from_one_process_to_two_and_back(found):
    assert [row["imitation/collected"] for row in rows_of(found["run"])] == [4, 8]
    assert [row["imitation/asked"] for row in rows_of(found["run"])] == [4, 4]
    state = checkpoint.read_state(checkpoint.folders(found["run"])[-1])
    memory = Memory(found["run"] / "imitation", 0)
    memory.restore(state["update"], state["targets"])
    assert len(memory) == 8
    assert {target.frame for target in memory.targets} == set(memory._frames)


def test_gradients_that_not_all_ranks_have(found):
    assert found["gradients"] == {"one": [1.0, 2.0, 3.0], "none": True, "half": [3.0, 3.0]}


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_checkpoint_of_sharded_weights_is_one_of_whole_weights(found, form):
    """Weights, changes, teacher, moments and the teacher's scores."""
    case = found["update"][f"{form}/stored"]
    assert case["factors"] == 0
    assert case["alone"] <= 1e-6
    assert case["sharded"] <= 1e-6
    assert case["alone after"] == case["sharded after"] == 0
    assert case["student"] == case["teacher"] == 0  # the folders for others
    assert case["class"] == ["Qwen3VLForConditionalGeneration"]


@pytest.mark.parametrize("episodes", [5, 1])
def test_episodes_are_the_same_however_many_ranks_share_them(found, episodes):
    alone, shared = found["evaluations"][str(episodes)]
    assert [record["number"] for record in shared["records"]] == list(range(episodes))
    assert shared == alone


def test_the_rank_with_least_memory_decides_how_many_turns_go_at_once(found):
    """By hand: 1 + (100 - 19) / 9 = 10 turns, 6 in equal parts of 12; then halves until one fits."""
    assert found["sizes"] == {"measured": 6, "tried": [6, 3, 1], "done": 1}


def test_two_ranks_go_on_with_a_run_of_one_process(found):
    rows = [json.loads(line) for line in (found["run"] / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2]
    assert [row["system/communicated_mb"] > 0 for row in rows] == [False, True]
    # full training: 2 optimizer steps, 2 more of the critic, and the merge
    size, critic = (found["update"]["full/ddp"][name] for name in ("trained", "critic"))
    plan = 4 * (2 * (size + critic) + 2 * critic + size) / 1e6
    assert plan <= rows[1]["system/communicated_mb"] <= plan + 0.1
    before, after = found["resumed"]["before"], found["resumed"]["after"]
    for old, new in zip(before, after, strict=True):
        assert new["episode"] == old["episode"]  # EZPoints cuts after 6 turns, these are 4
        assert new["actions"][:2] == old["actions"]
        assert len(new["actions"]) == 4
    assert json.loads((found["run"] / "summary.json").read_text())["env_steps"] == 8


def test_ranks_that_disagree_are_told(found):
    assert "have different numbers" in found["disagreement"]


def test_a_rank_that_dies_leaves_nobody_waiting(found):
    assert "ended without a word" in found["lost"]["said"]
    assert found["lost"]["seconds"] < 300  # of a time-out of 600


def torchrun(*arguments, **more):
    return start("-m", "torch.distributed.run", *arguments, **more)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def restarted(tiny, tmp_path_factory):
    """(run, settings file, what was told) of two sharded ranks of which one fails once, by the command."""
    folder = tmp_path_factory.mktemp("restarted")
    run, file = folder / "run", folder / "config.yaml"
    file.write_text(dump_config(settings(tiny, env_steps=8)))
    job = torchrun(
        "--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "--", HERE / "failing.py",
        "train", "--config", file, "--run", run, "--distributed.shard", "true",
    )  # fmt: skip
    told = end(job)
    assert job.returncode == 0, told
    return run, file, told


@pytest.mark.parametrize(("met", "code", "told"), [(False, 0, "out\nlate\n"), (True, 3, "out\n")])
def test_one_of_several_ranks_ends_without_taking_python_down(met, code, told):
    """Threads of gloo that free a tensor then would abort the process after all its work."""
    program = (
        "import atexit; from gtr_turbo.distributed import launch; atexit.register(print, 'late'); print('out')\n"
        f"launch.claim = {'bool' if met else None}; launch.leave({code})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, told)


def test_two_machines_end_with_the_checkpoint_of_one(restarted, tmp_path):
    """Two torchruns that meet at a port, a rank each; the other run had both ranks under one, and a restart."""
    one, file, _ = restarted
    port, two = free_port(), tmp_path / "two"
    nodes = [
        torchrun(
            "--nnodes", 2, "--node-rank", node, "--nproc-per-node", 1,
            "--master-addr", "127.0.0.1", "--master-port", port, "-m", "--", "gtr_turbo",
            "train", "--config", file, "--run", two, "--distributed.shard", "true",
        )
        for node in range(2)
    ]  # fmt: skip
    told = [end(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(told)
    ours, theirs = (run / "checkpoints" / "000002" for run in (two, one))
    files = sorted(file.name for file in theirs.glob("*.safetensors"))
    assert {"trained.safetensors", "optimizer.safetensors", "history.safetensors"} < set(files)
    for name in files:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    states = [checkpoint.read_state(folder) for folder in (ours, theirs)]
    assert states[0]["envs"] == states[1]["envs"]
    assert [row["update"] for row in rows_of(two)] == [1, 2]
    assert rows_of(two)[-1]["ppo/grad_norm"] > 0


def test_torchrun_names_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = torchrun(
            "--nnodes", 2, "--node-rank", 0, "--nproc-per-node", 1, "--master-addr", "127.0.0.1",
            "--master-port", port, "-m", "--", "gtr_turbo", "train", "--run", tmp_path / "run",
        )  # fmt: skip
        told = end(job)
    assert job.returncode != 0
    assert f"port: {port}" in told.splitlines()[-1]
    assert "address already in use" in told.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_rank_that_fails_is_told_once_and_a_restarted_job_goes_on(restarted, tiny, tmp_path):
    """Sharded, by the command; then one process goes on with whole weights."""
    made, _, told = restarted
    assert told.count("gtr-turbo: ") == 1, told
    assert "gtr-turbo: the roof of rank 1 leaks" in told
    run = tmp_path / "run"
    shutil.copytree(made, run)
    assert [row["update"] for row in rows_of(run)] == [1, 2]
    assert (run / "summary.json").exists()
    state = checkpoint.read_state(checkpoint.folders(run)[-1])
    assert [len(env["actions"]) for env in state["envs"]] == [4, 4]
    with own_folder(run):
        trainer.train(settings(tiny, env_steps=12), run, Silent(), resume=True)
    assert [row["update"] for row in rows_of(run)] == [1, 2, 3]
    new = checkpoint.read_state(checkpoint.folders(run)[-1])["envs"]
    for env, old in zip(new, state["envs"], strict=True):
        assert env["episode"] > old["episode"] or env["actions"][:4] == old["actions"]


@pytest.fixture
def among(monkeypatch):
    """The environment of a rank; nothing of it is left behind."""
    monkeypatch.setattr(launching, "claim", None)

    def place(rank, world, **more):
        for name, value in {"RANK": rank, "WORLD_SIZE": world, **more}.items():
            monkeypatch.setenv(name, str(value))

    return place


def test_a_port_in_use_is_told(among, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        among(0, 2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        assert main(["train"]) == 2
    assert f"port {port} is in use; give torchrun another --master-port" in capsys.readouterr().err


def test_the_environment_of_torchrun_is_checked(among):
    assert launch() == Launch()
    among(1, 2, LOCAL_RANK=0, TORCHELASTIC_RESTART_COUNT=1)
    assert launch() == Launch(rank=1, local_rank=0, world=2, restarts=1)
    among(2, 2)
    with pytest.raises(ConfigError, match="RANK=2 must be below WORLD_SIZE=2"):
        launch()
    among("x", 2)
    with pytest.raises(ConfigError, match="RANK=x"):
        launch()


def test_only_training_takes_several_ranks(among, capsys):
    among(0, 2)
    assert main(["eval", "tiny-qwen3-vl"]) == 2
    assert "eval runs in one process (WORLD_SIZE=2)" in capsys.readouterr().err


def test_ranks_of_which_only_some_resume_are_refused(tmp_path):
    """A restarted job on machines without a common disk."""

    class Resuming(Ranks):
        def gather(self, value):
            digest = hashlib.sha256(json.dumps(True).encode()).hexdigest()
            compared.append(value)  # the settings, then whether to resume
            return [value, value if len(compared) == 1 else digest]

    compared = []
    with pytest.raises(ConfigError, match=r"rank 0 and rank 1 have different views of the run fol"):
        trainer.train(settings("x"), tmp_path, Silent(), ranks=Resuming())
    assert not list(tmp_path.iterdir())


def test_restarts_need_a_run_folder(among, capsys):
    among(0, 1, TORCHELASTIC_MAX_RESTARTS=1)
    assert main(["train"]) == 2
    assert "--max-restarts needs --run DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("groups", "world", "message"),
    [
        ({"env": EnvConfig(num_envs=2)}, 3, r"env\.num_envs=2 .* 3 ranks must divide it"),
        ({"distributed": DistributedConfig(shard=True)}, 1, "needs several ranks"),
        (
            {
                "model": ModelConfig(path="x", train="lora"),
                "rollout": RolloutConfig(
                    turns_per_env=2,
                    engine="vllm",
                    vllm=VllmConfig(base_url=("http://a:1", "http://b:1")),
                ),
            },
            1,
            "2 addresses for 1 rank",
        ),
        (
            {
                "guidance": GuidanceConfig(
                    kind="external", external=ExternalConfig(outage="wait", wait_s=1800)
                )
            },
            2,
            r"timeout_s=1800 must be above guidance\.external\.wait_s=1800",
        ),
    ],
)
def test_settings_that_cannot_be_with_so_many_ranks(groups, world, message):
    with pytest.raises(ConfigError, match=message):
        settings("x", **groups).check_world(world)
