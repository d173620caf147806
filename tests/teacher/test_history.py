import pytest
import torch

from gtr_turbo.merging.methods import Recipe, ema, sma
from gtr_turbo.merging.tensors import merge_tensors
from gtr_turbo.teacher.history import History
from gtr_turbo.teaching_config import TeacherConfig

KINDS = [
    {"method": method, "weights": weights}
    for method in ("ties", "linear")
    for weights in ("sma", "ema")
]


def checkpoints(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.zeros(6, 5), torch.zeros(7)
    made = []
    for _ in range(count):
        a = a + torch.randn(a.shape, generator=generator)
        b = b + torch.randn(b.shape, generator=generator)
        made.append({"layer:0.weight": a, "layer.bias": b})
    return made


def remember(history, deltas):
    for delta in deltas:
        history.add(delta.items())
    return history


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_every_merge_moves_when_the_checkpoints_do(kind):
    # the published teacher froze at its first merge
    history = History(TeacherConfig(**kind))
    previous = None
    for delta in checkpoints(5):
        history.add(delta.items())
        merged = history.merge()
        if previous is not None:
            assert not any(torch.equal(merged[name], previous[name]) for name in merged)
        previous = merged


@pytest.mark.parametrize("kind", KINDS)
def test_merging_changes_neither_the_history_nor_an_earlier_merge(kind):
    deltas = checkpoints(4)
    history = remember(History(TeacherConfig(**kind)), deltas[:3])
    first = history.merge()
    kept = {name: tensor.clone() for name, tensor in first.items()}
    assert equal(history.merge(), kept)
    history.add(deltas[3].items())
    assert equal(first, kept)
    undisturbed = remember(History(TeacherConfig(**kind)), deltas)
    assert equal(history.merge(), undisturbed.merge())
    assert equal(deltas[0], checkpoints(1)[0])


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_sma_over_eight_checkpoints_weighs_each_an_eighth(method):
    for moved in range(8):
        history = History(TeacherConfig(method=method, density=1.0))
        for k in range(8):
            history.add([("w", torch.tensor([9.0 if k == moved else 1.0]))])
        assert history.merge()["w"].item() == pytest.approx(2.0, abs=1e-6)
    assert history.count == 8


def test_ema_weighs_the_newest_by_alpha():
    # 8, then .5 * 0 + .5 * 8 = 4, then .5 * 2 + .5 * 4 = 3
    history = History(TeacherConfig(method="linear", weights="ema"))
    for value in (8.0, 0.0, 2.0):
        history.add([("w", torch.tensor([value]))])
    assert history.merge()["w"].tolist() == [3.0]
    # TIES leaves the zero out: weights 1/4, 1/4, 1/2, so (8 / 4 + 2 / 2) / (3 / 4) = 4
    history = History(TeacherConfig(weights="ema"))
    for value in (8.0, 0.0, 2.0):
        history.add([("w", torch.tensor([value]))])
    assert history.merge()["w"].tolist() == [4.0]


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_history_is_the_merge_of_all_checkpoints(kind, alpha):
    deltas = checkpoints(9)
    merged = remember(History(TeacherConfig(**kind, alpha=alpha)), deltas).merge()
    weights = sma(9) if kind["weights"] == "sma" else ema(9, alpha)
    density = {"ties": 0.8, "linear": 1.0}[kind["method"]]
    recipe = Recipe(method=kind["method"], weights=tuple(weights), density=density)
    for name, tensor in merged.items():
        exact = merge_tensors([delta[name] for delta in deltas], recipe)
        assert torch.allclose(tensor, exact, atol=1e-6)
        if kind == {"method": "ties", "weights": "sma"}:
            assert torch.equal(tensor, exact)


def test_a_linear_merge_is_the_mean():
    history = History(TeacherConfig(method="linear"))
    for value in (1.0, -2.0, 7.0):
        history.add([("w", torch.tensor([value, 3.0]))])
    assert history.merge()["w"].tolist() == [2.0, 3.0]


def test_merges_are_due_after_every_interval():
    every = History(TeacherConfig(interval=1))
    assert [every.merge_is_due(i) for i in range(3)] == [True, True, True]
    third = History(TeacherConfig(interval=3))
    assert [third.merge_is_due(i) for i in range(7)] == [
        False, False, True, False, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_history_goes_on_bit_for_bit(kind):
    deltas = checkpoints(7)
    history = remember(History(TeacherConfig(**kind)), deltas[:4])
    saved = {name: tensor.clone() for name, tensor in history.state().items()}
    restored = History(TeacherConfig(**kind))
    restored.load_state(saved)
    assert restored.count == 4
    assert equal(restored.merge(), history.merge())
    remember(history, deltas[4:])
    remember(restored, deltas[4:])
    assert equal(restored.merge(), history.merge())
    assert equal(restored.state(), history.state())
    # what was saved is a copy of its own
    again = History(TeacherConfig(**kind))
    again.load_state(saved)
    assert again.count == 4
    assert equal(again.merge(), remember(History(TeacherConfig(**kind)), deltas[:4]).merge())


@pytest.mark.parametrize(("method", "sums"), [("ties", 4), ("linear", 1)])
def test_what_is_kept_does_not_grow_with_the_history(method, sums):
    history = History(TeacherConfig(method=method))
    for delta in checkpoints(6):
        history.add(delta.items())
        # count, and `sums` numbers for each of 30 + 7 parameters
        assert sum(tensor.numel() for tensor in history.state().values()) == 1 + sums * 37


def test_nothing_cannot_be_merged():
    with pytest.raises(RuntimeError, match="no checkpoint was added"):
        History(TeacherConfig()).merge()


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_history_can_be_added_to_without_touching_what_was_saved(kind):
    deltas = checkpoints(5)
    saved = remember(History(TeacherConfig(**kind)), deltas[:4]).state()
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    restored = History(TeacherConfig(**kind))
    restored.load_state(saved)
    remember(restored, deltas[4:])
    assert equal(saved, kept)


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_the_share_of_unmoved_entries_is_that_of_the_newest_checkpoint(method):
    history = History(TeacherConfig(method=method))
    assert history.zero_fraction == 0.0
    history.add([("a", torch.zeros(3)), ("b", torch.zeros(2, 2))])
    assert history.zero_fraction == 1.0
    history.add([("a", torch.tensor([0.0, -0.0, 1e-45])), ("b", torch.ones(2, 2))])
    assert history.zero_fraction == pytest.approx(2 / 7)
    history.add([("a", torch.ones(3)), ("b", torch.ones(2, 2))])
    assert history.zero_fraction == 0.0


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_that_is_not_finite_is_refused(method, value):
    with pytest.raises(FloatingPointError, match="not finite"):
        History(TeacherConfig(method=method)).add([("w", torch.tensor([1.0, value]))])
