import dataclasses
import errno
import fcntl
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from gtr_turbo import checkpoint, trainer
from gtr_turbo.checkpoint import CheckpointError, fingerprint, folders, own_folder, read_state
from gtr_turbo.config import ModelConfig, RolloutConfig
from gtr_turbo.learning.update import TrainingError, make_optimizer
from gtr_turbo.policy import starter
from gtr_turbo.teacher.history import History
from gtr_turbo.teaching_config import TeacherConfig
from tiny import Silent, make_policy, replies, scripted, settings


class Interrupting(Silent):
    """Ctrl-C in the middle of update `after + 1`, when checkpoint `after` exists."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def updated(self, row):
        super().updated(row)
        if row["update"] > self.after:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _valid_replies(monkeypatch):
    """Valid replies, so that there are thoughts and the teacher's KL is not 0."""
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)


def train(config, run, view, **options):
    with own_folder(run):
        return trainer.train(config, run, view, **options)


def config_of(path, updates, **groups):
    return settings(path, env_steps=4 * updates, **groups)


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "system/"))} for row in rows
    ]


def tensors_of(folder):
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def forget_settings(run):
    """Make the newest checkpoint one of an older version."""
    path = folders(run)[-1] / "state.json"
    state = json.loads(path.read_text())
    del state["settings"]
    path.write_text(json.dumps(state))


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("weights", ["sma", "ema"])
def test_two_updates_and_two_more_are_four_bit_for_bit(tiny, tmp_path, interval, weights):
    teacher = TeacherConfig(interval=interval, weights=weights)
    config = config_of(tiny, 4, teacher=teacher)
    train(config, tmp_path / "whole", Silent())
    view = Interrupting(2)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", view)
    assert [path.name for path in folders(tmp_path / "parts")] == ["000001", "000002"]
    assert len(rows_of(tmp_path / "parts")) == 3  # the third is made again
    train(config, tmp_path / "parts", Silent(), resume=True)
    whole, parts = (rows_of(tmp_path / name) for name in ("whole", "parts"))
    assert [row["update"] for row in parts] == [1, 2, 3, 4]
    assert parts == whole
    assert sum(row["teacher/kl"] > 0 for row in whole) >= 1
    for number in ("000003", "000004"):
        ours, theirs = (
            tensors_of(tmp_path / name / "checkpoints" / number) for name in ("whole", "parts")
        )
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        states = [
            read_state(tmp_path / name / "checkpoints" / number) for name in ("whole", "parts")
        ]
        for state in states:
            del state["seconds"], state["cpu_seconds"]
        assert states[0] == states[1]
    trajectories = [
        (tmp_path / name / "trajectories" / "000004.jsonl").read_text()
        for name in ("whole", "parts")
    ]
    assert trajectories[0] == trajectories[1]


LORA = {"attention": "eager", "train": "lora", "lora_rank": 4, "lora_alpha": 8}


@pytest.mark.parametrize("kept", ["factors", "sums"])
def test_adapters_resume_bit_for_bit(tiny, tmp_path, kept):
    model = ModelConfig(path=str(tiny), **LORA)
    teacher = TeacherConfig(history="auto" if kept == "factors" else kept, weights="ema")
    config = config_of(tiny, 3, model=model, teacher=teacher)
    train(config, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", Interrupting(1))
    train(config, tmp_path / "parts", Silent(), resume=True)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    ours, theirs = (
        tensors_of(tmp_path / name / "checkpoints" / "000003") for name in ("whole", "parts")
    )
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.startswith("history.safetensors:factors:2:") for name in ours) == (
        kept == "factors"
    )
    other = dataclasses.replace(teacher, history="sums" if kept == "factors" else "factors")
    config = dataclasses.replace(config, teacher=other, env_steps=16)
    told = rf"000003 .*teacher\.history was '{kept}' and is now"
    with pytest.raises(CheckpointError, match=told):
        train(config, tmp_path / "parts", Silent(), resume=True)
    forget_settings(tmp_path / "parts")
    with pytest.raises(CheckpointError, match=f"000003 does not fit: .* was kept as {kept}"):
        train(config, tmp_path / "parts", Silent(), resume=True)


