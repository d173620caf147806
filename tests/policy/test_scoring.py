import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from gtr_turbo.config import SamplingConfig
from gtr_turbo.learning.losses import ESTIMATORS
from gtr_turbo.policy import scoring
from gtr_turbo.policy.generation import generate
from gtr_turbo.policy.scoring import score, values
from gtr_turbo.teacher.guidance import guide
from gtr_turbo.teaching_config import GuidanceConfig
from gtr_turbo.turns.batch import Batch, select
from tiny import Bytes, inputs_of, make_policy, observations, perturb, replies, responses


@pytest.fixture
def policy(either):
    made = make_policy(either)
    perturb(made)  # sharper distributions than those of a fresh model
    torch.manual_seed(0)
    torch.nn.init.normal_(made.value_head.layers[-1].weight)
    return made


@torch.no_grad()
def test_scored_log_probs_and_values_equal_those_recorded_at_sampling(policy):
    observed = observations(policy, 4)
    written = generate(
        policy, observed, SamplingConfig(max_new_tokens=12), torch.Generator().manual_seed(0)
    )
    scores = score(policy, inputs_of(policy, observed, [r.response_ids for r in written]))
    for i, reply in enumerate(written):
        n = len(reply.response_ids)
        torch.testing.assert_close(scores.logprobs[i, :n], reply.logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.hidden[i], reply.hidden, atol=1e-4, rtol=0)
    recorded = torch.tensor([r.value for r in written])
    assert recorded.abs().min() > 1e-3  # the comparison below is of numbers, not of zeros
    torch.testing.assert_close(values(policy, observed), recorded, atol=1e-4, rtol=0)


@torch.no_grad()
def test_scores_are_the_softmax_of_a_plain_transformers_forward_pass(either):
    policy = make_policy(either, temperature=0.7)
    (observed,) = observations(policy, 1)
    (reply,) = responses(policy, 1)
    stock = AutoModelForImageTextToText.from_pretrained(either, attn_implementation="eager")
    ids = torch.cat([observed.prompt_ids, reply])[None]
    logits = stock.eval()(
        input_ids=ids,
        mm_token_type_ids=(ids == policy.processor.image_token_id).int(),
        **policy.processor.image_inputs([policy.processor.shrink(observed.frame)]),
    ).logits[0]
    logits[:, policy.processor.banned_token_ids] = -torch.inf
    expected = (logits / 0.7).log_softmax(-1)[len(observed.prompt_ids) - 1 : -1]
    scores = score(policy, inputs_of(policy, [observed], [reply]), distribution=True)
    torch.testing.assert_close(scores.distribution[0], expected, atol=1e-5, rtol=0)
    by_hand = expected[torch.arange(len(reply)), reply]
    torch.testing.assert_close(scores.logprobs[0], by_hand, atol=1e-5, rtol=0)
    entropy = torch.special.entr(expected.exp()).sum(-1)
    torch.testing.assert_close(scores.entropy[0], entropy, atol=1e-4, rtol=0)


