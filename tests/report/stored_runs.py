"""Run folders for the tests of the report: small, made by hand, every number known."""

import io
import json

import numpy as np
import yaml
from PIL import Image

TURNS = 2  # of an episode
PER_UPDATE = 3  # turns of an environment in an update: every second episode lies in two files
ENVS = 2


def frame(number, size=24):
    """PNG of a picture that no other number has."""
    picture = np.zeros((size, size, 3), np.uint8)
    picture[..., 0], picture[..., 1], picture[:, : size // 2, 2] = number % 256, number // 256, 200
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="png")
    return file.getvalue()


def turn(env, episode, step, **changes):
    """A line of trajectories; the reply is '{"thoughts": "...", "action": "up"}' in five tokens."""
    thought = f"env {env} episode {episode} step {step}"
    tokens = ['{"thoughts": "', thought, '", ', '"action": "up"}', "<end>"]
    last = step == TURNS - 1
    return {
        "env": env,
        "episode": episode,
        "step": step,
        "frame": f"frames/{env}-{episode}-{step}.png",
        "prompt": f"go to {episode}",
        "reply": "".join(tokens[:-1]),
        "tokens": tokens,
        "action": "up",
        "valid": True,
        "legal": True,
        "reward": 1.0 if last and episode % 2 == 0 else -0.5,
        "format_reward": 0.0,
        "value": 0.25,
        "terminated": last,
        "truncated": False,
        "success": episode % 2 == 0 if last else None,
        "facts": {"plan": episode % 2 == 0},
        "advantage": 0.5,
        # 3 tokens of thought; the second carries what tells episodes apart
        "kl_tokens": [0.0, round(0.02 * (episode + 1) + 0.001 * env, 5), 0.005],
    } | changes


def row(update, seed=0):
    """A line of metrics: success rises by 0.1 an update, and seeds lie 0.05 apart."""
    return {
        "update": update,
        "env_steps": 6 * update,
        "rollout/success": 0.1 * update + 0.05 * seed,
        "rollout/return": float(update),
        "teacher/kl": 0.001 * update,
        "ppo/entropy": 1.0 / update,
        "system/seconds": 10.0 * update + seed,
        "system/peak_rss_mb": 100.0,
    }


def evaluation(success):
    return {"success": success, "interval": [success - 0.1, success + 0.1], "episodes": 50}


def make_run(folder, *, seed=0, updates=6, settings=None, change=None, trajectories=True):
    """A run folder of `updates` updates.

    Args:
        folder: made here.
        seed: of the run.
        updates: rows and files.
        settings: over the config's own.
        change: called with every line of trajectories, returns what is written.
        trajectories: write any.
    """
    folder.mkdir(parents=True)
    config = {
        "run": str(folder),
        "name": "toy",
        "seed": seed,
        "model": {"path": "tiny", "train": "full", "vision": "frozen"},
        "env": {"id": "Toy", "options": {"prompt": "compact"}, "num_envs": ENVS},
        "guidance": {"kind": "kl", "beta": 5.0, "estimator": "clip", "credit": "advantage"},
        "teacher": {"method": "ties", "density": 0.8, "weights": "sma", "interval": 1},
        "save": {"trajectories": ENVS if trajectories else 0},
    } | (settings or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_lines(folder / "metrics.jsonl", [row(update + 1, seed) for update in range(updates)])
    summary = {
        "success_before": 0.2,
        "env_steps": 6 * updates,
        "seconds": 10.0 * updates,
        "peak_rss_mb": 100.0,
        "seed": seed,
        "name": "toy",
        "evaluations": {
            "before/held-out/student": evaluation(0.2),
            "after/held-out/student": evaluation(0.6 + 0.1 * seed),
            "after/held-out/teacher": evaluation(0.5),
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    if trajectories:
        (folder / "trajectories" / "frames").mkdir(parents=True)
        for update in range(updates):
            _update(folder / "trajectories", update, change or (lambda line: line))
    return folder


def _update(folder, update, change):
    lines = []
    for env in range(ENVS):
        for t in range(update * PER_UPDATE, (update + 1) * PER_UPDATE):
            line = change(turn(env, t // TURNS, t % TURNS))
            name = folder / line["frame"]
            if line["frame"].startswith("frames/") and not name.exists():
                name.write_bytes(frame(256 * env + t))
            lines.append(line)
    write_lines(folder / f"{update + 1:06d}.jsonl", lines)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
