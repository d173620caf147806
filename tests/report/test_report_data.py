import base64
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zlib

import pytest
from PIL import Image
from stored_runs import frame, make_run, row, turn, write_lines

from gtr_turbo.report import ReportError, write_report
from gtr_turbo.report.curves import MAIN, TITLES, Columns, band, block_width, columns, curves
from gtr_turbo.report.episodes import join, order_of_choice, spread
from gtr_turbo.report.frames import Frames
from gtr_turbo.report.groups import group_labels, group_runs
from gtr_turbo.report.overview import facts, results, settings
from gtr_turbo.report.page import as_json, write_whole
from gtr_turbo.report.read import read_run, read_runs


def data_of(page):
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def test_importing_and_writing_needs_no_torch(tmp_path):
    run = make_run(tmp_path / "run", updates=1)
    code = f"""
import sys
from pathlib import Path
from gtr_turbo.report import write_report
write_report([Path({str(run)!r})], Path({str(tmp_path / "r.html")!r}))
assert not {{"torch", "transformers", "numpy"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# joining


def test_an_episode_split_over_two_files_is_one_episode(tmp_path):
    # 3 turns an update, 2 an episode: of each environment's episodes 0, 1, 2 in updates 1 and 2, number 1 is split
    run = read_run(make_run(tmp_path / "run", updates=2))
    episodes, twice = join(run.turns)
    assert twice == 0
    assert [(e.env, e.number, [t.update for t in e.turns]) for e in episodes] == [
        (0, 0, [1, 1]), (0, 1, [1, 2]), (1, 0, [1, 1]), (1, 1, [1, 2]), (0, 2, [2, 2]), (1, 2, [2, 2]),
    ]  # fmt: skip
    assert [e.outcome for e in episodes] == ["success", "failed"] * 2 + ["success"] * 2
    assert all(e.complete for e in episodes)


def test_an_episode_without_its_end_is_unfinished_and_one_with_a_gap_is_incomplete(tmp_path):
    folder = make_run(tmp_path / "run", updates=1)
    write_lines(folder / "trajectories" / "000001.jsonl", [turn(0, 0, 0), turn(1, 1, 1)])
    episodes, _ = join(read_run(folder).turns)
    assert [(e.outcome, e.complete) for e in episodes] == [("unfinished", True), ("failed", False)]


def test_of_a_turn_stored_twice_the_later_file_counts_and_the_page_says_so(tmp_path):
    folder = make_run(tmp_path / "run", updates=1)
    write_lines(folder / "trajectories" / "000002.jsonl", [turn(0, 0, 0, action="down")])
    episodes, twice = join(read_run(folder).turns)
    assert (twice, episodes[-1].turns[0].action) == (1, "down")
    info = write_report([folder], tmp_path / "r.html")
    assert any("stored twice" in warning for warning in info.warnings)


def test_an_episode_that_another_follows_lacks_turns_if_it_has_no_end(tmp_path):
    folder = make_run(tmp_path / "run", updates=1)
    lines = [turn(0, 0, 0), turn(0, 1, 0), turn(1, 0, 0), turn(1, 0, 1), turn(1, 1, 0)]
    write_lines(folder / "trajectories" / "000001.jsonl", lines)
    episodes, _ = join(read_run(folder).turns)
    assert [(e.env, e.number) for e in episodes if not e.complete] == [(0, 0)]
    warnings = write_report([folder], tmp_path / "r.html").warnings
    assert warnings == ("run: 1 episodes lack turns; they are marked",)


def test_turns_are_ordered_by_step_whatever_the_order_of_the_lines(tmp_path):
    folder = make_run(tmp_path / "run", updates=1)
    write_lines(folder / "trajectories" / "000001.jsonl", [turn(0, 0, 1), turn(0, 0, 0)])
    ((episode,), _) = join(read_run(folder).turns)
    assert ([t.step for t in episode.turns], episode.outcome) == ([0, 1], "success")


# choosing


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 100, 527])
def test_spread_is_a_permutation_whose_prefixes_cover_the_range(count):
    order = spread(count)
    assert sorted(order) == list(range(count))
    for size in (4, 10, 50):
        if size < count:
            chosen = sorted(order[:size])
            gaps = [b - a for a, b in itertools.pairwise(chosen)]
            assert chosen[0] == 0
            assert chosen[-1] == count - 1
            assert max(gaps) <= 2 * count / (size - 2) + 2


def test_a_prefix_of_the_choice_is_spread_over_runs_too(tmp_path):
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)])
    joined = [join(run.turns, number)[0] for number, run in enumerate(runs)]
    first = order_of_choice(joined)[:6]
    assert [e.run for e in first] == [0, 1, 0, 1, 0, 1]


def test_episodes_without_an_end_are_chosen_last(tmp_path):
    folder = make_run(tmp_path / "run", updates=6)
    path = max((folder / "trajectories").glob("*.jsonl"))
    write_lines(path, [*map(json.loads, path.read_text().splitlines()), turn(1, 90, 0)])
    *ended, cut = join(read_run(folder).turns)[0]
    assert cut.outcome == "unfinished"
    order = order_of_choice([[*ended, cut]])
    assert order[:2] == [ended[0], ended[-1]]
    assert order[-1] is cut


def test_episodes_bounds_the_replay_and_what_is_left_out_is_counted(tmp_path):
    folder = make_run(tmp_path / "run", updates=6)  # 9 episodes of 2 environments
    info = write_report([folder], tmp_path / "r.html", episodes=5)
    data = data_of(tmp_path / "r.html")
    assert (info.episodes, info.left_out, info.turns, info.frames) == (5, 13, 10, 10)
    assert (len(data["episodes"]), data["stored"]) == (5, 18)
    assert [e["turns"][0]["update"] for e in data["episodes"]] == sorted(
        e["turns"][0]["update"] for e in data["episodes"]
    )


def test_without_a_number_as_many_episodes_as_fit_are_chosen(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", updates=6)
    whole = write_report([folder], tmp_path / "all.html")
    assert whole.left_out == 0
    bare = write_report([folder], tmp_path / "bare.html", episodes=0)
    budget = (whole.size + bare.size) // 2
    monkeypatch.setattr("gtr_turbo.report.page.BUDGET", budget)
    half = write_report([folder], tmp_path / "half.html")
    assert 0 < half.episodes < whole.episodes
    assert half.size <= budget
    assert half.size > budget - 2 * (whole.size - bare.size) / whole.episodes


# escaping


def test_embedded_json_holds_no_character_that_html_reads():
    nasty = "</script><script>&amp;<!-- \u2028\u2029 \x00\x1b[31m \ud800 \u202e \"'` é"
    text = as_json({nasty: nasty})
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == {nasty: nasty}


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    folder = make_run(tmp_path / "run", updates=1)
    line = turn(0, 0, 0, reward=float("nan"), value=10**400, kl_tokens=[float("inf"), 0.1, "x"])
    write_lines(folder / "trajectories" / "000001.jsonl", [line])
    write_report([folder], tmp_path / "r.html")
    (stored,) = data_of(tmp_path / "r.html")["episodes"][0]["turns"]
    assert (stored["reward"], stored["value"], stored["kl"]) == (None, None, [None, 0.1, None])


def test_numbers_whose_sums_overflow_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", updates=2)
    lines = [turn(0, 0, step, reward=1.7e308) for step in (0, 1)]
    write_lines(folder / "trajectories" / "000001.jsonl", lines)
    huge = [row(update) | {"rollout/return": 1.7e308} for update in (1, 2)]
    write_lines(folder / "metrics.jsonl", huge)
    write_report([folder], tmp_path / "r.html")
    assert [t["reward"] for t in data_of(tmp_path / "r.html")["episodes"][0]["turns"]] == [None] * 2


# curves


def test_thinning_averages_blocks_and_places_them_at_their_end():
    rows = [row(update) for update in (1, 2, 3, 4, 5)]
    assert block_width([5], most=3) == 2
    assert block_width([1000, 10]) == 1
    thin = columns(rows, 2)
    assert (thin.updates, thin.steps, thin.seconds) == ([2, 4, 5], [12, 24, 30], [20, 40, 50])
    assert thin.metrics["rollout/return"] == [1.5, 3.5, 5.0]


def test_a_block_without_the_metric_is_none():
    rows = [{"update": 1, "env_steps": 6}, {"update": 2, "env_steps": 12, "judge/plan": 0.5}]
    assert columns(rows, 1).metrics["judge/plan"] == [None, 0.5]


def of(steps, seconds, **metrics):
    return Columns(updates=steps, steps=steps, seconds=seconds, metrics=metrics)


def test_band_by_hand():
    runs = [
        of([10, 20, 30], [1, 2, 3], x=[0.0, 2.0, None]),
        of([10, 20, 30, 40], [3, 4, 5, 6], x=[1.0, 4.0, 5.0, 6.0]),
        of([10, 20], [5, 9], x=[5.0, 3.0]),
    ]
    found = band(runs, "x")
    # at 30 and 40 not every run has a value
    assert found.steps == [10, 20]
    assert found.mean == [2.0, 3.0]
    assert (found.low, found.high) == ([0.0, 2.0], [5.0, 4.0])
    assert found.seconds == [3.0, 5.0]


def test_a_band_leaves_out_runs_that_never_log_the_metric_and_needs_two():
    with_it, without = of([10], [1], x=[1.0]), of([10], [1], y=[2.0])
    assert band([with_it, with_it, without], "x").mean == [1.0]
    assert band([with_it, without], "x") is None
    assert band([with_it, of([20], [1], x=[1.0])], "x") is None


def test_runs_are_grouped_by_all_settings_but_seed_and_folder(tmp_path):
    other = {"guidance": {"kind": "none"}}
    folders = [
        make_run(tmp_path / "a0"),
        make_run(tmp_path / "b0", settings=other),
        make_run(tmp_path / "a1", seed=1),
        make_run(tmp_path / "b1", seed=1, settings=other),
        make_run(tmp_path / "c", settings={"name": "alone"}),
    ]
    runs = read_runs(folders)
    groups = group_runs(runs)
    assert groups == [[0, 2], [1, 3], [4]]
    first, second, third = group_labels(runs, groups)
    assert first.startswith("toy (guidance.kind kl, guidance.beta 5.0, ")
    assert second.startswith("toy (guidance.kind none, guidance.beta not set, ")
    assert third == "c"
    made = curves(runs)["groups"]
    assert made[0]["bands"]["rollout/success"]["mean"][0] == pytest.approx(0.125)
    assert made[2]["bands"] == {}
    differing = {row["name"] for row in settings(runs) if row["differs"]}
    assert {"run", "seed", "name", "guidance.kind"} <= differing
    assert "teacher.density" not in differing


def test_a_run_of_a_seed_that_is_there_already_is_no_further_sample(tmp_path):
    folders = [make_run(tmp_path / f"a{n}", seed=seed) for n, seed in enumerate((0, 0, 1, 0))]
    runs = read_runs(folders)
    groups = group_runs(runs)
    assert groups == [[0, 2], [1], [3]]
    assert group_labels(runs, groups) == ["toy", "a1", "a3"]


def test_labels_name_as_many_settings_as_tell_groups_apart(tmp_path):
    grid = list(itertools.product((0, 1), repeat=4))
    runs = read_runs(
        [
            make_run(
                tmp_path / f"{number}-{seed}",
                seed=seed,
                updates=1,
                settings={"ppo": dict(zip("abcd", values, strict=True))},
                trajectories=False,
            )
            for number, values in enumerate(grid)
            for seed in (0, 1)
        ]
    )
    labels = group_labels(runs, group_runs(runs))
    assert labels[1] == "toy (ppo.a 0, ppo.b 0, ppo.c 0, ppo.d 1)"
    assert len(set(labels)) == 16
    means = [row for row in results(runs) if row["run"] is None]
    assert [row["group"] for row in means] == list(range(16))


def test_titles_are_of_metrics_that_are_documented(request):
    page = (request.config.rootpath / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in TITLES)
    assert set(MAIN) <= set(TITLES)


def test_results_over_seeds_are_mean_and_range(tmp_path):
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)])
    mean, *single = results(runs)
    assert [r["stages"][1]["success"] for r in single] == [0.6, 0.7]
    assert single[0]["stages"][1]["low"] == 0.5
    assert mean["label"] == "toy, mean of 2 seeds"
    after = mean["stages"][1]
    assert (after["success"], after["low"], after["high"]) == (pytest.approx(0.65), 0.6, 0.7)


def test_facts_name_what_differs_between_runs(tmp_path):
    other = {"guidance": {"kind": "none", "beta": 5.0}}
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=3, settings=other)])
    found = dict(facts(runs))
    assert found["Environment"] == ["Toy (prompt=compact)"]
    assert found["Model"] == ["tiny (all weights, vision frozen)"]
    assert found["Guidance"] == [
        "KL to the merge, beta 5.0, estimator clip, credit advantage",
        "none (RL4VLM)",
    ]
    assert found["Teacher"] == ["merge by ties, density 0.8, weights sma, interval 1"]
    assert found["Seeds"] == ["0", "3"]


# frames


def test_equal_pictures_are_embedded_once_and_without_loss(tmp_path):
    for name, number in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / f"{name}.png").write_bytes(frame(number, size=200))
    frames = Frames()
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    frames.load(paths)
    assert [frames.embed(path) for path in paths] == [0, 0, 1]
    for path, uri in zip(paths[1:], frames.embedded, strict=True):
        with (
            Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as shown,
            Image.open(path) as stored,
        ):
            assert shown.convert("RGB").tobytes() == stored.tobytes()
        assert len(uri) < 4 / 3 * path.stat().st_size + 40


def test_frames_missing_damaged_or_outside_the_run_are_said_and_never_read(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(frame(7))
    names = {
        0: "frames/gone.png",
        1: "frames/bad.png",
        2: "../../secret.png",
        3: str(secret),
        4: "a\0b",
        6: "frames/odd.png",
    }

    def change(line):
        return line | {"frame": names.get(line["episode"], line["frame"])}

    folder = make_run(tmp_path / "run", change=lambda line: line)
    (folder / "trajectories" / "frames" / "bad.png").write_bytes(frame(1)[:60])
    # a chunk of a colour profile without a profile: Pillow raises IndexError
    profile = bytes(4) + b"iCCP" + zlib.crc32(b"iCCP").to_bytes(4)
    odd = frame(1)[:-12] + profile + frame(1)[-12:]
    (folder / "trajectories" / "frames" / "odd.png").write_bytes(odd)
    lines = [change(turn(0, episode, step)) for episode in range(7) for step in (0, 1)]
    for path in (folder / "trajectories").glob("*.jsonl"):
        path.unlink()
    write_lines(folder / "trajectories" / "000001.jsonl", lines)
    info = write_report([folder], tmp_path / "r.html")
    shown = {e["episode"]: e["turns"][0]["frame"] for e in data_of(tmp_path / "r.html")["episodes"]}
    assert shown == {
        0: "gone.png is missing",
        1: "bad.png is not a readable PNG",
        2: "no frame was stored",
        3: "no frame was stored",
        4: "no frame was stored",
        5: 0,
        6: "odd.png is not a readable PNG",
    }
    assert any("3 stored frame(s) missing or damaged" in warning for warning in info.warnings)


# errors


def test_what_is_no_run_folder_is_named(tmp_path):
    run, out = make_run(tmp_path / "run", updates=1), tmp_path / "r.html"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "ended").mkdir()
    (tmp_path / "ended" / "summary.json").write_text("{}")
    cases = [
        ([tmp_path / "nowhere"], "nowhere does not exist; give the folder"),
        ([tmp_path / "file"], "file is a file; give the folder"),
        ([tmp_path / "empty"], "empty is no run folder: it holds no metrics.jsonl"),
        ([tmp_path / "new"], "has not finished its first update"),
        ([tmp_path / "ended"], "though the run has ended (there is a summary.json): put the file"),
        ([run, tmp_path / "run" / ".." / "run"], "given twice"),
        ([], "at least one run"),
    ]
    for folders, message in cases:
        with pytest.raises(ReportError, match=re.escape(message)):
            write_report(folders, out)
    with pytest.raises(ReportError, match=r"must end in \.html"):
        write_report([run], run / "metrics.jsonl")
    (tmp_path / "d.html").mkdir()
    with pytest.raises(ReportError, match="is a folder"):
        write_report([run], tmp_path / "d.html")
    with pytest.raises(ReportError, match="must not be negative"):
        write_report([run], out, episodes=-1)
    assert not out.exists()


@pytest.mark.parametrize("text", ["", "\n", "not json\n", '{"update": 1}\n', "[1]\n"])
def test_metrics_without_a_usable_row_are_an_error(tmp_path, text):
    run = make_run(tmp_path / "run", updates=1)
    (run / "metrics.jsonl").write_text(text)
    with pytest.raises(ReportError, match=r"metrics\.jsonl holds"):
        write_report([run], tmp_path / "r.html")


def test_damaged_lines_are_skipped_counted_and_shown(tmp_path):
    run = make_run(tmp_path / "run", updates=3)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"update": 4, "env_st\n\xff\xfe\n' + b"[" * 5000 + b"\n")
    first = run / "trajectories" / "000001.jsonl"
    lines = first.read_text().splitlines()
    lines[1] = lines[1][:40]
    lines.append(json.dumps(turn(0, 0, 0) | {"env": "0"}))
    lines.append(json.dumps(turn(0, 0, 0) | {"step": -1}))
    lines.append(json.dumps(turn(0, 0, 0) | {"episode": True}))
    lines.append(json.dumps(turn(0, 0, 0) | {"reply": None}))
    first.write_text("\n".join(lines) + "\n")
    (run / "summary.json").write_text("{")
    (run / "config.yaml").write_text("a: [\n")
    info = write_report([run], tmp_path / "r.html")
    assert info.warnings[:4] == (
        "run/metrics.jsonl: 3 damaged lines skipped (lines 4, 5, 6)",
        next(w for w in info.warnings if w.startswith("run/config.yaml cannot be read as YAML")),
        "run/summary.json is damaged: no evaluations are shown for this run",
        "run/trajectories/000001.jsonl: 5 damaged lines skipped (lines 2, 7, 8, 9, 10)",
    )
    data = data_of(tmp_path / "r.html")
    assert data["warnings"] == list(info.warnings)
    assert data["curves"]["runs"][0]["updates"] == [1, 2, 3]
    # the damaged line was the second turn of environment 0's first episode
    assert (data["episodes"][0]["outcome"], len(data["episodes"][0]["turns"])) == ("unfinished", 1)


def test_a_folder_among_the_stored_turns_is_told_and_skipped(tmp_path):
    run = make_run(tmp_path / "run")
    before = write_report([run], tmp_path / "r.html")
    (run / "trajectories" / "000009.jsonl").mkdir()
    info = write_report([run], tmp_path / "r.html")
    assert info.warnings == ("run/trajectories/000009.jsonl: no file; skipped",)
    assert info.turns == before.turns > 0


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: 2026-13-45", "a: \xff"])
def test_a_config_that_cannot_be_shown_is_said_and_the_rest_is_shown(tmp_path, text):
    run = make_run(tmp_path / "run", updates=1)
    (run / "config.yaml").write_bytes(text.encode("latin-1"))
    (warning,) = write_report([run], tmp_path / "r.html", episodes=0).warnings
    assert warning.startswith("run/config.yaml cannot be read as YAML (")
    assert data_of(tmp_path / "r.html")["curves"]["runs"][0]["updates"] == [1]


def test_a_run_without_config_or_summary_or_trajectories_still_has_curves(tmp_path):
    run = make_run(tmp_path / "run", trajectories=False)
    (run / "config.yaml").unlink()
    (run / "summary.json").unlink()
    info = write_report([run], tmp_path / "r.html")
    assert [w.split(" is ")[0] for w in info.warnings] == ["run/config.yaml", "run/summary.json"]
    data = data_of(tmp_path / "r.html")
    assert data["curves"]["main"] == [
        "rollout/success",
        "rollout/return",
        "teacher/kl",
        "ppo/entropy",
    ]
    assert "--save.trajectories" in data["empty"]


def test_runs_without_trajectories_beside_others_are_told_in_one_line(tmp_path):
    some, off = make_run(tmp_path / "some"), make_run(tmp_path / "off", trajectories=False)
    gone = [make_run(tmp_path / f"gone{number}") for number in range(12)]
    for run in gone:
        shutil.rmtree(run / "trajectories")
    (warning,) = write_report([some, off, *gone], tmp_path / "r.html").warnings
    named = ", ".join(f"gone{number}" for number in range(10))
    assert warning == f"no trajectories are there of {named} and 2 more"
    assert write_report([some, *gone], tmp_path / "r.html", episodes=0).warnings == ()


def test_equal_folder_names_get_labels_that_differ(tmp_path):
    runs = read_runs([make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")])
    assert [run.label for run in runs] == ["a/run", "b/run"]


def test_the_file_is_replaced_whole(tmp_path):
    run = make_run(tmp_path / "run", updates=1)
    out = tmp_path / "deep" / "r.html"
    first = write_report([run], out)
    assert first.size == out.stat().st_size
    write_report([run], out)
    assert [path.name for path in out.parent.iterdir()] == ["r.html"]


def test_two_writers_of_a_file_do_not_meet(tmp_path, monkeypatch):
    out, replace = tmp_path / "r.html", os.replace

    def slow(part, to):
        monkeypatch.setattr(os, "replace", replace)
        write_whole(out, b"other")  # while the first is about to be put into its place
        replace(part, to)

    monkeypatch.setattr(os, "replace", slow)
    write_whole(out, b"first")
    assert out.read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
