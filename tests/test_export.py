"""`gtr-turbo export`: against peft's own merge, bit for bit where nothing is rounded, and its errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from gtr_turbo import checkpoint
from gtr_turbo.cli import main
from tiny import make_policy, observations, perturb

SMALL = {
    "model": {"attention": "eager"},
    "env": {
        "id": "NumberLine",
        "num_envs": 2,
        "options": {"prompt": "compact"},
        "eval_split": "held-out",
    },
    "sampling": {"max_new_tokens": 4},
    "rollout": {"turns_per_env": 2},
    "ppo": {"minibatch_turns": 4, "microbatch_turns": 4, "epochs": 1},
    "eval": {"episodes": 2},
    "save": {"interval": 1},
    "env_steps": 4,
    "threads": 1,
    "trackers": [],
}
LORA = {"train": "lora", "vision": "trained", "lora_rank": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """An adapter of the tiny model whose every factor is noise."""
    policy = make_policy(tiny, **LORA)
    perturb(policy, scale=0.1)
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    policy.save_student(folder)
    return folder


def run_folder(tiny, folder, **model):
    path = folder / "small.yaml"
    path.write_text(
        yaml.safe_dump({**SMALL, "model": {**SMALL["model"], "path": str(tiny)} | model})
    )
    assert main(["train", "--config", str(path), "--run", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def lora_run(tiny, tmp_path_factory):
    return run_folder(tiny, tmp_path_factory.mktemp("lora"), **LORA)


@pytest.fixture(scope="module")
def full_run(tiny, tmp_path_factory):
    return run_folder(tiny, tmp_path_factory.mktemp("full"))


@torch.no_grad()
def logits(model, tiny):
    policy = make_policy(tiny)
    observed = observations(policy, 2)
    ids = torch.stack([o.prompt_ids for o in observed[:1]])
    images = policy.processor.image_inputs([policy.processor.shrink(observed[0].frame)])
    kinds = (ids == policy.processor.image_token_id).int()
    return model.eval()(input_ids=ids, mm_token_type_ids=kinds, **images).logits


def stock(path):
    return AutoModelForImageTextToText.from_pretrained(
        path, dtype="auto", attn_implementation="eager"
    )


def test_an_exported_adapter_gives_the_logits_of_base_and_adapter(tiny, adapter, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(adapter), "--out", str(out)]) == 0
    merged = PeftModel.from_pretrained(stock(tiny), adapter).merge_and_unload()
    expected, found = logits(merged, tiny), logits(stock(out), tiny)
    assert (expected - logits(stock(tiny), tiny)).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    base, weights = load_file(tiny / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(weights) == set(base)
    theirs = merged.state_dict()
    for name, tensor in weights.items():
        assert tensor.dtype == base[name].dtype
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)
    assert torch.equal(
        weights["model.language_model.embed_tokens.weight"],
        base["model.language_model.embed_tokens.weight"],
    )
    processors = [AutoImageProcessor.from_pretrained(path).to_dict() for path in (out, tiny)]
    assert processors[0] == processors[1]
    ours, base_words = (AutoTokenizer.from_pretrained(path) for path in (out, tiny))
    assert ours.get_vocab() == base_words.get_vocab()
    assert ours.chat_template == base_words.chat_template


def test_shards_and_index_hold_every_tensor_once_and_load(tiny, adapter, tmp_path):
    out = tmp_path / "out"
    one = tmp_path / "one"
    limit = 1.0 / 1024  # GiB: 1 MiB
    assert main(["export", str(adapter), "--out", str(out), "--shard-gb", str(limit)]) == 0
    assert main(["export", str(adapter), "--out", str(one)]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert len(shards) > 2
    assert {n: f for f, tensors in shards.items() for n in tensors} == index["weight_map"]
    whole = load_file(one / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert all(torch.equal(shards[f][n], whole[n]) for n, f in index["weight_map"].items())
    assert all(sum(t.nbytes for t in s.values()) <= 2**20 or len(s) == 1 for s in shards.values())
    assert torch.equal(logits(stock(out), tiny), logits(stock(one), tiny))


def test_the_result_is_rounded_once_to_the_type_asked_for(adapter, tmp_path):
    exact, rounded = tmp_path / "exact", tmp_path / "rounded"
    assert main(["export", str(adapter), "--out", str(exact)]) == 0
    assert main(["export", str(adapter), "--out", str(rounded), "--dtype", "bfloat16"]) == 0
    found = load_file(rounded / "model.safetensors")
    for name, tensor in load_file(exact / "model.safetensors").items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16))
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    assert stock(rounded).dtype == torch.bfloat16


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_full_run_is_copied_bit_for_bit(full_run, tmp_path, which):
    out = tmp_path / "out"
    assert main(["export", str(full_run), "--out", str(out), "--which", which]) == 0
    folder = full_run / "checkpoints" / "000001" / which
    found, expected = (load_file(f / "model.safetensors") for f in (out, folder))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert stock(out).config.model_type == "qwen3_vl"


def test_a_run_with_adapters_exports_its_newest_student_and_its_teacher(lora_run, tiny, tmp_path):
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    assert main(["export", str(lora_run), "--out", str(student)]) == 0
    assert main(["export", str(lora_run), "--out", str(teacher), "--which", "teacher"]) == 0
    saved = lora_run / "checkpoints" / "000001"
    merged = PeftModel.from_pretrained(stock(tiny), saved / "student").merge_and_unload()
    torch.testing.assert_close(
        logits(stock(student), tiny), logits(merged, tiny), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(logits(stock(teacher), tiny), logits(stock(saved / "teacher"), tiny))
    for folder, words in ((student, "A vision-language agent"), (teacher, "The teacher")):
        assert words in (folder / "README.md").read_text()


def test_an_export_is_played_as_its_run_was(capsys, lora_run, full_run, tmp_path):
    """The same replies to the same deals, without a word about environment, prompt or sampling."""
    for run in (lora_run, full_run):
        out, found = tmp_path / run.parent.name, []
        assert main(["export", str(run), "--out", str(out)]) == 0
        for agent in (run, out):
            capsys.readouterr()
            assert main(["eval", str(agent), "--episodes", "3", "--json"]) == 0
            found.append(json.loads(capsys.readouterr().out))
        assert found[0] == found[1]
        assert (found[1]["env"], found[1]["split"]) == ("NumberLine", "held-out")
        assert yaml.safe_load((out / "recipe.yaml").read_text())["sampling"]["max_new_tokens"] == 4


def test_of_weights_without_a_run_the_recipe_beside_them_goes_along(adapter, tmp_path):
    started = named(adapter, tmp_path / "started")
    (started / "recipe.yaml").write_text("env: {id: NumberLine}\n")
    assert main(["export", str(started), "--out", str(tmp_path / "out")]) == 0
    made = (tmp_path / "out" / "recipe.yaml").read_text()
    assert yaml.safe_load(made) == {"env": {"id": "NumberLine"}}


@pytest.mark.parametrize("way", ["link", "here"])
def test_a_students_run_is_found_by_every_way_to_it(lora_run, tmp_path, monkeypatch, way):
    student = checkpoint.folders(lora_run)[-1] / "student"
    if way == "link":
        path = tmp_path / "latest"
        path.symlink_to(student)
    else:
        monkeypatch.chdir(student)
        path = Path()
    assert main(["export", str(path), "--out", str(tmp_path / "out")]) == 0
    assert (
        yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["env"]["id"] == "NumberLine"
    )
    assert main(["eval", str(path), "--episodes", "1"]) == 0


def test_an_exported_folder_names_no_folder_of_this_machine(capsys, full_run, adapter, tmp_path):
    moved, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(full_run, moved)
    settings = yaml.safe_load((moved / "config.yaml").read_text())
    settings["env"]["options"] |= {"games": "/home/me/games", "stop": "/"}
    (moved / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["export", str(moved), "--out", str(out)]) == 0
    options = yaml.safe_load((out / "recipe.yaml").read_text())["env"]["options"]
    assert (options["games"], options["stop"]) == ("games", "/")
    (note,) = capsys.readouterr().err.splitlines()
    assert "recipe.yaml holds the last part only" in note
    assert f"gtr-turbo eval {out} --option games=PATH" in note
    assert main(["export", str(adapter), "--out", str(tmp_path / "full")]) == 0
    for folder in (out, tmp_path / "full"):
        made = json.loads((folder / "merged-from.json").read_text())
        assert all("/" not in given["path"] for given in made["checkpoints"])
        assert all(str(tmp_path.parent) not in file.read_text() for file in text_files(folder))
    assert made["checkpoints"][0]["path"] == "mine"
    assert "/" not in made["base"]["path"]
    started = named(adapter, tmp_path / "started")  # as `sft` leaves it
    (started / "recipe.yaml").write_text("env: {id: Household, options: {games: /home/me/games}}")
    capsys.readouterr()
    assert main(["export", str(started), "--out", str(tmp_path / "start")]) == 0
    assert "option games, a path" in capsys.readouterr().err
    assert "/home" not in (tmp_path / "start" / "recipe.yaml").read_text()


def text_files(folder):
    return [file for file in folder.iterdir() if file.suffix in (".json", ".md", ".yaml")]


def fails(capsys, arguments, *parts):
    assert main(["export", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gtr-turbo: ")
    for part in parts:
        assert part in error


def named(adapter, folder, **config):
    """A copy of the adapter whose config says something else."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def test_wrong_input_is_refused_with_what_to_do(capsys, tiny, tiny25, adapter, lora_run, tmp_path):
    out = tmp_path / "out"
    hub = named(adapter, tmp_path / "hub", base_model_name_or_path="Some/Model-7B")
    fails(capsys, [hub, "--out", out], "'Some/Model-7B'", "hf download Some/Model-7B", "--base")
    fails(capsys, [hub, "--out", out, "--base", "Other/Model"], "of Some/Model-7B, not of Other")
    gone = named(adapter, tmp_path / "gone", base_model_name_or_path="/no/such/base")
    fails(capsys, [gone, "--out", out], "'/no/such/base' is not on this machine", "--base FOLDER")
    nameless = named(adapter, tmp_path / "nameless", base_model_name_or_path=None)
    fails(capsys, [nameless, "--out", out], "does not name its base", "--base")
    fails(capsys, [adapter, "--out", out, "--base", tiny25], "visual", "is it the model")
    fails(capsys, [tiny, "--out", out, "--base", tiny], "full weights", "drop it")
    fails(capsys, [adapter, "--out", out, "--which", "teacher"], "no run folder", "--which")
    fails(capsys, [tmp_path, "--out", out], "neither a run, nor a PEFT adapter")
    student = lora_run / "checkpoints" / "000001" / "student"
    fails(capsys, [student, "--out", out, "--which", "teacher"], "is a student", "/teacher")
    assert not out.exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept.txt").write_text("mine")
    fails(capsys, [adapter, "--out", full], "exists already", "Give another folder")
    assert [file.name for file in full.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_summary_is_told(capsys, full_run, tmp_path, text):
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    (run / "summary.json").write_text(text)
    fails(capsys, [run, "--out", tmp_path / "out"], "summary.json is damaged", "remove it")
    (run / "summary.json").unlink()
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0


def test_a_damaged_adapter_is_refused(capsys, adapter, tmp_path):
    broken = named(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    fails(capsys, [broken, "--out", tmp_path / "out"], "not finite")
    assert not (tmp_path / "out").exists()
