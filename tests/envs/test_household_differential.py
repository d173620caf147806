"""A small sample of `benchmarks/household.py`: our engine against ALFWorld's own, word by word."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from gtr_turbo.envs.household.files import export
from gtr_turbo.envs.household.generator import generate
from gtr_turbo.envs.household.oracle import solve
from gtr_turbo.envs.household.world import TASKS

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages of the real engine


@pytest.fixture(scope="module")
def benchmark():
    pytest.importorskip("alfworld", reason="the real engine needs pip install alfworld==0.4.2")
    pytest.importorskip("textworld", reason="the real engine needs pip install alfworld==0.4.2")
    path = Path(__file__).parents[2] / "benchmarks" / "household.py"
    spec = importlib.util.spec_from_file_location("household_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_game_of_each_type_is_the_same_in_both_engines(benchmark, tmp_path):
    real, rng = benchmark.Real(), np.random.default_rng(11)
    for i, task in enumerate(TASKS):
        game = generate(rng, task=task)
        path = export(game, tmp_path, f"g{i}", solve(game))
        found = benchmark.compare(real, path, rng, steps=4)
        assert found["differences"] == []
        assert found["states"] == 5