@torch.no_grad()
def test_neither_padding_nor_the_rest_of_the_batch_changes_scores(policy):
    observed, written = observations(policy, 4), responses(policy, 4)
    together = inputs_of(policy, observed, written)
    assert not together.prompt_mask.all()
    assert not together.response_mask.all()
    scores = score(policy, together)
    for i in range(4):
        alone = score(policy, inputs_of(policy, observed[i : i + 1], written[i : i + 1]))
        n = len(written[i])
        torch.testing.assert_close(scores.logprobs[i, :n], alone.logprobs[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.hidden[i], alone.hidden[0], atol=1e-4, rtol=0)
        assert (scores.logprobs[i, n:] == 0).all()
        assert (scores.entropy[i, n:] == 0).all()
    rows = torch.tensor([2, 0])
    part = score(policy, select(together, rows)).logprobs
    torch.testing.assert_close(part, scores.logprobs[rows, : part.shape[1]], atol=1e-4, rtol=0)


@torch.no_grad()
def test_changing_only_pixels_changes_the_log_probs(policy):
    (observed,), written = observations(policy, 1), responses(policy, 1)
    frame = observed.frame.copy()
    frame[60:120, 60:120] = 255 - frame[60:120, 60:120]
    prompt = "ezpoints token "
    seen = policy.observe([observed.frame, frame], [prompt, prompt])
    assert torch.equal(seen[0].prompt_ids, seen[1].prompt_ids)
    scores = score(policy, inputs_of(policy, seen, written * 2)).logprobs
    assert (scores[0] - scores[1]).abs().min() > 1e-5


@torch.no_grad()
def test_banned_tokens_are_never_sampled_and_have_probability_zero(policy):
    banned = policy.processor.banned_token_ids
    names = set(policy.processor.tokenizer.convert_ids_to_tokens(banned))
    assert names == {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"}

    def favour(module, arguments, logits):
        logits = logits.clone()
        logits[..., banned] = 1e4
        return logits

    policy._plain.get_output_embeddings().register_forward_hook(favour)
    observed = observations(policy, 2)
    for greedy in (False, True):
        written = generate(
            policy,
            observed,
            SamplingConfig(max_new_tokens=8),
            torch.Generator().manual_seed(0),
            greedy=greedy,
        )
        assert not any(np.isin(reply.response_ids, banned).any() for reply in written)
    inputs = inputs_of(policy, observed, [r.response_ids for r in written])
    scores = score(policy, inputs, distribution=True)
    assert (scores.distribution.exp()[..., banned] == 0).all()
    assert torch.isfinite(scores.logprobs).all()
    assert torch.isfinite(scores.entropy).all()


def _batch(policy, observed, texts):
    written = replies(policy, observed, texts)
    inputs = inputs_of(policy, observed, [r.response_ids for r in written])
    old = torch.zeros(inputs.response_mask.shape)
    for i, reply in enumerate(written):
        old[i, : len(reply.logprobs)] = reply.logprobs
    zeros, mask = torch.zeros(len(texts)), inputs.response_mask.clone()
    mask[:, 5:] = False
    return Batch(
        inputs=inputs, thought_mask=mask, old_logprobs=old, old_values=zeros,
        hidden=torch.stack([r.hidden for r in written]), rewards=zeros, next_values=zeros,
        terminated=zeros.bool(), done=zeros.bool(), shape=(1, len(texts)),
    )  # fmt: skip


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_kl_to_oneself_is_zero_and_to_another_is_not(tiny, estimator):
    policy = make_policy(tiny)
    nothing = {name: torch.zeros_like(delta) for name, delta in policy.deltas()}
    policy.load_teacher(nothing)
    texts = ['{"cards": [2, 6]', "no json, longer than the first", "x"]
    batch = _batch(policy, observations(policy, 3), texts)
    config = GuidanceConfig(estimator=estimator)
    guided = guide(batch, policy, config, microbatch_turns=2)
    assert guided.kl.shape == (3,)
    assert guided.kl.abs().max() < 1e-5
    generator = torch.Generator().manual_seed(0)
    policy.load_teacher(
        {n: 0.05 * torch.randn(d.shape, generator=generator) for n, d in nothing.items()}
    )
    other = guide(batch, policy, config, microbatch_turns=2)
    assert other.kl.abs().max() > 1e-3
    assert (other.kl_tokens[~batch.thought_mask] == 0).all()
    counts = batch.thought_mask.sum(1)
    torch.testing.assert_close(other.kl, other.kl_tokens.sum(1) / counts)


def test_guidance_of_whole_responses_leaves_invalid_replies_alone(tiny):
    policy = make_policy(tiny)
    policy.load_teacher({name: torch.ones_like(delta) for name, delta in policy.deltas()})
    batch = _batch(policy, observations(policy, 2), ['{"cards": [2, 6]', "no thought"])
    batch.thought_mask[1] = False
    guided = guide(batch, policy, GuidanceConfig(tokens="response"), microbatch_turns=2)
    assert torch.equal(guided.kl_mask[0], batch.inputs.response_mask[0])
    assert not guided.kl_mask[1].any()
    assert guided.kl[0] > 0 == guided.kl[1]


def test_without_a_thought_there_is_no_kl_and_without_guidance_no_scoring(tiny):
    policy = make_policy(tiny)
    policy.load_teacher({name: torch.ones_like(delta) for name, delta in policy.deltas()})
    batch = _batch(policy, observations(policy, 2), ["abc", "def"])
    silent = dataclasses.replace(batch, thought_mask=torch.zeros_like(batch.thought_mask))
    guided = guide(silent, policy, GuidanceConfig(), microbatch_turns=2)
    assert (guided.kl == 0).all()
    off = GuidanceConfig(kind="none", monitor=False)
    assert guide(batch, policy, off, microbatch_turns=2) is batch


@torch.no_grad()
def test_cached_features_give_the_scores_of_the_pixels(either):
    cached, plain = make_policy(either), make_policy(either, vision="trained")
    scored = []
    for policy in (cached, plain):
        observed = observations(policy, 3)
        scored.append(score(policy, inputs_of(policy, observed, responses(policy, 3))).logprobs)
        assert (observed[0].features is not None) == policy.caches_features
    assert cached.caches_features
    assert not plain.caches_features
    torch.testing.assert_close(scored[0], scored[1], atol=1e-5, rtol=0)


def test_no_gradient_reaches_a_frozen_vision_tower_and_one_reaches_a_trained_one(tiny):
    for vision, expected in (("frozen", False), ("trained", True)):
        policy = make_policy(tiny, vision=vision)
        observed = observations(policy, 1)
        score(policy, inputs_of(policy, observed, responses(policy, 1))).logprobs.sum().backward()
        grads = [p.grad is not None for n, p in policy.model.named_parameters() if "visual" in n]
        assert all(grads) if expected else not any(grads)


def _gradients(policy, inputs, *, entropy):
    """(scores, gradients of a weighted sum of the log-probs, and of the entropy if asked for)."""
    scores = score(policy, inputs, entropy_gradient=entropy)
    weights = torch.linspace(-1, 1, scores.logprobs.numel()).view(scores.logprobs.shape)
    loss = (weights * scores.logprobs).sum() + (scores.entropy.sum() if entropy else 0)
    loss.backward()
    found = {n: p.grad.clone() for n, p in policy.trained().items() if p.grad is not None}
    policy.zero_grad()
    return scores, found


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_scoring_some_tokens_at_a_time_changes_neither_values_nor_gradients(
    either, train, entropy, monkeypatch
):
    """With `full` the head is tied to the embeddings and trained: its gradient is a sum over the parts."""
    policy = make_policy(either, train=train, lora_rank=4)
    perturb(policy)
    inputs = inputs_of(policy, observations(policy, 4), responses(policy, 4))
    whole, expected = _gradients(policy, inputs, entropy=entropy)
    monkeypatch.setattr(scoring, "LOGITS", 3 * len(policy.banned))  # three tokens a part
    parts, found = _gradients(policy, inputs, entropy=entropy)
    torch.testing.assert_close(parts.logprobs, whole.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.entropy, whole.entropy, atol=1e-5, rtol=1e-5)
    assert whole.entropy.requires_grad == entropy
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        distribution = score(policy, inputs, distribution=True).distribution
    taken = distribution.gather(-1, inputs.response_ids[..., None]).squeeze(-1)
    real = inputs.response_mask
    torch.testing.assert_close(taken[real], whole.logprobs[real].detach(), atol=1e-5, rtol=1e-5)
    assert distribution[~real].isneginf().all()


def test_the_logits_of_all_tokens_never_lie_in_memory(tiny, monkeypatch):
    """Counted from the hidden states to their gradient: what comes before is the same either way."""
    policy = make_policy(tiny, train="lora", lora_rank=4)
    size, head = len(policy.banned), policy._plain.get_output_embeddings()
    inputs = inputs_of(policy, observations(policy, 32), [torch.arange(50) + 300] * 32)
    logits = 32 * 50 * size * 4  # bytes of (B, R, V) in float32
    states = torch.randn(32, 51, 128, requires_grad=True)
    monkeypatch.setattr(policy, "forward_states", lambda **_: (states, states, head))

    def backward(tokens, **options):
        monkeypatch.setattr(scoring, "LOGITS", tokens * size)
        with Bytes() as counted:
            scores = score(policy, inputs, **options)
            held = counted.live
            scores.logprobs.sum().backward()
        return counted, held

    (parts, held), (whole, held_whole) = backward(40), backward(1600)
    assert whole.largest == logits
    assert whole.peak > 3 * logits
    assert parts.largest < logits / 5  # the states
    assert parts.peak < logits
    assert held < 0.5 * logits < held_whole  # what waits for the backward pass
    assert backward(1600, entropy_gradient=True)[1] > held_whole + 0.9 * logits


@torch.no_grad()
def test_a_model_whose_logits_are_more_than_its_head_is_scored_by_its_own(tiny, monkeypatch):
    policy = make_policy(tiny)
    inputs = inputs_of(policy, observations(policy, 3), responses(policy, 3))
    expected = score(policy, inputs)
    policy.processor.native = False  # as of any other architecture
    monkeypatch.setattr(scoring, "LOGITS", 2 * len(policy.banned))
    found = score(policy, inputs)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_raw_log_probs_are_the_models_own(policy):
    """At temperature 1 with nothing banned: those of the policy at 1, times what is not banned."""
    observed = observations(policy, 2)
    inputs = inputs_of(policy, observed, responses(policy, 2))
    raw = score(policy, inputs, raw=True).raw
    assert score(policy, inputs).raw is None
    keep = policy.banned.clone()
    try:
        policy.banned.zero_()
        everything = score(policy, inputs, temperature=1.0, distribution=True)
    finally:
        policy.banned.copy_(keep)
    assert torch.allclose(raw, everything.logprobs, atol=1e-5)
    allowed = everything.distribution.exp()[..., ~keep].sum(-1)
    banned = score(policy, inputs, temperature=1.0).logprobs
    real = inputs.response_mask
    assert torch.allclose(raw[real], (banned + allowed.log())[real], atol=1e-5)
    assert (raw[real] < banned[real]).all()
