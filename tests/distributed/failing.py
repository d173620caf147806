"""`gtr-turbo` whose rank 1 fails in its second update, unless the job was restarted."""

import os
import sys

from gtr_turbo import learner
from gtr_turbo.cli import main
from gtr_turbo.distributed.launch import leave
from gtr_turbo.learning.update import TrainingError

PLAIN = learner.collect


def collect(*arguments):
    learner.collect = leaking
    return PLAIN(*arguments)


def leaking(*arguments):
    raise TrainingError("the roof of rank 1 leaks")


if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    learner.collect = collect

leave(main(sys.argv[1:]))
