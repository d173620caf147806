import io
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import yaml

from gtr_turbo import commands, trackers
from gtr_turbo.checkpoint import folders
from gtr_turbo.checks import ConfigError
from gtr_turbo.cli import main
from gtr_turbo.config import TrainConfig
from gtr_turbo.envs import make_env
from gtr_turbo.policy.starter import is_here
from gtr_turbo.settings import (
    SFT_CONFIGS,
    build_config,
    config_file,
    config_names,
    dump_config,
    read_config,
)
from gtr_turbo.sft_config import SFTConfig
from gtr_turbo.terminal import TerminalView
from tiny import scripted

SMALL = {
    "model": {"attention": "eager"},
    "env": {"num_envs": 2, "options": {"prompt": "compact"}, "eval_split": "held-out"},
    "sampling": {"max_new_tokens": 4},
    "rollout": {"turns_per_env": 2},
    "ppo": {"minibatch_turns": 4, "microbatch_turns": 4, "epochs": 1},
    "eval": {"episodes": 2},
    "save": {"interval": 1},
    "env_steps": 4,
    "threads": 1,
    "trackers": [],
}


@pytest.fixture(autouse=True)
def _signals():
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture
def small(tiny, tmp_path):
    """A config file for a run of one update."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "model": {**SMALL["model"], "path": str(tiny)}}))
    return str(path)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Folder of a finished run of one update."""
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "model": {**SMALL["model"], "path": str(tiny)}}))
    assert main(["train", "--config", str(path), "--run", str(folder / "run")]) == 0
    return folder / "run"


def check_fails(capsys, arguments, *parts, code=2):
    """The command ends with `code` and one line that holds all `parts`."""
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("gtr-turbo: ")
    assert "Traceback" not in error
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--ppo.lrr", "1"], ["unknown setting 'ppo.lrr'", "Did you mean 'lr'?"]),
        (["--pppo.lr", "1"], ["unknown setting 'pppo'", "Did you mean 'ppo'?"]),
        (["--ppo", "3"], ["ppo must be a group of settings"]),
        (["--ppo.lr", "fast"], ["ppo.lr='fast' must be a number\n"]),
        (["--ppo.lr", "null"], ["ppo.lr must not be null"]),
        (["--ppo.epochs", "1.5"], ["ppo.epochs=1.5 must be a whole number\n"]),
        (["--ppo.microbatch_turns", "x"],
         ["ppo.microbatch_turns='x' must be a whole number, or auto\n"]),
        (["--teacher.method", "tie"],
         ["teacher.method='tie' must be one of ties, linear. Did you mean 'ties'?\n"]),
        (["--guidance.kind", "KL"],
         ["guidance.kind='KL' must be one of none, static, kl, sft, external. Did you mean 'kl'?\n"]),
        (["--trackers", "wandb"],
         ["trackers='wandb' must be auto, or a list of tensorboard, wandb, trackio.", "'[wandb]'\n"]),
        (["--rollout.vllm.base_url", "3"],
         ["rollout.vllm.base_url=3 must be text, or a list of text, or null\n"]),
        (["--teacher.density", "2"], ["teacher.density=2", "(0, 1]"]),
        (["--ppo.gamma", "1.5"], ["ppo.gamma=1.5 must be between 0 and 1"]),
        (["--sampling.temperature", "0"], ["sampling.temperature=0", "greater than 0"]),
        (["--rollout.turns_per_env", "3"],
         ["ppo.minibatch_turns=64 must divide", "64 * 3 = 192", "5"][:2]),
        (["--ppo.minibatch_turns", "96", "--ppo.microbatch_turns", "96"],
         ["ppo.minibatch_turns=96 must divide env.num_envs * rollout.turns_per_env = 64 * 4 = 256"]),
        (["--ppo.microbatch_turns", "48"], ["ppo.microbatch_turns=48 must divide"]),
        (["--env_steps", "100"], ["env_steps=100 is less than one update of 256 turns"]),
        (["--guidance.credit", "token", "--ppo.ratio", "sequence"], ["needs ppo.ratio='token'"]),
        (["--model.dtype", "bfloat16"],
         ["model.dtype='bfloat16' cannot be trained with model.train='full'", "dtype to float32"]),
        (["--teacher.history", "factors"], ["needs model.train='lora', got 'full'"]),
        (["--env.options.split", "train"], ["set env.train_split and env.eval_split"]),
        (["--config", "ezpoint"], ["'ezpoint' is neither a file", "Did you mean 'ezpoints'?"]),
        (["--resume"], ["--resume needs --run DIR"]),
        (["--resume", "--config", "points24"], ["--config points24 would be ignored: leave it out"]),
        (["surplus"], ["cannot read 'surplus'"]),
        (["--ppo.lr"], ["cannot read '--ppo.lr'"]),
        (["--ppo.lr", "[1"], ["value of --ppo.lr cannot be read"]),
        (["--name", "2026-02-30"], ["value of --name cannot be read"]),
        (["--ppo", "{on: 3}"], ["ppo.True must be text", "YAML reads on, off"]),
        (["--env.options.since", "2026-01-01"], ["no JSON", "put a date into quotes"]),
        (["--env", "./my_env.py:E"], ["cannot import module './my_env.py'", "MODULE:ENV_ID"]),
    ],
)  # fmt: skip
def test_wrong_settings_are_explained_in_one_line(capsys, tmp_path, arguments, parts):
    run = tmp_path / "run"
    if "192" in "".join(parts):
        arguments = [*arguments, "--ppo.minibatch_turns", "128", "--ppo.microbatch_turns", "64"]
        parts = ["ppo.minibatch_turns=128 must divide", "64 * 3 = 192"]
    extra = [] if "--resume" in arguments else ["--run", str(run)]
    check_fails(capsys, ["train", *arguments, *extra], *parts)
    assert not run.exists()


