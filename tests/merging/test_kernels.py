import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gtr_turbo.merging.arrays import INFINITE, widen
from gtr_turbo.merging.methods import Recipe, Rows, find_tensor_cuts, merge_chunks
from gtr_turbo.merging.tensors import merge_tensors
from gtr_turbo.merging.trim import Cut, backend, keep_count

BACKENDS = {name: backend(name) for name in ("numba", "numpy")}
KERNELS = pytest.mark.parametrize("kernels", BACKENDS.values(), ids=BACKENDS.keys())
NOTHING = np.empty(0, np.float32)

CASES = {
    "linear": {},
    "slerp": {},
    "task-arithmetic": {},
    "ties": {"density": 0.3},
    "ties-peft": {"method": "ties", "density": 0.7, "compat": "peft"},
    "dare-linear": {"density": 0.7},
    "dare-ties": {"density": 0.3},
}
CASES = {name: {"method": name, **case} for name, case in CASES.items()}
METHODS = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def numbers(kind, shape, seed=0):
    """Float32 changes."""
    rng = np.random.default_rng(seed)
    made = {
        "normal": lambda: rng.normal(size=shape) / 100,
        "few": lambda: rng.integers(-2, 3, shape) / 4,
        "equal": lambda: np.full(shape, -0.3),
        "zero": lambda: rng.choice([0.0, -0.0], shape),
        "denormal": lambda: rng.integers(-9, 10, shape) * 2.0**-149,
        "huge": lambda: rng.choice([-1, 1], shape) * 1e30,
        "all sizes": lambda: rng.choice([-1, 1], shape) * 10 ** rng.uniform(-44, 30, shape),
    }
    return np.asarray(made[kind](), np.float32)


KINDS = pytest.mark.parametrize(
    "kind", ["normal", "few", "equal", "zero", "denormal", "huge", "all sizes"]
)


def some(case, kind, shape):
    """(tensors, a recipe of uneven weights)."""
    count = 2 if case["method"] == "slerp" else 4
    weights = (0.3, 1.0, 2.5, 0.0)[:count]
    rows = [torch.from_numpy(numbers(kind, shape, seed)) for seed in range(count)]
    return rows, Recipe(weights=weights, **case)


def merged(source, recipe, kernels, **known):
    """(merged changes, tally)."""
    out = np.full(source.size, np.nan, np.float32)

    def sink(at, base, chunk):
        out[at : at + len(chunk)] = chunk

    tally = merge_chunks(source, recipe, sink, kernels=kernels, **known)
    return out, tally


def bits(array):
    """To compare with -0 and 0, and any two numbers, told apart."""
    return np.atleast_1d(np.asarray(array)).view(np.uint32).tolist()


def rounded(*rows):
    """Bfloat16 numbers as uint16."""
    return np.stack(
        [torch.from_numpy(row).to(torch.bfloat16).view(torch.uint16).numpy() for row in rows]
    )


# -- engines ---------------------------------------------------------------------------------------


@METHODS
@KINDS
def test_engines_agree_bit_for_bit(case, kind):
    for shape in [(), (1,), (0,), (2, 0), (5, 3), (1023,), (1025,), (70_001,)]:
        deltas, recipe = some(case, kind, shape)
        numba, numpy, on_torch = (
            merge_tensors(deltas, recipe, seed=9, engine=engine)
            for engine in ("numba", "numpy", "torch")
        )
        assert numba.shape == numpy.shape == on_torch.shape == shape
        assert bits(numba) == bits(numpy) == bits(on_torch)


finite = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45])
)


