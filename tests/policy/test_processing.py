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


def test_a_lone_surrogate_in_a_prompt_is_a_question_mark():
    processor = Processor(starter.model_folder("tiny-qwen3-vl"), "qwen3_vl")
    frame = np.zeros((32, 32, 3), np.uint8)
    prompts = ["You said \ud83c.", "You said ?.", "2 \U0001f0a1"]
    first, second, whole = processor.encode([frame] * 3, prompts)
    assert first.tolist() == second.tolist()
    assert processor.clean(prompts[2]) == prompts[2]
    assert len(whole)
    assert processor.reply_ids("\ud83c").tolist() == processor.reply_ids("?").tolist()
