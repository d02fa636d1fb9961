"The one-dimensional k-means against brute force and scikit-learn, on every dtype and on awkward values."
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from nncomp import kmeans
from nncomp.kmeans import inertia, kmeans_1d

INITS = ("optimal", "linear", "density", "forgy", "k-means++")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def brute_force(x, k, w):
    "Least inertia over all partitions of sorted points into at most k intervals, each about its own mean."
    order = np.argsort(x)
    x, w = x[order][w[order] > 0], w[order][w[order] > 0]
    best = np.inf
    for cuts in combinations(range(1, len(x)), min(k, len(x)) - 1):
        ends = (0, *cuts, len(x))
        total = 0.0
        for i, j in zip(ends[:-1], ends[1:]):
            centre = x[i] + np.average(x[i:j] - x[i], weights=w[i:j])
            total += (w[i:j] * (x[i:j] - centre) ** 2).sum()
        best = min(best, total)
    return best


def sample(kind, n, rng):
    return {
        "normal": lambda: rng.normal(size=n),
        "tied": lambda: rng.integers(-3, 4, n).astype(float),
        "constant": lambda: np.full(n, 0.3),
        "two-valued": lambda: rng.choice([-0.7, 0.1], n),
        "heavy": lambda: rng.standard_cauchy(n) * 1e3,
        "even": lambda: np.arange(n) / 7,
        "peaks": lambda: np.sign(rng.normal(size=n)) + 1e-6 * rng.normal(size=n),
        "offset": lambda: 1e8 + rng.normal(size=n),
        "descending": lambda: np.sort(rng.normal(size=n))[::-1],
    }[kind]()


KINDS = ("normal", "tied", "constant", "two-valued", "heavy", "even", "peaks", "offset", "descending")


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 13), st.booleans(), st.integers(0, 2**31))
def test_optimum_equals_brute_force(kind, n, k, weighted, seed):
    rng = np.random.default_rng(seed)
    x = sample(kind, n, rng)
    w = rng.integers(0, 4, n).astype(float) if weighted else np.ones(n)
    w[0] = 1
    codebook, assignments = kmeans_1d(x, k, weights=w if weighted else None)
    least, ours = brute_force(x, k, w), inertia(x, codebook, assignments, w)
    resolution = np.spacing(np.abs(x).max()) ** 2 * w.sum()      # a codebook of doubles cannot do better than this
    assert abs(ours - least) <= 1e-9 * least + resolution
    assert len(codebook) == min(k, len(np.unique(x[w > 0])))
    for init in INITS[1:]:
        other = kmeans_1d(x, k, init=init, weights=w if weighted else None)
        assert len(other[0]) == len(codebook)
        assert inertia(x, *other, w) >= least * (1 - 1e-9) - resolution


def partition_cost(x, w, labels):
    "Inertia of a partition about its own means, as a fraction."
    total = Fraction(0)
    for j in np.unique(labels):
        points, mass = [Fraction(v) for v in x[labels == j]], [Fraction(v) for v in w[labels == j]]
        if any(mass):
            moment = sum(m * p for m, p in zip(mass, points))
            total += sum(m * p * p for m, p in zip(mass, points)) - moment**2 / sum(mass)
    return total


def least_cost(x, w, k):
    "Least inertia of at most k intervals of sorted x, as a fraction, by dynamic programming."
    best = [Fraction(0)] + [None] * len(x)
    cost = [[partition_cost(x[i:j], w[i:j], np.zeros(max(j - i, 0))) for j in range(len(x) + 1)] for i in range(len(x))]
    for _ in range(k):
        best = [min((best[i] + cost[i][j] for i in range(j) if best[i] is not None), default=best[j]) for j in range(len(x) + 1)]
    return best[-1]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(("normal", "heavy", "tied", "descending")), st.integers(3, 12), st.integers(2, 8), st.floats(0, 10),
       st.floats(-290, 290), st.booleans(), st.integers(0, 2**31))
