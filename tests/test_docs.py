"""What README and docs tell the reader to type is read by the program; what they show and link to exists."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from gtr_turbo import cli, planning
from gtr_turbo.config import TrainConfig
from gtr_turbo.envs import check_env, make_env
from gtr_turbo.settings import build_config, merge, read_config
from gtr_turbo.sft_config import SFTConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:\w+=\w+ )*(?:gtr-turbo|torchrun)\s[^`]+)`")
CALL = re.compile(r"(?:gtr-turbo|-m -- +gtr_turbo) ((?:train|compare|sft|plan)\b.*)")
FORMS = {"NAME", "N", "CONFIG"}
"""With one of these words for a value it is no command but the form of one."""
FILES = ("mine.yaml", "runs/mine/config.yaml", "runs/ezpoints-seed0/config.yaml", "DIR/config.yaml")
"""What the pages take for granted: a recipe of the reader's, and runs."""
MINE = {
    "base": "points24-qwen2.5-vl-7b",
    "model": {"vision": "frozen"},
    "guidance": {"external": {"budget": {"input_price": 1.0}}},
}


def blocks(kind):
    return [
        (page.name, text)
        for page in PAGES
        for language, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if language == kind
    ]


def commands():
    """(page, arguments) of every complete `gtr-turbo train|compare|sft|plan` that a page shows."""
    shown = [(page, line) for page, text in blocks("") for line in joined(text)]
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        shown += [(page.name, " ".join(found.split())) for found in INLINE.findall(text)]
    found = []
    for page, line in shown:
        call = CALL.search(line)
        if call is None or " ..." in line or " -" not in call[1]:
            continue  # or the command's name in a sentence
        arguments = shlex.split(call[1], comments=True)
        if FORMS.isdisjoint(arguments):
            found.append((page, arguments))
    return found


def joined(text):
    return text.replace("\\\n", " ").splitlines()


def name(case):
    return f"{case[0]}: {' '.join(case[1])}"


class Built(Exception):  # noqa: N818 - it is no error
    """A plan was to be made: its settings were read."""


def stop(config, **about):
    raise Built


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The present folder of a reader who has followed the pages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(planning, "make_plan", stop)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(yaml.safe_dump(MINE))
    return tmp_path


def test_the_pages_show_commands():
    pages = [page for page, _ in commands()]
    assert len(pages) > 40
    assert {"README.md", "environments.md", "external.md", "scaling.md"} <= set(pages)


@pytest.mark.parametrize("case", commands(), ids=name)
def test_a_command_of_the_pages_is_read(case, reader, capsys):
    _, (command, *arguments) = case
    if command == "plan":
        options, rest = cli._parser().parse_known_args([command, *arguments])
        with pytest.raises(Built):
            options.run_command(options, rest)
        return
    last = "--dry-run" if command == "compare" else "--print_config"
    assert cli.main([command, *arguments, last]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("case", blocks("yaml"), ids=lambda case: case[0])
def test_a_recipe_of_the_pages_is_built(case):
    settings = yaml.safe_load(case[1])
    base = settings.pop("base", None)
    if base is not None:
        settings = merge(read_config(ROOT / "src/gtr_turbo/configs" / f"{base}.yaml"), settings)
    assert build_config(TrainConfig, settings).num_updates >= 1


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda f: f.name)
def test_an_example_recipe_has_an_environment_that_keeps_the_contract(file, reader):
    settings = read_config(file)
    if "demonstrations" in settings:
        played = build_config(SFTConfig, settings).demonstrations
    else:
        played = [build_config(TrainConfig, settings).env]
    for env in played:
        check_env(make_env(env.id, **env.options))


@pytest.mark.parametrize("case", blocks("python"), ids=lambda case: case[0])
def test_python_of_the_pages_compiles(case):
    compile(case[1], case[0], "exec")


def test_the_pages_show_the_files_they_name():
    shown = {text for _, text in blocks("yaml")}
    assert (ROOT / "examples" / "lake.yaml").read_text() in shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = page.parent / file if file else page
        assert found.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, target


def test_the_page_of_settings_is_made_of_the_declarations(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_settings

    assert make_settings.page() == make_settings.PAGE.read_text(encoding="utf-8"), (
        "python docs/make_settings.py"
    )
