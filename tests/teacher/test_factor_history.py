"""A history of LoRA factors is the history of sums, at the memory of the factors."""

import pytest
import torch
from safetensors.torch import load, save

from gtr_turbo.merging import tensors
from gtr_turbo.merging.methods import Recipe, ema, sma
from gtr_turbo.merging.tensors import merge_tensors
from gtr_turbo.teacher.history import FactorHistory, History
from gtr_turbo.teaching_config import TeacherConfig
from tiny import Bytes, make_policy, perturb

KINDS = [
    {"method": method, "weights": weights, "alpha": 0.3}
    for method in ("ties", "linear")
    for weights in ("sma", "ema")
]
SHAPES = {"layer:0.weight": (24, 40), "layer.1.weight": (33, 16)}
RANK = 3


def change_of(name, factors):
    a, b = factors.split([SHAPES[name][1], SHAPES[name][0]], 1)
    return 2.0 * (b.t().contiguous() @ a.contiguous())


def checkpoints(count, seed=0):
    """Factors that walk: (r, in + out) of every layer."""
    draws = torch.Generator().manual_seed(seed)
    now = {name: torch.zeros(RANK, sum(shape)) for name, shape in SHAPES.items()}
    made = []
    for _ in range(count):
        now = {n: t + torch.randn(t.shape, generator=draws) for n, t in now.items()}
        made.append(now)
    return made


def remember(history, made):
    for checkpoint in made:
        history.add(checkpoint.items())
    return history


def factor_history(kind=None, made=()):
    return remember(FactorHistory(TeacherConfig(**(kind or {})), change_of), made)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("started", [False, True], ids=["fresh", "adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_merges_the_checkpoints_of_a_policy_to_the_bits_of_the_sums(
    tiny, tmp_path, kind, started
):
    lora = {"train": "lora", "lora_rank": 4, "lora_alpha": 12}
    policy = make_policy(tiny, **lora)
    if started:
        perturb(policy, seed=9)
        policy.save_student(tmp_path / "adapter")
        policy = make_policy(tiny, **lora, adapter=str(tmp_path / "adapter"))
    config = TeacherConfig(**kind)
    sums, factors = History(config), FactorHistory(config, policy.change_of)
    changes = []
    for count in range(1, 5):
        perturb(policy, seed=count)
        changes.append(dict(policy.deltas()))
        sums.add(changes[-1].items())
        factors.add(policy.factors())
        merged = factors.merge()
        assert equal(merged, sums.merge())
        assert factors.zero_fraction == sums.zero_fraction
        weights = sma(count) if kind["weights"] == "sma" else ema(count, kind["alpha"])
        density = config.density if kind["method"] == "ties" else 1.0
        recipe = Recipe(method=kind["method"], weights=tuple(weights), density=density)
        for name, tensor in merged.items():
            exact = merge_tensors([change[name] for change in changes], recipe)
            assert torch.allclose(tensor, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_equal_checkpoints_merge_to_themselves(kind, count):
    one = checkpoints(1)[0]
    merged = factor_history({**kind, "density": 1.0}, [one] * count).merge()
    for name, tensor in merged.items():
        assert torch.allclose(tensor, change_of(name, one[name]), rtol=1e-6, atol=0)


def test_it_holds_factors_only():
    count = 5
    state = factor_history({}, checkpoints(count)).state()
    for name, (rows, columns) in SHAPES.items():
        kept = [tensor for key, tensor in state.items() if key.endswith(f":{name}")]
        assert sum(tensor.nbytes for tensor in kept) == count * RANK * (columns + rows) * 4
    assert set(state) == {"count", *(f"factors:{k}:{n}" for n in SHAPES for k in range(count))}


@pytest.mark.parametrize("kind", KINDS)
def test_between_merges_nothing_of_a_layers_size_is_kept(kind):
    made = checkpoints(6)
    with Bytes() as made_bytes:
        history = FactorHistory(TeacherConfig(**kind), change_of)
        for checkpoint in made:
            history.add(checkpoint.items())
            for name, tensor in history.merged():
                assert tensor.shape == SHAPES[name]
            del tensor
        smallest = min(rows * columns for rows, columns in SHAPES.values())
        assert made_bytes.largest >= 4 * smallest
        assert made_bytes.live < 4 * smallest
        assert (
            made_bytes.peak < 16 * 4 * 24 * 40
        )  # of one layer, whatever the number of checkpoints
    assert history.count == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_history_of_factors_goes_on_bit_for_bit(kind):
    made = checkpoints(5)
    history = factor_history(kind, made[:3])
    before = history.merge()
    restored = factor_history(kind)
    restored.load_state(load(save(history.state())))
    assert restored.count == 3
    assert equal(restored.merge(), before)
    remember(history, made[3:])
    remember(restored, made[3:])
    assert equal(restored.merge(), history.merge())
    assert equal(restored.state(), history.state())


def test_a_threshold_is_found_once(monkeypatch):
    found = []
    real = tensors.cut_of
    monkeypatch.setattr(tensors, "cut_of", lambda *a, **k: found.append(1) or real(*a, **k))
    history = factor_history({})
    for count, checkpoint in enumerate(checkpoints(4), start=1):
        history.add(checkpoint.items())
        history.merge()
        history.merge()
        assert len(found) == count * len(SHAPES)


def test_the_other_form_is_refused():
    factors = factor_history({}, checkpoints(2))
    sums = History(TeacherConfig())
    sums.add([("w", torch.ones(2, 2))])
    with pytest.raises(ValueError, match=r"kept as factors, .* set teacher.history to factors"):
        History(TeacherConfig()).load_state(factors.state())
    with pytest.raises(ValueError, match=r"kept as sums, .* set teacher.history to sums"):
        factor_history({}).load_state(sums.state())


def test_factors_that_are_not_finite_are_refused():
    bad = checkpoints(1)[0]
    bad["layer.1.weight"][0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="not finite"):
        factor_history({}, [bad])


def test_nothing_cannot_be_merged():
    with pytest.raises(RuntimeError, match="no checkpoint was added"):
        factor_history().merge()


def test_unmoved_entries_are_counted_in_the_change():
    history = factor_history()
    fresh = checkpoints(1)[0]
    fresh["layer:0.weight"][:, 40:] = 0  # B
    history.add(fresh.items())
    assert history.zero_fraction == 24 * 40 / (24 * 40 + 33 * 16)
