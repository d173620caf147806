import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Qwen3_5Config,
    RepetitionPenaltyLogitsProcessor,
)

from gtr_turbo.checks import ConfigError
from gtr_turbo.config import SamplingConfig
from gtr_turbo.policy import model, scoring, starter
from gtr_turbo.policy.generation import generate, warp
from gtr_turbo.policy.scoring import score, values
from tiny import inputs_of, make_policy, observations, perturb


@pytest.fixture
def policy(either):
    """Replies of this one end after different numbers of tokens: the logit of the end token is a random
    projection of the hidden state, the first one that does so.
    """
    made = make_policy(either, temperature=1.0)
    perturb(made)
    end, generator = made.processor.end_token_id, torch.Generator().manual_seed(3)
    direction = torch.zeros(128)

    def sometimes(module, arguments, logits):
        logits = logits.clone()
        logits[..., end] = logits.amax(-1) + 0.2 * (arguments[0] @ direction)
        return logits

    made._plain.get_output_embeddings().register_forward_hook(sometimes)
    observed = observations(made, 6)
    for _ in range(50):
        direction.normal_(generator=generator)
        lengths = {len(row) for row in write(made, observed, greedy=True)}
        if (
            len(lengths) > 2
            and len({len(row) for row in write(made, observed[:5], greedy=True)}) > 1
        ):
            return made
    raise AssertionError("no direction ends replies at different steps")


def write(policy, observed, *, seed=0, greedy=False, **sampling):
    sampling = SamplingConfig(**{"max_new_tokens": 12, **sampling})
    generator = torch.Generator().manual_seed(seed)
    written = generate(policy, observed, sampling, generator, greedy=greedy)
    return [reply.response_ids.tolist() for reply in written]


@torch.no_grad()
def test_greedy_equals_the_generate_of_transformers(policy):
    observed = observations(policy, 5)
    lengths = [len(o.prompt_ids) for o in observed]
    assert len(set(lengths)) > 1
    ours = write(policy, observed, greedy=True)
    assert len({len(reply) for reply in ours}) > 1  # rows end at different steps
    pad, end = policy.processor.pad_token_id, policy.processor.end_token_id
    ids = torch.full((5, max(lengths)), pad)
    mask = torch.zeros_like(ids)
    for i, o in enumerate(observed):
        ids[i, -lengths[i] :], mask[i, -lengths[i] :] = o.prompt_ids, 1
    theirs = policy.model.generate(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=(ids == policy.processor.image_token_id).int(),
        **policy.processor.image_inputs([policy.processor.shrink(o.frame) for o in observed]),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=end,
        pad_token_id=pad,
        suppress_tokens=policy.processor.banned_token_ids,
    )[:, max(lengths) :].tolist()
    for row, expected in zip(ours, theirs, strict=True):
        assert row == expected[: len(row)]
        assert all(token == pad for token in expected[len(row) :])


def test_a_row_ends_at_its_own_end_token_as_if_it_were_alone(policy):
    observed, end = observations(policy, 6), policy.processor.end_token_id
    together = write(policy, observed, greedy=True)
    assert any(row[-1] == end and len(row) > 1 for row in together)
    for i, row in enumerate(together):
        assert end not in row[:-1]
        assert row[-1] == end or len(row) == 12
        assert write(policy, observed[i : i + 1], greedy=True) == [row]


@pytest.mark.parametrize("greedy", [True, False])
def test_prompts_that_are_read_in_parts_are_answered_as_those_read_at_once(
    policy, greedy, monkeypatch
):
    observed = observations(policy, 5)
    longest = max(len(o.prompt_ids) for o in observed)
    sizes = []
    forward = policy.forward_hidden
    monkeypatch.setattr(
        policy, "forward_hidden", lambda **a: (sizes.append(len(a["input_ids"])), forward(**a))[1]
    )
    one, expected = write(policy, observed, greedy=greedy), values(policy, observed)
    assert sizes[0] == 5
    sizes.clear()
    monkeypatch.setattr(scoring, "PASS_TOKENS", 2 * longest + 1)
    assert write(policy, observed, greedy=greedy) == one
    assert sizes[:3] == [2, 2, 1]
    assert values(policy, observed) == pytest.approx(expected, abs=1e-5)


def test_a_reply_is_cut_at_the_limit(policy):
    observed = observations(policy, 6)
    full = write(policy, observed, greedy=True)
    for limit in (1, 3):
        assert write(policy, observed, greedy=True, max_new_tokens=limit) == [
            row[:limit] for row in full
        ]


