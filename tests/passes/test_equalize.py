"""Channel scales move between two products through ReLU and straight links, and nowhere else."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

import qcompiler as qc
from qcompiler.debug.report import sqnr_db
from qcompiler.ir.tracing import trace
from qcompiler.passes.equalize import equalize
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.simplify import simplify

# Scaled weights are rounded to float32 once more, 2**-24 each: some 140 dB, of which cancellation eats a part.
LEAST_DB = 80.0


def _spread(channels, factor=1e3, seed=9):
    """Channel factors between 1 / sqrt(factor) and sqrt(factor)."""
    exponents = np.random.default_rng(seed).permutation(np.linspace(-0.5, 0.5, channels))
    return (factor**exponents).astype(np.float32)


def _conv(x, w, groups=1):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def _equalize(fun, weights, x):
    before = fold_norms(simplify(trace(fun, weights, (jax.ShapeDtypeStruct(x.shape, x.dtype),))))
    after = equalize(before)
    assert sqnr_db(before.evaluate([x]), after.evaluate([x])) >= LEAST_DB
    return before, after


def _ranges(program, name, axis):
    w = np.abs(np.asarray(program.weights[name], np.float64))
    return w.max(axis=tuple(d for d in range(w.ndim) if d != axis))


LINKS = {
    "straight": lambda p, y: y,
    "bias": lambda p, y: y + p["b"],
    "relu": lambda p, y: jax.nn.relu(y),
    "bias_relu": lambda p, y: jax.nn.relu(y + p["b"]),
    "norm_relu": lambda p, y: jax.nn.relu((y - p["b"]) * p["s"]),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kinds", ["conv-conv", "conv-dot", "dot-dot"])
def test_pairs_get_equal_ranges(kinds, link):
    first, second = kinds.split("-")
    conv = first == "conv"
    weights = {"first": normal(3, 3, 2, 8) if conv else normal(2, 8), "b": normal(8, seed=1), "s": _spread(8, 10.0)}
    weights["first"] = weights["first"] * _spread(8)
    weights["second"] = normal(3, 3, 8, 4, seed=2) if second == "conv" else normal(8, 4, seed=2)

    def fun(p, x):
        y = _conv(x, p["first"]) if conv else x @ p["first"]
        y = LINKS[link](p, y)
        return _conv(y, p["second"]) if second == "conv" else y @ p["second"]

    _, after = _equalize(fun, weights, normal(2, 4, 4, 2) if conv else normal(3, 2))
    (pair,) = after.notes["equalized"]
    out, back = after.weights[pair["first"]].ndim - 1, after.weights[pair["second"]].ndim - 2
    np.testing.assert_allclose(_ranges(after, pair["first"], out), _ranges(after, pair["second"], back), rtol=1e-5)
    assert pair["largest_scale"] > 5


def test_a_weight_on_the_left_and_a_contraction_on_the_right():
    weights = {"first": normal(8, 3) * _spread(8)[:, None], "b": normal(8, 1), "second": normal(4, 8)}
    _, after = _equalize(lambda p, x: p["second"] @ jax.nn.relu(p["first"] @ x + p["b"]), weights, normal(3, 5))
    np.testing.assert_allclose(_ranges(after, "first", 0), _ranges(after, "second", 1), rtol=1e-5)


def test_a_chain_of_three_settles():
    weights = {"a": normal(3, 8) * _spread(8), "b": normal(8, 8) * _spread(8, seed=4), "c": normal(8, 3)}
    fun = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    _, after = _equalize(fun, weights, normal(3, 3))
    for pair in (("a", "b"), ("b", "c")):
        # Sweeps end when no scale moves by more than 0.1%.
        np.testing.assert_allclose(_ranges(after, pair[0], 1), _ranges(after, pair[1], 0), rtol=5e-3)
    assert len(after.notes["equalized"]) == 2


def _twice(p, x):
    y = jax.nn.relu(x @ p["first"])
    return y @ p["second"] + y @ p["third"]


def _is_a_result(p, x):
    y = x @ p["first"]
    return y, y @ p["second"]


def _residual(p, x):
    return jax.nn.relu(x @ p["first"] + x) @ p["second"]


def _tied(p, x):
    return jax.nn.relu(x @ p["first"]) @ p["first"]


def _tied_elsewhere(p, x):
    return jax.nn.relu(x @ p["first"]) @ p["second"] + jnp.sin(x) @ p["first"]


@pytest.mark.parametrize(
    "fun",
    [
        _twice,
        _is_a_result,
        _residual,
        _tied,
        _tied_elsewhere,
        lambda p, x: jax.nn.relu6(x @ p["first"]) @ p["second"],
        lambda p, x: jnp.maximum(x @ p["first"], 0.5) @ p["second"],
        lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"],
        lambda p, x: jax.nn.relu(x @ p["first"] + p["rows"]) @ p["second"],
        lambda p, x: jax.nn.relu(jnp.maximum(x @ p["first"], 0.0) + 1.0) @ p["second"],
        lambda p, x: (x @ p["first"]).T @ p["wide"],
        lambda p, x: jnp.einsum("bi,ihf,hfo->bo", x, p["first"].reshape(8, 2, 4), p["second"].reshape(2, 4, 8)),
    ],
    ids=["two_readers", "result", "residual", "tied", "tied_elsewhere", "relu6", "max_half", "tanh"]
    + ["row_bias", "number_added", "transposed", "two_contracted"],
)
def test_does_nothing_where_the_channels_belong_to_others_too(fun):
    weights = {"first": normal(8, 8) * _spread(8), "second": normal(8, 8, seed=1), "third": normal(8, 8, seed=2)}
    weights |= {"b": normal(8), "rows": normal(4, 1), "wide": normal(4, 3)}
    before, after = _equalize(fun, weights, normal(4, 8))
    assert after.notes["equalized"] == []
    for name, w in before.weights.items():
        np.testing.assert_array_equal(np.asarray(w), np.asarray(after.weights[name]))


@pytest.mark.parametrize("groups", [(2, 1), (1, 2), (8, 8)])
def test_grouped_convolutions_stay(groups):
    weights = {"first": normal(3, 3, 8 // groups[0], 8) * _spread(8), "second": normal(3, 3, 8 // groups[1], 8)}
    fun = lambda p, x: _conv(jax.nn.relu(_conv(x, p["first"], groups[0])), p["second"], groups[1])
    _, after = _equalize(fun, weights, normal(1, 4, 4, 8))
    assert after.notes["equalized"] == []


@pytest.mark.parametrize("tiny", [0.0, 1e-12], ids=["zero", "next_to_zero"])
@pytest.mark.parametrize("which", ["first", "second"])
def test_channels_without_a_range_keep_scale_one(which, tiny):
    weights = {"first": normal(8, 8), "b": normal(8), "second": normal(8, 8, seed=1)}
    if which == "first":
        weights["first"][:, 2] *= np.float32(tiny)
    else:
        weights["second"][2] *= np.float32(tiny)
    fun = lambda p, x: jax.nn.relu(x @ p["first"] + p["b"]) @ p["second"]
    before, after = _equalize(fun, weights, normal(4, 8))
    bias = next(n for n in before.weights if n.startswith("b"))
    assert after.weights[bias].ravel()[2] == before.weights[bias].ravel()[2]
    np.testing.assert_array_equal(after.weights["first"][:, 2], before.weights["first"][:, 2])
    assert all(np.isfinite(w).all() for w in after.weights.values())


def test_balanced_weights_do_not_change():
    first = normal(8, 8)
    first /= np.abs(first).max(axis=0)
    second = normal(8, 8, seed=1)
    second /= np.abs(second).max(axis=1, keepdims=True)
    weights = {"first": first, "b": normal(8), "second": second}
    before, after = _equalize(lambda p, x: jax.nn.relu(x @ p["first"] + p["b"]) @ p["second"], weights, normal(4, 8))
    assert [p["largest_scale"] for p in after.notes["equalized"]] == [1.0]
    for name, w in before.weights.items():
        np.testing.assert_array_equal(w, after.weights[name])


def test_half_precision_weights_stay():
    weights = {"first": (normal(8, 8) * _spread(8)).astype(jnp.bfloat16), "second": normal(8, 8).astype(jnp.bfloat16)}
    _, after = _equalize(
        lambda p, x: jax.nn.relu(x @ p["first"]) @ p["second"], weights, normal(4, 8).astype(jnp.bfloat16)
    )
    assert after.notes["equalized"] == []


def _integer_sqnr(weights, x, equalize):
    def fun(p, x):
        return jax.nn.relu(x @ p["first"] + p["b"]) @ p["second"]

    recipe = qc.Recipe(granularity="tensor", equalize=equalize)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = qc.quantize(fun, [x], params=weights, recipe=recipe)
    return sqnr_db([fun(weights, x)], [model(x)])


def test_equalizing_helps_weights_per_tensor_with_spread_channels():
    """Channels 10**3 apart share one int8 scale: small ones vanish, though the next layer makes them large again."""
    spread = _spread(32)
    weights = {
        "first": normal(32, 32) * spread,
        "b": normal(32) * spread,
        "second": normal(32, 32, seed=1) / spread[:, None],
    }
    x = normal(256, 32, seed=3)
    without, with_ = (_integer_sqnr(weights, x, e) for e in (False, True))
    # Without: half of the channels have at most a bit or two left. With: as good as int8 gets, some 35 dB.
    assert with_ >= 30 and with_ >= without + 15, (without, with_)


def test_equalizing_does_not_hurt_balanced_weights():
    weights = {"first": normal(32, 32), "b": normal(32), "second": normal(32, 32, seed=1)}
    x = normal(256, 32, seed=3)
    without, with_ = (_integer_sqnr(weights, x, e) for e in (False, True))
    # Ranges of random channels differ by a factor of two or so: quantization noise moves by a fraction of a dB.
    assert with_ >= without - 1.0, (without, with_)
