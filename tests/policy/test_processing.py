"""Frames become the pixels that the stock image processor makes, to the bit."""

import numpy as np
import pytest
from PIL import Image

from gtr_turbo.policy import starter
from gtr_turbo.policy.processing import Processor


@pytest.mark.parametrize(("path", "kind"), [("qwen3-vl", "qwen3_vl"), ("qwen2.5-vl", "qwen2_5_vl")])
def test_pixels_are_those_of_the_stock_processor(path, kind):
    processor, draws = (
        Processor(starter.model_folder(f"tiny-{path}"), kind),
        np.random.default_rng(0),
    )
    shapes = [(300, 300, 3), (112, 112, 3), (400, 250, 3), (9, 8, 3)]
    frames = [draws.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    ours = processor.image_inputs(frames)
    stock = processor.image_processor(
        images=[Image.fromarray(frame) for frame in frames], return_tensors="pt"
    )
    assert set(ours) == set(stock)
    for name, tensor in ours.items():
        assert tensor.dtype == stock[name].dtype
        assert tensor.numpy().tobytes() == stock[name].numpy().tobytes()