def test_the_generator_is_the_only_randomness(policy):
    observed = observations(policy, 4)
    torch.manual_seed(0)
    first = write(policy, observed, seed=5)
    torch.manual_seed(1)
    assert write(policy, observed, seed=5) == first
    assert write(policy, observed, seed=6) != first


def test_top_one_is_greedy(policy):
    observed = observations(policy, 4)
    assert write(policy, observed, seed=1, top_k=1) == write(policy, observed, greedy=True)


def test_top_k_keeps_the_k_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    kept = warp(logits, torch.zeros((1, 0), dtype=torch.long), SamplingConfig(top_k=2))
    assert kept.isfinite().tolist() == [[False, True, False, True]]
    assert warp(logits, torch.tensor([[1]]), SamplingConfig()) is logits


def test_the_repetition_penalty_is_that_of_transformers():
    torch.manual_seed(0)
    logits, seen = torch.randn(3, 20), torch.randint(0, 20, (3, 9))
    ours = warp(logits, seen, SamplingConfig(repetition_penalty=1.3))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits)
    assert torch.equal(ours, theirs)


def test_sampling_follows_the_temperature(policy):
    """Frequencies of the first token over 500 draws, at the scored probabilities."""
    (observed,) = observations(policy, 1)
    with torch.no_grad():
        first = generate(
            policy, [observed] * 500, SamplingConfig(max_new_tokens=1),
            torch.Generator().manual_seed(0),
        )  # fmt: skip
    ids = torch.tensor([int(reply.response_ids[0]) for reply in first])
    probability = {int(r.response_ids[0]): float(r.logprobs[0].exp()) for r in first}
    token = max(probability, key=lambda t: probability[t])
    p = probability[token]
    share = (ids == token).float().mean()
    assert abs(share - p) < 4 * (p * (1 - p) / 500) ** 0.5  # four standard errors


def test_the_padding_of_a_shorter_prompt_is_not_penalised(policy):
    pad = policy.processor.pad_token_id

    def padded(module, arguments, logits):
        logits = logits.clone()
        logits[..., pad] = logits.amax(-1).clamp(min=0) + 1
        return logits

    policy._plain.get_output_embeddings().register_forward_hook(padded)
    observed = observations(policy, 3)
    lengths = [len(o.prompt_ids) for o in observed]
    assert min(lengths) < max(lengths)
    assert not any(pad in o.prompt_ids for o in observed)
    together = write(policy, observed, greedy=True, repetition_penalty=100.0)
    assert [row[0] for row in together] == [pad] * 3
    for i, row in enumerate(together):
        alone = write(policy, observed[i : i + 1], greedy=True, repetition_penalty=100.0)
        assert alone == [row]


@torch.no_grad()
def test_a_row_leaves_a_cache_of_linear_attention_too(tiny25, monkeypatch):
    """Qwen3.5: three of four layers keep a state, not keys and values."""
    words = starter.tokenizer()
    kinds = ("image_pad", "video_pad", "vision_start", "vision_end")
    special = {
        f"{kind.removesuffix('_pad')}_token_id": words.convert_tokens_to_ids(f"<|{kind}|>")
        for kind in kinds
    }
    rope = {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6],
        "mrope_interleaved": True, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    text = {
        "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "rope_parameters": rope,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
        "out_hidden_size": 64, "num_position_embeddings": 64,
    }  # fmt: skip
    config = Qwen3_5Config(text_config=text, vision_config=vision, **special)
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_config(config)
    monkeypatch.setattr(model, "load", lambda _: base)
    policy = make_policy(tiny25, temperature=1.0)
    perturb(policy)
    observed = observations(policy, 4)
    policy.processor.end_token_id = write(policy, observed)[1][2]
    written = generate(
        policy, observed, SamplingConfig(max_new_tokens=6), torch.Generator().manual_seed(0)
    )
    lengths = [len(reply.response_ids) for reply in written]
    assert min(lengths) < max(lengths) == 6
    scored = score(policy, inputs_of(policy, observed, [r.response_ids for r in written])).logprobs
    for row, reply, length in zip(scored, written, lengths, strict=True):
        assert torch.allclose(row[:length], reply.logprobs, atol=1e-4)


def test_rotary_positions_that_are_not_known_here_are_refused_and_not_left_out(tiny, monkeypatch):
    monkeypatch.setattr(model, "QWEN", ("another",))
    with pytest.raises(
        ConfigError, match="qwen3_vl with multimodal rotary positions, which are made"
    ):
        make_policy(tiny)