def test_both_forms_of_the_history_make_the_same_run(tiny, tmp_path):
    model = ModelConfig(path=str(tiny), **LORA)
    for kept in ("sums", "factors"):
        config = config_of(tiny, 3, model=model, teacher=TeacherConfig(history=kept))
        train(config, tmp_path / kept, Silent())
    assert rows_of(tmp_path / "sums") == rows_of(tmp_path / "factors")
    assert rows_of(tmp_path / "sums")[-1]["teacher/distance"] > 0


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    run, config = tmp_path_factory.mktemp("stopped") / "run", config_of(tiny, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gtr_turbo.collect.generate", scripted)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, Interrupting(2))
    return config, run


@pytest.fixture
def interrupted(stopped, tmp_path):
    """(config, folder) of a run stopped after its second checkpoint."""
    shutil.copytree(stopped[1], tmp_path / "run")
    return stopped[0], tmp_path / "run"


def test_a_seed_decides_the_run(tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(dataclasses.replace(config_of(tiny, 1), seed=seed), tmp_path / name, Silent())
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    assert rows_of(tmp_path / "a") != rows_of(tmp_path / "c")


def test_only_the_newest_checkpoints_are_kept(tiny, tmp_path):
    train(config_of(tiny, 4), tmp_path, Silent())
    assert [path.name for path in folders(tmp_path)] == ["000003", "000004"]
    assert not list(tmp_path.rglob("*.part"))
    assert {p.name for p in folders(tmp_path)[-1].iterdir()} >= {"student", "teacher", "state.json"}


def test_what_a_killed_process_left_of_checkpoints_goes(tiny, tmp_path):
    """And nothing else that lies there."""
    places = {name: tmp_path / "checkpoints" / name for name in ("000000", ".000007.part", "best")}
    for place in places.values():
        place.mkdir(parents=True)
        (place / "optimizer.safetensors").write_bytes(b"x" * 100)
    train(config_of(tiny, 1), tmp_path, Silent())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000001", "best"]


def test_a_tokenizer_that_meets_a_full_disk_leaves_no_part(tiny, tmp_path, monkeypatch):
    """Tokenizers raises a plain Exception then; what another error leaves is removed too, and it stays itself."""
    for error, raised in ((Exception("No space left"), OSError), (KeyError("a bug"), KeyError)):

        def full(processor, path, error=error):
            raise error

        monkeypatch.setattr("gtr_turbo.policy.processing.Processor.save", full)
        with pytest.raises(raised, match=r"could not be written: No space left|a bug"):
            train(config_of(tiny, 1), tmp_path, Silent())
        assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("file", ["trained", "history", "optimizer", "value_head"])
def test_a_cut_file_is_told(interrupted, file):
    config, run = interrupted
    path = folders(run)[-1] / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"000002 is damaged: {file}\.safetensors was cut"):
        train(config, run, Silent(), resume=True)


@pytest.mark.parametrize("file", ["trained", "history", "optimizer", "value_head", "teacher"])
def test_flipped_bytes_in_a_header_are_told(tiny, tmp_path, file):
    config = config_of(tiny, 2, teacher=TeacherConfig(interval=3))
    train(config, tmp_path, Silent())
    path = folders(tmp_path)[-1] / f"{file}.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])
    with pytest.raises(CheckpointError, match="damaged"):
        train(
            config_of(tiny, 3, teacher=TeacherConfig(interval=3)), tmp_path, Silent(), resume=True
        )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": {"gone.safetensors": 3}}', "\x00"])
def test_a_broken_state_is_told(interrupted, text):
    config, run = interrupted
    (folders(run)[-1] / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        train(config, run, Silent(), resume=True)


def test_without_the_damaged_folder_the_one_before_is_used(interrupted):
    config, run = interrupted
    for file in folders(run)[-1].glob("state.json"):
        file.unlink()  # incomplete: not a checkpoint
    train(config, run, Silent(), resume=True)
    assert [row["update"] for row in rows_of(run)] == [1, 2, 3]


@pytest.mark.parametrize("form", [{}, {"train": "lora", "lora_rank": 4, "lora_alpha": 8}])
def test_another_starting_model_is_refused(tiny, tmp_path, form):
    """With adapters too: a fresh adapter is the same on any base, its meaning is not."""
    other, run = tmp_path / "other", tmp_path / "run"
    starter.build("qwen3-vl", other, 7)
    model = ModelConfig(path=str(tiny), attention="eager", **form)
    config = config_of(tiny, 2, model=model)
    with pytest.raises(KeyboardInterrupt):
        train(config, run, Interrupting(1))
    config = dataclasses.replace(config, model=dataclasses.replace(model, path=str(other)))
    with pytest.raises(CheckpointError, match="began from another model"):
        train(config, run, Silent(), resume=True)


CONTRADICTIONS = [
    ({"seed": 1}, "seed was 0 and is now 1"),
    ({"env": {"num_envs": 4}}, "env.num_envs was 2 and is now 4"),
    ({"env": {"train_split": None}}, "env.train_split was 'train' and is now None"),
    ({"env": {"options": {"prompt": "full"}}}, "env.options was {'prompt': 'compact'} and is now"),
    ({"env": {"id": "Points24"}}, "env.id was 'EZPoints' and is now 'Points24'"),
    ({"rollout": {"turns_per_env": 4}}, "rollout.turns_per_env was 2 and is now 4"),
    ({"model": {"lora_alpha": 2}}, "model.lora_alpha was 256 and is now 2"),
    ({"model": {"train": "lora"}}, "model.train was 'full' and is now 'lora'"),
    ({"teacher": {"method": "linear"}}, "teacher.method was 'ties' and is now 'linear'"),
    ({"teacher": {"weights": "ema"}}, "teacher.weights was 'sma' and is now 'ema'"),
    ({"env_steps": 4}, "000002 has made 2 updates, and env_steps=4 is 1 of 4 turns"),
]


def changed(config, over):
    """`config` with the settings of `over`, groups merged."""
    groups = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in over.items()
    }
    return dataclasses.replace(config, **groups)


@pytest.mark.parametrize(("over", "told"), CONTRADICTIONS)
def test_settings_that_contradict_the_checkpoint_are_refused(interrupted, over, told):
    config, run = interrupted
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    over = {"env_steps": 24, **over}
    with pytest.raises(CheckpointError, match=re.escape(told)):
        train(changed(config, over), run, Silent(), resume=True)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_settings_that_do_not_contradict_it_may_change(interrupted):
    config, run = interrupted
    over = {
        "env_steps": 16,
        "name": "longer",
        "model": {"attention": "sdpa", "gradient_checkpointing": True},
        "rollout": {"rescore": True},
        "ppo": {"lr": 1e-4, "microbatch_turns": 4},
        "guidance": {"beta": 1.0},
        "teacher": {"interval": 2, "history": "sums"},
        "eval": {"interval": 3, "interval_episodes": 1},
        "save": {"interval": 2},
    }
    train(changed(config, over), run, Silent(), resume=True)
    assert [row["update"] for row in rows_of(run)] == [1, 2, 3, 4]


def test_rescoring_does_not_hide_a_sampler_that_disagrees(tiny, tmp_path, monkeypatch):
    def off(*arguments, **options):
        made = scripted(*arguments, **options)
        return [dataclasses.replace(reply, logprobs=reply.logprobs - shift) for reply in made]

    monkeypatch.setattr("gtr_turbo.collect.generate", off)
    rollout = RolloutConfig(turns_per_env=2, rescore=True, max_logprob_gap=0.2)
    config, view, shift = config_of(tiny, 1, rollout=rollout), Silent(), 0.1
    train(config, tmp_path / "near", view)
    assert view.rows[0]["ppo/sampling_gap"] == pytest.approx(0.1, abs=1e-4)
    assert view.rows[0]["ppo/first_log_ratio"] < 1e-4
    shift = 0.3
    with pytest.raises(TrainingError, match=r"0\.3 nats per token .*max_logprob_gap=0\.2"):
        train(config, tmp_path / "far", view)


def test_a_checkpoint_of_an_older_version_resumes_with_its_seed_and_environments(interrupted):
    config, run = interrupted
    forget_settings(run)
    for over in ({"seed": 1}, {"env": {"num_envs": 1}, "ppo": {"minibatch_turns": 2}}):
        with pytest.raises(CheckpointError, match=r"seed was 0|env\.num_envs was 2"):
            train(changed(config, over), run, Silent(), resume=True)
    train(config, run, Silent(), resume=True)
    assert [row["update"] for row in rows_of(run)] == [1, 2, 3]


def test_the_fingerprint_sees_every_kind_of_change():
    a = {"x": torch.zeros(3, 4), "y": torch.tensor(1.0)}
    known = {fingerprint(a)}
    for b in (
        {"x": torch.zeros(4, 3), "y": a["y"]},
        {"z": torch.zeros(3, 4), "y": a["y"]},
        {"x": torch.zeros(3, 4, dtype=torch.bfloat16), "y": a["y"]},
        {"x": torch.full((3, 4), -0.0), "y": a["y"]},
        {"x": torch.zeros(3, 4), "y": torch.tensor(2.0)},
    ):
        known.add(fingerprint(b))
    assert len(known) == 6
    assert fingerprint(dict(reversed(a.items()))) in known


def test_a_run_folder_has_one_owner(tmp_path):
    with open(tmp_path / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            pytest.raises(CheckpointError, match="in use by another process"),
            own_folder(tmp_path),
        ):
            pass
    with own_folder(tmp_path):
        pass
    with (
        pytest.raises(CheckpointError, match="cannot be written"),
        own_folder(tmp_path / "run.lock" / "below"),
    ):
        pass


def test_a_full_disk_leaves_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    config = config_of(tiny, 2)
    policy = make_policy(tiny)
    policy.load_teacher({name: torch.zeros_like(d) for name, d in policy.deltas()})
    optimizer, history = make_optimizer(policy, config.ppo), History(config.teacher)
    history.add(policy.deltas())
    state = {"update": 1, "teacher_age": 0, "start": "x"}
    checkpoint.save(tmp_path, policy, optimizer, history, state, keep=1)
    before = tensors_of(folders(tmp_path)[0])
    written = []

    def full(tensors, path, *rest, **more):
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(b"half")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"000002 could not be written.*No space left"):
        checkpoint.save(tmp_path, policy, optimizer, history, {**state, "update": 2}, keep=1)
    assert len(written) == 3
    assert [path.name for path in folders(tmp_path)] == ["000001"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000001"]
    after = tensors_of(folders(tmp_path)[0])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    checkpoint.write_atomically(path, "first")

    def crash(number):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="broken"):
        checkpoint.write_atomically(path, "second")
    assert path.read_text() == "first"


