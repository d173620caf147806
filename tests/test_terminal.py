import io
import math
import re

import pytest
from rich.console import Console

from gtr_turbo.play import printable
from gtr_turbo.terminal import TerminalView, percent, show_summary, sparkline
from tiny import settings

SUMMARY = {
    "name": "ezpoints",
    "seed": 3,
    "split": "held-out",
    "episodes": 200,
    "success_before": 0.1,
    "success_after": 0.4,
    "success_merge": 0.45,
    "student": "runs/a/checkpoints/000010/student",
    "teacher": "runs/a/checkpoints/000010/teacher",
    "env_steps": 5120,
    "seconds": 61.4,
    "peak_rss_mb": 812.3,
    "evaluations": {
        "before/held-out/student": {"success": 0.1, "interval": [0.066, 0.149]},
        "after/held-out/student": {"success": 0.4, "interval": [0.335, 0.469]},
        "after/held-out/teacher": {"success": 0.45, "interval": [0.383, 0.519]},
    },
}


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def printed(summary):
    console = Console(file=io.StringIO(), width=120)
    show_summary(console, summary)
    return console.file.getvalue()


def test_control_characters_are_shown_and_never_obeyed():
    assert printable("\x1b[31mred") == "\\x1b[31mred"
    assert printable("a\nb\tc") == "a b c"
    assert printable("\r\x07\x9b") == "\\r\\x07\\x9b"
    assert printable("\u202eabc") == "\\u202eabc"  # right-to-left override
    assert printable("\ud83c") == "\\ud83c"  # half a pair could not even be written
    assert printable("ü 漢 [bold]") == "ü 漢 [bold]"


def test_sparkline():
    assert sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline(list(range(100)), width=8) == "▁▂▃▄▅▆▇█"


def test_percent():
    assert percent(0.4321) == "43.2 %"
    assert numbers(percent(0.4, [0.335, 0.469])) == [40.0, 33.5, 46.9]
    assert percent(None) == "-"


def test_the_summary_shows_its_numbers():
    text = printed(SUMMARY)
    shown = numbers(text)
    for number in (10.0, 6.6, 14.9, 40.0, 33.5, 46.9, 45.0, 38.3, 51.9):
        assert number in shown
    for part in (
        "ezpoints", "seed 3", "held-out", "200 episodes", "5120 environment steps in 61 s",
        "812 MB", "the merge", SUMMARY["student"], SUMMARY["teacher"],
    ):  # fmt: skip
        assert part in text
    assert "the student" in printed({**SUMMARY, "success_merge": 0.3}).split("Better")[1]
    without = {f"success_{when}": None for when in ("before", "after", "merge")}
    assert "Better" not in printed({**SUMMARY, **without, "evaluations": {}, "episodes": 0})


def test_a_name_is_no_markup():
    console = Console(file=io.StringIO(), width=100)
    evaluation = {"success": 0.5, "interval": [0.4, 0.6], "episodes": 10}
    show_summary(
        console,
        {
            "name": "lr[/kl]", "seed": 0, "episodes": 10, "env_steps": 4, "seconds": 1.0, "peak_rss_mb": 1.0,
            "success_after": None, "success_merge": None, "student": "s", "teacher": "t",
            "evaluations": {"before/odd[b]/student": evaluation, "before/a/b/student": evaluation},
        },
    )  # fmt: skip
    text = console.file.getvalue()
    assert "lr[/kl] · seed 0" in text
    assert "odd[b], 10 episodes" in text
    assert re.search(r"a/b, 10 episodes.*50\.0 %", text)


def test_the_summary_says_which_evaluation_rests_on_other_episodes():
    found = dict(SUMMARY["evaluations"])
    found["before/held-out/student"] = {**found["before/held-out/student"], "episodes": 500}
    found["after/held-out/student"] = {**found["after/held-out/student"], "episodes": 200}
    text = printed({**SUMMARY, "evaluations": found})
    assert text.count("500 episodes") == text.count("200 episodes") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_a_view_tells_of_every_update(tmp_path, capsys, terminal):
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    row = {"update": 1, "env_steps": 4, "rollout/success": 0.25, "rollout/return": -1.5,
           "rollout/valid": 1.0, "teacher/kl": 0.0123, "critic/explained_variance": -math.pi}  # fmt: skip
    with TerminalView(console) as view:
        view.evaluating("student before", 3, 3)
        view.started(settings("m"), tmp_path, 0)
        view.evaluating("merge at update 1", 2, 2)
        view.updated(row | {"eval/student_success": 0.5, "eval/teacher_success": 0.625})
        view.noted("wandb [failed]")
        task = view._progress.tasks[0]
        assert (task.description, task.completed, task.total) == ("environment steps", 4, 4)
    text = console.file.getvalue()
    assert ("wandb [failed]" in text) is terminal  # without a panel it goes to standard error
    assert ("wandb [failed]" in capsys.readouterr().err) is not terminal
    for part in ("50.0%", "62.5%", "25.0%", "-1.50", "0.0123", "EZPoints"):
        assert part in text
    assert ("\x1b" in text) is terminal
    assert ("evaluating student before: 3/3 episodes" in text) is not terminal
