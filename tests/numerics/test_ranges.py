import collections
import dataclasses
import itertools
import math

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from qcompiler.numerics import ranges

ESTIMATORS = [
    ranges.MinMax(),
    ranges.MovingAverage(),
    ranges.Percentile(),
    ranges.MSE(),
    ranges.Entropy(),
]
# (qmin, qmax, symmetric)
INT8_AFFINE = (-128, 127, False)
INT8_SYMMETRIC = (-127, 127, True)
GRIDS = [
    INT8_AFFINE,
    INT8_SYMMETRIC,
    (-128, 127, True),
    (-2, 1, True),
    (-8, 7, False),
    (-32768, 32767, False),
    (0, 1, False),
]
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
ARRAYS = hypothesis.extra.numpy.arrays(np.float32, st.integers(1, 60), elements=FLOATS)
QUICK = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)


def quantize(x, low, high, qmin, qmax, symmetric):
    """Quantizes and dequantizes in float64, by the textbook formula."""
    if symmetric:
        scale, zero = high / qmax, 0
    else:
        scale = (high - low) / (qmax - qmin)
        zero = min(max(round(qmin - low / scale), qmin), qmax)
    return (np.clip(np.rint(x / scale) + zero, qmin, qmax) - zero) * scale


def mean_squared_error(x, range_, grid):
    return np.mean((x - quantize(x, *range_, *grid)) ** 2)


def sqnr_db(x, range_, grid):
    return 10 * np.log10(np.mean(x**2) / mean_squared_error(x, range_, grid))


def stats_of(*batches, num_bins=ranges.DEFAULT_BINS):
    histogram = ranges.Histogram(num_bins)
    for batch in batches:
        histogram.update(batch)
    return histogram.stats


def without_batches(stats):
    return dataclasses.replace(stats, batch_ranges=np.zeros((0, 2)))


def samples(kind, size=20000, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size)
    return {
        "normal": x,
        "laplace": rng.laplace(size=size),
        "relu": np.maximum(x, 0),
        "relu6": np.clip(4 * x, 0, 6),
        "gelu": 1.5 * x * (1 + np.tanh(0.79788 * (x + 0.044715 * x**3))),
        "sigmoid": 1 / (1 + np.exp(-3 * x)),
        "negative": -np.abs(x) - 1,
        "sparse": np.where(rng.random(size) < 0.001, x, 0),
    }[kind]


KINDS = ["normal", "laplace", "relu", "relu6", "gelu", "sigmoid", "negative", "sparse"]


# Histogram


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bins", [2, 5, 100, 2048])
def test_histogram_counts_what_a_literal_count_finds(kind, num_bins):
    x = samples(kind)
    stats = stats_of(x, num_bins=num_bins)
    literal = collections.Counter(math.floor(v / stats.width) for v in x)
    assert {stats.first_bin + i: n for i, n in enumerate(stats.counts.tolist()) if n} == literal
    assert stats.edges.size == stats.counts.size + 1
    assert 0.0 in stats.edges
    assert (stats.min, stats.max, stats.count, stats.zeros) == (x.min(), x.max(), x.size, (x == 0).sum())
    np.testing.assert_array_equal(stats.batch_ranges, [[x.min(), x.max()]])
    # Not more bins than asked for, and not one doubling fewer than possible.
    assert stats.counts.size <= num_bins
    half = stats.width / 2
    assert math.floor(max(x.max(), 0) / half) - math.floor(min(x.min(), 0) / half) + 1 > num_bins


@QUICK
@hypothesis.given(st.lists(ARRAYS, min_size=1, max_size=6), st.sampled_from([2, 3, 64, 2048]), st.randoms())
def test_batches_and_their_order_do_not_matter_at_all(batches, num_bins, random):
    streamed = stats_of(*batches, num_bins=num_bins)
    everything = np.concatenate(batches)
    assert streamed.counts.sum() == streamed.count == everything.size
    assert without_batches(streamed) == without_batches(ranges.RangeStats.of(everything, num_bins))
    shuffled = random.sample(batches, len(batches))
    assert without_batches(stats_of(*shuffled, num_bins=num_bins)) == without_batches(streamed)
    # Every value is in its bin, by exact arithmetic.
    for i, n in enumerate(streamed.counts.tolist()):
        assert n == np.sum((everything >= streamed.edges[i]) & (everything < streamed.edges[i + 1]))


