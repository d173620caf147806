"""Imports point downwards. A module may import rows below its own, and its own package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "gtr_turbo"

LAYERS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("agents",),
    ("compare", "export", "planning"),
    ("settings", "trainer", "play", "baselines", "doctor", "report"),
    ("evaluate", "learner", "sft", "terminal", "card"),
    ("tracking", "trackers"),
    ("checkpoint",),
    ("collect", "learning.update", "teacher"),
    ("policy", "envs"),
    ("learning.advantages",),
    ("turns", "prompts", "parsing", "learning.losses", "merging", "signals"),
    ("distributed",),
    ("sft_config",),
    ("config",),
    ("vllm_config",),
    ("teaching_config",),
    ("checks", "student", "text"),
)
"""The order, from the top. An entry is a module, or a package with all that is in it."""

MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def imports_of(path):
    """Names of all modules that a file imports, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def ours(path):
    """Modules of this package that a file imports, without the prefix."""
    names = {n.removeprefix("gtr_turbo.") for n in imports_of(path) if n.startswith("gtr_turbo.")}
    return {n for n in names if n in MODULES or f"{n}.__init__" in MODULES}


def place(module):
    """(row, entry) of a module in the table; None for empty `__init__` files and the package's own."""
    for row, entries in enumerate(LAYERS):
        for entry in entries:
            if module == entry or module.startswith(f"{entry}."):
                return row, entry
    return None


def test_every_module_has_a_place():
    lost = {m for m in MODULES if place(m) is None} - {"__init__", "learning.__init__"}
    assert not lost, f"add them to LAYERS: {lost}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module):
    if place(module) is None:
        assert not ours(MODULES[module])
        return
    row, entry = place(module)
    upward = []
    for name in ours(MODULES[module]):
        other = place(name)
        if other is None:  # `from gtr_turbo.learning import losses` names the package too
            assert name == "learning"
        elif other[1] != entry and other[0] <= row:
            upward.append(name)
    assert not upward, f"{module} imports {upward}, which are not below it"


def external(module):
    return {n.split(".")[0] for n in imports_of(MODULES[module]) if not n.startswith("gtr_turbo")}


def test_config_is_standard_library_only():
    parts = ("config", "vllm_config", "teaching_config", "checks")
    for module in parts:
        assert external(module) <= set(sys.stdlib_module_names)
        assert ours(MODULES[module]) <= set(parts)


def test_environments_parsing_and_prompts_never_import_torch():
    for module in MODULES:
        if module.split(".")[0] in ("envs", "parsing", "prompts"):
            assert not external(module) & {"torch", "transformers", "peft"}, module


def test_the_merge_stands_alone():
    for module in MODULES:
        if module.startswith("merging"):
            assert all(
                name.split(".")[0] in ("merging", "config") for name in ours(MODULES[module])
            )
    for module in ("merging.methods", "learning.losses", "learning.advantages"):
        assert "config" not in ours(MODULES[module])  # tensors and numbers only


@pytest.mark.parametrize(
    "code",
    [
        "import gtr_turbo.envs; gtr_turbo.envs.make_env('Points24').reset(seed=0)",
        "from gtr_turbo.cli import main; main(['--help'])",
        "from gtr_turbo.cli import main; main(['train', '--print_config'])",
    ],
)
def test_what_needs_no_torch_imports_none(code):
    check = f"""
import sys
try:
    {code}
except SystemExit as end:
    assert not end.code
heavy = {{"torch", "transformers", "peft"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
