"""The page as a whole in a real browser: what it shows, loads, lets in; curves; themes; size."""

import json

import pytest
from pages import DESKTOP, PHONE, count, title, until, words
from stored_runs import frame, make_run, row, turn, write_lines

from gtr_turbo.report import write_report


def test_it_opens_and_shows_everything(opened, report):
    page = opened(report).go()
    assert page.title() == "GTR-Turbo report: toy-seed0, toy-seed1"
    assert "Toy (prompt=compact)" in page.inner_text("#facts")
    table = page.inner_text(".results")
    assert "60.0 %" in table
    assert "50.0 – 70.0" in table
    assert "toy, mean of 2 seeds" in table
    note = page.inner_text("#results-table p.muted >> nth=0")
    assert note.startswith("Success in the runs' evaluations, 50 episodes each, with its 95 %")
    assert count(page) == "36 episodes"
    assert page.locator("#turn img").count() == 1  # only the open turn is rendered
    assert page.evaluate("document.querySelector('#turn img').naturalWidth") == 24
    assert page.inner_text("#thought dd") == "env 0 episode 0 step 0"
    assert page.inner_text("#action pre") == "up"
    assert page.inner_text("#prompt pre") == "go to 0"
    numbers = page.inner_text("#turn .numbers")
    assert all(word in numbers for word in ("−0.5", "0.25", "0.5", "0.02"))
    chips = page.locator("#turn .chip").all_inner_texts()
    assert chips == ["✓ valid", "✓ legal", "✓ plan: right"]
    assert page.locator("#replay .row").count() < 36  # the list holds only rows in view


