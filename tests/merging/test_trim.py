import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtr_turbo.merging.arrays import widen
from gtr_turbo.merging.methods import Rows, find_tensor_cuts
from gtr_turbo.merging.tensors import trim
from gtr_turbo.merging.trim import Cut, backend, cut_of, find_cuts, keep_count

ENGINES = ["numba", "numpy", "torch"]
BACKENDS = {name: backend(name) for name in ("numba", "numpy")}
KERNELS = pytest.mark.parametrize("kernels", BACKENDS.values(), ids=BACKENDS.keys())
NOTHING = np.empty(0, np.float32)


def tensor(*values):
    return torch.tensor(values)


def numbers(kind, size, seed=0):
    """(size,) float32 changes."""
    rng = np.random.default_rng([seed, size])
    made = {
        "normal": lambda: rng.normal(size=size) / 100,
        "few": lambda: rng.integers(-3, 4, size) / 4,
        "equal": lambda: np.full(size, -0.3),
        "zero": lambda: np.zeros(size),
        "mostly zero": lambda: rng.normal(size=size) * (rng.random(size) < 0.1),
        "one bin": lambda: 1 + rng.integers(0, 50, size) * 2.0**-23,
        "two bins": lambda: np.where(rng.random(size) < 0.5, 1.0, 1.0078125),
        "denormal": lambda: rng.integers(-9, 10, size) * 2.0**-149,
        "all sizes": lambda: rng.choice([-1, 1], size) * 10 ** rng.uniform(-44, 38, size),
    }
    return made[kind]().astype(np.float32)


KINDS = [
    "normal", "few", "equal", "zero", "mostly zero", "one bin", "two bins", "denormal", "all sizes",
]  # fmt: skip


def sorted_cut(change, keep):
    """By a full sort of the magnitudes."""
    size = np.sort(np.abs(change.astype(np.float64)))[::-1]
    threshold = size[keep - 1]
    pattern = int(np.float32(threshold).view(np.uint32))
    larger = int((size > threshold).sum())
    return Cut(pattern, keep - larger, int((size == threshold).sum()))


def sorted_trim(change, keep):
    """By a stable sort of all entries."""
    order = np.argsort(-np.abs(change.astype(np.float64)), kind="stable")[:keep]
    expected = np.zeros_like(change)
    expected[order] = change[order]
    return expected


def bits(array):
    """To compare with -0 and 0 told apart."""
    return array.view(np.uint32).tolist()


# -- how many --------------------------------------------------------------------------------------


def test_how_many_are_kept():
    assert keep_count(5, 0.8) == 4
    assert keep_count(10, 0.29) == 2  # int, not rounded
    assert keep_count(100, 0.29) == 28  # .29 * 100 is 28.999999999999996
    assert keep_count(5, 0.01) == 1
    assert keep_count(1, 0.5) == 1
    assert keep_count(7, 1.0) == 7
    assert keep_count(0, 0.5) == 0
    assert keep_count(0, 1.0) == 0


@given(st.integers(1, 10**12), st.floats(0, 1, exclude_min=True))
def test_never_none_and_never_more_than_there_are(size, density):
    keep = keep_count(size, density)
    assert keep == max(1, int(density * size))
    assert 1 <= keep <= size


