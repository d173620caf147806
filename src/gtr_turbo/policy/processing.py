"""From (frame, prompt) to token ids and image tensors, for one image a turn.

Qwen's vision-language models go through a thin processor of our own (tokenizer, PIL image processor,
chat template): the stock one wants a video processor, and with it torchvision. Every other model goes
through `transformers.AutoProcessor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Processor:
    """Tokenizer, image processor and chat template of one model.

    Attributes:
        image_token_id: the placeholder; a prompt holds one for each visual token.
        end_token_id: ends a reply.
        pad_token_id: fills batches; masked everywhere.
        banned_token_ids: image, video and vision tokens. The policy gives them probability 0: a sampled
            placeholder without pixels behind it would break the next forward pass.
    """

    def __init__(self, path: str | Path, model_type: str) -> None:
        from transformers import AutoProcessor, AutoTokenizer

        self.native = model_type in QWEN
        if self.native:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
                Qwen2VLImageProcessorPil,
            )

            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
            self._stock: Any = None
        else:
            self._stock = AutoProcessor.from_pretrained(path)
            self.tokenizer = self._stock.tokenizer
            self.image_processor = self._stock.image_processor
            if self.tokenizer.pad_token is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
        specials = self.tokenizer.all_special_tokens + [
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        ]
        self._specials = sorted(set(specials), key=len, reverse=True)
        self._grids: dict[tuple[int, ...], Tensor] = {}
        self.image_token_id = self._image_token_id()
        self.end_token_id: int = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id
        self.pad_token_id: int = self.end_token_id if pad is None else pad
        marks = ("image", "video", "vision")
        self.banned_token_ids = sorted(
            {self.image_token_id}
            | {
                self.tokenizer.convert_tokens_to_ids(token)
                for token in self._specials
                if any(mark in token for mark in marks)
            }
        )

    def _image_token_id(self) -> int:
        if self.native:
            return int(self.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        return int(self.tokenizer.convert_tokens_to_ids(self._stock.image_token))

    def save(self, path: Path) -> None:
        """Write the tokenizer and image processor beside a model."""
        (self._stock or self.tokenizer).save_pretrained(path)
        if self._stock is None:
            self.image_processor.save_pretrained(path)

    def clean(self, text: str) -> str:
        """`text` without the model's special tokens: text of an environment is data, never markup.

        Lone surrogates, which JSON escapes can smuggle in and no tokenizer takes, become question marks.
        """
        text, before = text.encode("utf-8", "replace").decode(), None
        while text != before:  # what is left may join to another
            before = text
            for token in self._specials:
                text = text.replace(token, "")
        return text

    def image_inputs(
        self, frames: list[np.ndarray], device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Image tensors of the model, concatenated along dimension 0.

        Args:
            frames: uint8 (H, W, 3), each from `shrink`: shrinking twice may end at another size.
            device: where the tensors are made.
        """
        if not self.native:
            return {key: value.to(device) for key, value in self._stock_inputs(frames).items()}
        # what the stock processor makes, to the bit, without its conversions: a pixel's value after rescaling
        # and normalisation depends on its channel and level only, so it is looked up, where bytes become floats
        side = self.image_processor.patch_size
        grids = torch.tensor(
            [[1, height // side, width // side] for height, width, _ in map(np.shape, frames)]
        )
        levels = torch.from_numpy(self._levels).to(device)
        pixels = []
        for _, alike in groupby(frames, key=np.shape):
            images = torch.from_numpy(np.stack(list(alike))).to(device).int()
            planes = [
                channel.index_select(0, images[..., c].flatten()).view(images.shape[:3])
                for c, channel in enumerate(levels)
            ]
            pixels.append(self._patches(torch.stack(planes, 1)))
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": grids.to(device)}

    def _patches(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) as (patches, numbers of a patch), patches that are merged side by side (Qwen2-VL)."""
        stock = self.image_processor
        side, merged = stock.patch_size, stock.merge_size
        count, channels, height, width = images.shape
        rows, columns = height // side // merged, width // side // merged
        cut = images.view(count, channels, rows, merged, side, columns, merged, side)
        whole = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
        times = [-1] * 6 + [stock.temporal_patch_size, -1, -1]
        return whole.expand(times).reshape(count * rows * columns * merged**2, -1)

    def _stock_inputs(self, frames: list[np.ndarray]) -> dict[str, Tensor]:
        images = [Image.fromarray(frame) for frame in frames]
        return dict(self.image_processor(images=images, return_tensors="pt"))

    @cached_property
    def _levels(self) -> np.ndarray:
        """(3, 256) float32: what the stock processor makes of each level of each channel."""
        stock = self.image_processor
        levels = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))  # an image of three channels
        if stock.do_rescale:
            levels = stock.rescale(levels, stock.rescale_factor)
        if stock.do_normalize:
            levels = stock.normalize(levels, stock.image_mean, stock.image_std)
        return levels[:, 0].astype(np.float32)

    def shrink(self, frame: np.ndarray) -> np.ndarray:
        """The frame at the size the model sees, where that is known."""
        if not self.native:
            return frame
        _, height, width = (int(n) * self.image_processor.patch_size for n in self.grid(frame)[0])
        if frame.shape[:2] == (height, width):
            return frame
        return np.asarray(
            Image.fromarray(frame).resize((width, height), self.image_processor.resample)
        )

    def grid(self, frame: np.ndarray) -> Tensor:
        """(1, 3) patches in time, height and width of a frame of this size (Qwen's models)."""
        if frame.shape not in self._grids:
            self._grids[frame.shape] = self._stock_inputs([frame])["image_grid_thw"]
        return self._grids[frame.shape]

    def encode(self, frames: list[np.ndarray], prompts: list[str]) -> list[Tensor]:
        """Prompt ids, (P,) int64 each, with the image placeholder expanded to the image's tokens."""
        texts = [self._chat(self.clean(prompt)) for prompt in prompts]
        if not self.native:
            images = [[Image.fromarray(frame)] for frame in frames]
            first = self.tokenizer.bos_token
            begun = first is not None and texts[0].startswith(first)  # the template wrote it
            encoded = self._stock(
                text=texts,
                images=images,
                padding=True,
                return_tensors="pt",
                add_special_tokens=not begun,
            )
            rows = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
            return [row[keep] for row, keep in rows]
        merge = self.image_processor.merge_size**2
        counts = [int(self.grid(frame).prod()) // merge for frame in frames]
        token = "<|image_pad|>"
        texts = [t.replace(token, token * n) for t, n in zip(texts, counts, strict=True)]
        return [
            torch.tensor(row)
            for row in self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]

    def _chat(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        template = self.tokenizer if self._stock is None else self._stock
        # a template that knows no thinking of its own takes no notice of it
        return str(
            template.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        )

    def reply_ids(self, text: str) -> Tensor:
        """Ids of a reply with its end token, for imitation; (R,) int64."""
        ids = self.tokenizer(self.clean(text), add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.end_token_id])

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Text of reply ids, special tokens included as they stand."""
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
