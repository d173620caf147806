"""The command as a process: `gtr-turbo`, and `python -m gtr_turbo` for torchrun."""

from typing import NoReturn

from gtr_turbo.cli import main
from gtr_turbo.distributed.launch import leave


def run() -> NoReturn:
    """Run the command of this process' arguments, and end with its code."""
    leave(main())


if __name__ == "__main__":
    run()
