"""On a CUDA device the numbers are those of the CPU: pixels, teacher and merge to the bit, passes to rounding.

`python -m pytest -m gpu` runs these and `tests/merging/test_kernels.py`'s; elsewhere they are skipped.
"""

import numpy as np
import pytest
import torch

from gtr_turbo.config import SamplingConfig
from gtr_turbo.policy.generation import generate
from gtr_turbo.policy.scoring import score
from gtr_turbo.teacher.history import FactorHistory
from gtr_turbo.teaching_config import TeacherConfig
from tiny import inputs_of, make_policy, observations, perturb, responses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ("cpu", "cuda")
BOUNDS = {"float32": 5e-3, "bfloat16": 0.2}
"""Of log-probs, in nats. Convolutions in float32 use TF32 on a GPU."""
LORA = {"train": "lora", "lora_rank": 4, "lora_alpha": 8, "attention": "sdpa"}


def pair(path, **model):
    """The same policy, moved away from its start, on both devices."""
    made = [make_policy(path, device=device, **LORA, **model) for device in DEVICES]
    for policy in made:
        perturb(policy)
    return made


def test_pixels(either):
    frames = [
        np.random.default_rng(i).integers(0, 256, (80, 60 + i % 2, 3), np.uint8) for i in range(3)
    ]
    for name in ("frozen", "trained"):
        here, there = pair(either, vision=name)
        small = [here.processor.shrink(frame) for frame in frames]
        wanted, found = (p.processor.image_inputs(small, p.device) for p in (here, there))
        for key, tensor in wanted.items():
            assert found[key].device.type == there.device.type
            assert torch.equal(found[key].cpu(), tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vision", ["frozen", "trained"])
def test_scores_and_gradients(either, dtype, vision):
    found = []
    for policy in pair(either, dtype=dtype, vision=vision, gradient_checkpointing=True):
        inputs = inputs_of(policy, observations(policy, 6), responses(policy, 6))
        policy.model.train()
        scores = score(policy, inputs)
        scores.logprobs.sum().backward()
        gradients = torch.cat([p.grad.flatten().cpu() for p in policy.trained().values()])
        found.append((scores.logprobs.detach().cpu(), gradients))
    (here, own), (there, other) = found
    torch.testing.assert_close(there, here, atol=BOUNDS[dtype], rtol=0)
    alike = torch.nn.functional.cosine_similarity(own, other, dim=0)
    assert alike > (0.999 if dtype == "float32" else 0.95)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_is_scored(either, dtype):
    policy = pair(either, dtype=dtype)[1]
    observed = observations(policy, 6)
    with policy.whole():
        replies = generate(policy, observed, SamplingConfig(max_new_tokens=12), torch.Generator())
    inputs = inputs_of(policy, observed, [reply.response_ids for reply in replies])
    with torch.no_grad():
        scores = score(policy, inputs).logprobs.cpu()
    for row, reply in zip(scores, replies, strict=True):
        there = row[: len(reply.logprobs)]
        torch.testing.assert_close(there, reply.logprobs, atol=BOUNDS[dtype], rtol=0)


def test_the_merge_and_the_teacher(either):
    states = []
    for policy in pair(either, dtype="bfloat16"):
        history = FactorHistory(TeacherConfig(), policy.change_of)
        for seed in range(3):
            perturb(policy, seed=seed)
            history.add(policy.factors())
        merged = dict(history.merged())
        assert all(change.device.type == policy.device.type for change in merged.values())
        policy.load_teacher(merged)
        before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        with policy.as_teacher():
            pass
        assert all(torch.equal(tensor, before[n]) for n, tensor in policy.state_dict().items())
        states.append((merged, policy.teacher_state()))
    (merged, teacher), (other_merged, other_teacher) = states
    for (
        name,
        change,
    ) in merged.items():  # products of another device round otherwise, and votes with them
        near = torch.isclose(other_merged[name].cpu(), change, atol=1e-6, rtol=1e-4)
        assert near.float().mean() > 0.999
    for name, tensor in teacher.items():
        near = torch.isclose(other_teacher[name].cpu(), tensor, rtol=1e-2)
        assert near.float().mean() > 0.999


def test_the_start_as_teacher_is_the_start(either):
    for policy in pair(either, dtype="bfloat16"):
        policy.load_start()
        own = policy._replaced()
        assert all(torch.equal(t, own[n].cpu()) for n, t in policy._teacher.items())
