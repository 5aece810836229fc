"""Ranges chosen by the error they leave in the results of the layers that read them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

import qcompiler as qc
from qcompiler import range_choice
from qcompiler.debug.report import sqnr_db
from qcompiler.errors import CalibrationError, RecipeError
from qcompiler.numerics import ranges
from qcompiler.passes import choose_ranges
from qcompiler.recipe import Recipe

RECIPE = Recipe(activation_sqnr=None)
WEIGHT = normal(16, 8, seed=3)


def _decided(passes, fun, weights, batches, recipe=RECIPE):
    program = passes(fun, weights, batches, recipe, until="assign_precision")["assign_precision"]
    return choose_ranges.by_output_error(program, [[b] for b in batches], recipe.estimator_for), program


def _stats(program):
    """Of the only input."""
    (stats,) = (s for key, s in program.stats.items() if key.startswith("input:"))
    return stats


def _only(chosen):
    """The only range."""
    ((_, by_type),) = chosen.items()
    return by_type["int8"]


def _uncared_for(factor=300):
    """Inputs whose largest channel meets weights of zero."""
    x, w = normal(64, 16, seed=4), WEIGHT.copy()
    x[:, 5] *= factor
    w[5] = 0
    return x, w


def test_a_channel_that_nothing_reads_takes_no_range(passes):
    x, w = _uncared_for()
    chosen, program = _decided(passes, lambda p, x: x @ p, w, [x])
    low, high = _only(chosen)
    rest = np.abs(np.delete(x, 5, axis=1)).max()
    assert low > _stats(program).min / 2 and high < _stats(program).max / 2
    assert max(-low, high) > 0.5 * rest


def test_it_gains_where_estimators_cannot_see():
    x, w = _uncared_for()
    exact = x @ w
    got = {}
    for name in (None, "output_error"):
        qmodel = qc.quantize(lambda p, x: x @ p, [x], params=w, recipe=dataclasses.replace(RECIPE, ranges=name))
        got[name] = sqnr_db([exact], [np.asarray(qmodel(x))])
    # Less than a tenth of the range is left, 3.3 bits; 20 dB less what the first, below 1 dB, is no noise any more.
    assert got["output_error"] > got[None] + 15


def test_nothing_changes_where_the_estimator_is_right(passes):
    x = np.random.default_rng(0).uniform(0, 1, (64, 16)).astype(np.float32)
    chosen, _ = _decided(passes, lambda p, x: x @ p, WEIGHT, [x])
    assert chosen == {}


def test_a_centred_value_gets_the_zero_point_zero(passes):
    x = np.random.default_rng(0).uniform(-1, 1, (512, 16)).astype(np.float32)
    x[0, :2] = -1.004, 1.0
    chosen, program = _decided(passes, lambda p, x: x @ p, WEIGHT, [x], Recipe(activation_range="minmax"))
    if chosen:
        low, high = _only(chosen)
        assert low * 127 == pytest.approx(-high * 128, rel=1e-6)
    encoding = qc.Encoding.of_stats(_stats(program), RECIPE.activation, ranges.MinMax())
    assert chosen or not np.any(encoding.zero_point)


def test_every_reader_counts(passes):
    """One reader ignores the outlier, the other needs nothing else: the range must hold it."""
    x, w = _uncared_for(30)
    other = np.zeros_like(w)
    other[5] = 1
    chosen, program = _decided(passes, lambda p, x: (x @ p["w"], x @ p["o"]), {"w": w, "o": other}, [x])
    stats = _stats(program)
    low, high = _only(chosen) if chosen else (stats.min, stats.max)
    assert high > 0.8 * stats.max or low < 0.8 * stats.min


def test_products_of_two_activations(passes):
    def attend(p, x):
        scores = jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"])
        return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), x @ p["v"])

    weights = {name: normal(16, 16, seed=k) / 4 for k, name in enumerate("qkv")}
    x = normal(4, 10, 16, seed=7)
    chosen, program = _decided(passes, attend, weights, [x], Recipe(pair_sqnr=None))
    known = set(program.stats)
    assert set(chosen) <= known


def test_another_batch_size_has_the_same_ranges():
    x, w = _uncared_for()
    recipe = dataclasses.replace(RECIPE, ranges="output_error")
    qmodel = qc.quantize(lambda p, x: x @ p, [x], params=w, recipe=recipe)
    whole = np.asarray(qmodel(x))
    np.testing.assert_array_equal(np.asarray(qmodel(x[:10])), whole[:10])


def test_data_of_another_shape_is_no_help():
    x, w = _uncared_for()
    calibrated = qc.trace(lambda p, x: x @ p, x[:8], params=w).calibrate([x])
    again = calibrated.quantize(dataclasses.replace(RECIPE, ranges="output_error"))
    assert again.program.notes["ranges"]


def test_kept_batches_must_fit():
    calibrated = qc.trace(lambda p, x: x @ p, normal(8, 16), params=WEIGHT).calibrate([normal(8, 16)])
    calibrated._data = dataclasses.replace(calibrated._data, samples=type(calibrated._data.samples)())
    with pytest.raises(CalibrationError, match="choose_ranges looks at calibration data"):
        calibrated.quantize(Recipe(ranges="output_error"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(ranges="best"), "unknown choice of ranges"),
        (lambda: range_choice.OutputError(batches=0), "at least one batch"),
        (lambda: range_choice.Tiers(shares=(0.8, 0.5)), "shares"),
        (lambda: range_choice.Tiers(high="median"), "unknown range estimator"),
        (lambda: range_choice.Tiers(criticality={"*": 0.0}), "positive weight"),
    ],
)
def test_bad_choices(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def _two_layers(p, x):
    with jax.named_scope("first"):
        x = jax.nn.relu(x @ p["a"])
    with jax.named_scope("second"):
        x = jax.nn.relu(x @ p["b"])
    with jax.named_scope("third"):
        return x @ p["c"]


def test_tiers_have_estimators_of_their_own():
    weights = {name: normal(16, 16, seed=k) / 4 for k, name in enumerate("abc")}
    x = normal(64, 16, seed=9)
    x[0, 0] = 40
    shares = (1 / 3, 1 / 3)
    found = {}
    for layer in ("first", "second"):
        choice = range_choice.Tiers(
            high=ranges.Percentile(99.0), medium="entropy", low="minmax", shares=shares, criticality={layer: 1e6}
        )
        qmodel = qc.quantize(_two_layers, [x], params=weights, recipe=dataclasses.replace(RECIPE, ranges=choice))
        found[layer] = qmodel._quantized.programs["choose_ranges"].notes["ranges"]
    stats = qmodel._quantized.programs["choose_ranges"].stats
    for layer, chosen in found.items():
        (value,) = (key for key in chosen if key.startswith("input:" if layer == "first" else "first/"))
        expected = ranges.Percentile(99.0).estimate(stats[value], -128, 127, False)
        assert chosen[value]["int8"] == expected
    assert found["first"] != found["second"]


def test_tiers_that_agree_with_the_recipe_change_nothing():
    weights = {name: normal(16, 16, seed=k) / 4 for k, name in enumerate("abc")}
    x = normal(64, 16, seed=9)
    choice = range_choice.Tiers(high="mse", medium="mse", low="mse")
    outs = [
        np.asarray(qc.quantize(_two_layers, [x], params=weights, recipe=dataclasses.replace(RECIPE, ranges=r))(x))
        for r in (None, choice)
    ]
    np.testing.assert_array_equal(*outs)
