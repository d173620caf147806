"""The section of a comparison, in a real browser."""

import pytest
from pages import PHONE, words
from stored_runs import make_run

from gtr_turbo.report import write_report


def row(label, group, mean, points, **more):
    ends = {
        "low": (mean or 0.0) - 0.1,
        "high": (mean or 0.0) + 0.1,
        "seeds": len(points),
        "runs": len(points),
        "planned": 3,
        "best": False,
    }
    return {
        "label": label,
        "group": group,
        "mean": mean,
        "points": points,
        **ends,
        "difference": None,
    } | more


def comparison(label="guidance=kl"):
    gap = {"mean": 0.25, "low": -0.05, "high": 0.55, "above": 1, "below": 1, "pairs": 2, "seeds": 2}
    panel = {
        "title": "Student after",
        "about": "success on held-out",
        "unit": "fraction",
        "main": True,
        "rows": [
            row("guidance=none", 0, 0.5, [0.4, 0.6, 0.5]),
            row(label, 1, 0.75, [0.7, 0.8], best=True, difference=gap),
            row("guidance=sft", None, None, [], low=None, high=None),
            row("guidance=static", None, -0.0004, [-0.0004], low=-0.0504, high=0.0496),
        ],
    }
    alike = gap | {"mean": 0.0, "low": None, "high": None, "above": 0, "below": 0}
    rows = [row("guidance=none", 0, 90.0, [90.0], low=None, high=None),
            row(label, 1, 90.0, [90.0, 90.0], low=None, high=None, difference=alike)]  # fmt: skip
    cost = panel | {
        "title": "Wall time",
        "about": "",
        "unit": "seconds",
        "main": False,
        "rows": rows,
    }
    close = gap | {"mean": -0.0004, "low": -0.0014, "high": 0.0004, "above": 0}
    panel["rows"][2]["difference"] = close
    return {
        "title": "GTR-Turbo comparison: toy",
        "base": "guidance=none",
        "missing": [f"{label}, seed 2: exit code 2: <b>no</b>"],
        "panels": [panel, cost],
        "target": {"success": 0.5, "about": "Of finished runs.", "rows": [
            {"label": "guidance=none", "reached": 2, "seeds": 3, "steps": 5120},
            {"label": label, "reached": 0, "seeds": 2, "steps": None}]},
    }  # fmt: skip


@pytest.fixture
def compared(tmp_path):
    """Writes a report of two variants with two seeds each."""

    def make(**more):
        runs = [make_run(tmp_path / f"{kind}-{seed}", seed=seed, updates=2)
                for kind in ("a", "b") for seed in (0, 1)]  # fmt: skip
        groups = [("guidance=none", [0, 1]), ("guidance=kl", [2, 3])]
        out = tmp_path / "report.html"
        write_report(runs, out, episodes=0, groups=groups, comparison=comparison(**more))
        return out

    return make


def test_variants_stand_beside_each_other_with_seeds_and_intervals(opened, compared):
    page = opened(compared()).go()
    assert page.title() == "GTR-Turbo comparison: toy"
    assert page.inner_text("h1") == "GTR-Turbo comparison"
    assert page.locator("#comparison-link").is_visible()
    first = page.locator(".compared").first
    none, kl, sft, static = (words(first.locator("tbody tr").nth(i)) for i in range(4))
    assert none == "guidance=none 3 runs 50.0 % 40.0 % to 60.0 % –"
    assert (
        kl
        == "guidance=kl 2 of 3 runs ★ 75.0 % 65.0 % to 85.0 % +25.0 −5.0 to +55.0 higher in 1 of 2"
    )
    assert sft == "guidance=sft 0 of 3 runs – 0.0 −0.1 to 0.0 higher in 0 of 2"
    assert static == "guidance=static 1 of 3 runs 0.0 % −5.0 % to 5.0 % –"
    plot = first.locator("tbody tr").nth(1).locator("td.plot svg")
    assert plot.get_attribute("aria-label") == (
        "seeds 70.0 %, 80.0 %; mean 75.0 %, interval 65.0 % to 85.0 %"
    )
    places = [float(plot.locator("circle").nth(i).get_attribute("cx")) for i in (0, 1)]
    whisker = plot.locator(".whisker")
    low, high = (float(whisker.get_attribute(end)) for end in ("x1", "x2"))
    assert low < places[0] < places[1] < high
    assert (low + high) / 2 == pytest.approx(sum(places) / 2)
    target = words(page.locator(".compared").nth(1).locator("tbody"))
    assert target == "guidance=none 2 of 3 5,120 guidance=kl 0 of 2 –"
    assert not page.locator(".compared").nth(2).is_visible()
    page.locator("#comparison details summary").click()
    cost = page.locator(".compared").nth(2).locator("tbody")
    assert words(cost.locator("tr").nth(0)) == "guidance=none 1 of 3 runs 90 s one seed –"
    assert words(cost.locator("tr").nth(1)) == "guidance=kl 2 of 3 runs 90 s no spread the same"


def test_the_groups_of_a_comparison_are_the_bands_of_its_curves(opened, compared):
    page = opened(compared()).go()
    legend = words(page.locator(".legend"))
    assert "guidance=none: mean of 2 seeds (0, 1)" in legend
    assert "guidance=kl: mean of 2 seeds (0, 1)" in legend
    assert page.locator('figure[data-metric="rollout/success"] path.band').count() == 2


def test_a_report_that_compares_nothing_has_no_such_section(opened, report):
    page = opened(report).go()
    assert not page.locator("#comparison").is_visible()
    assert not page.locator("#comparison-link").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(opened, compared, scheme):
    page = opened(compared(), viewport=PHONE, scheme=scheme).go()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    panel = page.locator("#comparison .scroll").first
    assert panel.get_attribute("tabindex") == "0"  # it scrolls by keyboard too


def test_labels_and_logs_are_shown_as_text(opened, compared):
    page = opened(compared(label="<img src=x onerror=alert(1)>\u202e")).go()
    assert "<img src=x onerror=alert(1)>U+202E" in page.inner_text(".compared")
    assert "exit code 2: <b>no</b>" in page.inner_text("#comparison .notice")
    assert page.locator("#comparison img, #comparison b").count() == 0
