"""Model cards: what the hub reads in them, what they say, and that nothing in them escapes its place."""

import importlib.util
import json
import re
from dataclasses import asdict

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import BatchFeature

from gtr_turbo.card import model_card, without_paths, write_cards
from gtr_turbo.cli import main
from gtr_turbo.config import EnvConfig, ModelConfig, TrainConfig
from gtr_turbo.envs import make_env
from gtr_turbo.policy.processing import Processor
from gtr_turbo.policy.starter import model_folder
from gtr_turbo.teaching_config import ExternalConfig, GuidanceConfig
from tiny import make_policy

HUB = "Qwen/Qwen2.5-VL-7B-Instruct"
SUMMARY = {
    "success_after": 0.5,
    "success_merge": 0.25,
    "split": "held-out",
    "episodes": 200,
    "env_steps": 30720,
    "evaluations": {
        "before/held-out/student": {"success": 0.125, "interval": [0.1, 0.15]},
        "after/held-out/student": {"success": 0.5, "interval": [0.43, 0.57]},
        "after/held-out/teacher": {"success": 0.25, "interval": [0.2, 0.3]},
    },
}


def settings(**changed):
    return json.loads(json.dumps(asdict(TrainConfig(**changed))))


def card(**changed):
    about = {
        "base": HUB,
        "which": "student",
        "adapter": True,
        "settings": settings(name="mine", seed=7, env=EnvConfig(id="Points24")),
        "summary": SUMMARY,
    }
    return model_card(**about | changed)


def code_of(text):
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


def test_the_hub_reads_the_front_matter():
    data = huggingface_hub.ModelCard(card()).data
    assert data.base_model == HUB
    assert data.library_name == "peft"
    assert data.license is None
    assert {"gtr-turbo", "lora"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_value) == ("Points24", 0.5)
    teacher = huggingface_hub.ModelCard(card(which="teacher", adapter=False)).data
    assert (teacher.library_name, teacher.to_dict()["base_model_relation"]) == (
        "transformers",
        "merge",
    )
    assert teacher.eval_results[0].metric_value == 0.25


def test_it_says_what_was_measured_and_with_which_settings():
    text = card()
    assert "| held-out | the model the run began with | 12.5% | 10.0% to 15.0% |" in text
    assert "| held-out | this student | 50.0% | 43.0% to 57.0% |" in text
    assert "25.0%" not in text  # the merge has a card of its own
    assert "25.0% | 20.0% to 30.0%" in card(which="teacher", adapter=False)
    assert "| environment steps of the run | 30720 |" in text
    assert "| seed | 7 |" in text
    dumped = re.search(r"```yaml\n(.*?)```", text, re.S)[1]
    assert yaml.safe_load(dumped)["ppo"] == settings()["ppo"]
    assert f'from_pretrained("{HUB}"' in code_of(text)
    compile(code_of(text), "card", "exec")


def test_names_cannot_break_yaml_markdown_or_code():
    evil = 'x\n---\n# Fake | <b>`a`</b> [l](javascript:0) "y: {{ 7*7 }}'
    hostile = settings(name=evil, env=EnvConfig(id=evil, options={"note": "````\n# out"}))
    text = card(settings=hostile, base=f"/home/me/{evil}")
    head, body = text.split("\n---\n", 1)[0] + "\n", text.split("\n---\n", 1)[1]
    front = yaml.safe_load(head.removeprefix("---\n"))
    assert front["model-index"][0]["results"][0]["dataset"]["type"] == evil
    assert "base_model" not in front
    prose = re.sub(r"(`{3,})\w+\n.*?\n\1", "", body, flags=re.S)
    assert "# Fake" not in re.findall(r"^.*$", prose, re.M)
    assert "<b>" not in prose.replace("\\<b\\>", "")
    assert "49" not in prose
    rows = [line for line in prose.splitlines() if line.startswith("| environment |")]
    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 3
    assert "`````yaml" in text  # longer than the fence inside
    compile(code_of(text), "card", "exec")


def test_no_folder_of_this_machine_is_published():
    folder = "/home/me/models/mine"
    text = card(
        settings=settings(run="/home/me/runs/x", model=ModelConfig(path=folder)), base=folder
    )
    assert "/home/me" not in text
    assert "path: mine" in text