# -- trim ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_trim_keeps_the_largest_by_magnitude(engine):
    delta = tensor(0.5, -3.0, 0.1, 2.0, -0.2)
    assert trim(delta, 0.4, engine=engine).tolist() == [0.0, -3.0, 0.0, 2.0, 0.0]
    # int(.8 * 5) = 4: only the smallest goes
    assert torch.equal(trim(delta, 0.8, engine=engine), tensor(0.5, -3.0, 0.0, 2.0, -0.2))
    assert torch.equal(trim(delta, 1.0, engine=engine), delta)
    # never fewer than one
    assert trim(delta, 0.01, engine=engine).tolist() == [0.0, -3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_magnitudes_are_kept_from_the_front(engine):
    def kept(delta, density):
        return trim(delta, density, engine=engine).tolist()

    assert kept(tensor(1.0, -1.0, 1.0, -1.0), 0.5) == [1.0, -1.0, 0.0, 0.0]
    assert kept(tensor(1.0, -2.0, 1.0, -1.0, 2.0), 0.6) == [1.0, -2.0, 0.0, 0.0, 2.0]
    assert kept(tensor([1.0, 1.0], [1.0, 2.0]), 0.5) == [[1.0, 0.0], [0.0, 2.0]]


@pytest.mark.parametrize("engine", ENGINES)
@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_trim_keeps_exactly_that_many(engine, size, density, distinct):
    # `distinct` 0 gives different magnitudes, else so few that most are equal
    generator = torch.Generator().manual_seed(size)
    delta = torch.randn(size, generator=generator)
    if distinct:
        delta = torch.randint(1, distinct + 1, (size,), generator=generator).float() * delta.sign()
    before = delta.clone()
    trimmed = trim(delta, density, engine=engine)
    keep = max(1, int(density * size))
    assert int((trimmed != 0).sum()) == keep
    assert trimmed.tolist() == sorted_trim(delta.numpy(), keep).tolist()
    assert torch.equal(delta, before)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_trim_equals_a_stable_sort(kind, engine):
    for size in (1, 2, 1023, 1024, 1025, 5000, 70_001):
        change = numbers(kind, size)
        for density in (0.05, 0.5, 0.8, 0.99):
            trimmed = trim(torch.from_numpy(change), density, engine=engine).numpy()
            assert bits(trimmed) == bits(sorted_trim(change, keep_count(size, density)) + 0.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_trim_of_degenerate_tensors(engine):
    assert trim(torch.tensor(-3.0), 0.5, engine=engine).item() == -3.0
    assert trim(tensor(-3.0), 0.5, engine=engine).tolist() == [-3.0]
    assert trim(torch.zeros(0), 0.5, engine=engine).tolist() == []
    assert trim(torch.zeros(2, 0), 0.5, engine=engine).shape == (2, 0)
    assert trim(torch.zeros(5), 0.5, engine=engine).tolist() == [0.0] * 5
    sevens = trim(torch.full((5,), 7.0), 0.5, engine=engine)
    assert sevens.tolist() == [7.0, 7.0, 0.0, 0.0, 0.0]


def test_trim_returns_a_tensor_of_its_own():
    for engine in ENGINES:
        delta = tensor(1.0, 2.0)
        trim(delta, 1.0, engine=engine).zero_()
        assert delta.tolist() == [1.0, 2.0]


def test_unknown_kernels_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'cupy'.*'numba'.*'numpy'"):
        backend("cupy")


# -- thresholds ------------------------------------------------------------------------------------


class Passes(Rows):
    """Counts how often the tensor is read."""

    made = 0

    def chunks(self):
        self.made += 1
        return super().chunks()


@KERNELS
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    st.integers(1, 5000),
    st.floats(0.05, 0.99),
    st.sampled_from([97, 1024, 5000]),
)
@settings(max_examples=80, deadline=None)
def test_the_cut_is_that_of_a_full_sort(kernels, kinds, size, density, chunk):
    keep = keep_count(size, density)
    rows = np.stack([numbers(kind, size, seed) for seed, kind in enumerate(kinds)])
    source = Passes(rows, NOTHING, chunk=chunk)
    if keep < size:
        assert find_tensor_cuts(source, density, kernels) == [sorted_cut(row, keep) for row in rows]
        assert source.made == 2


@KERNELS
def test_the_cut_by_hand(kernels):
    rows = np.array([[1.0, -2.0, 3.0, 2.0, -2.0], [0.0, 0.0, -0.0, 5.0, 0.0]], np.float32)
    two = int(np.float32(2).view(np.uint32))
    # of the first, 3 is larger than 2, and two of the three 2 are kept; of the second, 5 and two 0
    source = Rows(rows, NOTHING)
    found = find_cuts(source.chunks, 2, 5, 3, kernels=kernels)
    assert found == [Cut(two, 2, 3), Cut(0, 2, 4)]


@KERNELS
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_an_entry_of_a_histogram_is_found_by_its_rank_from_above(kernels, counts, data):
    entries = [place for place, count in enumerate(counts) for _ in range(count)][::-1]
    if not entries:
        return
    rank = data.draw(st.integers(1, len(entries)))
    place = entries[rank - 1]
    found = kernels.descend(np.array(counts, np.int64), rank)
    assert tuple(found) == (place, rank - entries.index(place), counts[place])


@KERNELS
def test_nothing_is_read_to_keep_everything(kernels):
    def chunks():
        raise AssertionError

    for keep in (5, 6):
        cuts = find_cuts(chunks, 2, 5, keep, kernels=kernels)
        assert [cut.magnitude for cut in cuts] == [0, 0]


@KERNELS
def test_an_empty_tensor_has_a_cut(kernels):
    assert cut_of(NOTHING, 0.5, kernels=kernels) == Cut(0, 0, 0)
    source = Rows(np.empty((2, 0), np.float32), NOTHING)
    assert find_tensor_cuts(source, 0.5, kernels) == [Cut(0, 0, 0)] * 2


@KERNELS
@pytest.mark.parametrize("size", [2, 7, 8, 9, 500, 70_000])
def test_the_cut_of_a_change_in_memory(size, kernels):
    for kind in ("normal", "few", "mostly zero"):
        change = numbers(kind, size)
        for density in (0.05, 0.5, 0.99):
            expected = sorted_cut(change, keep_count(size, density))
            assert cut_of(change, density, kernels=kernels) == expected


def patterns(*rows):
    """Bfloat16 numbers as uint16."""
    return np.stack(
        [torch.from_numpy(row).to(torch.bfloat16).view(torch.uint16).numpy() for row in rows]
    )


@KERNELS
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_is_enough_for_16_bit_numbers(kind, kernels):
    rows = patterns(numbers(kind, 3000, 0), numbers("normal", 3000, 1))
    for density in (0.05, 0.5, 0.8, 0.99):
        source = Passes(rows, rows[0, :0], exact16=True, chunk=1100)
        expected = [sorted_cut(widen(row), keep_count(3000, density)) for row in rows]
        assert find_tensor_cuts(source, density, kernels) == expected
        assert source.made == 1


@KERNELS
@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_16_bit_numbers_are_cut_in_float32(kind, kernels):
    base = numbers("normal", 3000, 7)
    # "all sizes" reaches 1e38: bfloat16 rounds that to a finite number still
    rows, known = patterns(base + numbers(kind, 3000, 8), base), patterns(base)[0]
    changes = widen(rows) - widen(known)
    source = Rows(rows, known, chunk=1100)
    for density in (0.05, 0.5, 0.99):
        expected = [sorted_cut(change, keep_count(3000, density)) for change in changes]
        assert find_tensor_cuts(source, density, kernels) == expected


@KERNELS
def test_changes_against_a_base_are_cut_in_float32(kernels):
    base = numbers("normal", 3000, 7)
    rows = np.stack([base + numbers(kind, 3000, 8) for kind in ("normal", "mostly zero")])
    for known in (base, patterns(base)[0]):
        expected = [sorted_cut(row - widen(known), 1500) for row in rows]
        assert find_tensor_cuts(Rows(rows, known, chunk=1100), 0.5, kernels) == expected
