"""Model cards: a `README.md` beside saved weights, with the front matter that the Hugging Face hub reads.

Everything that comes from outside (names, paths, options) is escaped; of a path only the last part is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gtr_turbo import __version__
from gtr_turbo.checkpoint import write_atomically
from gtr_turbo.config import SamplingConfig, TrainConfig
from gtr_turbo.policy.starter import is_hub_name, model_folder

PAPER = "https://arxiv.org/abs/2512.13043"
MARKS = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$])")
KINDS = {
    "none": "no guidance (RL4VLM)",
    "kl": "the reverse KL to the merge of the run's own checkpoints",
    "static": "the reverse KL to the model the run began with",
    "sft": "imitation of thoughts that the merge of the run's own checkpoints writes",
    "external": "imitation of thoughts that an external model corrects (GTR)",
}
TEMPLATE = (
    """\
---
{{ front }}---

# {{ title }}

{% if settings %}
{% if which == "teacher" %}
The teacher of a GTR-Turbo run: the merge of its checkpoints ({{ settings.teacher.method }}, weights
{{ settings.teacher.weights }}).
{% else %}
A vision-language agent, trained by multi-turn PPO with a critic. Guidance: {{ guidance }}.
{% endif %}
The method is that of [GTR-Turbo]("""
    + PAPER
    + """); made by gtr-turbo {{ version }}.
{% else %}
Weights exported by gtr-turbo {{ version }}; how they were trained is not known to it.
{% endif %}

| | |
|---|---|
| base model | {{ base }} |
| these files | {{ form }} |
{% if settings %}
| environment | {{ settings.env.id }} |
| environment steps of the run | {{ steps }} |
| seed | {{ settings.seed }} |
{% endif %}
{% if results %}

## Results

Success, sampled at temperature {{ settings.sampling.temperature }}, on {{ episodes }} fixed episodes; 95 % Wilson
intervals.

| episodes | model | success | interval |
|---|---|---|---|
{% for row in results %}
| {{ row.split }} | {{ row.model }} | {{ row.success }} | {{ row.interval }} |
{% endfor %}
{% endif %}
{% if settings %}

## Data

The agent's own episodes in the environment {{ settings.env.id }} (options below), split {{ train_split }}
{%- if settings.guidance.kind == "external" %}, and
thoughts corrected by {{ settings.guidance.external.model }}{% endif %}; no other
data was used in this stage.
{% endif %}

## Use

{{ code }}

## Licence

The licence of the base model holds for weights that derive from it. This card names none: add `license:` above
before you publish these files.
{% if settings %}

## Settings

{{ dumped }}
{% endif %}
"""
)

EXAMPLE = """\
import json

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
{imports}
{model}
processor = AutoProcessor.from_pretrained({name})  # Qwen's want torchvision

frame, prompt = Image.open("frame.png"), "..."  # what the environment shows, and its prompt
content = [{{"type": "image", "image": frame}}, {{"type": "text", "text": prompt}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device)
sampling = dict(do_sample=True, top_p=1.0, {options})
written = model.generate(**inputs, **sampling)[0, inputs["input_ids"].shape[1]:]
reply = processor.decode(written, skip_special_tokens=True)
print(json.loads(reply)["action"])  # a reply that is no JSON is an illegal action
"""


def escape(value: object) -> str:
    """Text as one line of Markdown that shows it and obeys none of it."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return MARKS.sub(r"\\\1", text)


def fenced(text: str, language: str) -> Markup:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def without_paths(value: Any) -> Any:
    """Settings as they may be published: an absolute path is cut to its last part.

    `/` and `/name` tell nothing of a machine, and need not be paths: they stay.
    """
    if isinstance(value, Mapping):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(entry) for entry in value]
    if isinstance(value, str) and Path(value).is_absolute() and len(Path(value).parts) > 2:
        return Path(value).name
    return value