def test_range_grows_by_many_orders_of_magnitude():
    batches = [np.linspace(-1, 1, 1000) * 10.0**e for e in range(-30, 31, 3)]
    stats = stats_of(*batches)
    assert stats.counts.sum() == stats.count == 1000 * len(batches)
    assert without_batches(stats) == without_batches(stats_of(*batches[::-1]))
    np.testing.assert_array_equal(stats.batch_ranges, [[b.min(), b.max()] for b in batches])


def test_merge_is_associative_and_equals_updates():
    a, b, c = (ranges.RangeStats.of(samples("normal", 500, seed) * 10**seed) for seed in range(3))
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(b).merge(c) == stats_of(*(samples("normal", 500, seed) * 10**seed for seed in range(3)))
    with pytest.raises(ValueError, match="2048 and 64 bins"):
        a.merge(ranges.RangeStats.of([1.0], 64))


def test_empty_batches_are_no_information():
    x = samples("gelu", 100)
    assert stats_of(np.zeros((0, 3)), x, np.zeros(0, np.float32)) == stats_of(x)
    nothing = stats_of(np.zeros((4, 0)))
    assert nothing == ranges.RangeStats.empty()
    for estimator in ESTIMATORS:
        with pytest.raises(ValueError, match="no values"):
            estimator.estimate(nothing, *INT8_AFFINE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("position", [0, 5, 70000])
def test_values_that_are_not_finite_are_refused(bad, position):
    x = np.zeros(70001)
    x[position] = bad
    histogram = ranges.Histogram()
    histogram.update([1.0, 2.0])
    before = histogram.stats
    with pytest.raises(ValueError, match="finite"):
        histogram.update(x)
    assert histogram.stats is before


def test_shapes_and_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.arange(-12, 12).reshape(2, 3, 4)
    expected = stats_of(x.ravel().astype(np.float64))
    for dtype in (np.int8, np.int32, np.float16, np.float32, ml_dtypes.bfloat16):
        assert stats_of(x.astype(dtype)) == expected
    assert stats_of(np.asfortranarray(x)) == stats_of(x[::-1, ::-1]) == stats_of(x.tolist()) == expected
    assert stats_of(np.array(True)).count == 1
    with pytest.raises(TypeError, match="complex"):
        stats_of(x.astype(np.complex64))
    with pytest.raises(ValueError, match="at least 2 bins"):
        ranges.Histogram(1)


def test_stats_round_trip_through_npz(tmp_path):
    for stats in (stats_of(samples("gelu"), samples("relu")), ranges.RangeStats.empty(7)):
        np.savez(tmp_path / "stats.npz", **stats.to_arrays())
        with np.load(tmp_path / "stats.npz", allow_pickle=False) as loaded:
            back = ranges.RangeStats.from_arrays(loaded)
        assert back == stats
        assert back != stats.merge(ranges.RangeStats.of([3.0], stats.num_bins))
        assert {f.name: type(getattr(back, f.name)) for f in dataclasses.fields(back)} == {
            f.name: type(getattr(stats, f.name)) for f in dataclasses.fields(stats)
        }
    with pytest.raises(ValueError, match="read-only"):
        stats.counts[:] = 0


# What every estimator promises


def check_promises(range_, qmin, qmax, symmetric):
    low, high = range_
    assert type(low) is type(high) is float
    assert low <= 0 <= high != low
    assert not symmetric or low == -high
    scale = np.float32(high / qmax if symmetric else (high - low) / (qmax - qmin))
    tiny = np.finfo(np.float32).tiny
    assert tiny <= scale < np.inf
    assert tiny <= np.float32(1) / scale < np.inf


@QUICK
@hypothesis.given(st.lists(ARRAYS, min_size=1, max_size=3), st.sampled_from(GRIDS), st.sampled_from([2, 64, 2048]))
def test_zero_is_inside_and_the_scale_is_normal(batches, grid, num_bins):
    stats = stats_of(*batches, num_bins=num_bins)
    for estimator in ESTIMATORS:
        low, high = estimator.estimate(stats, *grid)
        check_promises((low, high), *grid)
        # No range reaches beyond the data, but for those that had to be widened.
        reach = max(-stats.min, stats.max) * (1 + 1e-12)
        smallest = ranges.MIN_SCALE * (grid[1] - grid[0]) * (1 + 1e-12)
        assert max(-low, high) <= max(reach, smallest) or reach == 0


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.name)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -5.5, 1e30, -1e30, 1e-30, -1e-30, 1e-45, 3.4e38, -3.4e38])
def test_constants(estimator, grid, value):
    low, high = estimator.estimate(stats_of(np.full(10, value), np.full((2, 3), value)), *grid)
    check_promises((low, high), *grid)
    if value == 0:
        assert (low, high) == ((-1.0, 1.0) if grid[2] else (0.0, 1.0))
    elif 1e-30 <= abs(value) <= 1e30:
        expected = (-abs(value), abs(value)) if grid[2] else (min(value, 0), max(value, 0))
        np.testing.assert_allclose((low, high), expected, rtol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.name)