def test_optimum_for_importances_over_twenty_decades(kind, n, k, decades, unit, zeros, seed):
    rng = np.random.default_rng(seed)
    x, w = np.sort(sample(kind, n, rng)), 10.0 ** (unit + rng.uniform(-decades, decades, n))
    if zeros:
        w[rng.integers(0, n, 2)] = 0
    w[0] = 10.0**unit
    least = least_cost(x, w, k)
    assert partition_cost(x, w, kmeans_1d(x, k, weights=w)[1]) <= least * (1 + Fraction(1, 10**9))
    for init in INITS[1:]:
        codebook, labels = kmeans_1d(x, k, init=init, weights=w)
        assert np.isfinite(codebook).all() and partition_cost(x, w, labels) >= least * (1 - Fraction(1, 10**9))


@pytest.mark.parametrize("unit", [5e-324, 1e-200, 1e200, 1.7e308])
@pytest.mark.parametrize("init", INITS)
def test_the_unit_of_the_importances_does_not_matter(unit, init):
    x = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, other = kmeans_1d(x, 7, init=init), kmeans_1d(x, 7, init=init, weights=torch.full((300,), unit, dtype=torch.float64))
    torch.testing.assert_close(other[0], plain[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(other[1], plain[1])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-60000, 60000, width=16), min_size=1, max_size=40), st.integers(2, 20),
       st.sampled_from(INITS), st.sampled_from(DTYPES), st.booleans())
def test_what_holds_for_every_dtype_and_start(values, k, init, dtype, keep_zero):
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    codebook, assignments = kmeans_1d(x, k, init=init, keep_zero=keep_zero)
    assert codebook.dtype == dtype and assignments.dtype == torch.int64 and assignments.shape == x.shape
    assert 1 <= len(codebook) <= k and (codebook.double().diff() > 0).all()
    assert codebook.double().min() >= x.double().min() and codebook.double().max() <= x.double().max()
    if keep_zero:
        assert torch.equal(codebook[assignments] == 0, x == 0)
    else:
        gap = (x.double()[:, None] - codebook.double()[None]).abs()
        assert torch.equal(gap.gather(1, assignments[:, None])[:, 0], gap.min(1).values)
    if len(x.unique()) <= k:
        assert torch.equal(codebook[assignments], x)


@pytest.mark.parametrize("kind", ["normal", "heavy", "tied", "peaks"])
@pytest.mark.parametrize("k", [2, 7, 40])
def test_never_worse_than_scikit_learn(kind, k):
    x = sample(kind, 2000, np.random.default_rng(k))
    k = min(k, len(np.unique(x)))
    theirs = KMeans(k, n_init=3, random_state=0, tol=0).fit(x[:, None])
    assert inertia(x, *kmeans_1d(x, k)) <= inertia(x, theirs.cluster_centers_[:, 0], theirs.labels_.astype(np.int64)) * (1 + 1e-9)


def test_larger_optimum_by_dynamic_programming():
    x = np.sort(np.random.default_rng(0).standard_t(2, 300))
    one, two = np.append(0, x.cumsum()), np.append(0, (x**2).cumsum())
    i, j = np.arange(301)[:, None], np.arange(301)[None]
    cost = np.where(j > i, (two[j] - two[i]) - (one[j] - one[i]) ** 2 / np.maximum(j - i, 1), np.inf)
    best = np.where(np.arange(301) == 0, 0.0, np.inf)
    for k in range(1, 60):
        best = (best[:, None] + cost).min(0)
        assert inertia(x, *kmeans_1d(x, k)) == pytest.approx(best[-1], rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_larger_optimum_equals_kmeans1d(kind):
    rival = pytest.importorskip("kmeans1d")
    x = sample(kind, 3000, np.random.default_rng(1))
    for k in (2, 17, 90):
        k = min(k, len(np.unique(x)))
        _, labels = np.unique(rival.cluster(x, k).clusters, return_inverse=True)
        means = np.array([np.mean(x[labels == j] - x[labels == j][0]) + x[labels == j][0] for j in range(labels.max() + 1)])
        theirs, ours = inertia(x, means, labels), inertia(x, *kmeans_1d(x, k))
        resolution = np.spacing(np.abs(x).max()) ** 2 * len(x)
        assert ours <= theirs * (1 + 1e-9) + resolution
        if kind not in ("peaks", "offset"):      # there its running sums cancel, and ours is the better one
            assert ours == pytest.approx(theirs, rel=1e-9, abs=resolution)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 300), st.floats(0, 4), st.integers(0, 2**31))