@METHODS
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_engines_agree_bit_for_bit_on_any_numbers(case, data):
    count = 2 if case["method"] == "slerp" else data.draw(st.integers(1, 5))
    size = data.draw(st.integers(1, 20))
    rows = data.draw(arrays.arrays(np.float32, (count, size), elements=finite))
    weights = data.draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
    if not sum(weights) > 0:
        weights[0] = 1.0
    recipe = Recipe(weights=tuple(weights), **case)
    made = [
        bits(merge_tensors(list(torch.from_numpy(rows)), recipe, seed=1, engine=engine))
        for engine in ("numba", "numpy", "torch")
    ]
    assert made[0] == made[1] == made[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@METHODS
def test_a_gpu_gives_the_bits_of_the_kernels(case):
    for kind in ("normal", "few", "all sizes"):
        deltas, recipe = some(case, kind, (70_001,))
        there = merge_tensors([delta.cuda() for delta in deltas], recipe, seed=9)
        assert bits(there.cpu()) == bits(merge_tensors(deltas, recipe, seed=9))


@pytest.mark.parametrize("bases", ["float32", "bfloat16", "none"])
@pytest.mark.parametrize("form", ["float32", "bfloat16"])
@KERNELS
def test_changes_are_taken_against_the_base_in_float32(kernels, form, bases):
    base = numbers("normal", 3000, 8)
    rows = numbers("few", (3, 3000), 9) / 100 + base
    rows = rounded(*rows) if form == "bfloat16" else rows
    known = {"float32": base, "bfloat16": rounded(base)[0], "none": rows[0, :0]}[bases]
    changes = [widen(row) - widen(known) if known.size else widen(row).copy() for row in rows]
    recipe = Recipe(weights=(1.0, 0.3, 2.0), density=0.6)
    out, tally = merged(Rows(rows, known, chunk=1300), recipe, kernels)
    expected = merge_tensors([torch.from_numpy(c) for c in changes], recipe, engine="numpy")
    assert bits(out) == bits(expected)
    assert tally.zeros.tolist() == [int((change == 0).sum()) for change in changes]


# -- chunks ----------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize("kind", ["normal", "few", "equal"])
def test_chunks_do_not_change_the_result(case, kind):
    deltas, recipe = some(case, kind, (3001,))
    rows = np.stack([delta.numpy() for delta in deltas])
    for kernels in BACKENDS.values():
        whole, tally = merged(Rows(rows, NOTHING), recipe, kernels, seed=9)
        for chunk in (7, 1000, 1024, 3000):
            out, other = merged(Rows(rows, NOTHING, chunk=chunk), recipe, kernels, seed=9)
            assert bits(out) == bits(whole)
            assert other.cuts == tally.cuts
            assert other.zeros.tolist() == tally.zeros.tolist()
            assert other.largest.tolist() == tally.largest.tolist()
            assert other.exact == tally.exact


@KERNELS
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_a_quota_crosses_the_border_of_a_chunk(chunk, kernels):
    row = np.ones((1, 40), np.float32)
    row[0, [5, 11, 39]] = -2.0
    out, tally = merged(
        Rows(row, NOTHING, chunk=chunk), Recipe(weights=(1.0,), density=0.5), kernels
    )
    # of 20 kept three are -2, and 17 are the first of the 37 that are equal
    assert np.flatnonzero(out).tolist() == [*range(19), 39]
    assert tally.cuts == [Cut(int(np.float32(1).view(np.uint32)), 17, 37)]
    assert tally.exact


@KERNELS
def test_the_drop_goes_by_the_index_in_the_tensor(kernels):
    recipe = Recipe(method="dare-linear", weights=(1.0,), density=0.5)
    long, short = (np.ones((1, size), np.float32) for size in (3000, 1500))
    kept, _ = merged(Rows(long, NOTHING, chunk=1100), recipe, kernels)
    first, _ = merged(Rows(short, NOTHING), recipe, kernels)
    assert bits(kept[:1500]) == bits(first)
    assert bits(kept[1500:]) != bits(first)


# -- what a merge counts ---------------------------------------------------------------------------


@METHODS
@KERNELS
def test_zero_changes_are_counted_before_anything_is_dropped(kernels, case):
    count = 2 if case["method"] == "slerp" else 3
    base = numbers("normal", 2500)
    rows = np.stack([base.copy() for _ in range(count)])
    for k, moved in enumerate((0, 1700, 2500)[:count]):
        rows[k, :moved] += 1.0
    recipe = Recipe(weights=(1.0,) * count, **case)
    _, tally = merged(Rows(rows, base, chunk=700), recipe, kernels)
    assert tally.counted == (case["method"] not in ("linear", "slerp", "task-arithmetic"))
    assert tally.zeros.tolist() == ([2500, 800, 0][:count] if tally.counted else [0] * count)
    assert tally.finite


@KERNELS
def test_minus_zero_is_a_zero_change(kernels):
    rows = np.array([[0.0, -0.0, 1e-45, -1.0]], np.float32)
    _, tally = merged(Rows(rows, NOTHING), Recipe(weights=(1.0,), density=0.5), kernels)
    assert tally.zeros.tolist() == [2]
    assert tally.exact


@METHODS
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@KERNELS
def test_a_number_that_is_not_finite_is_found_wherever_it_is(kernels, bad, case):
    count = 2 if case["method"] == "slerp" else 3
    recipe = Recipe(weights=(1.0,) * count, **case)
    for k, place in ((0, 0), (1, 1024), (count - 1, 2499)):
        rows = numbers("normal", (count, 2500))
        rows[k, place] = bad
        with np.errstate(invalid="ignore"):
            _, tally = merged(Rows(rows, NOTHING, chunk=1100), recipe, kernels)
        assert not tally.finite
        assert (tally.largest >= INFINITE).tolist() == [i == k for i in range(count)]


@METHODS
@KERNELS
def test_the_largest_magnitude_is_known(kernels, case):
    count = 2 if case["method"] == "slerp" else 3
    rows = numbers("normal", (count, 2500))
    rows[0, 2499], rows[1, 1023] = -7.0, 1e30
    _, tally = merged(
        Rows(rows, NOTHING, chunk=1100), Recipe(weights=(1.0,) * count, **case), kernels
    )
    known = bits(np.abs(rows).max(axis=1)) if tally.counted else [0] * count
    assert tally.largest.tolist() == known
    assert tally.finite


@KERNELS
@pytest.mark.parametrize("density", [0.01, 0.3, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 2, 5, 2500])
def test_thresholds_of_the_data_are_found_exact(size, density, kernels):
    recipe = Recipe(weights=(1.0, 2.0), density=density)
    for kind in ("normal", "few", "equal", "zero"):
        source = Rows(numbers(kind, (2, size)), NOTHING, chunk=1100)
        out, tally = merged(source, recipe, kernels)
        assert tally.exact
        right = find_tensor_cuts(source, density, kernels)
        again, handed = merged(source, recipe, kernels, cuts=right)
        assert handed.exact
        assert bits(again) == bits(out)


@KERNELS
def test_an_empty_tensor_is_exact(kernels):
    source = Rows(np.empty((2, 0), np.float32), NOTHING)
    _, tally = merged(source, Recipe(weights=(1.0, 1.0), density=0.5), kernels)
    assert tally.exact
    assert tally.finite


@KERNELS
@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("kind", ["normal", "few"])
def test_wrong_thresholds_are_noticed(kind, wrong, kernels):
    rows = numbers(kind, (2, 2500))
    source = Rows(rows, NOTHING, chunk=1100)
    recipe = Recipe(weights=(1.0, 2.0), density=0.6)
    right = find_tensor_cuts(source, 0.6, kernels)
    cut = right[wrong]
    patterns = np.unique(np.abs(rows[wrong]).view(np.uint32)).astype(int)
    place = int(np.searchsorted(patterns, cut.magnitude))
    # "few" keeps 1500 of magnitudes 0, 1/4, 1/2: some of 1/4
    lower, higher = int(patterns[place - 1]), int(patterns[place + 1])
    found = [
        Cut(cut.magnitude + 1, cut.need, cut.ties),
        Cut(cut.magnitude - 1, cut.need, cut.ties),
        Cut(higher, cut.need, cut.ties),
        Cut(lower, cut.need, cut.ties),
        Cut(0, 2500, 0),
        Cut(int(INFINITE) - 1, 0, 0),
        Cut(cut.magnitude, cut.need - 1, cut.ties),
        Cut(cut.magnitude, cut.need + 1, cut.ties),
    ]
    for other in found:
        cuts = list(right)
        cuts[wrong] = other
        _, tally = merged(source, recipe, kernels, cuts=cuts)
        assert not tally.exact


@KERNELS
def test_a_threshold_that_drops_something_at_density_one_is_noticed(kernels):
    row = np.array([[3.0, -1.0, 0.0, 2.0]], np.float32)
    one = int(np.float32(1).view(np.uint32))
    recipe = Recipe(weights=(1.0,))
    for cut in (Cut(one, 0, 1), Cut(one, 4, 1), Cut(one + 1, 1, 1)):
        _, tally = merged(Rows(row, NOTHING), recipe, kernels, cuts=[cut])
        assert not tally.exact


@KERNELS
@given(
    arrays.arrays(np.int8, st.integers(2, 12), elements=st.integers(-3, 3)),
    st.sampled_from([0.2, 0.5, 0.8]),
    st.integers(0, 4),
    st.integers(0, 12),
)
@settings(max_examples=250, deadline=None)
def test_a_merge_called_exact_keeps_what_a_sort_would(kernels, whole, density, magnitude, need):
    row = whole.astype(np.float32)
    cut = Cut(int(np.float32(magnitude).view(np.uint32)), need, 0)
    source = Rows(row[None], NOTHING, chunk=5)
    out, tally = merged(source, Recipe(weights=(1.0,), density=density), kernels, cuts=[cut])
    keep = keep_count(row.size, density)
    order = np.argsort(-np.abs(row), kind="stable")[:keep]
    kept = np.zeros_like(row)
    kept[order] = row[order]
    if tally.exact:
        assert out.tolist() == kept.tolist()
    if cut.magnitude == find_tensor_cuts(source, density, kernels)[0].magnitude:
        larger = int((np.abs(row) > magnitude).sum())
        assert tally.exact == (larger + need == keep)


# -- the last step: base + factor * change, rounded ------------------------------------------------


def finished(kernels, change, base=None, factor=1.0, form=np.uint16):
    """(result, largest magnitude in it)."""
    out = np.empty(len(change), form)
    base = np.empty(0, form) if base is None else base
    return out, kernels.finish(change, base, np.float32(factor), out)


@KERNELS
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_rounding_to_bfloat16_is_that_of_torch(kernels, data):
    pattern = st.integers(0, 2**32 - 1).filter(lambda n: n & 0x7F800000 != 0x7F800000)
    change = np.array(data.draw(st.lists(pattern, min_size=1, max_size=30)), np.uint32)
    change = change.view(np.float32)
    out, largest = finished(kernels, change)
    assert out.tolist() == rounded(change)[0].tolist()
    assert largest == (out.astype(np.uint32) << 16 & 0x7FFFFFFF).max()


@KERNELS
def test_a_long_tensor_is_rounded_to_bfloat16(kernels):
    for kind in ("normal", "denormal", "all sizes"):
        change = numbers(kind, 70_001)
        out, _ = finished(kernels, change)
        assert out.tolist() == rounded(change)[0].tolist()


@KERNELS
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (0x3F808000, 0x3F80),  # halfway: to the even neighbour below
        (0x3F818000, 0x3F82),  # halfway: to the even neighbour above
        (0x3F808001, 0x3F81),
        (0x3F807FFF, 0x3F80),
        (0xBF818000, 0xBF82),
        (0xBF808000, 0xBF80),
        (0x3FFF8000, 0x4000),  # carries into the exponent
        (0x00008000, 0x0000),
        (0x00008001, 0x0001),
        (0x007FFFFF, 0x0080),
        (0x80000000, 0x8000),
        (0x7F7F7FFF, 0x7F7F),  # the largest that still rounds down
    ],
)
def test_halves_round_to_even(pattern, expected, kernels):
    change = np.array([pattern], np.uint32).view(np.float32)
    out, largest = finished(kernels, change)
    assert out.tolist() == [expected] == rounded(change)[0].tolist()
    assert largest == (expected & 0x7FFF) << 16
    assert largest < INFINITE