@pytest.mark.parametrize("grid", [INT8_AFFINE, INT8_SYMMETRIC], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_scale_with_the_data(estimator, grid, kind):
    x = samples(kind, 2000)
    low, high = estimator.estimate(stats_of(x), *grid)
    # By powers of two even the bins are the same.
    for factor in (2.0**-99, 2.0**99):
        scaled = estimator.estimate(stats_of(x * factor), *grid)
        np.testing.assert_allclose(scaled, (low * factor, high * factor), rtol=1e-9)
    if not x.min() < 0 < x.max() and not grid[2]:
        assert low == 0 or high == 0  # one-sided data keep all integers on their side


@pytest.mark.parametrize("grid", [(0, 255, True), (-128, 0, True), (3, 3, False), (5, -5, False)], ids=str)
def test_integers_that_cannot_be(grid):
    with pytest.raises(ValueError, match="range of integers"):
        ranges.MinMax().estimate(stats_of([1.0]), *grid)


# Each estimator against its formula


def test_minmax():
    stats = stats_of([-1.0, 0.5], [2.0, 1.5])
    assert ranges.MinMax().estimate(stats, *INT8_AFFINE) == (-1.0, 2.0)
    assert ranges.MinMax().estimate(stats, *INT8_SYMMETRIC) == (-2.0, 2.0)
    assert ranges.MinMax(margin=1.25).estimate(stats, *INT8_AFFINE) == (-1.25, 2.5)
    assert ranges.MinMax().estimate(stats_of([2.0, 3.0]), *INT8_AFFINE) == (0.0, 3.0)
    assert ranges.MinMax().estimate(stats_of([-2.0, -3.0]), *INT8_AFFINE) == (-3.0, 0.0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_moving_average(decay):
    batches = [samples("normal", 50, seed) * (seed + 1) for seed in range(8)]
    low, high = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        low = decay * low + (1 - decay) * batch.min()
        high = decay * high + (1 - decay) * batch.max()
    # Empty batches do not count, and saved statistics know as much.
    stats = stats_of(batches[0], np.zeros(0), *batches[1:4]).merge(stats_of(*batches[4:]))
    np.testing.assert_allclose(ranges.MovingAverage(decay).estimate(stats, *INT8_AFFINE), (low, high), rtol=1e-12)


def exact_quantile(x, percentile):
    x = np.sort(x)
    return x[math.ceil(percentile / 100 * x.size) - 1]


@pytest.mark.parametrize("percentile", [90, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_within_a_bin_of_the_exact_one(percentile, kind):
    x = samples(kind)
    stats = stats_of(*np.array_split(x, 7))
    x = x[x != 0]
    estimator = ranges.Percentile(percentile)
    low, high = estimator.estimate(stats, *INT8_AFFINE)
    assert abs(high - max(exact_quantile(x, percentile), 0)) <= stats.width
    assert abs(low - min(-exact_quantile(-x, percentile), 0)) <= stats.width
    low, high = estimator.estimate(stats, *INT8_SYMMETRIC)
    assert abs(high - exact_quantile(np.abs(x), percentile)) <= stats.width
    if percentile == 100:
        assert (low, high) == ranges.MinMax().estimate(stats, *INT8_SYMMETRIC)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["laplace", "relu", "relu6", "gelu", "sigmoid", "sparse"])
def test_mse_is_as_good_as_brute_force_on_the_raw_data(bits, symmetric, kind):
    x = samples(kind, 6000)
    grid = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, symmetric)
    if symmetric:
        candidates = [(-a, a) for a in np.abs(x).max() * np.linspace(0.1, 1, 150)]
    else:
        lows = x.min() * np.linspace(0.1, 1, 16) if x.min() < 0 else [0.0]
        candidates = list(itertools.product(lows, x.max() * np.linspace(0.1, 1, 40)))
    best = min(mean_squared_error(x, candidate, grid) for candidate in candidates)
    found = mean_squared_error(x, ranges.MSE().estimate(stats_of(x), *grid), grid)
    assert found <= 1.03 * best


@pytest.mark.parametrize("grid", [INT8_AFFINE, INT8_SYMMETRIC, (-8, 7, False), (-32768, 32767, False)], ids=str)
def test_squared_error_is_that_of_values_spread_over_their_bins(grid):
    rng = np.random.default_rng(1)
    edges, counts = np.arange(-60, 61) / 16, rng.integers(0, 9, 120)
    spread = (edges[:-1, None] + (np.arange(4000) + 0.5) / 4000 / 16).ravel()
    for range_ in [(-3.0, 3.0), (-1.3, 1.3)] + ([] if grid[2] else [(0.0, 3.1), (-0.7, 2.0)]):
        literal = np.sum(np.repeat(counts, 4000) / 4000 * (spread - quantize(spread, *range_, *grid)) ** 2)
        np.testing.assert_allclose(ranges._squared_error(edges, counts * 16.0, range_, *grid), literal, rtol=2e-3)


def literal_divergence(counts, start, stop, levels):
    """KL of one window in plain Python, from the description in Entropy's docstring."""
    inside = [float(n) for n in counts[start:stop]]
    bins = len(inside)
    p = list(inside)
    p[0] += sum(counts[:start])
    p[-1] += sum(counts[stop:])
    q = [0.0] * bins
    for level in range(levels):
        members = [i for i in range(bins) if i * levels // bins == level]
        filled = [i for i in members if inside[i] > 0]
        for i in filled:
            q[i] = sum(inside[j] for j in members) / len(filled)

    def smooth(values):
        empty = sum(v == 0 for v in values)
        values = [1e-4 if v == 0 else v - 1e-4 * empty / (bins - empty) for v in values]
        return [v / sum(values) for v in values]

    return sum(a * math.log(a / b) for a, b in zip(smooth(p), smooth(q), strict=True))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["laplace", "relu", "gelu", "negative"])
def test_entropy_minimizes_the_literal_divergence(symmetric, kind):
    x = samples(kind, 5000)
    x = np.concatenate([x, 4 * x[:5]])
    stats = stats_of(x, num_bins=128)
    grid = (-8, 7, symmetric)
    width, levels = stats.width, 8 if symmetric else 16
    values = np.abs(x[x != 0]) if symmetric else x[x != 0]
    # 128 bins shrink one at a time; the literal search tries every window on the path.
    bins = [math.floor(v / width) for v in values]
    first, last = min(*bins, 0), max(*bins, 0)
    counts = [bins.count(k) for k in range(first, last + 1)]
    zero = -first
    if zero + 1 < len(counts) and counts[zero + 1]:
        counts[zero] = min(counts[zero], counts[zero + 1])
    if zero >= 2 and counts[zero - 2]:
        counts[zero - 1] = min(counts[zero - 1], counts[zero - 2])
    start, stop, tried = 0, len(counts), {}
    while stop - start >= levels:
        if any(counts[start:stop]):
            tried[start, stop] = literal_divergence(counts, start, stop, levels)
        left = sum(counts[: start + 1]) - sum(counts[:start]) if start < zero else math.inf
        right = counts[stop - 1] if stop - 1 > zero else math.inf
        if left == right == math.inf:
            break
        from_left = left < right or (left == right and zero - start > stop - zero)
        start, stop = (start + 1, stop) if from_left else (start, stop - 1)
    low, high = ranges.Entropy().estimate(stats, *grid)
    assert len(tried) > 30
    start, stop = min(tried, key=tried.get)
    assert low == (-high if symmetric else max((start - zero) * width, min(x.min(), 0)))
    assert high == min((stop - zero) * width, np.abs(x).max() if symmetric else max(x.max(), 0))


def test_entropy_smoothing_keeps_mass_and_leaves_no_empty_bin():
    counts = np.array([0, 5, 0, 0, 1, 20.0])
    smooth = ranges._smooth(counts)
    assert (smooth > 0).all()
    assert math.isclose(smooth.sum(), counts.sum())


def test_entropy_ignores_the_spike_at_zero():
    x = np.abs(samples("laplace"))
    expected = ranges.Entropy().estimate(stats_of(x), *INT8_AFFINE)
    assert ranges.Entropy().estimate(stats_of(x, np.zeros(10 * x.size)), *INT8_AFFINE) == expected


def test_entropy_with_more_integers_than_bins_is_minmax():
    stats = stats_of(samples("normal"))
    grid = (-32768, 32767, False)
    assert ranges.Entropy().estimate(stats, *grid) == ranges.MinMax().estimate(stats, *grid)


# Whether it helps


@pytest.mark.parametrize("grid", [INT8_AFFINE, INT8_SYMMETRIC], ids=str)
@pytest.mark.parametrize(
    ("kind", "outlier", "gains"),
    [
        ("normal", 20, {"percentile": 12, "entropy": 12}),
        ("relu", 20, {"percentile": 12, "entropy": 12}),
        ("laplace", 60, {"percentile": 12, "entropy": 12}),
        # MSE pays for what outliers lose, two values in 100,000, so it is near ones that it clips with gain.
        ("normal", 8, {"percentile": 4, "entropy": 3, "mse": 1.5}),
        ("relu", 8, {"percentile": 4, "entropy": 3, "mse": 0.4}),
        ("laplace", 20, {"percentile": 2.5, "entropy": 2.5, "mse": 1.5}),
    ],
)
def test_estimators_beat_minmax_by_decibels_on_the_bulk_of_data_with_outliers(grid, kind, outlier, gains):
    bulk = samples(kind, 100000)
    outliers = np.array([outlier * 0.8, outlier]) * ([1, 1] if kind == "relu" else [-1, 1])
    stats = stats_of(bulk[:50000], outliers, bulk[50000:])
    base = sqnr_db(bulk, ranges.MinMax().estimate(stats, *grid), grid)
    for name, gain in gains.items():
        assert sqnr_db(bulk, ranges.by_name(name).estimate(stats, *grid), grid) > base + gain
    # Over all values, nothing beats MSE.
    everything = np.concatenate([bulk, outliers])
    best = mean_squared_error(everything, ranges.MSE().estimate(stats, *grid), grid)
    for estimator in ESTIMATORS:
        assert best <= 1.03 * mean_squared_error(everything, estimator.estimate(stats, *grid), grid)


# The registry


def test_by_name():
    assert ranges.by_name("minmax") == ranges.MinMax()
    assert ranges.by_name("percentile", percentile=99.9) == ranges.Percentile(99.9)
    assert [ranges.by_name(e.name) for e in ESTIMATORS] == ESTIMATORS
    with pytest.raises(ValueError, match="'minmax', 'moving_average', 'percentile', 'mse', 'entropy'"):
        ranges.by_name("max")
    with pytest.raises(TypeError):
        ranges.by_name("minmax", percentile=99)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("minmax", "margin", [0, -1, math.inf, math.nan]),
        ("moving_average", "decay", [-0.1, 1, math.nan]),
        ("percentile", "percentile", [50, 101, math.nan]),
        ("mse", "candidates", [1, 0]),
    ],
)
def test_options_are_checked(name, option, values):
    for value in values:
        with pytest.raises(ValueError, match=option):
            ranges.by_name(name, **{option: value})


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("shape", ["normal", "laplace", "uniform", "positive"])
def test_expected_sqnr_is_that_of_quantizing(shape, bits):
    rng = np.random.default_rng(0)
    x = {
        "normal": lambda: rng.normal(size=20000),
        "laplace": lambda: rng.laplace(size=20000),
        "uniform": lambda: rng.uniform(-1, 1, 20000),
        "positive": lambda: rng.exponential(size=20000),
    }[shape]().astype(np.float32)
    stats = ranges.RangeStats.of(x, 2048)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = ranges.MinMax().estimate(stats, qmin, qmax, False)
    scale = (high - low) / (qmax - qmin)
    zero = np.rint(qmin - low / scale)
    q = (np.clip(np.rint(x / scale) + zero, qmin, qmax) - zero) * scale
    measured = 10 * np.log10(np.sum(x**2) / np.sum((x - q) ** 2))
    # Values lie evenly within a bin, of which there are eight and more to a step.
    assert ranges.expected_sqnr_db(stats, (low, high), qmin, qmax, False) == pytest.approx(measured, abs=0.3)


def test_expected_sqnr_of_one_value_is_infinite():
    stats = ranges.RangeStats.of(np.full(5, 2.0, np.float32), 2048)
    assert ranges.expected_sqnr_db(stats, (0.0, 2.0), -128, 127, False) == math.inf
