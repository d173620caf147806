"""The replay in a real browser: filters, keys, addresses, tokens."""

from pages import count, title, until
from stored_runs import make_run, turn, write_lines

from gtr_turbo.report import write_report


def test_filters(opened, report):
    page = opened(report).go()
    expected = [
        ("#filter-run", "1", "18 of 36 episodes"),
        ("#filter-outcome", "success", "20 of 36 episodes"),
        ("#filter-outcome", "failed", "16 of 36 episodes"),
        ("#filter-outcome", "unfinished", "0 of 36 episodes"),
    ]
    for box, value, shown in expected:
        page.select_option(box, value)
        assert count(page) == shown
        page.click("#filter-reset")
        assert count(page) == "36 episodes"
    page.select_option("#filter-outcome", "unfinished")
    assert "No episode matches" in page.inner_text("#episodes")
    assert not page.is_visible("#turn-column")
    page.click("#filter-reset")
    page.check("#filter-invalid")
    assert count(page) == "2 of 36 episodes"
    assert title(page).startswith("toy-seed1: env 0, episode 4")
    page.uncheck("#filter-invalid")
    page.fill("#filter-search", "EPISODE 7 STEP 1")
    assert count(page) == "4 of 36 episodes"
    page.fill("#filter-search", "mumble")
    assert count(page) == "2 of 36 episodes"
    page.fill("#filter-search", "")
    page.fill("#filter-from", "2")
    page.fill("#filter-to", "2")  # turns 3 to 5 of an environment: its episodes 1 (its end) and 2
    assert count(page) == "8 of 36 episodes"
    page.fill("#filter-to", "1")
    assert count(page) == "4 of 36 episodes"  # episode 1 lies in both updates


def test_a_run_without_episodes_and_an_episode_without_its_end_say_so(opened, tmp_path):
    runs = [make_run(tmp_path / "some"), make_run(tmp_path / "none", trajectories=False)]
    lines = [turn(0, 0, 0), turn(0, 1, 0)]
    for path in (runs[0] / "trajectories").glob("*.jsonl"):
        path.unlink()
    write_lines(runs[0] / "trajectories" / "000001.jsonl", lines)
    write_report(runs, tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    notice = "#turn .notice"
    assert page.inner_text(notice) == "Turns of this episode are missing from the stored files."
    page.keyboard.press("j")
    assert page.inner_text(notice) == "The end of this episode was not stored: the run ended first."
    page.select_option("#filter-run", "1")
    assert page.inner_text("#episodes") == "This file holds no episode of this run."
    page.select_option("#filter-run", "0")
    page.select_option("#filter-outcome", "failed")
    assert "No episode matches" in page.inner_text("#episodes")


def test_order_by_kl_is_that_of_the_stored_numbers(opened, report):
    page = opened(report).go()
    page.select_option("#filter-run", "0")
    page.select_option("#filter-order", "kl")
    # 0.02 * (episode + 1) + 0.001 * env is largest for episode 8 of environment 1
    names = [text.split("·")[0].strip() for text in page.locator(".row .name").all_inner_texts()]
    assert names[:3] == ["env 1, episode 8", "env 0, episode 8", "env 1, episode 7"]
    assert title(page).startswith("toy-seed0: env 1, episode 8")
    assert "max KL 0.181" in page.inner_text(".row >> nth=0")


def test_keys_move_between_turns_and_episodes(opened, report):
    page = opened(report).go()
    press = page.keyboard.press
    assert "env 0, episode 0 turn 1 of 2" in title(page)
    press("ArrowRight")
    assert "episode 0 turn 2 of 2" in title(page)
    press("ArrowRight")  # at the end, nothing moves
    assert "episode 0 turn 2 of 2" in title(page)
    press("ArrowLeft")
    assert "turn 1 of 2" in title(page)
    press("j")
    assert "env 0, episode 1 turn 1" in title(page)
    press("k")
    assert "env 0, episode 0 turn 1" in title(page)
    page.focus("#episodes")
    press("ArrowDown")
    assert "env 0, episode 1" in title(page)
    assert (
        page.get_attribute(
            f"#{page.get_attribute('#episodes', 'aria-activedescendant')}", "aria-selected"
        )
        == "true"
    )
    press("ArrowUp")
    press("End")
    assert "env 0, episode 0 turn 2" in title(page)
    press("/")
    assert page.evaluate("document.activeElement.id") == "filter-search"
    page.keyboard.type("j?k")  # typed, not obeyed
    assert page.input_value("#filter-search") == "j?k"
    press("Escape")
    # as the list is still filtered by it
    assert page.input_value("#filter-search") == "j?k"
    page.click("#filter-reset")
    press("?")
    assert page.is_visible("#help")
    press("Escape")
    assert not page.is_visible("#help")


def test_buttons_do_the_same_and_focus_stays_near(opened, report):
    page = opened(report).go()
    page.get_by_role("button", name="Next turn").click()
    assert "turn 2 of 2" in title(page)
    page.get_by_role("button", name="Next episode").click()
    page.get_by_role("button", name="Next episode").click()
    page.get_by_role("button", name="Previous episode").click()
    assert "env 0, episode 1 turn 1" in title(page)
    page.get_by_role("button", name="Turn 2").click()
    assert "turn 2 of 2" in title(page)
    assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "step"
    page.locator(".row").nth(3).click()
    assert page.locator(".row").nth(3).get_attribute("aria-selected") == "true"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input')].filter(e => !(e.textContent.trim()"
        " || e.ariaLabel || e.labels?.length)).length"
    )
    assert unnamed == 0


