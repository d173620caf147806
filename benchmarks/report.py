"""How large a report is, how long it takes to write, and how fast it opens and answers in Chromium.

    python benchmarks/report.py                      # a made-up run: 300 episodes, 30,000 updates
    python benchmarks/report.py --run runs/points24-seed0 --run runs/points24-seed1

The made-up run has frames of Points24 (300 x 300), 4 turns an episode, 60 tokens a reply and 40 metrics an update.
Needs Playwright and a Chromium. Times are medians over `--repeats` fresh browser contexts.
"""

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import gtr_turbo.envs
from gtr_turbo.report import write_report

TURNS, TOKENS, METRICS = 4, 60, 40


def make_run(folder, episodes, rows):
    rng = random.Random(0)
    frames = folder / "trajectories" / "frames"
    frames.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: made-up\nseed: 0\n")
    with open(folder / "metrics.jsonl", "w") as file:
        for i in range(rows):
            row = {"update": i + 1, "env_steps": i + 1, "system/seconds": float(i)}
            row |= {f"group{j % 5}/metric{j}": rng.random() for j in range(METRICS)}
            row["rollout/success"] = rng.random()
            file.write(json.dumps(row) + "\n")
    env = gtr_turbo.envs.make_env("Points24")
    per_file = max(1, episodes // 60)
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        with open(folder / "trajectories" / f"{episode // per_file + 1:06d}.jsonl", "a") as file:
            for step in range(TURNS):
                picture = observation["image"].copy()
                picture[-20:, : 40 + step] = rng.randrange(256)  # every frame is its own
                name = f"frames/{episode}-{step}.png"
                Image.fromarray(picture).save(folder / "trajectories" / name)
                file.write(json.dumps(turn(rng, episode, step, name, observation["prompt"])) + "\n")


def turn(rng, episode, step, frame, prompt):
    words = [f"{rng.randrange(100)} " for _ in range(TOKENS - 4)]
    tokens = ['{"thoughts": "', *words, '"', ', "action": "', "+", '"}']
    return {
        "env": 0, "episode": episode, "step": step, "frame": frame, "prompt": prompt,
        "reply": "".join(tokens), "tokens": tokens, "action": "+", "valid": True, "legal": True,
        "reward": 0.0, "format_reward": 0.0, "value": rng.random(), "advantage": rng.random(),
        "terminated": step == TURNS - 1, "truncated": False,
        "success": rng.random() < 0.5 if step == TURNS - 1 else None,
        "facts": {"plan": rng.random() < 0.5},
        "kl_tokens": [round(rng.expovariate(20), 5) for _ in range(TOKENS - 3)],
    }  # fmt: skip


TIMED = """(action) => new Promise((done) => {
  const start = performance.now();
  action();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""
NEXT_TURN = "() => document.getElementById('next-turn').click()"
NEXT_EPISODE = "() => document.getElementById('next-episode').click()"
SEARCH = """() => { const box = document.getElementById('filter-search'); box.value = '77 1';
  box.dispatchEvent(new Event('input')); }"""


def measure(browser, page_file):
    """One opening: milliseconds until it can be used and until it is painted, and of three answers."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-ready]")
    found = {
        "usable": page.evaluate(
            "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
        ),
        "painted": page.evaluate(
            "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN"
        ),
    }
    for name, action in (
        ("next turn", NEXT_TURN),
        ("next episode", NEXT_EPISODE),
        ("search", SEARCH),
    ):
        found[name] = page.evaluate(f"({TIMED})({action})")
    context.close()
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="append", type=Path, help="a real run; can be repeated")
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = options.run
        if not runs:
            runs = [folder / "made-up"]
            make_run(runs[0], options.episodes, options.rows)
        start = time.perf_counter()
        info = write_report(runs, folder / "report.html")
        print(
            f"written in {time.perf_counter() - start:.1f} s: {info.size / 1e6:.1f} MB, {info.episodes} episodes "
            f"({info.left_out} left out), {info.turns} turns, {info.frames} frames"
        )
        path = shutil.which("chromium") or shutil.which("google-chrome")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            print(f"Chromium {browser.version}, median of {options.repeats}:")
            times = [measure(browser, info.out) for _ in range(options.repeats)]
            browser.close()
    for name in times[0]:
        print(f"{name:<14} {statistics.median(one[name] for one in times):6.0f} ms")


if __name__ == "__main__":
    main()
