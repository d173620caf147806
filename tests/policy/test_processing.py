"""Frames become the pixels, and prompts the ids, that the stock processors make."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gtr_turbo.config import SamplingConfig
from gtr_turbo.policy import starter
from gtr_turbo.policy.generation import generate
from gtr_turbo.policy.processing import CHAT_TEMPLATE, Processor
from tiny import make_policy


@pytest.mark.parametrize(("path", "kind"), [("qwen3-vl", "qwen3_vl"), ("qwen2.5-vl", "qwen2_5_vl")])
def test_pixels_are_those_of_the_stock_processor(path, kind):
    processor, draws = (
        Processor(starter.model_folder(f"tiny-{path}"), kind),
        np.random.default_rng(0),
    )
    shapes = [(300, 300, 3), (112, 112, 3), (400, 250, 3), (9, 8, 3)]
    frames = [draws.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    ours = processor.image_inputs([processor.shrink(frame) for frame in frames])
    stock = processor.image_processor(
        images=[Image.fromarray(frame) for frame in frames], return_tensors="pt"
    )
    assert set(ours) == set(stock)
    for name, tensor in ours.items():
        assert tensor.dtype == stock[name].dtype
        assert tensor.numpy().tobytes() == stock[name].numpy().tobytes()


def test_a_size_that_shrinking_twice_would_change_is_shrunk_once(tiny, tmp_path):
    """Where a preprocessor_config.json asks for one number of pixels, no size may suit, and any changes again."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    file = folder / "preprocessor_config.json"
    about = json.loads(file.read_text())
    side = about["patch_size"] * about["merge_size"]
    pixels = (
        9 * side**2
    )  # 3 x 3 tokens; of a frame twice as wide as high it makes 4 x 2, and of that 5 x 3
    about["size"] = {"shortest_edge": pixels, "longest_edge": pixels}
    file.write_text(json.dumps(about))
    policy = make_policy(folder)
    processor, frame = policy.processor, np.full((60, 120, 3), 7, np.uint8)
    once = processor.shrink(frame)
    assert processor.shrink(once).shape != once.shape
    for vision in ("frozen", "trained"):
        policy = make_policy(folder, vision=vision)
        observed = policy.observe([frame] * 2, ["1", "2"])
        assert (observed[0].shown is None) == (vision == "frozen")
        (reply, _) = generate(policy, observed, SamplingConfig(max_new_tokens=2), torch.Generator())
        assert len(reply.response_ids) > 0
    stock = processor.image_processor(images=[Image.fromarray(frame)], return_tensors="pt")
    assert torch.equal(stock["pixel_values"], processor.image_inputs([once])["pixel_values"])


def test_a_lone_surrogate_in_a_prompt_is_a_question_mark():
    processor = Processor(starter.model_folder("tiny-qwen3-vl"), "qwen3_vl")
    frame = np.zeros((32, 32, 3), np.uint8)
    prompts = ["You said \ud83c.", "You said ?.", "2 \U0001f0a1"]
    first, second, whole = processor.encode([frame] * 3, prompts)
    assert first.tolist() == second.tolist()
    assert processor.clean(prompts[2]) == prompts[2]
    assert len(whole)
    assert processor.reply_ids("\ud83c").tolist() == processor.reply_ids("?").tolist()


def test_another_models_prompt_begins_once_as_its_own_processor_makes_it(tmp_path):
    words = starter.tokenizer()
    words.add_special_tokens({"bos_token": "<s>"})
    words.pad_token = None  # as of many models
    first = [("<s>", words.bos_token_id)]
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=first
    )
    template = (
        "{{ bos_token }}{% for part in messages[0].content %}"
        "{% if part.type == 'image' %}<|image_pad|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    )
    size = {"height": 28, "width": 28}
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    LlavaProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<|image_pad|>", chat_template=template,
    ).save_pretrained(tmp_path)  # fmt: skip
    stock = AutoProcessor.from_pretrained(tmp_path)
    frame, texts = np.zeros((30, 30, 3), np.uint8), ["one", "one two three"]
    processor = Processor(tmp_path, "llava")
    assert processor.pad_token_id == processor.end_token_id == words.eos_token_id
    for text, row in zip(texts, processor.encode([frame] * 2, texts), strict=True):
        content = [
            {"type": "image", "image": Image.fromarray(frame)},
            {"type": "text", "text": text},
        ]
        theirs = stock.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert row.tolist() == theirs["input_ids"][0].tolist()
        assert row.tolist().count(words.bos_token_id) == 1


def test_a_template_that_can_open_a_thought_leaves_it_closed(tiny):
    processor = Processor(tiny, "qwen3_vl")
    processor.tokenizer.chat_template = CHAT_TEMPLATE + (
        "<think>{% if enable_thinking is defined and enable_thinking is false %}</think>{% endif %}"
    )
    (ids,) = processor.encode([np.zeros((56, 56, 3), np.uint8)], ["one"])
    assert processor.decode(ids).endswith("<think></think>")