def test_cheapest_path_equals_quadratic_programme(kind, n, power, seed):
    "At any price, and whatever the length of blocks and segments."
    x = np.unique(sample(kind, n, np.random.default_rng(seed)))
    x = (x - x[0]) / max(1e-300, np.abs(x - x[0]).max())
    mass = np.random.default_rng(seed).integers(1, 50, len(x)).astype(float)
    sums, out, price = kmeans._moments(x, mass), np.empty(len(x)), 10.0 ** -(2 * power)
    best = np.zeros(len(x) + 1)
    for j in range(1, len(x) + 1):
        kmeans._costs(sums, 0, j, j, out)
        best[j] = (best[:j] + out[:j]).min() + price
    ends = kmeans._cheapest_path(x, mass, price)
    assert ends[0] == 0 and ends[-1] == len(x) and (np.diff(ends) > 0).all()
    assert kmeans._path_cost(x, mass, ends) + price * (len(ends) - 1) == pytest.approx(best[-1], rel=1e-10)


def test_segments_join():
    "A sweep over several segments of 65,536 points, with intervals shorter and longer than a segment, beats every shift of a cut."
    x = np.unique(np.random.default_rng(0).normal(size=200_000))
    ones = np.ones(len(x))
    for k in (2, 3, 40):
        ends = kmeans._optimal(x, ones, k)
        least = kmeans._path_cost(x, ones, ends)
        assert len(ends) == k + 1
        for j in range(1, k):
            for shift in (-1000, -30, -1, 1, 30, 1000):
                other = ends.copy()
                other[j] = min(max(ends[j] + shift, ends[j - 1]), ends[j + 1])
                assert kmeans._path_cost(x, ones, other) >= least * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60))
def test_dealing_sorts_every_float32(values):
    x = np.array(values, np.float32)
    found = kmeans._sorted_bits(x.view(np.uint32)).view(np.float32)
    assert np.array_equal(found, np.sort(x)) and np.array_equal(np.sort(np.signbit(found)), np.sort(np.signbit(x)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=200),
       st.lists(st.floats(-100, 100, width=32), max_size=40, unique=True))
def test_nearest_index_is_a_search(values, cuts):
    for dtype in (np.float32, np.float64):
        x, c = np.array(values, dtype), np.sort(np.array(cuts))
        assert np.array_equal(kmeans._nearest_index(x, c), np.searchsorted(c, x))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(2, 120), st.integers(0, 2**31))
def test_plus_plus_draws_as_the_textbook_does(kind, n, seed):
    rng = np.random.default_rng(seed)
    x = np.unique(sample(kind, n, rng))
    mass, draws = rng.integers(1, 9, len(x)).astype(float), rng.random(rng.integers(1, len(x) + 1))
    weight, near, chosen = mass.copy(), np.full(len(x), np.inf), []
    for draw in draws:
        running = np.cumsum(weight)
        at = np.searchsorted(running, draw * running[-1], side="right")
        if abs(running - draw * running[-1]).min() <= 1e-9 * running[-1]:
            return                                                # too close to call for sums in another order
        chosen.append(at)
        near = np.minimum(near, (x - x[at]) ** 2)
        weight = mass * near
    assert np.array_equal(kmeans._plus_plus(x, mass, draws), chosen)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=60), st.integers(2, 12), st.sampled_from(INITS), st.sampled_from(DTYPES),
       st.floats(0, 1))
def test_keep_zero_keeps_the_sparsity(values, k, init, dtype, share):
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    x = x.masked_fill(torch.rand(len(x), generator=torch.Generator().manual_seed(len(values))) < share, 0)
    codebook, assignments = kmeans_1d(x, k, init=init, keep_zero=True)
    shared = codebook[assignments]
    assert int((shared == 0).sum()) == int((x == 0).sum()) and torch.equal(shared == 0, x == 0) and len(codebook) <= k
    assert (x == 0).any() == (codebook == 0).any() and not torch.signbit(codebook[codebook == 0]).any()


def test_long_searches_can_be_interrupted(monkeypatch):
    "The compiled loops return to Python often enough: an exception in the middle of the work stops it."
    calls = {}
    x = np.random.default_rng(0).normal(size=300_000)
    for name, init, k in (("_draw_far", "k-means++", 5000), ("_extend", "optimal", 9), ("_rounds", "linear", 60)):
        real = getattr(kmeans, name)

        def stop(*args, name=name, real=real):
            calls[name] = calls.get(name, 0) + 1
            if calls[name] == 3:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(kmeans, name, stop)
            with pytest.raises(KeyboardInterrupt):
                kmeans_1d(x, k, init=init)


