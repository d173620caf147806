"""Curves of several runs, in a real browser: what a point is the mean of, and what is drawn of many runs."""

import json

import pytest
from pages import until, words
from stored_runs import make_run, write_lines

from gtr_turbo.report import write_report


def with_rows(run, **columns):
    """Put columns, one value an update or None, into a run's rows of metrics."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row.pop(name.replace("__", "/"), None)
            if value is not None:
                row[name.replace("__", "/")] = value
    write_lines(path, rows)


def reading(page, metric):
    return words(page.locator(f'figure[data-metric="{metric}"] .readout'))


def test_a_point_can_be_the_mean_of_the_last_updates_and_the_band_is_of_such_means(
    opened, tmp_path
):
    runs = [
        make_run(tmp_path / str(seed), seed=seed, updates=20, trajectories=False) for seed in (0, 1)
    ]
    for seed, run in enumerate(runs):
        ups_and_downs = [float((update + seed) % 2) for update in range(20)]
        seldom = [update / 20 if update % 5 == 0 else None for update in range(1, 21)]
        with_rows(run, rollout__success=ups_and_downs, eval__student_success=seldom)
    write_report(runs, tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    assert page.input_value("#smooth") == "1"  # a single recipe is shown as it was logged
    assert page.locator("#smooth option").all_inner_texts() == [
        "as logged",
        "mean of the last 3 updates",
    ]
    assert reading(page, "rollout/success") == "last: 0.5 (0 to 1)"
    page.select_option("#smooth", "3")
    # the last three of seed 0 are 1, 0, 1, of seed 1 they are 0, 1, 0
    assert reading(page, "rollout/success") == "last: 0.5 (0.333 to 0.667)"
    # updates 18 and 19 logged none, and 15 is too long ago
    assert "student 1 (1 to 1)" in reading(page, "eval/student_success")
    page.locator('figure[data-metric="rollout/success"] svg.chart').focus()
    page.keyboard.press("Home")
    until(page, "document.querySelector('figure .readout').textContent.startsWith('6 steps')")
    assert reading(page, "rollout/success") == "6 steps: 0.5 (0 to 1)"  # nothing lies before it
    page.keyboard.press("ArrowRight")
    until(page, "document.querySelector('figure .readout').textContent.startsWith('12 steps')")
    assert reading(page, "rollout/success") == "12 steps: 0.5 (0.5 to 0.5)"


def test_the_band_of_three_seeds_is_the_interval_of_their_mean_or_their_range(opened, tmp_path):
    runs = [
        make_run(tmp_path / str(seed), seed=seed, updates=20, trajectories=False)
        for seed in range(3)
    ]
    for seed, run in enumerate(runs):
        alternating = [float(seed if update % 2 else 3) for update in range(20)]
        with_rows(run, rollout__success=alternating)
        with_rows(run, thought__self_bleu=[float(seed)] * 20 if seed else [None] * 20)
    write_report(runs, tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    # 0, 1, 2: deviation 1, t of 2 degrees of freedom 4.3027, 4.3027 / sqrt(3) = 2.484
    assert reading(page, "rollout/success") == "last: 1 (\u22121.48 to 3.48)"
    assert "95 % interval of the mean (Student's t)" in page.inner_text(".legend")
    page.select_option("#show-metrics", "thought/self_bleu")
    assert reading(page, "thought/self_bleu") == "last: 1.5 (1 to 2)"  # of two: their range
    figure = page.locator('figure[data-metric="thought/self_bleu"]')
    figure.locator("summary").click()
    assert "lowest to highest seed" in figure.locator("thead").inner_text()
    page.select_option("#show-metrics", "rollout/success")
    page.select_option("#smooth", "3")
    # the last three values are 0, 3, 0; 1, 3, 1; 2, 3, 2: means 1, 5/3, 7/3
    assert reading(page, "rollout/success") == "last: 1.67 (0.011 to 3.32)"
    page.select_option("#band", "range")
    assert reading(page, "rollout/success") == "last: 1.67 (1 to 2.33)"
    assert "lowest to highest seed" in page.inner_text(".legend")


def test_a_metric_that_is_constant_but_for_rounding_is_drawn(opened, tmp_path):
    run = make_run(tmp_path / "run", updates=20, trajectories=False)
    with_rows(run, rollout__return=[0.1] * 20)
    write_report([run], tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    page.set_default_timeout(5000)  # a page whose script does not end answers nothing
    page.select_option("#smooth", "3")  # (0.1 + 0.1 + 0.1) / 3 is 0.10000000000000002
    assert reading(page, "rollout/return") == "last: 0.1"
    heights = page.locator('figure[data-metric="rollout/return"] text.tick.end')
    assert heights.all_text_contents()[:5] == ["0.09", "0.095", "0.1", "0.105", "0.11"]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([79_010, 79_060], ["79.02k", "79.04k", "79.06k"]),
        ([1_000_000, 1_004_000], ["1M", "1.002M", "1.004M"]),
        ([20_000, 40_000], ["0", "20k", "40k"]),
    ],
)
def test_ticks_of_a_narrow_range_of_large_numbers_differ(opened, tmp_path, values, labels):
    run = make_run(tmp_path / "run", updates=2, trajectories=False)
    with_rows(run, rollout__return=values)
    write_report([run], tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    heights = page.locator('figure[data-metric="rollout/return"] text.tick.end')
    assert heights.all_text_contents()[: len(labels)] == labels


def test_many_recipes_are_told_by_their_means_and_named_once(opened, tmp_path):
    runs = [
        make_run(
            tmp_path / f"{name}{seed}",
            seed=seed,
            updates=30,
            settings={"name": name},
            trajectories=False,
        )
        for name in "abcd"
        for seed in (0, 1)
    ]
    write_report(runs, tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    success = page.locator('figure[data-metric="rollout/success"]')
    assert success.locator("path.band").count() == 4
    assert success.locator("path.line").count() == 4
    assert "thin lines" not in page.inner_text(".legend")
    assert page.input_value("#smooth") == "3"
    assert "a (2 seeds), b (2 seeds), c (2 seeds), d (2 seeds)" in page.inner_text("#facts")
    table = page.locator("#settings-body table").first
    assert table.locator("thead th").all_inner_texts() == ["Setting", "a", "b", "c", "d"]
    assert words(table.locator("tbody tr")) == "name a b c d"