@KERNELS
@pytest.mark.parametrize("sign", [1, -1])
def test_what_does_not_fit_bfloat16_is_reported(sign, kernels):
    change = numbers("normal", 3000)
    change[2900] = sign * np.uint32(0x7F7F8000).view(np.float32)
    out, largest = finished(kernels, change)
    assert largest == INFINITE
    assert out[2900] & 0x7FFF == 0x7F80
    # float32 holds it
    out, largest = finished(kernels, change, form=np.float32)
    assert largest == 0x7F7F8000
    assert bits(out) == bits(change)


@KERNELS
def test_what_does_not_fit_float32_is_reported(kernels):
    change = np.array([1.0, 3e38, 0.0], np.float32)
    with np.errstate(over="ignore"):
        out, largest = finished(kernels, change, change.copy(), form=np.float32)
        assert largest == INFINITE
        assert out.tolist() == [2.0, np.inf, 0.0]
        assert finished(kernels, change, factor=-2.0, form=np.float32)[1] == INFINITE


@KERNELS
@pytest.mark.parametrize("form", [np.uint16, np.float32])
@pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_what_is_not_a_number_is_reported_and_stays_so(pattern, form, kernels):
    change = np.array([1.0, 0.0, 2.0], np.float32)
    change.view(np.uint32)[1] = pattern
    with np.errstate(invalid="ignore"):
        out, largest = finished(kernels, change, form=form)
    assert largest > INFINITE
    assert np.isnan(widen(out)).tolist() == [False, True, False]


@KERNELS
@pytest.mark.parametrize("form", [np.uint16, np.float32])
@pytest.mark.parametrize("bases", [np.uint16, np.float32])
@pytest.mark.parametrize("factor", [1.0, 0.3, -2.0, 0.0])
def test_the_base_is_added_in_float32_and_rounded_once(factor, bases, form, kernels):
    change, base = numbers("all sizes", 3000, 1) / np.float32(1e20), numbers("normal", 3000, 2)
    base = rounded(base)[0] if bases is np.uint16 else base
    exact = widen(base) + np.float32(factor) * change
    out, largest = finished(kernels, change, base, factor, form)
    if form is np.uint16:
        assert out.tolist() == rounded(exact)[0].tolist()
    else:
        assert bits(out) == bits(exact)
    assert largest == (widen(out).view(np.uint32) & 0x7FFFFFFF).max()


@KERNELS
def test_an_empty_tensor_is_finished(kernels):
    for form in (np.uint16, np.float32):
        out, largest = finished(kernels, NOTHING, form=form)
        assert (len(out), largest) == (0, 0)