def test_coarse_price_search_is_still_exact():
    "More points than the coarse level holds, ties included: all neighbours of the found partition cost at least as much."
    for x in (np.random.default_rng(0).normal(size=100_000), np.arange(50_000.0)):
        codebook, assignments = kmeans_1d(x, 37)
        assert len(codebook) == 37
        least = inertia(x, codebook, assignments)
        for init in INITS[1:]:
            assert inertia(x, *kmeans_1d(x, 37, init=init)) >= least * (1 - 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_histogram_equals_sorting(dtype):
    x = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    w = torch.rand(5000, generator=torch.Generator().manual_seed(1)).double()
    for weights in (None, w):
        half, wide = kmeans_1d(x, 12, weights=weights), kmeans_1d(x.double(), 12, weights=weights)
        assert torch.equal(half[0], wide[0].to(dtype))


def test_centroids_stay_apart_when_rounded():
    x = torch.tensor([1.0, 1.0009765625, 1.0009765625, 1.001953125, 1.001953125, 1.0029296875], dtype=torch.float16)
    for k in range(1, 5):
        codebook, assignments = kmeans_1d(x, k)
        assert len(codebook.unique()) == len(codebook) <= k and int(assignments.max()) < len(codebook)


def test_keep_zero_lets_nothing_vanish():
    codebook, assignments = kmeans_1d(torch.tensor([-1.0, 0.0, 1.0]), 2, keep_zero=True)    # the mean of the others is 0
    assert torch.equal(codebook[assignments] == 0, torch.tensor([False, True, False]))
    tiny = torch.tensor([0.0, -6e-8, 6e-8, 1.0], dtype=torch.float16)
    codebook, assignments = kmeans_1d(tiny, 3, keep_zero=True)
    assert torch.equal(codebook[assignments] == 0, tiny == 0)
    assert kmeans_1d(torch.tensor([1.0, 2.0]), 2, keep_zero=True)[0].tolist() == [1.0, 2.0]  # no zeros: nothing to keep
    assert kmeans_1d(np.array([0.0, 5.0, 6.0]), 2, keep_zero=True, weights=np.array([1.0, 0, 0]))[0][0] == 0


def test_scale_and_sign_do_not_matter():
    x = np.random.default_rng(0).normal(size=200)
    _, assignments = kmeans_1d(x, 9)
    for scale in (1e-300, 1e-30, 1e150, 1e307):
        assert np.array_equal(kmeans_1d(x * scale, 9)[1], assignments)
    assert np.array_equal(8 - kmeans_1d(-x, 9)[1], assignments)


def test_random_starts_follow_the_generator():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    for init in ("forgy", "k-means++"):
        draw = [kmeans_1d(x, 8, init=init, generator=torch.Generator().manual_seed(s))[0] for s in (0, 0, 1)]
        assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
        assert torch.equal(kmeans_1d(x, 8, init=init)[0], draw[0])                         # without one: seed 0


def test_arrays_and_tensors_of_any_layout():
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    frozen = x.copy()
    frozen.flags.writeable = False
    expect = kmeans_1d(x, 3)
    assert expect[0].dtype == np.float32 and expect[1].dtype == np.int64 and expect[1].shape == (6, 4)
    for other in (frozen, np.asfortranarray(x), x[::-1][::-1], x.astype(">f4")):
        assert np.array_equal(kmeans_1d(other, 3)[1], expect[1])
    assert np.array_equal(kmeans_1d(x.T, 3)[1], expect[1].T)
    parameter = torch.nn.Parameter(torch.from_numpy(x.copy()))
    codebook, assignments = kmeans_1d(parameter, 3)
    assert not codebook.requires_grad and np.array_equal(assignments.numpy(), expect[1])
    assert kmeans_1d(torch.tensor(2.5), 3)[1].shape == ()


@pytest.mark.parametrize("change, message", [
    ({"k": 0}, "k must be an integer of at least 1, got 0"),
    ({"k": 2.0}, "k must be an integer"),
    ({"init": "random"}, "init must be one of optimal"),
    ({"values": torch.empty(0)}, "at least one value"),
    ({"values": torch.arange(4)}, "float16, bfloat16, float32 or float64, got torch.int64"),
    ({"values": np.array([True, False])}, "got torch.bool"),
    ({"values": np.empty((0, 3), np.float32)}, "at least one value, got shape (0, 3)"),
    ({"values": torch.tensor([1.0, float("-inf")]).half()}, "values holds 1 NaN or infinite value of 2"),
    ({"values": torch.zeros(3, dtype=torch.uint8)}, "got torch.uint8"),
    ({"k": -3}, "at least 1, got -3"),
    ({"values": np.array([1 + 2j])}, "got complex128"),
    ({"values": np.array(["a"])}, "got <U1"),
    ({"values": np.array([1.0, np.nan, np.inf])}, "values holds 2 NaN or infinite values of 3"),
    ({"weights": torch.ones(2)}, "weights must have the shape of values, (3,), got (2,)"),
    ({"values": torch.ones(3, 4), "weights": torch.ones(4, 3)}, "weights must have the shape of values, (3, 4), got (4, 3)"),
    ({"values": torch.empty(3, device="meta")}, "values is on the meta device and holds no values"),
    ({"weights": torch.tensor([1.0, -1.0, 1.0])}, "at least 0"),
    ({"weights": torch.zeros(3)}, "not all 0"),
    ({"weights": torch.tensor([1.0, float("nan"), 1.0])}, "weights holds 1 NaN"),
    ({"values": torch.tensor([0.0, 1.0]), "k": 1, "keep_zero": True}, "k of at least 2"),
    ({"generator": np.random.default_rng(0)}, "generator must be a torch.Generator, got <class 'numpy.random"),
    ({"init": "forgy", "generator": 0}, "generator must be a torch.Generator, got <class 'int'>"),
    ({"values": torch.eye(3).to_sparse()}, "values must be a dense tensor, got one of layout torch.sparse_coo"),
    ({"values": torch.eye(3).to_sparse_csr()}, "values must be a dense tensor"),
    ({"weights": torch.ones(3).to_sparse()}, "weights must be a dense tensor"),
])
def test_bad_input(change, message):
    arguments = {"values": torch.tensor([1.0, 2.0, 3.0]), "k": 2, **change}
    with pytest.raises(ValueError) as error:
        kmeans_1d(arguments.pop("values"), arguments.pop("k"), **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("change, message", [
    ({"assignments": np.array([0, 1])}, "assignments must have the shape of values, (3,), got (2,)"),
    ({"assignments": np.array([[0, 1, 1]])}, "assignments must have the shape of values"),
    ({"assignments": np.array([0, 1, 2])}, "assignments must lie in 0…1, got 0…2"),
    ({"assignments": np.array([0, 1, -1])}, "assignments must lie in 0…1, got -1…1"),
    ({"assignments": np.array([0.0, 1.0, 1.0])}, "assignments must be integers, got torch.float64"),
    ({"codebook": np.ones((2, 2))}, "codebook must have one axis"),
    ({"weights": np.ones(2)}, "weights must have the shape of values, (3,), got (2,)"),
    ({"values": torch.ones(3).to_sparse()}, "values must be a dense tensor"),
])
def test_inertia_refuses_what_does_not_fit(change, message):
    arguments = {"values": np.ones(3), "codebook": np.array([0.0, 1.0]), "assignments": np.array([0, 1, 1])} | change
    with pytest.raises(ValueError) as error:
        inertia(**arguments)
    assert message in str(error.value)


def test_inertia_takes_any_integers():
    for kind in (np.uint8, np.int16, np.int64):
        assert inertia(np.array([1.0, 2.0]), np.array([0.0, 4.0]), np.array([0, 1], kind), np.array([3, 1])) == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype):
    x = (torch.randn(20_000, generator=torch.Generator().manual_seed(0))).to(dtype)
    x[::3] = 0
    for init in INITS:
        here, there = kmeans_1d(x, 16, init=init, keep_zero=True), kmeans_1d(x.cuda(), 16, init=init, keep_zero=True)
        assert there[0].is_cuda and there[1].is_cuda
        assert torch.equal(there[0].cpu(), here[0]) and torch.equal(there[1].cpu(), here[1])