def test_settings_meet_in_the_order_file_then_command_line(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: ezpoints\nppo: {lr: 3.0e-5}\nenv: {options: {prompt: full}}\n")
    arguments = ["train", "--config", str(path), "--rollout.format_invalid", "-3",
                 "--env.options.solvable_only=true", "--seed", "7", "--print_config"]  # fmt: skip
    assert main(arguments) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["ppo"]["lr"] == 3e-5
    assert shown["rollout"]["format_invalid"] == -3
    assert shown["seed"] == 7
    assert shown["name"] == "mine"
    base = read_config(config_file("ezpoints"))
    assert shown["env"]["options"] == {
        **base["env"]["options"], "prompt": "full", "solvable_only": True
    }  # fmt: skip


def test_the_name_of_a_group_alone_means_its_switch(capsys):
    over = [
        "--model",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "--model.dtype=bfloat16",
        "--guidance",
        "none",
    ]
    assert main(["train", *over, "--env", "Points24", "--teacher=linear", "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["path"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert shown["model"]["dtype"] == "bfloat16"
    assert shown["guidance"]["kind"] == "none"
    assert shown["env"]["id"] == "Points24"
    assert shown["teacher"]["method"] == "linear"
    assert main(["train", "--model", "{path: here, vision: trained}", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["vision"] == "trained"


def test_a_printed_config_is_read_back_equal(capsys, tmp_path):
    assert (
        main(["train", "--print_config", "--ppo.lr", "1e-05", "--eval.extra_splits", "[all]"]) == 0
    )
    text = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    config = build_config(TrainConfig, read_config(path))
    assert config.ppo.lr == 1e-5
    assert config.eval.extra_splits == ("all",)
    assert dump_config(config) == text
    assert build_config(TrainConfig, yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_config_loads(name):
    config = build_config(TrainConfig, read_config(config_file(name)))
    assert config.num_updates >= 1
    config.model.check_trained()
    assert build_config(TrainConfig, yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("name", config_names(SFT_CONFIGS))
def test_every_shipped_sft_config_loads(name):
    config = build_config(SFTConfig, read_config(config_file(name, SFT_CONFIGS)))
    assert build_config(SFTConfig, yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    "text", ["[1, 2]", "a: [", "a: &x {b: *x}", "just text", "\x00", b"\xff\xfe\xff"]
)
def test_a_file_that_is_no_config_is_told(capsys, tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    check_fails(capsys, ["train", "--config", str(path), "--run", str(tmp_path / "r")], str(path))


def test_a_missing_model_is_told(capsys, small, tmp_path):
    check_fails(
        capsys,
        ["train", "--config", small, "--run", str(tmp_path / "r"), "--model.path", "./nowhere"],
        "model.path='./nowhere' is no folder here",
        "tiny-household-qwen3-vl",
        "hf download NAME --local-dir DIR",
    )


def test_a_mistyped_agent_is_told_what_is_like_it_and_the_hub_is_not_asked(
    capsys, finished, monkeypatch
):
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", None)
    monkeypatch.chdir(finished.parent.parent)
    there = f"{finished.parent.name}/run"
    for wrong, *parts in (
        (f"{finished.parent.name}/rnu", "is no folder here", f"Did you mean '{there}'?", f"Runs here: {there}"),
        (finished.parent.name, "without a run or a model", f"Runs here: {there}"),
        ("Points25", "is no folder here", "Did you mean 'Points24'?"),
        ("points24", "Did you mean 'Points24'?", "The recipe is given as --config points24."),
        ("household-tny", "'household-tiny'? The recipe is given as --config household-tiny."),
        ("tiny-qwen4-vl", "Did you mean 'tiny-qwen3-vl'?"),
    ):  # fmt: skip
        check_fails(capsys, ["eval", wrong], f"'{wrong}' is ", *parts)
    for name, asked in (("Qwen/Qwen3-VL-2B-Instruct", True), (f"{finished.parent.name}/x", False)):
        assert is_here(name) is asked


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["--model.device", "gpu"], ["model.device='gpu'", "Give cpu, or cuda", "doctor"]),
        (["--model.device", "cuda:99"], ["model.device='cuda:99'", "Give cpu, or cuda", "doctor"]),
        (["--model.train", "lora", "--model.adapter", "nosuch"],
         ["model.adapter='nosuch' holds no LoRA adapter", "adapter_config.json"]),
    ],
)  # fmt: skip
def test_what_this_machine_lacks_is_told_before_weights_are_loaded(
    capsys, small, tmp_path, monkeypatch, settings, parts
):
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", None)
    run = ["--run", str(tmp_path / "r")]
    check_fails(capsys, ["train", "--config", small, *run, *settings], *parts)
    assert not (tmp_path / "r").exists()


def test_an_attention_whose_package_is_missing_is_told(capsys, small, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ImportError("the package is not installed.")

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", missing)
    start = ["train", "--config", small, "--run", str(tmp_path / "r")]
    check_fails(
        capsys,
        [*start, "--model.attention", "flash_attention_2"],
        "model.attention='flash_attention_2' cannot be used here: the package is not installed. ",
        "give sdpa",
    )


def test_an_unknown_environment_is_told(capsys, small, tmp_path):
    check_fails(
        capsys,
        ["train", "--config", small, "--run", str(tmp_path / "r"), "--env.id", "Point24"],
        "unknown environment 'Point24'",
        "Did you mean 'Points24'?",
    )


def test_resuming_needs_a_run_with_a_checkpoint(capsys, small, tmp_path):
    run = tmp_path / "run"
    check_fails(capsys, ["train", "--resume", "--run", str(run)], "does not exist")
    run.mkdir()
    shutil.copy(small, run / "config.yaml")
    check_fails(capsys, ["train", "--resume", "--run", str(run)], "holds no complete checkpoint")


def test_an_error_shows_control_characters_as_text(capsys):
    assert main(["report", "runs/\x1b[31m\u202e\x07x"]) == 2
    error = capsys.readouterr().err
    assert r"runs/\x1b[31m\u202e\x07x does not exist" in error
    assert not {"\x1b", "\x07", "\u202e"} & set(error)


def test_a_run_that_cannot_go_on_with_other_settings_keeps_its_own(capsys, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    resume = ["train", "--resume", "--run", str(finished), "--env_steps", "24", "--seed", "3"]
    told = ("seed was 0 and is now 3", "teacher.method was 'ties' and is now 'linear'", "--run")
    check_fails(capsys, [*resume, "--teacher.method", "linear"], *told)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("over", "told"),
    [
        (["--model", "tiny-qwen2.5-vl"], "began from another model"),
        (["--env.eval_split", "bogus"], "split"),
        (["--guidance", "external", "--guidance.external.key_variable", "null"], "nothing answers"),
        (["--trackers", "[tensorboard]"], "tensorboard did not start"),
    ],
)
def test_settings_with_which_a_run_cannot_go_on_are_not_kept(
    capsys, finished, tmp_path, monkeypatch, over, told
):
    """Else the next plain --resume, eval or export would take them."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "config.yaml").read_bytes()
    address = [
        "--guidance.external.base_url",
        "http://127.0.0.1:9/v1",
        "--guidance.external.model",
        "x",
    ]

    def broken(*given):
        raise RuntimeError

    monkeypatch.setitem(trackers.WRITERS, "tensorboard", broken)
    resume = ["train", "--resume", "--run", str(run), "--env_steps", "8"]
    check_fails(capsys, [*resume, *address, *over], told)
    assert (run / "config.yaml").read_bytes() == before
    assert main(resume) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["env_steps"] == 8


def test_a_recipe_of_ones_own_is_not_overwritten_by_its_run(capsys, small, tmp_path):
    own = tmp_path / "mine" / "config.yaml"
    own.parent.mkdir()
    shutil.copy(small, own)
    check_fails(
        capsys, ["train", "--config", str(own), "--run", str(own.parent)], "is of no run", "--run"
    )
    assert own.read_bytes() == Path(small).read_bytes()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "tensorboard/events", "trajectories/000001.jsonl", "imitation/a.png"]
)
def test_files_of_others_are_not_cleared_away(capsys, small, tmp_path, name):
    theirs = tmp_path / "theirs" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("kept")
    run = str(tmp_path / "theirs")
    check_fails(capsys, ["train", "--config", str(small), "--run", run], "is of no run", "--run")
    assert theirs.read_text() == "kept"


def test_what_an_attempt_left_is_not_shown_as_the_runs_own(small, tmp_path):
    """Trajectories of updates that this course of the run has not made."""
    run = tmp_path / "run"
    (run / "trajectories").mkdir(parents=True)
    (run / "run.lock").touch()
    (run / "tensorboard").mkdir()
    for update in (1, 2):
        (run / "trajectories" / f"00000{update}.jsonl").write_text("of another environment\n")
    (run / "tensorboard" / "events.out.tfevents.0").write_text("")
    assert main(["train", "--config", small, "--run", str(run), "--trackers", "auto"]) == 0
    assert [path.name for path in (run / "trajectories").glob("*.jsonl")] == ["000001.jsonl"]
    assert "of another" not in (run / "trajectories" / "000001.jsonl").read_text()
    assert not (run / "tensorboard" / "events.out.tfevents.0").exists()


def test_an_encoding_without_a_sign_does_not_end_a_command(finished, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["play", str(finished), "--episodes", "1", "--show"]) == 0
    out.flush()
    assert b"?" in out.buffer.getvalue()


def test_weights_are_as_readable_as_what_lies_beside_them(finished):
    for which in ("student", "teacher"):
        folder = folders(finished)[-1] / which
        mode = (folder / "config.json").stat().st_mode
        assert (folder / "model.safetensors").stat().st_mode == mode


def test_a_folder_that_holds_a_run_is_left_alone(capsys, finished, small):
    before = (finished / "metrics.jsonl").read_bytes()
    check_fails(capsys, ["train", "--config", small, "--run", str(finished)], "holds a run already")
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_results_whose_checkpoints_were_removed_are_left_alone(capsys, finished, small, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints"))
    before = (run / "summary.json").read_bytes(), (run / "metrics.jsonl").read_bytes()
    for begin in (["--config", small], ["--resume"]):
        told = ("results of a finished run whose checkpoints are gone", "another --run")
        check_fails(capsys, ["train", *begin, "--run", str(run)], *told)
    assert ((run / "summary.json").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before


def test_a_folder_that_cannot_be_written_is_told(capsys, small, tmp_path):
    (tmp_path / "file").write_text("")
    run = str(tmp_path / "file" / "run")
    check_fails(capsys, ["train", "--config", small, "--run", run], "cannot be written", "--run")


def test_a_damaged_checkpoint_is_told(capsys, finished):
    state = folders(finished)[-1] / "state.json"
    text = state.read_text()
    state.write_text(text[: len(text) // 2])
    try:
        check_fails(capsys, ["eval", str(finished), "--episodes", "1"], "damaged")
        check_fails(capsys, ["train", "--resume", "--run", str(finished)], "damaged")
    finally:
        state.write_text(text)


def test_a_run_leaves_what_the_design_promises(finished):
    assert {path.name for path in finished.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "trajectories"
    }  # fmt: skip
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["env_steps"] == 4
    assert summary["success_before"] == 0.0  # random weights write no JSON
    assert 0.0 <= summary["interval_after"][0] <= summary["interval_after"][1] <= 1.0
    assert (summary["seed"], summary["name"]) == (0, "small")
    config = build_config(TrainConfig, read_config(finished / "config.yaml"))
    assert config.run == str(finished)
    turns = (finished / "trajectories" / "000001.jsonl").read_text().splitlines()
    for line in turns:
        assert (finished / "trajectories" / json.loads(line)["frame"]).exists()


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_eval_prints_one_object(capsys, finished, which, tmp_path):
    capsys.readouterr()
    records = tmp_path / "records.jsonl"
    arguments = ["eval", str(finished), "--which", which, "--episodes", "3", "--json"]
    assert main([*arguments, "--records", str(records)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"success", "interval", "episodes", "return", "valid"} <= set(result)
    assert result["episodes"] == 3
    assert result["which"] == which
    assert [json.loads(line)["number"] for line in records.read_text().splitlines()] == [0, 1, 2]
    check_fails(
        capsys,
        [*arguments, "--records", str(tmp_path)],
        "--records cannot be written",
        "give a file",
    )


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("rollout:", "rollout must not be null"),
        ("teacher: ties", "teacher must be a group of settings"),
        ("env: {id: EZPoints, options: }", "env.options must not be null"),
        ("env: {id: 5}", ""),
        ("5: 3", "5 must be text"),
        ("name: 2026-02-30", "cannot be read as YAML"),
    ],
)
def test_a_recipe_of_eval_that_holds_no_settings_is_told(capsys, tmp_path, recipe, told):
    path = tmp_path / "mine.yaml"
    path.write_text(recipe)
    play = ["eval", "--config", str(path), "--baselines", "random", "--episodes", "1"]
    if "env" in recipe:  # the environment of the command line takes the place of what is wrong
        assert main([*play, "--env", "Blackjack"]) == 0
        return
    check_fails(capsys, play, told)


def test_eval_for_people_and_its_refusals(capsys, finished, tiny):
    assert main(["eval", str(finished), "--episodes", "2", "--split", "none"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"success\W+0\.0 %", text)
    assert "65.8" in text  # 0 of 2: z^2 / (2 + z^2)
    check_fails(
        capsys,
        ["eval", str(tiny), "--which", "teacher"],
        "is no run folder",
        "drop --which teacher",
    )
    check_fails(capsys, ["eval", str(tiny), "--episodes", "0"], "--episodes 0 must be at least 1")
    check_fails(capsys, ["eval", str(tiny), "--nonsense", "1"], "unknown argument '--nonsense'")
    of = ["eval", str(tiny), "--env", "EZPoints"]
    check_fails(capsys, [*of, "--option", "prompt"], "must be NAME=VALUE")
    check_fails(capsys, [*of, "--option", "colour=red"], "does not take the options")
    check_fails(capsys, [*of, "--option", "split=train"], "option of its own, --split")
    check_fails(capsys, [*of, "--split", "odd", "--episodes", "1"], "split")


def test_the_teacher_of_a_run_whose_settings_are_for_adapters_is_evaluated(finished, tmp_path):
    """Full weights, as every teacher is: `rollout.engine: vllm` and a history of factors would be refused."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["train"] = "lora"
    settings["rollout"]["engine"], settings["teacher"]["history"] = "vllm", "factors"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["eval", str(run), "--which", "teacher", "--episodes", "1"]) == 0
    (teacher,) = sorted(run.glob("checkpoints/*/teacher"))[-1:]
    assert main(["eval", str(teacher), "--episodes", "1"]) == 0


class Bare(gymnasium.Env):
    """An environment that takes no options."""

    fields = ("thoughts", "action")

    def __init__(self):
        made = make_env("NumberLine")
        self.observation_space, self.action_space = made.observation_space, made.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"image": np.zeros((56, 56, 3), np.uint8), "prompt": "go"}, {"actions": ["a"]}

    def step(self, action):
        return self.reset()[0], 0.0, True, False, {"success": False}


def test_another_environment_gets_no_options_that_nobody_gave_it(capsys, finished):
    """The run is of EZPoints with `prompt: compact` and a held-out split."""
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings["env"]["options"] == {"prompt": "compact"}
    gymnasium.register("Bare-v0", Bare)
    try:
        found = []
        for name in ("Bare-v0", "Blackjack", "gtr/EZPoints-v0"):
            capsys.readouterr()
            assert main(["eval", str(finished), "--env", name, "--episodes", "1", "--json"]) == 0
            found.append(json.loads(capsys.readouterr().out)["split"])
    finally:
        del gymnasium.registry["Bare-v0"]
    assert found == [None, "held-out", "held-out"]


@pytest.mark.parametrize("command", ["eval", "play"])
def test_weights_alone_are_not_played_as_something_they_may_not_know(capsys, tiny, command):
    """The recipe beside the shipped starter of the card games says how it is asked, not what it plays."""
    for agent in (str(tiny), "tiny-qwen3-vl"):
        told = "no environment in the settings beside its weights"
        check_fails(capsys, [command, agent], told, "--config", "--env")


def test_play_shows_turns_and_saves_frames(capsys, finished, tmp_path):
    capsys.readouterr()
    assert main(["play", str(finished), "--episodes", "1", "--frames", str(tmp_path / "f")]) == 0
    text = capsys.readouterr().out
    assert "reply" in text
    assert "failed" in text
    assert list((tmp_path / "f").glob("0000-*.png"))


def test_help_shows_percent_signs_as_they_are(capsys):
    for arguments in (["--help"], ["eval", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "its 95 % interval" in capsys.readouterr().out


def test_a_command_is_needed(capsys):
    for arguments, code in (([], 2), (["fly"], 2), (["--version"], 0)):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_resumable_run(capsys, small, tmp_path, monkeypatch, number):
    """A terminated run exits with 130, says how to go on, and goes on to the same end."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    updated = TerminalView.updated

    def killed(self, row):
        updated(self, row)
        if row["update"] == 2:
            os.kill(os.getpid(), number)

    run = str(tmp_path / "run")
    start = ["train", "--config", small, "--run", run, "--env_steps", "12", "--eval.episodes", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(TerminalView, "updated", killed)
        assert main(start) == 130
    error = capsys.readouterr().err
    assert f"interrupted ({number.name})" in error
    assert f"gtr-turbo train --run {run} --resume" in error
    assert [path.name for path in folders(tmp_path / "run")] == ["000001"]
    assert main(["train", "--run", run, "--resume"]) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["update"] for row in rows] == [1, 2, 3]


def test_the_disk_holds_a_row_before_its_checkpoint(small, tmp_path, monkeypatch):
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    run = tmp_path / "run"
    assert main(["train", "--config", small, "--run", str(run), "--eval.episodes", "0"]) == 0
    checkpointed = next(i for i, name in enumerate(synced) if ".part/" in name)
    assert str(run / "metrics.jsonl") in synced[:checkpointed]


def test_nohup_goes_on_when_the_terminal_closes(capsys):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert main(["train", "--print_config"]) == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("setting", ["guidance.beta", "ppo.lr", "guidance.external.budget.dollars"])
@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_settings_are_finite(capsys, small, setting, value):
    assert main(["train", "--config", small, f"--{setting}", value]) == 2
    assert f"{setting}=" in capsys.readouterr().err


def test_ctrl_c_before_the_first_checkpoint_advises_no_resume(capsys, small, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TerminalView, "started", interrupt)
        assert main(["train", "--config", small, "--eval.episodes", "0"]) == 130
    error = capsys.readouterr().err
    assert "no checkpoint yet: start again" in error
    assert "--resume" not in error
    with monkeypatch.context() as patch:  # after the only update
        patch.setattr("gtr_turbo.trainer._summary", interrupt)
        assert main(["train", "--config", small, "--eval.episodes", "0"]) == 130
    assert "gtr-turbo train --run runs/small-seed0-2 --resume" in capsys.readouterr().err


def test_ctrl_c_before_anything_is_no_traceback(capsys, small, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "read_config", interrupt)
    assert main(["train", "--config", small]) == 130
    assert "interrupted (Ctrl-C)" in capsys.readouterr().err


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch, small, tmp_path):
    def broken(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("gtr_turbo.learner.collect", broken)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--config", small, "--run", str(tmp_path / "r"), "--eval.episodes", "0"])


def test_config_files_that_name_each_other_are_told(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"base: {path}\n")
    with pytest.raises(ConfigError, match="base"):
        read_config(path)
