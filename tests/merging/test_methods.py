import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtr_turbo.merging.methods import METHODS, RunningTies, ema, linear, sma, ties, trim


def tensor(*values):
    return torch.tensor(values)


def ulps(a, b):
    """The largest distance in units of the last place of float32."""
    a, b = a.numpy(), b.numpy()
    scale = np.spacing(np.maximum(np.abs(a), np.abs(b)).astype(np.float32))
    return float((np.abs(a - b) / scale).max(initial=0.0))


def reference(deltas, weights, density):
    """TIES as MERGING.md writes it, in float64, by a stable sort."""
    trimmed = []
    for delta in deltas:
        flat = delta.double().flatten().numpy().copy()
        keep = max(1, int(density * flat.size))
        order = np.argsort(-np.abs(flat), kind="stable")
        flat[order[keep:]] = 0.0
        trimmed.append(flat)
    stack, weights = np.stack(trimmed), np.array(weights, dtype=np.float64)[:, None]
    elected = np.where((weights * stack).sum(0) >= 0, 1.0, -1.0)
    agrees = stack * elected > 0
    total = (weights * agrees).sum(0)
    merged = (weights * stack * agrees).sum(0) / np.where(total > 0, total, 1.0)
    return torch.from_numpy(merged).view(deltas[0].shape)