def test_an_evaluation_on_other_episodes_than_the_rest_says_so(opened, tmp_path):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["evaluations"]["after/held-out/student"]["episodes"] = 1500
    (run / "summary.json").write_text(json.dumps(summary))
    write_report([run], tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    cells = page.locator(".results tbody td.number").all_inner_texts()[:3]
    assert [cell.split("\n")[-1] for cell in cells] == [
        "50 episodes",
        "1,500 episodes",
        "50 episodes",
    ]


def test_every_turn_has_its_own_frame(opened, report):
    page = opened(report).go()
    seen = set()
    for _ in range(4):
        for _ in range(2):
            until(page, "document.querySelector('#turn img').complete")
            assert page.evaluate("document.querySelector('#turn img').naturalWidth") == 24
            seen.add(page.get_attribute("#turn img", "src"))
            page.keyboard.press("ArrowRight")
        page.keyboard.press("j")
    assert len(seen) == 8


def test_two_recipes_have_two_lines_and_one_that_ended_says_so(opened, tmp_path):
    runs = [
        make_run(tmp_path / "long"),
        make_run(tmp_path / "short", updates=2, settings={"name": "b"}),
    ]
    write_report(runs, tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    success = page.locator('figure[data-metric="rollout/success"]')
    dashes = [success.locator("path.line").nth(i).get_attribute("stroke-dasharray") for i in (0, 1)]
    assert len(set(dashes)) == 2
    success.locator("svg.chart").focus()
    page.keyboard.press("End")
    until(page, "document.querySelector('figure .readout').textContent.startsWith('36 steps')")
    assert words(success.locator(".readout")) == "36 steps: long: 0.6 short: ended"
    assert page.locator("#settings-body .settings tbody tr").first.inner_text().split() == [
        "name",
        "toy",
        "b",
    ]


NASTY = (
    "<script>window.hacked=1</script></script><img src=x onerror='window.hacked=2'>\"'&amp;"
    "</textarea>--><svg onload=window.hacked=3> \x1b[31mred\x00 \u202egnp.exe \ud800 \u2028 \u200b"
)


def test_a_malicious_trajectory_is_shown_as_text(opened, tmp_path):
    def nasty(line):
        return line | {
            "prompt": NASTY,
            "reply": json.dumps({"thoughts": NASTY, "action": "up"}),
            "action": NASTY,
            "tokens": [NASTY, "", "\n", " ", NASTY],
            "facts": {NASTY: True, "__proto__": False, "constructor": True},
            "frame": f"frames/{NASTY}",
        }

    lines = [nasty(turn(0, 0, 0)), nasty(turn(0, 0, 1)) | {"reply": NASTY}]
    run = make_run(
        tmp_path / "run", updates=1, settings={"name": NASTY, NASTY: NASTY, "env": {"id": NASTY}}
    )
    for path in (run / "trajectories").glob("*.jsonl"):
        path.unlink()
    write_lines(run / "trajectories" / "000001.jsonl", lines)
    write_lines(
        run / "metrics.jsonl",
        [
            {
                "update": 1,
                "env_steps": 6,
                "rollout/success": 0.5,
                NASTY: 1.0,
                "__proto__": 1.0,
                "constructor": 2.0,
            }
        ],
    )
    write_report([run], tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    for _ in range(2):
        prompt = page.inner_text("#prompt pre")
        assert prompt.startswith("<script>window.hacked=1</script></script><img src=x onerror=")
        assert "ESC[31mredNUL U+202Egnp.exe U+D800 U+2028 U+200B" in prompt
        assert "<img src=x onerror=" in page.inner_text("#action pre")
        assert page.locator("#turn img").count() == 0
        assert "No frame" in page.inner_text("#turn .frame")
        assert any("constructor: right" in text for text in page.locator(".chip").all_inner_texts())
        page.keyboard.press("ArrowRight")
    page.select_option("#show-metrics", "__proto__")
    page.select_option("#show-metrics", "constructor")
    page.locator("#settings-body summary").click()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x], svg[onload]").count() == 0
    assert page.evaluate("document.scripts.length") == 2  # data and script; nothing was added


def test_the_policy_stops_what_escaping_would_have_missed(opened, report):
    watched = opened(report)
    page = watched.go()
    page.evaluate(
        "() => { document.body.insertAdjacentHTML('beforeend', `<img src='x:' onerror='window.hacked=1'>`);"
        " const s = document.createElement('script'); s.textContent = 'window.hacked = 2';"
        " document.body.append(s); }"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert any("CSP script-src" in text for text in watched.complaints)
    watched.complaints.clear()
    watched.requests.clear()


def test_curves_axis_choice_cursor_and_table(opened, report):
    page = opened(report).go()
    assert page.locator("#charts figure").count() == 4  # the main metrics that these runs have
    success = page.locator('figure[data-metric="rollout/success"]')
    assert success.locator("path.band").count() == 1
    assert success.locator("path.line.thin").count() == 2
    assert "mean of 2 seeds (0, 1)" in page.inner_text(".legend")
    assert "lowest to highest seed" in page.inner_text(".legend")
    assert "from 0.125 to 0.625" in success.locator("svg.chart").get_attribute("aria-label")
    assert success.locator("svg.chart title").count() == 1
    assert success.locator("svg.chart desc").count() == 1
    svg = success.locator("svg.chart")
    svg.focus()
    page.keyboard.press("Home")
    until(page, "document.querySelector('figure .readout').textContent.startsWith('6 steps')")
    # at step 6: seeds at 0.1 and 0.15
    assert words(success.locator(".readout")) == "6 steps: 0.125 (0.1 to 0.15)"
    other = page.locator('figure[data-metric="rollout/return"] .readout')
    assert other.inner_text().startswith("6 steps")  # one cursor for all charts
    page.keyboard.press("ArrowRight")
    until(page, "document.querySelector('figure .readout').textContent.startsWith('12 steps')")
    assert "turn 1 of 2" in title(page)
    page.get_by_label("Wall time").check()
    page.keyboard.press("Escape")
    success.locator("summary").click()
    # seeds differ in their times, and the mean has its own: three places for each of 6 updates
    until(page, "document.querySelectorAll('figure tbody tr').length === 18")
    cells = success.locator("tbody tr").first.locator("td, th").all_inner_texts()
    assert cells[0] == "10 s"
    page.select_option("#show-metrics", "ppo/*")
    assert page.locator("#charts figure").count() == 1
    page.select_option("#show-metrics", "teacher/kl")
    assert page.locator("#charts.one figure").get_attribute("data-metric") == "teacher/kl"
    box = page.locator("#charts svg.chart").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 50)
    until(page, "document.querySelector('figure .readout').textContent.startsWith('1 min')")
    assert "0.006" in page.inner_text("#charts .readout")


def test_student_and_merge_share_a_chart_though_few_updates_have_them(opened, tmp_path):
    run = make_run(tmp_path / "run")
    rows = [row(update) for update in range(1, 7)]
    for at, student, merge in ((1, 0.25, 0.5), (4, 0.75, 0.625)):
        rows[at] |= {"eval/student_success": student, "eval/teacher_success": merge}
    write_lines(run / "metrics.jsonl", rows)
    write_report([run], tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    chart = page.locator('figure[data-metric="eval/student_success"]')
    assert chart.locator("path.line").count() == 2
    assert page.locator('figure[data-metric="eval/teacher_success"]').count() == 0
    assert words(chart.locator(".readout")) == "last: student 0.75 merge 0.625"
    label = chart.locator("svg.chart").get_attribute("aria-label")
    assert "run, student: from 0.25 to 0.75; run, merge: from 0.5 to 0.625" in label
    chart.locator("summary").click()
    until(page, "document.querySelectorAll('figure tbody tr').length === 2")
    assert chart.locator("tbody tr").all_inner_texts() == ["12\t0.25\t0.5", "30\t0.75\t0.625"]


CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const background = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    if (node.closest('script, option, .visually-hidden, [aria-disabled=true]')) continue;
    const svg = node.closest('svg');
    const color = parse(svg ? getComputedStyle(node).fill : getComputedStyle(node).color);
    const [a, b] = [light(color), light(background(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push(`${ratio.toFixed(2)} ${node.className} ${walker.currentNode.data.slice(0, 30)}`);
  }
  return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_both_themes_are_readable_and_nothing_is_wider_than_the_screen(
    opened, report, scheme, viewport
):
    page = opened(report, viewport, scheme).go("#replay/toy-seed1/0/4/0")
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.wait_for_timeout(50)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.evaluate(CONTRAST) == []
    page.keyboard.press("k")
    page.select_option("#filter-order", "kl")
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_the_theme_follows_the_system_until_the_button_is_used(opened, report):
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = opened(report).go(), opened(report, scheme="dark").go()
    colours = [page.evaluate(colour) for page in (light, dark)]
    assert colours[0] != colours[1]
    dark.click("#theme")
    assert dark.inner_text("#theme") == "Theme: light"
    assert dark.evaluate(colour) == colours[0]
    light.click("#theme")
    light.click("#theme")
    assert light.evaluate(colour) == colours[1]


def test_the_focus_is_visible_and_motion_is_reduced(opened, report):
    page = opened(report).go()
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_without_trajectories_the_replay_says_why(opened, tmp_path):
    run = make_run(tmp_path / "run", trajectories=False)
    (run / "summary.json").unlink()
    write_report([run], tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    assert "save.trajectories is 0" in page.inner_text("#replay-empty")
    assert page.locator("#charts figure").count() == 4
    assert "summary.json is missing" in page.inner_text("#notices")
    assert "not ended" in page.inner_text(".results")
    page.keyboard.press("j")
    page.keyboard.press("?")
    assert page.is_visible("#help")


def test_300_episodes_and_30000_rows_stay_small_and_open(opened, tmp_path):
    run = make_run(tmp_path / "run", updates=1)
    write_lines(
        run / "metrics.jsonl",
        [
            {"update": i + 1, "env_steps": i + 1, "rollout/success": i % 7 / 7}
            for i in range(30_000)
        ],
    )
    lines = [
        turn(0, e, s, terminated=s == 4, frame=f"frames/{e % 50}.png")
        for e in range(300)
        for s in range(5)
    ]
    for i in range(50):
        (run / "trajectories" / "frames" / f"{i}.png").write_bytes(frame(1000 + i, size=100))
    write_lines(run / "trajectories" / "000001.jsonl", lines)
    info = write_report([run], tmp_path / "r.html")
    assert (info.episodes, info.turns, info.frames, info.left_out) == (300, 1500, 50, 0)
    assert info.size <= 30e6
    page = opened(tmp_path / "r.html").go()
    assert count(page) == "300 episodes"
    assert "mean over 30 updates" in page.inner_text("#curves-body")
    assert page.evaluate("document.querySelectorAll('body *:not(script)').length") < 2000
    for _ in range(40):
        page.keyboard.press("j")
    assert "env 0, episode 40 turn 1 of 5" in title(page)
    assert page.locator(".row[aria-selected=true]").is_visible()
