"""Write the tables of docs/settings.md from the settings' own declarations: defaults, types and docstrings.

    python docs/make_settings.py

The declarations are `src/gtr_turbo/config.py` and the files it takes groups from. What stands above `MARK` is
written by hand. `tests/test_docs.py` compares the page with them.
"""

import ast
import inspect
import json
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from gtr_turbo.config import TrainConfig
from gtr_turbo.sft_config import DemonstrationConfig, SFTConfig

PAGE = Path(__file__).parent / "settings.md"
MARK = "<!-- from here on written by docs/make_settings.py -->\n"
KINDS = {"None": "null", "dict[str, Any]": "mapping", "tuple[str, ...]": "list of str"}
SFT = """\
Settings of that command, beside the group `model` above (`model.vision` is `trained` by default here) and
`demonstrations`, a list of the group below: what is imitated."""


def described(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(declared, ast.ClassDef)
    found = {}
    for field, below in zip(declared.body, declared.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value)
            found[ast.unparse(field.target)] = " ".join(text.split())
    return found


def values(annotation: str) -> str:
    """A type as a reader thinks of it: the words it allows, or the kind of value it is."""
    parts = []
    for part in annotation.split(" | "):
        _, literal, words = part.partition("Literal[")
        words = words.partition("]")[0].replace("'", "`")
        several = "list of " if part.startswith("tuple[Literal") else ""
        parts.append(several + words if literal else KINDS.get(part, part))
    return " or ".join(parts)


def default(field: Any) -> str:
    """A default as YAML, which is JSON but for the quotes that words need not have."""
    value = field.default if field.default is not MISSING else field.default_factory()
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def group(cls: Any, title: str, text: str, leave: tuple[str, ...] = ()) -> str:
    """A heading, a table of the settings of `cls` but those to leave, and the groups below it."""
    docs, types = described(cls), get_type_hints(cls)
    rows, below = ["| Setting | Default | Values | Meaning |", "|---|---|---|---|"], []
    for field in fields(cls):
        if field.name in leave:
            continue
        if is_dataclass(inner := types[field.name]):
            about = f"{inner.__doc__} {docs.get(field.name, '')}".strip()
            below.append(group(inner, f"`{inner._prefix[:-1]}`", about))  # type: ignore[union-attr]
            continue
        name = f"`{cls._prefix}{field.name}`"
        cells = (name, default(field), values(str(field.type)), docs[field.name])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n\n".join([f"## {title}", text, "\n".join(rows), *below])


def page() -> str:
    """The text of docs/settings.md, with the tables made anew."""
    about = " ".join(str(DemonstrationConfig.__doc__).split())
    parts = (
        group(TrainConfig, "The run", "Settings outside a group."),
        group(SFTConfig, "gtr-turbo sft", SFT, leave=("model", "demonstrations")),
        group(DemonstrationConfig, "`demonstrations`", about),
    )
    return (
        PAGE.read_text(encoding="utf-8").partition(MARK)[0]
        + MARK
        + "\n"
        + "\n\n".join(parts)
        + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