def history(count, shape=(37,), seed=0):
    """Checkpoints of a walk: each is the one before plus noise."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn((count, *shape), generator=generator).cumsum(0) / 10)


# sums of such numbers, weighted by powers of two, are exact: a sum of zero is zero in every order
grid = st.integers(-64, 64).map(lambda n: n / 16)
rows = st.integers(1, 6).flatmap(
    lambda size: st.lists(
        st.lists(grid, min_size=size, max_size=size).map(torch.tensor), min_size=1, max_size=6
    )
)
densities = st.sampled_from([0.2, 0.5, 0.8, 1.0])

# -- trim ------------------------------------------------------------------------------------------


def test_trim_keeps_the_largest_by_magnitude():
    delta = tensor(0.5, -3.0, 0.1, 2.0, -0.2)
    assert trim(delta, 0.4).tolist() == [0.0, -3.0, 0.0, 2.0, 0.0]
    # int(.8 * 5) = 4: only the smallest goes
    assert trim(delta, 0.8).tolist() == pytest.approx([0.5, -3.0, 0.0, 2.0, -0.2])
    assert torch.equal(trim(delta, 1.0), delta)
    # never fewer than one
    assert trim(delta, 0.01).tolist() == [0.0, -3.0, 0.0, 0.0, 0.0]


def test_equal_magnitudes_are_kept_from_the_front():
    assert trim(tensor(1.0, -1.0, 1.0, -1.0), 0.5).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert trim(tensor(1.0, -2.0, 1.0, -1.0, 2.0), 0.6).tolist() == [1.0, -2.0, 0.0, 0.0, 2.0]
    square = tensor([1.0, 1.0], [1.0, 2.0])
    assert trim(square, 0.5).tolist() == [[1.0, 0.0], [0.0, 2.0]]


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_trim_keeps_exactly_that_many(size, density, distinct):
    # `distinct` 0 gives different magnitudes, else so few that most are equal
    generator = torch.Generator().manual_seed(size)
    delta = torch.randn(size, generator=generator)
    if distinct:
        delta = torch.randint(1, distinct + 1, (size,), generator=generator).float() * delta.sign()
    before = delta.clone()
    trimmed = trim(delta, density)
    keep = max(1, int(density * size))
    assert int((trimmed != 0).sum()) == keep
    order = np.argsort(-delta.abs().numpy(), kind="stable")[:keep]
    expected = torch.zeros(size)
    expected[order] = delta[order]
    assert torch.equal(trimmed, expected)
    assert torch.equal(delta, before)


def test_trim_of_degenerate_tensors():
    assert trim(torch.tensor(-3.0), 0.5).item() == -3.0
    assert trim(tensor(-3.0), 0.5).tolist() == [-3.0]
    assert trim(torch.zeros(0), 0.5).tolist() == []
    assert trim(torch.zeros(2, 0), 0.5).shape == (2, 0)
    assert trim(torch.zeros(5), 0.5).tolist() == [0.0] * 5
    assert trim(torch.full((5,), 7.0), 0.5).tolist() == [7.0, 7.0, 0.0, 0.0, 0.0]


def test_trim_returns_a_tensor_of_its_own():
    delta = tensor(1.0, 2.0)
    trim(delta, 1.0).zero_()
    assert delta.tolist() == [1.0, 2.0]


# -- weights ---------------------------------------------------------------------------------------


def test_sma_over_eight_checkpoints_weighs_each_an_eighth():
    assert sma(8) == [0.125] * 8
    # one checkpoint at a time is moved by 8: the merge moves by 1
    for moved in range(8):
        deltas = [tensor(8.0 if i == moved else 0.0) for i in range(8)]
        assert linear(deltas, sma(8)).tolist() == [1.0]
        ones = [tensor(9.0 if i == moved else 1.0) for i in range(8)]
        assert ties(ones, sma(8), density=1.0).tolist() == [2.0]


def test_ema_weights_are_those_of_the_recursion():
    assert ema(1, 0.5) == [1.0]
    assert ema(4, 0.5) == [0.125, 0.125, 0.25, 0.5]
    assert ema(3, 0.2) == pytest.approx([0.64, 0.16, 0.2])
    assert ema(3, 1.0) == [0.0, 0.0, 1.0]


@given(st.integers(1, 40), st.floats(0.01, 1.0))
@settings(max_examples=100, deadline=None)
def test_ema_weights_sum_to_one_and_give_the_running_merge(count, alpha):
    weights = ema(count, alpha)
    assert sum(weights) == pytest.approx(1.0)
    numbers = [float(i * i % 7) for i in range(count)]
    merged = numbers[0]
    for number in numbers[1:]:
        merged = alpha * number + (1 - alpha) * merged
    assert sum(w * x for w, x in zip(weights, numbers, strict=True)) == pytest.approx(merged)


# -- merging by hand -------------------------------------------------------------------------------


def test_ties_by_hand():
    deltas = [
        tensor(1.0, -2.0, 0.1, 3.0, 0.2),
        tensor(2.0, 1.0, -4.0, -1.0, 0.3),
        tensor(-4.0, 3.0, -2.0, -3.0, 0.0),
    ]
    # density .8 keeps four of five:
    #   1 -2  0  3 .2  /  2  1 -4 -1  0  /  -4  3 -2 -3  0
    # sums -1, 2, -6, -1, .2 elect - + - - +
    # means of those that agree: -4; (1 + 3) / 2; (-4 - 2) / 2; (-1 - 3) / 2; .2
    merged = ties(deltas, sma(3), density=0.8)
    assert merged.tolist() == pytest.approx([-4.0, 2.0, -3.0, -2.0, 0.2])
    # weights 1, 1, 2: sums -5, 5, -8, -4, .2; means (1 + 6) / 3, (-4 - 4) / 3, (-1 - 6) / 3
    merged = ties(deltas, [1.0, 1.0, 2.0], density=0.8)
    assert merged.tolist() == pytest.approx([-4.0, 7 / 3, -8 / 3, -7 / 3, 0.2])
    # weights 4, 1, 1: sums 2, -4, -6, 8, .8
    merged = ties(deltas, [4.0, 1.0, 1.0], density=0.8)
    assert merged.tolist() == pytest.approx([6 / 5, -2.0, -3.0, 3.0, 0.2])
    # density .4 keeps 0 -2 0 3 0 / 2 0 -4 0 0 / -4 3 0 0 0; the others do not count as zeros
    merged = ties(deltas, sma(3), density=0.4)
    assert merged.tolist() == [-4.0, 3.0, -4.0, 3.0, 0.0]


def test_a_sum_of_zero_elects_plus():
    assert ties([tensor(2.0), tensor(-2.0)], sma(2), density=1.0).tolist() == [2.0]
    assert ties([tensor(-2.0), tensor(2.0)], sma(2), density=1.0).tolist() == [2.0]
    assert ties([tensor(0.0), tensor(0.0)], sma(2), density=1.0).tolist() == [0.0]


def test_zeros_neither_vote_nor_count():
    assert ties([tensor(0.0), tensor(-3.0), tensor(0.0)], sma(3), density=1.0).tolist() == [-3.0]


def test_linear_by_hand():
    deltas = [tensor(1.0, -2.0), tensor(3.0, 6.0)]
    assert linear(deltas, [0.5, 0.5]).tolist() == [2.0, 2.0]
    assert linear(deltas, [1.0, 3.0]).tolist() == [2.5, 4.0]
    assert linear(deltas, [2.0, 6.0]).tolist() == [2.5, 4.0]


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 30])
@pytest.mark.parametrize("method", METHODS)
def test_equal_checkpoints_merge_to_themselves(method, count):
    delta = history(1, shape=(13, 7), seed=count)[0]
    merged = METHODS[method]([delta] * count, sma(count), density=1.0)
    # multiples by powers of two are exact; else every addition rounds by half a unit at most
    assert ulps(merged, delta) <= (0 if count in (1, 2, 4) else max(1, count / 2))
    norm = float(merged.norm() / delta.norm())
    assert norm == pytest.approx(1.0, abs=1e-6)


@given(rows, densities, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("method", METHODS)
def test_order_does_not_matter_for_sma(method, deltas, density, random):
    shuffled = random.sample(deltas, len(deltas))
    weights = sma(len(deltas))
    merged = METHODS[method](deltas, weights, density=density)
    other = METHODS[method](shuffled, weights, density=density)
    assert torch.allclose(merged, other, rtol=0, atol=2e-6 if method == "linear" else 0)


@given(rows, densities)
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("method", METHODS)
def test_no_input_is_changed(method, deltas, density):
    before = [delta.clone() for delta in deltas]
    weights = ema(len(deltas), 0.5)
    merged = METHODS[method](deltas, weights, density=density)
    merged.fill_(9.0)
    assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))
    assert weights == ema(len(deltas), 0.5)


@given(rows, densities, st.sampled_from([0.25, 3.0, 100.0]))
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_the_weights_does_not_matter(method, deltas, density, scale):
    weights = ema(len(deltas), 0.5)
    merged = METHODS[method](deltas, weights, density=density)
    scaled = METHODS[method](deltas, [scale * w for w in weights], density=density)
    assert torch.allclose(merged, scaled, rtol=1e-6, atol=1e-6)


@given(rows, densities)
@settings(max_examples=150, deadline=None)
def test_turned_checkpoints_merge_to_the_turned_merge(deltas, density):
    weights = sma(len(deltas))
    merged = ties(deltas, weights, density=density)
    turned = ties([-delta for delta in deltas], weights, density=density)
    decided = sum(trim(delta, density) for delta in deltas) != 0  # a sum of zero elects plus
    assert torch.equal(turned[decided], -merged[decided])


@given(rows, densities)
@settings(max_examples=150, deadline=None)
def test_a_merge_lies_between_the_entries_that_agree(deltas, density):
    merged = ties(deltas, sma(len(deltas)), density=density)
    stack = torch.stack([trim(delta, density) for delta in deltas])
    agree = stack * merged.sign() > 0
    least = torch.where(agree, stack, torch.full_like(stack, 9.0)).amin(0)
    most = torch.where(agree, stack, torch.full_like(stack, -9.0)).amax(0)
    some = merged != 0
    assert (merged >= least - 1e-6)[some].all()
    assert (merged <= most + 1e-6)[some].all()


# -- against a reference, and running against all at once ------------------------------------------


@given(rows, densities, st.sampled_from(["sma", "ema", "uneven"]))
@settings(max_examples=200, deadline=None)
def test_ties_agrees_with_a_reference_in_float64(deltas, density, kind):
    count = len(deltas)
    weights = {
        "sma": sma(count),
        "ema": ema(count, 0.5),
        "uneven": [2.0 ** (i * 2 % 3) for i in range(count)],
    }[kind]
    merged = ties(deltas, weights, density=density)
    assert torch.allclose(merged.double(), reference(deltas, weights, density), atol=1e-6)


@pytest.mark.parametrize(("count", "density"), itertools.product([2, 4, 8], [0.2, 0.8, 1.0]))
def test_ties_agrees_with_a_reference_on_a_long_history(count, density):
    deltas = history(count, shape=(61, 17), seed=count)
    merged = ties(deltas, sma(count), density=density)
    assert ulps(merged, reference(deltas, sma(count), density).float()) <= 2


def running(deltas, density, alpha=None):
    sums = RunningTies(deltas[0])
    for k, delta in enumerate(deltas):
        weight = 1.0
        if alpha is not None and k:
            sums.decay(1 - alpha)
            weight = alpha
        sums.add(trim(delta, density), weight)
    return sums.merged()


@pytest.mark.parametrize("density", [0.2, 0.8, 1.0])
def test_running_sums_are_ties_over_the_whole_history(density):
    deltas = history(12, shape=(40, 25))
    for k in range(1, 13):
        merged = running(deltas[:k], density)
        assert int((merged != ties(deltas[:k], sma(k), density=density)).sum()) == 0


@pytest.mark.parametrize(("density", "alpha"), itertools.product([0.2, 0.8, 1.0], [0.1, 0.5, 0.9]))
def test_decayed_sums_are_ties_with_the_closed_form_weights(density, alpha):
    deltas = history(12, shape=(40, 25))
    for k in range(1, 13):
        merged = running(deltas[:k], density, alpha)
        assert torch.allclose(merged, ties(deltas[:k], ema(k, alpha), density=density), atol=1e-6)


def test_ties_of_a_ties_is_something_else():
    deltas = history(8, shape=(40, 25))
    exact = ties(deltas, sma(8), density=0.8)
    previous = deltas[0]
    for k, delta in enumerate(deltas[1:], start=1):
        previous = ties([previous, delta], [k / (k + 1), 1 / (k + 1)], density=0.8)
    assert float((previous - exact).norm() / exact.norm()) > 0.05


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 1, 2)])
def test_every_shape_merges_to_its_own(shape):
    deltas = [torch.full(shape, 2.0), torch.full(shape, 4.0), torch.full(shape, -1.0)]
    merged = ties(deltas, sma(3), density=1.0)
    assert merged.shape == shape
    assert merged.flatten().tolist() == [3.0] * merged.numel()
