"""CPU seconds and bytes of a LoRA run's history: sums against factors.

    python benchmarks/history.py [--layers 4] [--width 2048] [--rank 64] [--checkpoints 8]

Times are of the process, on one thread, for the newest checkpoint and the merge of all.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from gtr_turbo.teacher.history import FactorHistory, History
from gtr_turbo.teaching_config import TeacherConfig


def change_of(_: str, factors: Tensor) -> Tensor:
    a, b = factors.chunk(2, 1)
    return 2.0 * (b.t().contiguous() @ a.contiguous())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, number in (("layers", 4), ("width", 2048), ("rank", 64), ("checkpoints", 8)):
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(0)
    names = [f"layer{i}" for i in range(options.layers)]
    made = [
        {name: torch.randn(options.rank, 2 * options.width, generator=draws) for name in names}
        for _ in range(options.checkpoints)
    ]
    print("| method | history | MB | add s | merge s |\n|---|---|---|---|---|")
    for method in ("ties", "linear"):
        config = TeacherConfig(method=method)
        for history in (History(config), FactorHistory(config, change_of)):
            for checkpoint in made:
                kept = (
                    (name, tensor if history.form == "factors" else change_of(name, tensor))
                    for name, tensor in checkpoint.items()
                )
                times = [time.process_time()]
                history.add(kept)
                times.append(time.process_time())
                for _ in history.merged():
                    pass
                times.append(time.process_time())
            add, merge = times[1] - times[0], times[2] - times[1]
            size = sum(tensor.nbytes for tensor in history.state().values()) / 1e6
            print(f"| {method} | {history.form} | {size:.0f} | {add:.2f} | {merge:.2f} |")


if __name__ == "__main__":
    main()