def test_the_summary_of_a_shorter_run_goes_when_it_goes_on(tiny, tmp_path):
    train(config_of(tiny, 1), tmp_path, Silent())
    assert json.loads((tmp_path / "summary.json").read_text())["env_steps"] == 4
    with pytest.raises(KeyboardInterrupt):
        train(config_of(tiny, 3), tmp_path, Interrupting(1), resume=True)
    assert not (tmp_path / "summary.json").exists()


def test_the_summary_of_a_finished_run_stands_while_it_is_evaluated_again(
    tiny, tmp_path, monkeypatch
):
    train(config_of(tiny, 1), tmp_path, Silent())
    before = (tmp_path / "summary.json").read_text()

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gtr_turbo.trainer._evaluate", cut)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(tiny, 1), tmp_path, Silent(), resume=True)
    assert (tmp_path / "summary.json").read_text() == before


def test_a_start_that_writes_no_valid_reply_is_told(tiny, tmp_path, monkeypatch):
    def mumble(policy, observed, sampling, generator, **options):
        return replies(policy, observed, ["mumble"] * len(observed))

    good, bad = Silent(), Silent()
    train(config_of(tiny, 1), tmp_path / "good", good)
    assert good.notes == []
    monkeypatch.setattr("gtr_turbo.collect.generate", mumble)
    train(config_of(tiny, 2), tmp_path / "bad", bad)
    (note,) = bad.notes
    assert "none of the first 4 replies is valid" in note
