"""Samples that stand for a pool."""

import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

import qcompiler as qc
from qcompiler.errors import CalibrationError

WEIGHT = normal(8, 6, seed=1)


def _model(p, x):
    return jnp.maximum(x @ p, 0) @ p.T


def _traced(size=4):
    return qc.trace(_model, np.zeros((size, 8), np.float32), params=WEIGHT)


def _clusters():
    """300 samples: nine tenths alike, the rest of two other kinds."""
    rng = np.random.default_rng(0)
    scale = np.repeat([1.0, 6.0, 20.0], [270, 20, 10])
    x = (rng.normal(size=(300, 8)) * scale[:, None]).astype(np.float32)
    order = rng.permutation(300)
    return x[order], np.searchsorted([270, 290], order, side="right")


def test_every_kind_is_chosen():
    x, kind = _clusters()
    chosen = _traced().representative([x[:100], x[100:150], x[150:]], 12)
    assert set(kind[chosen.indices]) == {0, 1, 2}
    assert chosen.pool == 300 and len(chosen.indices) == 12
    (batch,) = chosen.batches
    np.testing.assert_array_equal(batch.args[0], x[chosen.indices])


def test_it_covers_more_than_chance():
    x, _ = _clusters()
    chosen = _traced().representative([x], 12)
    covered = np.mean([*chosen.range_coverage.values()])
    # Twelve random samples have the rarest kind in a third of the draws.
    assert covered > 0.9 and covered > chosen.random_range_coverage + 0.2
    assert chosen.distance < 0.9 * chosen.random_distance
    assert "12 of 300 samples" in str(chosen) and "least covered" in str(chosen)


def test_coverage_is_that_of_the_values():
    x, _ = _clusters()
    chosen = _traced().representative([x], 12)
    (name,) = (key for key in chosen.range_coverage if key.startswith("input:"))
    kept = x[chosen.indices]
    expected = (kept.max() - kept.min()) / (x.max() - x.min())
    assert chosen.range_coverage[name] == pytest.approx(expected, rel=1e-6)


def test_a_small_pool_is_taken_whole():
    x, _ = _clusters()
    chosen = _traced().representative([x[:7]], 12)
    np.testing.assert_array_equal(chosen.indices, np.arange(7))
    assert set(chosen.range_coverage.values()) == {1.0} and chosen.distance == 0


def test_the_bulk_alone_and_the_edges_alone():
    x, _ = _clusters()
    bulk, edges = (_traced().representative([x], 6, edges=share) for share in (0.0, 1.0))
    assert bulk.distance <= edges.distance
    assert np.mean([*edges.range_coverage.values()]) >= np.mean([*bulk.range_coverage.values()])


def test_it_calibrates_as_well_as_the_pool():
    x, _ = _clusters()
    chosen = _traced().representative([x], 12)
    stats = [_traced().calibrate(batches).program.stats for batches in ([x], chosen.batches)]
    for key in stats[0]:
        spans = [s[key].max - s[key].min for s in stats]
        assert spans[1] >= 0.8 * spans[0]


@pytest.mark.parametrize(
    ("pool", "count", "message"),
    [
        ([np.ones((3, 8), np.float32)], 0, "count of at least 1"),
        ([], 3, "no samples"),
        ([np.full((3, 8), np.nan, np.float32)], 3, "NaN"),
        ([np.ones((9000, 8), np.float32)], 3, "at most 8192"),
    ],
)
def test_bad_pools(pool, count, message):
    with pytest.raises(CalibrationError, match=message):
        _traced().representative(pool, count)


def test_samples_need_a_common_dimension():
    traced = qc.trace(lambda p, x, s: x @ p * s, normal(4, 8), np.float32(2), params=WEIGHT)
    with pytest.raises(CalibrationError, match="leading dimension that all inputs have in common"):
        traced.representative([(normal(4, 8), np.float32(2))], 2)
