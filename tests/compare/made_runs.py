"""Finished runs by hand, with numbers that are known: no model is trained."""

import json
from dataclasses import replace

from gtr_turbo.config import TrainConfig
from gtr_turbo.settings import build_config, config_file, dump_config, merge, read_config


def evaluation(success):
    return {"success": success, "interval": [success, success], "episodes": 50}


def finished(folder, *, seed=0, over=None, after=0.5, merge_after=0.6, curve=(0.1, 0.3, 0.5)):
    """A run of the recipe `ezpoints` with `over`, as `gtr-turbo train` leaves it.

    Args:
        folder: made here.
        seed: of the run.
        over: nested settings.
        after: success of the student after.
        merge_after: of the merge.
        curve: `rollout/success` of the first updates, 256 steps and 10 seconds apart; in others no episode ends.
    """
    settings = merge(read_config(config_file("ezpoints")), {"name": "ezpoints"} | (over or {}))
    config = replace(build_config(TrainConfig, settings), run=str(folder), seed=seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    rows = [
        {"update": i + 1, "env_steps": 256 * (i + 1), "rollout/success": y, "system/seconds": 10.0 * (i + 1),
         "system/cpu_seconds": 15.0 * (i + 1)}
        for i, y in enumerate(curve)
    ]  # fmt: skip
    for update in range(len(curve) + 1, config.num_updates + 1):
        rows.append({"update": update, "env_steps": 256 * update})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "env_steps": config.num_updates * config.turns_per_update,
        "seconds": 100.0 + seed,
        "peak_rss_mb": 1000.0,
        "seed": seed,
        "evaluations": {
            "before/held-out/student": evaluation(0.1),
            "after/held-out/student": evaluation(after),
            "after/held-out/teacher": evaluation(merge_after),
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