def test_the_address_leads_back_to_the_turn(opened, report):
    first = opened(report)
    page = first.go()
    page.keyboard.press("j")
    page.keyboard.press("ArrowRight")
    hash_ = page.evaluate("location.hash")
    assert hash_ == "#replay/toy-seed0/0/1/1"
    assert "env 0, episode 1 turn 2 of 2" in title(opened(report).go(hash_))
    page.check("#filter-invalid")
    page.evaluate("location.hash = '#replay/toy-seed1/1/8/0'")
    until(page, "document.getElementById('turn-title').textContent.includes('episode 8')")
    assert count(page) == "36 episodes"  # the filter that hid it is gone
    lost = opened(report).go("#replay/toy-seed1/7/7/7")
    assert "does not hold the episode" in lost.inner_text("#lost")


def test_tokens_are_coloured_by_kl_with_number_and_thickness(opened, report):
    page = opened(report).go()
    page.select_option("#filter-order", "kl")
    tokens = page.locator("#tokens .tokens .token")
    assert tokens.all_inner_texts()[:2] == ['{"thoughts": "', "env 1 episode 8 step 0"]
    classes = [tokens.nth(i).get_attribute("class").split() for i in range(5)]
    assert [[c for c in names if c not in ("token", "chosen")] for names in classes] == [
        [], ["level-2"], [], ["rest"], ["rest"],
    ]  # fmt: skip
    assert tokens.nth(1).get_attribute("title") == "KL 0.181 nats"
    widths = [
        page.evaluate(
            "i => getComputedStyle(document.querySelectorAll('.scale .token')[i]).borderBottomWidth",
            i,
        )
        for i in range(6)
    ]
    assert widths == ["0px", "1px", "2px", "3px", "4px", "5px"]
    readout = "#tokens .token-readout"
    assert (
        page.inner_text(readout)
        == "Token 2 of 5: env 1 episode 8 step 0 KL 0.181 nats, level 2 of 5"
    )
    tokens.nth(1).focus()
    page.keyboard.press("ArrowLeft")
    assert page.inner_text(readout).endswith("KL 0 nats")
    assert "turn 1 of 2" in title(page)  # the arrow moved the token, not the turn
    tokens.nth(4).click()
    assert "not part of the thought" in page.inner_text(readout)


def test_lines_without_tokens_show_the_reply_without_colours(opened, tmp_path):
    def older(line):
        del line["tokens"]
        if line["episode"]:
            del line["kl_tokens"]
        return line

    run = make_run(tmp_path / "run", updates=1, change=older)
    write_report([run], tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    assert page.locator("#tokens").count() == 0
    assert page.inner_text("#raw pre") == '{"thoughts": "env 0 episode 0 step 0", "action": "up"}'
    assert page.locator("#bars rect").count() == 3
    page.keyboard.press("j")
    assert page.locator("#bars").count() == 0


def test_levels_begin_at_their_bounds_and_negative_estimates_have_their_own(opened, tmp_path):
    kl = [0.0099, 0.01, 0.05, 0.2, 0.5, 1.0, -0.3]
    run = make_run(tmp_path / "run", updates=1)
    lines = [turn(0, 0, 0, tokens=list("abcdefgh"), kl_tokens=kl)]
    write_lines(run / "trajectories" / "000001.jsonl", lines)
    write_report([run], tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    tokens = page.locator("#tokens .tokens .token")
    found = [tokens.nth(i).get_attribute("class").split() for i in range(8)]
    assert [[c for c in names if c not in ("token", "chosen")] for names in found] == [
        [], ["level-1"], ["level-2"], ["level-3"], ["level-4"], ["level-5"],
        ["level-3", "negative"], ["rest"],
    ]  # fmt: skip
    assert "chosen" in found[5]  # the readout begins at the highest
    style = (
        "i => getComputedStyle(document.querySelectorAll('.tokens .token')[i]).borderBottomStyle"
    )
    assert [page.evaluate(style, i) for i in (3, 6)] == ["solid", "dashed"]
    assert "negative" in page.inner_text(".scale")


def test_odd_numbers_of_tokens_and_kl(opened, tmp_path):
    kinds = [
        {"kl_tokens": [0.1] * 9},
        {"kl_tokens": []},
        {"kl_tokens": [None, None]},
        {"tokens": []},
    ]
    run = make_run(tmp_path / "run", updates=1)
    lines = [turn(0, 0, step, **change) for step, change in enumerate(kinds)]
    write_lines(run / "trajectories" / "000001.jsonl", lines)
    write_report([run], tmp_path / "r.html")
    page = opened(tmp_path / "r.html").go()
    said = []
    for _ in kinds:
        said.append(page.inner_text("#tokens").replace("\n", " "))
        page.keyboard.press("ArrowRight")
    assert "Token 1 of 5" in said[0]
    assert "no KL is stored" in said[1]
    assert "KL not stored" in said[2]
    assert "Token" not in said[3].replace("Reply, token by token", "")


def test_a_choice_of_folding_lasts_while_turns_go_by(opened, report):
    page = opened(report).go()
    assert page.is_visible("#prompt pre")
    page.click("#prompt summary")
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    assert not page.is_visible("#prompt pre")
