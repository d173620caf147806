import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from peft.utils.merge_utils import ties as peft_ties

from gtr_turbo.merging.methods import METHODS, Recipe, ema, sma
from gtr_turbo.merging.tensors import RunningTies, merge_tensors, trim
from gtr_turbo.merging.trim import Cut


def tensor(*values):
    return torch.tensor(values)


def merge(deltas, method="ties", weights=None, *, seed=0, recipe_seed=0, engine="numba", **numbers):
    weights = sma(len(deltas)) if weights is None else weights
    recipe = Recipe(method=method, weights=tuple(weights), seed=recipe_seed, **numbers)
    return merge_tensors(deltas, recipe, seed=seed, engine=engine)


def ulps(a, b):
    """The largest distance in units of the last place of float32."""
    a, b = a.numpy(), b.numpy()
    scale = np.spacing(np.maximum(np.abs(a), np.abs(b)).astype(np.float32))
    return float((np.abs(a - b) / scale).max(initial=0.0))


def history(count, shape=(37,), seed=0):
    """Checkpoints of a walk: each is the one before plus noise."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn((count, *shape), generator=generator).cumsum(0) / 10)


# every method, `ties` in both forms; density .5 makes a drop's factor exactly 2
CASES = {
    "linear": {},
    "slerp": {},
    "task-arithmetic": {},
    "ties": {"density": 0.5},
    "ties-peft": {"method": "ties", "density": 0.5, "compat": "peft"},
    "dare-linear": {"density": 0.5},
    "dare-ties": {"density": 0.5},
}
CASES = {name: {"method": name, **case} for name, case in CASES.items()}


def cases(*without):
    chosen = {name: case for name, case in CASES.items() if name not in without}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


# -- a reference in float64 ------------------------------------------------------------------------


def sorted_trim(flat, density):
    flat = flat.copy()
    order = np.argsort(-np.abs(flat), kind="stable")
    flat[order[max(1, int(density * flat.size)) :]] = 0.0
    return flat


def split_mix(key, index):
    mask = (1 << 64) - 1
    z = (key + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def random_drop(flat, density, key):
    kept = [split_mix(key, i) / 2**64 < density for i in range(flat.size)]
    return np.where(kept, flat / density, 0.0)


def sphere(a, b, t):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = a @ b / norms if norms else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def reference(deltas, method, weights, *, density=1.0, compat=None, seed=0):
    """Each method as its paper writes it, in float64, trimmed by a stable sort."""
    stack = np.stack([delta.double().flatten().numpy() for delta in deltas])
    weights = np.array(weights, dtype=np.float64)
    if method == "slerp":
        merged = sphere(*stack, weights[1] / weights.sum())
        return torch.from_numpy(merged).view(deltas[0].shape)
    if method == "ties":
        stack = np.stack([sorted_trim(row, density) for row in stack])
    elif method.startswith("dare"):
        state = np.random.SeedSequence([0, seed]).generate_state(len(stack), np.uint64)
        pairs = zip(stack, state, strict=True)
        stack = np.stack([random_drop(row, density, int(key)) for row, key in pairs])
    column = weights[:, None]
    if method.endswith("ties"):
        vote = (stack if compat else column * stack).sum(0)
        agrees = stack * np.where(vote >= 0, 1.0, -1.0) > 0
        mass = (agrees if compat else column * agrees).sum(0)
        merged = (column * stack * agrees).sum(0) / np.where(mass > 0, mass, 1.0)
    else:
        merged = (column * stack).sum(0)
        if method != "task-arithmetic":
            merged = merged / weights.sum()
    return torch.from_numpy(merged).view(deltas[0].shape)


# sums of such numbers, weighted by powers of two, are exact: a sum of zero is zero in every order
@st.composite
def checkpoints(draw, case=None, most=6):
    count = 2 if case == CASES["slerp"] else draw(st.integers(1, most))
    size = draw(st.integers(1, 8))
    whole = draw(arrays.arrays(np.int8, (count, size), elements=st.integers(-64, 64)))
    return list(torch.from_numpy(whole.astype(np.float32) / 16))


def powers(deltas):
    """Weights that are powers of two."""
    power = st.integers(-2, 2).map(lambda n: 2.0**n)
    return st.lists(power, min_size=len(deltas), max_size=len(deltas))


densities = st.sampled_from([0.2, 0.5, 0.8, 1.0])

# -- weights ---------------------------------------------------------------------------------------


def test_sma_over_eight_checkpoints_weighs_each_an_eighth():
    assert sma(8) == [0.125] * 8
    # one checkpoint at a time is moved by 8: the merge moves by 1
    for moved in range(8):
        deltas = [tensor(8.0 if i == moved else 0.0) for i in range(8)]
        assert merge(deltas, "linear").tolist() == [1.0]
        ones = [tensor(9.0 if i == moved else 1.0) for i in range(8)]
        assert merge(ones, "ties").tolist() == [2.0]


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


# -- recipes that make no sense --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            {"method": "mean"},
            "'mean'.*linear, slerp, task-arithmetic, ties, dare-linear, dare-ties",
        ),
        ({"density": 0.0}, r"density 0\.0 must be in \(0, 1\]"),
        ({"density": -0.5}, r"density -0\.5"),
        ({"density": 1.5}, r"density 1\.5"),
        ({"density": float("nan")}, "density nan"),
        ({"method": "linear", "density": 0.5}, "linear has no density"),
        ({"method": "slerp", "density": 0.5}, "slerp has no density"),
        ({"method": "task-arithmetic", "density": 0.5}, "task-arithmetic has no density"),
        ({"weights": (1.0, -2.0)}, r"\[1\.0, -2\.0\]"),
        ({"weights": (0.0, 0.0)}, r"\[0\.0, 0\.0\].*not all 0"),
        ({"weights": (1.0, float("nan"))}, r"\[1\.0, nan\]"),
        ({"weights": (1.0, float("inf"))}, r"\[1\.0, inf\]"),
        ({"weights": ()}, "no checkpoint was given"),
        ({"method": "slerp", "weights": (1.0, 1.0, 1.0)}, "slerp takes 2 checkpoints, given 3"),
        ({"method": "slerp", "weights": (1.0,)}, "slerp takes 2 checkpoints, given 1"),
        ({"compat": "mergekit"}, "'mergekit'.*'peft'"),
        ({"method": "linear", "compat": "peft"}, "compat peft is for ties; linear"),
        ({"method": "dare-ties", "compat": "peft"}, "compat peft is for ties; dare-ties"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_by_name(numbers, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"weights": (1.0, 1.0), **numbers})


def test_every_checkpoint_needs_a_weight():
    with pytest.raises(ValueError, match="3 tensors, but 2 weights"):
        merge([tensor(1.0)] * 3, weights=[1.0, 1.0])


# -- merging by hand -------------------------------------------------------------------------------


def test_linear_by_hand():
    deltas = [tensor(1.0, -2.0), tensor(3.0, 6.0)]
    assert merge(deltas, "linear", [0.5, 0.5]).tolist() == [2.0, 2.0]
    assert merge(deltas, "linear", [1.0, 3.0]).tolist() == pytest.approx([2.5, 4.0])
    assert merge(deltas, "linear", [2.0, 6.0]).tolist() == pytest.approx([2.5, 4.0])
    assert merge(deltas, "linear", [0.0, 1.0]).tolist() == [3.0, 6.0]


def test_task_arithmetic_takes_weights_as_factors():
    deltas = [tensor(1.0, -2.0), tensor(3.0, 6.0)]
    assert merge(deltas, "task-arithmetic", [1.0, 1.0]).tolist() == [4.0, 4.0]
    assert merge(deltas, "task-arithmetic", [0.5, 2.0]).tolist() == [6.5, 11.0]
    assert merge(deltas, "task-arithmetic", [1.0, 0.0]).tolist() == [1.0, -2.0]


def test_slerp_of_orthogonal_vectors_follows_the_circle():
    a, b = tensor(1.0, 0.0), tensor(0.0, 1.0)
    half = 2**-0.5
    assert merge([a, b], "slerp").tolist() == pytest.approx([half, half])
    # a quarter of the way from b to a: 22.5 degrees from b
    assert merge([a, b], "slerp", [1.0, 3.0]).tolist() == pytest.approx([0.3826834, 0.9238795])
    assert merge([2 * a, 4 * b], "slerp").tolist() == pytest.approx([2 * half, 4 * half])
    assert merge([a, b], "slerp", [1.0, 0.0]).tolist() == pytest.approx([1.0, 0.0], abs=1e-7)


def test_slerp_halves_an_angle_of_sixty_degrees():
    merged = merge([tensor(1.0, 0.0), tensor(0.5, 0.75**0.5)], "slerp")
    assert merged.tolist() == pytest.approx([0.75**0.5, 0.5])


def test_slerp_interpolates_nearly_parallel_vectors_linearly():
    a = tensor(1.0, 0.0)
    near, far = (torch.tensor([c, (1 - c * c) ** 0.5]) for c in (0.9996, 0.999))
    assert merge([a, near], "slerp").tolist() == pytest.approx(((a + near) / 2).tolist(), rel=1e-6)
    # on the circle the middle has norm 1; on the line it does not
    assert float(merge([a, far], "slerp").norm()) == pytest.approx(1.0, abs=1e-6)
    assert float(merge([a, near], "slerp").norm()) < 1 - 5e-5
    assert merge([a, -a], "slerp", [3.0, 1.0]).tolist() == [0.5, 0.0]
    assert merge([a, a], "slerp", [3.0, 1.0]).tolist() == [1.0, 0.0]


def test_slerp_with_a_zero_vector_interpolates_linearly():
    zero, b = tensor(0.0, 0.0), tensor(2.0, 4.0)
    assert merge([zero, b], "slerp").tolist() == [1.0, 2.0]
    assert merge([b, zero], "slerp", [1.0, 3.0]).tolist() == [0.5, 1.0]


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
    merged = merge(deltas, density=0.8)
    assert merged.tolist() == pytest.approx([-4.0, 2.0, -3.0, -2.0, 0.2])
    # weights 1, 1, 2: sums -5, 5, -8, -4, .2; means (1 + 6) / 3, (-4 - 4) / 3, (-1 - 6) / 3
    merged = merge(deltas, weights=[1.0, 1.0, 2.0], density=0.8)
    assert merged.tolist() == pytest.approx([-4.0, 7 / 3, -8 / 3, -7 / 3, 0.2])
    # weights 4, 1, 1: sums 2, -4, -6, 8, .8
    merged = merge(deltas, weights=[4.0, 1.0, 1.0], density=0.8)
    assert merged.tolist() == pytest.approx([6 / 5, -2.0, -3.0, 3.0, 0.2])
    # density .4 keeps 0 -2 0 3 0 / 2 0 -4 0 0 / -4 3 0 0 0; the others do not count as zeros
    merged = merge(deltas, density=0.4)
    assert merged.tolist() == [-4.0, 3.0, -4.0, 3.0, 0.0]


def test_ties_as_peft_has_it_by_hand():
    # the votes of 4 and -3 are 1 and, weighted, -5
    deltas = [tensor(4.0, 2.0, -1.0), tensor(-3.0, 4.0, 0.0)]
    assert merge(deltas, weights=[1.0, 3.0]).tolist() == pytest.approx([-3.0, 3.5, -1.0])
    # of those that agree the sum is weighted, and divided by their number
    assert merge(deltas, weights=[1.0, 3.0], compat="peft").tolist() == [4.0, 7.0, -1.0]
    assert merge(deltas, weights=[0.5, 0.5], compat="peft").tolist() == [2.0, 1.5, -0.5]
    assert merge(deltas, weights=[1.0, 3.0], compat="peft", density=0.4).tolist() == [
        4.0,
        12.0,
        0.0,
    ]


@pytest.mark.parametrize("compat", [None, "peft"])
def test_a_sum_of_zero_elects_plus(compat):
    assert merge([tensor(2.0), tensor(-2.0)], compat=compat, weights=[1, 1]).tolist() == [2.0]
    assert merge([tensor(-2.0), tensor(2.0)], compat=compat, weights=[1, 1]).tolist() == [2.0]
    assert merge([tensor(0.0), tensor(0.0)], compat=compat, weights=[1, 1]).tolist() == [0.0]


def test_zeros_neither_vote_nor_count():
    assert merge([tensor(0.0), tensor(-3.0), tensor(0.0)]).tolist() == [-3.0]


def test_a_checkpoint_of_weight_zero_neither_votes_nor_counts():
    deltas = [tensor(-9.0, 1.0, 5.0), tensor(1.0, 3.0, 0.0)]
    assert merge(deltas, weights=[0.0, 1.0]).tolist() == [1.0, 3.0, 0.0]
    assert merge(deltas, "linear", weights=[0.0, 1.0]).tolist() == [1.0, 3.0, 0.0]


# -- dare ------------------------------------------------------------------------------------------


def masks(count, size=4096, density=0.5, **seeds):
    """Which entries of each checkpoint a drop keeps."""
    ones = [torch.ones(size)] * count
    alone = np.eye(count).tolist()
    return [merge(ones, "dare-linear", w, density=density, **seeds) != 0 for w in alone]


def test_the_drop_is_split_mix_64():
    # published outputs for the state 0, after 1, 2, 3 and 4 steps
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [split_mix(0, i) for i in (1, 2, 3, 4)] == known


def test_dare_keeps_entries_by_the_hash_of_seed_checkpoint_and_index():
    kept = masks(3, size=300, density=0.3, seed=5)
    keys = np.random.SeedSequence([0, 5]).generate_state(3, np.uint64)
    for mask, key in zip(kept, keys, strict=True):
        expected = [split_mix(int(key), i) >> 40 < round(0.3 * 2**24) for i in range(300)]
        assert mask.tolist() == expected


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.9])
def test_dare_keeps_about_that_many_entries(density):
    size = 40_000
    for mask in masks(2, size, density):
        deviation = (size * density * (1 - density)) ** 0.5
        assert abs(int(mask.sum()) - density * size) < 5 * deviation


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
@pytest.mark.parametrize("density", [0.125, 0.3, 0.5, 0.8])
def test_what_dare_keeps_is_divided_by_the_density(method, density):
    delta = history(1, (2000,))[0]
    merged = merge([delta], method, density=density)
    kept = merged != 0
    assert 0 < int(kept.sum()) < 2000
    assert torch.equal(merged[kept], delta[kept] * torch.tensor(1 / density))
    assert ulps(merged[kept], delta[kept] / density) <= (0 if density in (0.125, 0.5) else 1)


def test_dare_drops_alike_for_one_seed_and_otherwise_for_another():
    first, second = masks(2)
    assert all(torch.equal(a, b) for a, b in zip([first, second], masks(2), strict=True))
    (tensor_seed,), (recipe_seed,) = masks(1, seed=1), masks(1, recipe_seed=1)
    # independent halves agree on a half
    for a, b in itertools.combinations([first, second, tensor_seed, recipe_seed], 2):
        assert 0.45 < float((a == b).float().mean()) < 0.55


@pytest.mark.parametrize(("dare", "plain"), [("dare-linear", "linear"), ("dare-ties", "ties")])
def test_dare_that_keeps_everything_is_the_plain_method(dare, plain):
    deltas = history(5, (400,))
    weights = [1.0, 0.3, 2.0, 0.0, 0.7]
    assert torch.equal(merge(deltas, dare, weights), merge(deltas, plain, weights))


def test_dare_linear_keeps_the_mean():
    delta = torch.full((200,), 3.0)
    merged = merge([delta] * 500, "dare-linear", density=0.25)
    # of 500 drops, an entry is the mean: 3 with deviation 3 sqrt(.75 / .25 / 500) = .23
    assert float((merged - 3.0).abs().max()) < 5 * 0.23
    assert float(merged.mean()) == pytest.approx(3.0, abs=0.1)


# -- laws ------------------------------------------------------------------------------------------


@cases()
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_every_method_agrees_with_a_reference_in_float64(case, data):
    deltas = data.draw(checkpoints(case))
    weights = data.draw(powers(deltas))
    density = data.draw(densities) if case["method"] == "ties" else case.get("density", 1.0)
    numbers = {**case, "density": density}
    merged = merge(deltas, weights=weights, seed=4, **numbers)
    expected = reference(deltas, weights=weights, seed=4, **numbers)
    assert torch.allclose(merged.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("count", "density"), itertools.product([2, 4, 8], [0.2, 0.8, 1.0]))
def test_ties_agrees_with_a_reference_on_a_long_history(count, density):
    deltas = history(count, shape=(61, 17), seed=count)
    merged = merge(deltas, density=density)
    expected = reference(deltas, "ties", sma(count), density=density)
    assert ulps(merged, expected.float()) <= 2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 8, 30])
@cases("slerp", "dare-linear", "dare-ties")
def test_equal_checkpoints_merge_to_themselves(case, count):
    delta = history(1, shape=(13, 7), seed=count)[0]
    factors = [1.0] * count if case.get("compat") else sma(count)
    merged = merge([delta] * count, weights=factors, **case)
    expected = trim(delta, case["density"]) if "density" in case else delta
    # multiples by powers of two are exact; else every addition rounds by half a unit at most
    assert ulps(merged, expected) <= (0 if count in (1, 2, 4) else max(1, count / 2))
    norm = float(merged.norm() / expected.norm())
    assert norm == pytest.approx(1.0, abs=1e-6)


@given(checkpoints(most=1), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_slerp_of_two_equal_checkpoints_is_that_checkpoint(deltas, t):
    merged = merge(deltas * 2, "slerp", [1 - t, t])
    assert torch.allclose(merged, deltas[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_equal_checkpoints_stay_equal_where_dare_ties_keeps_any(count):
    delta = history(1, shape=(500,))[0]
    merged = merge([delta] * count, "dare-ties", density=0.5)
    kept = torch.stack(masks(count, 500, 0.5)).any(0)
    assert int((~kept).sum()) > 0
    assert ulps(merged[kept], 2 * delta[kept]) <= count / 2
    assert not merged[~kept].any()


@cases("slerp")
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_one_checkpoint_merges_to_its_thinned_self(case, data):
    (delta,) = data.draw(checkpoints(most=1))
    merged = merge([delta], weights=[1.0], **case)
    expected = reference([delta], weights=[1.0], **case).float()
    assert torch.equal(merged, expected)
    if case["method"] != "task-arithmetic" and "compat" not in case:
        assert torch.equal(merge([delta], weights=[0.3], **case), merged)


@pytest.mark.parametrize("count", [1, 2, 5])
@cases()
def test_no_change_gives_no_change(case, count):
    count = 2 if case["method"] == "slerp" else count
    deltas = [torch.zeros(40) * sign for sign in (1, -1, 1, -1, 1)[:count]]
    merged = merge(deltas, weights=list(range(1, count + 1)), **case)
    assert torch.equal(merged.view(torch.int32), torch.zeros(40, dtype=torch.int32))


@cases("slerp", "dare-linear", "dare-ties")
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_order_of_checkpoints_with_their_weights_does_not_matter(case, data):
    deltas = data.draw(checkpoints(case))
    weights = data.draw(powers(deltas))
    order = data.draw(st.permutations(range(len(deltas))))
    shuffled = merge([deltas[i] for i in order], weights=[weights[i] for i in order], **case)
    assert torch.equal(merge(deltas, weights=weights, **case), shuffled)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_slerp_is_the_same_from_either_end(data):
    a, b = data.draw(checkpoints(CASES["slerp"]))
    t = data.draw(st.floats(0.0, 1.0))
    forth, back = merge([a, b], "slerp", [1 - t, t]), merge([b, a], "slerp", [t, 1 - t])
    # close to 180 degrees apart the factors are up to 32
    assert torch.allclose(forth, back, rtol=1e-6, atol=3e-5)


@pytest.mark.parametrize("scale", [0.25, 3.0, 100.0])
@cases("task-arithmetic", "ties-peft")
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_scale_of_the_weights_does_not_matter(case, scale, data):
    deltas = data.draw(checkpoints(case))
    weights = data.draw(st.lists(st.integers(1, 7), min_size=len(deltas), max_size=len(deltas)))
    scaled = [scale * weight for weight in weights]
    assert torch.equal(
        merge(deltas, weights=weights, **case), merge(deltas, weights=scaled, **case)
    )


@pytest.mark.parametrize("name", ["task-arithmetic", "ties-peft"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_weights_that_are_factors_scale_the_merge(name, data):
    deltas = data.draw(checkpoints())
    weights = data.draw(powers(deltas))
    doubled = merge(deltas, weights=[2 * weight for weight in weights], **CASES[name])
    assert torch.equal(doubled, 2 * merge(deltas, weights=weights, **CASES[name]))


@cases()
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_turned_checkpoints_merge_to_the_turned_merge(case, data):
    deltas = data.draw(checkpoints(case))
    weights = data.draw(powers(deltas))
    merged = merge(deltas, weights=weights, **case)
    turned = merge([-delta for delta in deltas], weights=weights, **case)
    if not case["method"].endswith("ties"):
        assert torch.equal(turned, -merged)
        return
    # a sum of zero elects plus
    if case["method"] == "dare-ties":
        vote = merge(deltas, "dare-linear", weights, density=0.5)
    else:
        votes = [1.0] * len(deltas) if case.get("compat") else weights
        vote = sum(w * trim(d, 0.5) for w, d in zip(votes, deltas, strict=True))
    assert torch.equal(turned[vote != 0], -merged[vote != 0])
    assert (turned[vote == 0] >= 0).all()
    assert (merged[vote == 0] >= 0).all()


@pytest.mark.parametrize("engine", ["numba", "numpy", "torch"])
@pytest.mark.parametrize("count", [1, 2, 3])
@cases()
def test_no_input_is_changed(case, engine, count):
    deltas = history(2 if case["method"] == "slerp" else count, (50,))
    weights = [float(1 + i) for i in range(len(deltas))]
    for density in {case.get("density", 1.0), 1.0}:
        before = [delta.clone() for delta in deltas]
        numbers = {**case, "density": density}
        merge(deltas, weights=weights, engine=engine, **numbers).fill_(9.0)
        assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))
        assert weights == [float(1 + i) for i in range(len(deltas))]


@given(checkpoints(), densities)
@settings(max_examples=100, deadline=None)
def test_a_merge_lies_between_the_entries_that_agree(deltas, density):
    merged = merge(deltas, density=density)
    stack = torch.stack([trim(delta, density) for delta in deltas])
    agree = stack * merged.sign() > 0
    least = torch.where(agree, stack, torch.full_like(stack, 9.0)).amin(0)
    most = torch.where(agree, stack, torch.full_like(stack, -9.0)).amax(0)
    some = merged != 0
    assert (merged >= least - 1e-6)[some].all()
    assert (merged <= most + 1e-6)[some].all()


@pytest.mark.parametrize("engine", ["numba", "numpy", "torch"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (3, 1, 2)])
def test_every_shape_merges_to_its_own(shape, engine):
    deltas = [torch.full(shape, 2.0), torch.full(shape, 4.0), torch.full(shape, -1.0)]
    merged = merge(deltas, engine=engine)
    assert merged.shape == shape
    assert merged.flatten().tolist() == [3.0] * merged.numel()


@cases()
def test_a_tensor_that_is_not_contiguous_merges_like_its_copy(case):
    turned = [delta.t() for delta in history(2, (5, 7))]
    merged = merge(turned, weights=[1.0, 2.0], **case)
    assert torch.equal(merged, merge([t.contiguous() for t in turned], weights=[1.0, 2.0], **case))


# -- running against all at once -------------------------------------------------------------------


def coarse(count, shape, seed=0):
    """A walk on few values: many entries are equal at the threshold, cancel, or are zero."""
    return [(delta * 8).round() / 4 for delta in history(count, shape, seed)]


def running(deltas, density, alpha=None, engine="numba"):
    sums = RunningTies(deltas[0])
    for k, delta in enumerate(deltas):
        if alpha is not None and k:
            sums.decay(1 - alpha)
        weight = 1.0 if alpha is None or not k else alpha
        sums.add(delta, weight, density=density, engine=engine)
    return sums.merged(engine=engine)


@pytest.mark.parametrize("engine", ["numba", "numpy", "torch"])
@pytest.mark.parametrize("walk", [history, coarse])
@pytest.mark.parametrize("density", [0.2, 0.8, 1.0])
def test_running_sums_are_ties_over_the_whole_history(density, walk, engine):
    deltas = walk(12, shape=(40, 45))
    for k in range(1, 13):
        merged = running(deltas[:k], density, engine=engine)
        exact = merge(deltas[:k], density=density, engine=engine)
        assert int((merged != exact).sum()) == 0


@pytest.mark.parametrize(("density", "alpha"), itertools.product([0.2, 0.8, 1.0], [0.1, 0.5, 0.9]))
def test_decayed_sums_are_ties_with_the_closed_form_weights(density, alpha):
    deltas = history(12, shape=(40, 25))
    for k in range(1, 13):
        merged = running(deltas[:k], density, alpha)
        exact = merge(deltas[:k], weights=ema(k, alpha), density=density)
        assert torch.allclose(merged, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("walk", [history, coarse])
def test_all_engines_keep_the_same_sums(walk, alpha):
    deltas = walk(6, (3000,))
    made = [running(deltas, 0.7, alpha, engine) for engine in ("numba", "numpy", "torch")]
    assert torch.equal(*(merged.view(torch.int32) for merged in made[:2]))
    assert torch.equal(made[0], made[2])


def test_running_sums_remember_zeros_and_threshold_of_the_newest_change():
    for engine in ("numba", "numpy", "torch"):
        sums = RunningTies(torch.zeros(5))
        sums.add(tensor(1.0, 2.0, 3.0, 4.0, 5.0), 1.0, density=0.4, engine=engine)
        assert sums.zeros == 0
        sums.add(tensor(0.0, -0.0, 3.0, -3.0, 3.0), 1.0, density=0.4, engine=engine)
        assert sums.zeros == 2
        assert sums.cut.need == 2
        assert sums.cut.ties == 3
        assert np.uint32(sums.cut.magnitude).view(np.float32) == 3.0
        # 4 and 5; 3 and -3: the sums are 3, 4 - 3, 5
        assert sums.merged(engine=engine).tolist() == [0.0, 0.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("engine", ["numba", "numpy", "torch"])
def test_a_threshold_that_is_known_is_not_looked_for(engine):
    sums = RunningTies(torch.zeros(4))
    known = Cut(int(np.float32(2.0).view(np.uint32)), 1, 2)
    sums.add(tensor(1.0, 2.0, -2.0, 3.0), 1.0, density=1.0, cut=known, engine=engine)
    assert sums.cut == known
    assert sums.merged(engine=engine).tolist() == [0.0, 2.0, 0.0, 3.0]


@pytest.mark.parametrize("engine", ["numba", "numpy", "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_change_that_is_not_finite_is_refused(bad, engine):
    delta = torch.ones(2000)
    delta[1999] = bad
    for density in (0.5, 1.0):
        with pytest.raises(FloatingPointError, match="not finite"):
            RunningTies(delta).add(delta, 1.0, density=density, engine=engine)


@pytest.mark.parametrize("engine", ["numba", "numpy", "torch"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3)])
def test_running_sums_take_any_shape(shape, engine):
    sums = RunningTies(torch.zeros(shape))
    for value in (2.0, 4.0, -1.0):
        sums.add(torch.full(shape, value), 1.0, density=1.0, engine=engine)
    merged = sums.merged(engine=engine)
    assert merged.shape == shape
    assert merged.flatten().tolist() == [3.0] * merged.numel()


def test_ties_of_a_ties_is_something_else():
    deltas = history(8, shape=(40, 25))
    exact = merge(deltas, density=0.8)
    previous = deltas[0]
    for k, delta in enumerate(deltas[1:], start=1):
        previous = merge([previous, delta], weights=[k / (k + 1), 1 / (k + 1)], density=0.8)
    assert float((previous - exact).norm() / exact.norm()) > 0.05


# -- PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_ties_of_unit_weights_is_that_of_peft(count):
    deltas = history(count, (64, 33), seed=count)
    assert all(len(delta.abs().unique()) == delta.numel() for delta in deltas)
    theirs = peft_ties(deltas, torch.ones(count), 0.8)
    for compat in (None, "peft"):
        ours = merge(deltas, weights=[1.0] * count, density=0.8, compat=compat)
        assert ulps(ours, theirs) <= 1


@pytest.mark.parametrize("density", [0.2, 0.8])
@pytest.mark.parametrize("weights", [[0.5, 0.5, 0.5], [1.0, 2.0, 4.0], [0.3, 1.0, 0.05]])
def test_ties_of_any_weights_is_that_of_peft_with_compat(weights, density):
    deltas = history(3, (64, 33))
    theirs = peft_ties(deltas, torch.tensor(weights), density)
    ours = merge(deltas, weights=weights, density=density, compat="peft")
    assert ulps(ours, theirs) <= 1
    # ours would be another
    assert ulps(merge(deltas, weights=weights, density=density), theirs) > 1000


def test_every_method_is_tested_here():
    assert {case["method"] for case in CASES.values()} == set(METHODS)
