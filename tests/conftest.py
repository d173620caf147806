"""Tiny models with random weights, written once a session; no network, one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


def _build(architecture, folder, seed):
    import torch

    from gtr_turbo.policy import starter

    torch.set_num_threads(1)
    starter.build(architecture, folder, seed)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny Qwen3-VL."""
    return _build("qwen3-vl", tmp_path_factory.mktemp("models") / "tiny", 0)


@pytest.fixture(scope="session")
def tiny25(tmp_path_factory):
    """Folder of a tiny Qwen2.5-VL."""
    return _build("qwen2.5-vl", tmp_path_factory.mktemp("models") / "tiny25", 1)


@pytest.fixture(params=["tiny", "tiny25"])
def either(request):
    """Folder of either architecture: the test runs with both."""
    return request.getfixturevalue(request.param)