def model_card(
    *,
    base: str,
    which: str,
    adapter: bool,
    settings: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> str:
    """The text of a card.

    Args:
        base: name or folder of the base model.
        which: `student` or `teacher`.
        adapter: True if the files are a PEFT adapter.
        settings: the resolved settings of the run; None if there was none.
        summary: what `summary.json` holds; None if the run has not ended.
    """
    shown = None if settings is None else without_paths(settings)
    name = "weights" if shown is None else f"{shown['name']}, {which}, seed {shown['seed']}"
    environment = Environment(
        finalize=lambda value: value if isinstance(value, Markup) else escape(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=False,
    )
    given = summary or {}
    split = None if shown is None else shown["env"]["train_split"]
    return environment.from_string(TEMPLATE).render(
        front=Markup(_front_matter(base, which, adapter, shown, given, name)),
        title=name,
        settings=shown,
        which=which,
        version=__version__,
        guidance=None if shown is None else KINDS[shown["guidance"]["kind"]],
        base=without_paths(base),
        form="LoRA adapter (PEFT)" if adapter else "full weights",
        steps=given.get("env_steps", "not known: the run has no summary of these weights"),
        episodes=given.get("episodes"),
        results=_results(given, which),
        train_split=split or "none",
        code=_code(base, adapter, shown["sampling"] if shown else asdict(SamplingConfig())),
        dumped=None
        if shown is None
        else fenced(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), "yaml"),
    )


def _front_matter(
    base: str,
    which: str,
    adapter: bool,
    settings: Mapping[str, Any] | None,
    summary: Mapping[str, Any],
    name: str,
) -> str:
    """YAML of the hub's model card metadata, without the licence."""
    front: dict[str, Any] = {}
    if is_hub_name(base):
        relation = "merge" if which == "teacher" else "adapter" if adapter else "finetune"
        front = {"base_model": base, "base_model_relation": relation}
    front |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["gtr-turbo", "reinforcement-learning", "vision-language-agent"]
        + (["lora"] if adapter else []),
    }
    after = summary.get("success_merge" if which == "teacher" else "success_after")
    if settings is not None and after is not None:
        env, split = settings["env"]["id"], summary["split"] or "all"
        metric = {"type": "success_rate", "name": "success", "value": after}
        result = {
            "task": {"type": "reinforcement-learning", "name": "visual agent"},
            "dataset": {"type": env, "name": f"{env} ({split})"},
            "metrics": [metric],
        }
        front["model-index"] = [{"name": name, "results": [result]}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _results(summary: Mapping[str, Any], which: str) -> list[dict[str, str]]:
    """Rows of the table: the start, and these weights, on every split that was evaluated."""
    rows = []
    names = {"before": "the model the run began with", "after": f"this {which}"}
    for key, found in summary.get("evaluations", {}).items():
        when, _, rest = key.partition("/")
        split, _, player = rest.rpartition("/")
        if player != ("student" if when == "before" else which):
            continue
        low, high = found["interval"]
        number, usual = found.get("episodes"), summary.get("episodes")
        other = "" if number in (None, usual) else f" ({number} episodes)"
        rows.append(
            {
                "split": "all" if split == "None" else split,
                "model": names[when] + other,
                "success": f"{found['success']:.1%}",
                "interval": f"{low:.1%} to {high:.1%}",
            }
        )
    return rows


def _code(base: str, adapter: bool, sampling: Mapping[str, Any]) -> Markup:
    """Python that loads the files with stock libraries, and has one action written."""
    imports, name = "", '"."'
    if adapter:
        imports, name = "from peft import PeftModel\n", json.dumps(without_paths(base))
    if adapter and model_folder(base) != base:
        imports += "from gtr_turbo.policy.starter import model_folder\n"
        name = f"model_folder({name})"
    loaded = f'AutoModelForImageTextToText.from_pretrained({name}, dtype="auto")'
    model = f"model = {loaded}"
    if adapter:
        model = f'base = {loaded}\nmodel = PeftModel.from_pretrained(base, ".")'
    given = {
        key: sampling[key]
        for key in ("max_new_tokens", "temperature", "top_k", "repetition_penalty")
    }
    options = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return fenced(
        EXAMPLE.format(imports=imports, model=model, name=name, options=options), "python"
    )


def write_cards(config: TrainConfig, summary: Mapping[str, Any]) -> None:
    """Write the cards of a run that has ended, beside its newest student and teacher."""
    settings = json.loads(json.dumps(asdict(config)))
    lora = config.model.train == "lora"
    for which in ("student", "teacher"):
        text = model_card(
            base=config.model.path,
            which=which,
            adapter=lora and which == "student",
            settings=settings,
            summary=summary,
        )
        write_atomically(Path(summary[which]) / "README.md", text)