@pytest.mark.parametrize("value", ["/", "//", "/no_think", "a/b", "", 3])
def test_an_option_that_is_no_path_in_a_folder_stays(value):
    assert without_paths({"option": [value]}) == {"option": [value]}


def test_data_of_an_external_corrector_is_told():
    external = GuidanceConfig(kind="external", external=ExternalConfig(model="gpt-4o"))
    told = " ".join(card(settings=settings(guidance=external)).replace("\\", "").split())
    assert "split none, and thoughts corrected by gpt-4o; no other data was used" in told
    assert "split none; no other data was used" in " ".join(card().split())


class Stock:
    """In place of Qwen's own processor, which wants torchvision: ours, with the calls of the card."""

    def __init__(self, path):
        self.ours = Processor(path, "qwen3_vl")

    def apply_chat_template(self, messages, **_):
        image, text = messages[0]["content"]
        frame = np.asarray(image["image"])
        ids = self.ours.encode([frame], [text["text"]])[0][None]
        kinds = (ids == self.ours.image_token_id).int()
        made = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": kinds,
        }
        return BatchFeature(made | dict(self.ours.image_inputs([self.ours.shrink(frame)])))

    def decode(self, ids, **_):
        return self.ours.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_code_of_a_card_has_an_action_written(adapter, tmp_path, monkeypatch, capsys):
    """Of a starter's own weights, exported as full weights, and of an adapter that changes nothing."""
    if adapter:
        policy = make_policy("tiny-qwen3-vl", train="lora", lora_rank=4, lora_alpha=8)
        policy.save_student(tmp_path / "out")
    else:
        assert main(["export", model_folder("tiny-qwen3-vl"), "--out", str(tmp_path / "out")]) == 0
    if importlib.util.find_spec("torchvision") is None:
        monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", Stock)
    seen, _ = make_env("EZPoints", prompt="compact").reset(seed=0)
    monkeypatch.chdir(tmp_path / "out")
    Image.fromarray(seen["image"]).save("frame.png")
    code = code_of(card(base="tiny-qwen3-vl", adapter=adapter))
    assert ("gtr_turbo" in code) is ("peft" in code) is adapter
    assert "max_new_tokens=96, temperature=0.7, top_k=0, repetition_penalty=1.0" in code
    torch.manual_seed(0)
    exec(code.replace('"..."', repr(seen["prompt"])), {})
    assert capsys.readouterr().out.splitlines()[-1] in {"2", "10", "+", "*", "-", "/", "="}


def test_the_name_of_a_split_may_hold_a_slash():
    found = {"after/valid/unseen/student": SUMMARY["evaluations"]["after/held-out/student"]}
    assert "valid/unseen | this student" in card(summary=SUMMARY | {"evaluations": found})


def test_an_evaluation_on_other_episodes_than_the_rest_says_so():
    before = SUMMARY["evaluations"]["before/held-out/student"] | {"episodes": 500}
    evaluations = SUMMARY["evaluations"] | {"before/held-out/student": before}
    text = card(summary=SUMMARY | {"evaluations": evaluations})
    assert "the model the run began with (500 episodes) | 12.5%" in text.replace("\\", "")
    assert text.count("500 episodes") == 1


def test_a_run_without_evaluations_and_weights_without_a_run_claim_nothing(tmp_path):
    for which in ("student", "teacher"):
        (tmp_path / which).mkdir()
    paths = {which: str(tmp_path / which) for which in ("student", "teacher")}
    summary = {"success_after": None, "success_merge": None, "env_steps": 4, "evaluations": {}}
    write_cards(TrainConfig(), summary | paths | {"episodes": 0})
    for which, words in (("student", "A vision-language agent"), ("teacher", "The teacher of")):
        text = (tmp_path / which / "README.md").read_text()
        assert words in text
        assert "## Results" not in text
        assert "model-index" not in text
        assert "PeftModel" not in text  # the default trains all weights
    bare = model_card(base=HUB, which="student", adapter=False)
    assert "how they were trained is not known" in bare
    assert "## Settings" not in bare
