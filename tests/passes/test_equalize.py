"""Channel scales move between products wherever a positive factor passes exactly, and nowhere else."""

import dataclasses
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
from qcompiler.passes.equalize import FAR_APART, equalize
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.simplify import simplify

# Scaled weights are rounded to float32 once more, 2**-24 each: some 140 dB, of which cancellation eats a part.
LEAST_DB = 80.0
# Sweeps end when no factor moves by more than half a percent; of two that meet, the ranges move by as much each.
ALIKE = 0.02

#: Eight bits wherever a product reads, so that what one range for all channels costs is seen.
NARROW = {"activation_sqnr": None}


def _spread(channels, factor=1e3, seed=9):
    """Channel factors between 1 / sqrt(factor) and sqrt(factor)."""
    exponents = np.random.default_rng(seed).permutation(np.linspace(-0.5, 0.5, channels))
    return (factor**exponents).astype(np.float32)


def _conv(x, w, groups=1, padding="SAME"):
    return lax.conv_general_dilated(
        x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def _equalize(fun, weights, x, least=1.0):
    before = fold_norms(simplify(trace(fun, weights, (jax.ShapeDtypeStruct(x.shape, x.dtype),))))
    after = equalize(before, least)
    assert sqnr_db(before.evaluate([x]), after.evaluate([x])) >= LEAST_DB
    return before, after


def _links(program):
    return program.notes["equalized"]["links"]


def _unchanged(before, after):
    assert before.weights.keys() == after.weights.keys()
    return all(np.array_equal(w, after.weights[name]) for name, w in before.weights.items())


def _relative(ranges):
    """Over the median one."""
    return ranges / np.exp(np.median(np.log(ranges)))


def _ranges(program, name, axis):
    """Largest magnitude of each channel, relative to the median one."""
    w = np.abs(np.asarray(program.weights[name], np.float64))
    return _relative(w.max(axis=tuple(d for d in range(w.ndim) if d != axis % w.ndim)))


LINKS = {
    "straight": lambda p, y: y,
    "bias": lambda p, y: y + p["b"],
    "relu": lambda p, y: jax.nn.relu(y),
    "bias_relu": lambda p, y: jax.nn.relu(y + p["b"]),
    "norm_relu": lambda p, y: jax.nn.relu((y - p["b"]) * p["s"]),
    "number": lambda p, y: jax.nn.relu(y) + 1.0,
    "turned": lambda p, y: jax.nn.relu(1.5 - y),
    "relu6": lambda p, y: jax.nn.relu6(y),
    "bounded_below": lambda p, y: jnp.maximum(y, 0.5),
    "clip": lambda p, y: jnp.clip(y, -0.5, 1.0),
    "clamp": lambda p, y: lax.clamp(np.float32(-0.5), y, np.float32(1.0)),
    "bounds": lambda p, y: jnp.minimum(y, jnp.abs(p["b"])),
    "leaky": lambda p, y: jax.nn.leaky_relu(y),
    "prelu": lambda p, y: jnp.where(y > 0, y, p["s"] * y),
    "prelu_summed": lambda p, y: jax.nn.relu(y) - p["s"] * jax.nn.relu(-y),
    "where": lambda p, y: jnp.where(y > 0.3, y, 0.0),
    "magnitude": lambda p, y: jnp.abs(y),
    "scaled": lambda p, y: y * p["s"] / 3.0,
    "masked": lambda p, y: y * jnp.broadcast_to((y[..., :1] > 0).astype(np.int32), y.shape).astype(np.float32),
    "signed": lambda p, y: y * jnp.sign(y),
    "joined": lambda p, y: jnp.maximum(y, 0.1 * y) + jax.nn.relu(y),
    "gated": lambda p, y: jax.nn.relu(y) * jax.nn.sigmoid(jnp.ones_like(y[..., :1]) * p["s"][0]),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kinds", ["conv-conv", "dot-dot"])
def test_pairs_get_equal_ranges(kinds, link):
    conv, spread = kinds == "conv-conv", _spread(8, 30.0)
    first = normal(*((3, 3, 2, 8) if conv else (2, 8)), scale=0.2, shift=1.0)
    weights = {"first": first * spread, "s": _spread(8, 10.0)}
    weights |= {"b": normal(8, scale=0.1, shift=0.5) * spread}
    weights["second"] = normal(3, 3, 8, 4, seed=2) if conv else normal(8, 4, seed=2)

    def fun(p, x):
        y = LINKS[link](p, _conv(x, p["first"]) if conv else x @ p["first"])
        return _conv(y, p["second"]) if conv else y @ p["second"]

    before, after = _equalize(fun, weights, normal(2, 4, 4, 2) if conv else normal(3, 2))
    (found,) = _links(after)
    (first,), (second,) = found["writers"], found["readers"]
    expected = _relative(np.sqrt(_ranges(before, first, -1) * _ranges(before, second, -2)))
    np.testing.assert_allclose(_ranges(after, first, -1), expected, rtol=1e-5)
    np.testing.assert_allclose(_ranges(after, second, -2), expected, rtol=1e-5)
    assert found["largest_factor"] > 1.5 and found["channels"] == 8


PATHS = {
    "flatten": lambda y: y.reshape(y.shape[0], -1),
    "max_pool": lambda y: lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").reshape(2, -1),
    "average_pool": lambda y: lax.reduce_window(y, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME").reshape(2, -1) / 4,
    "mean": lambda y: y.mean(axis=(1, 2)),
    "largest": lambda y: y.max(axis=(1, 2)),
    "pad": lambda y: jnp.pad(y, ((0, 0), (1, 0), (0, 2), (0, 0))).reshape(2, -1),
    "channels_padded": lambda y: jnp.pad(y, ((0, 0), (0, 0), (0, 0), (2, 3))).mean((1, 2)),
    "transpose": lambda y: y.transpose(0, 3, 1, 2).reshape(2, -1),
    "slice": lambda y: y[:, 1:3, ::2].reshape(2, -1),
    "channels_sliced": lambda y: y[..., 1:7].mean((1, 2)),
    "rev": lambda y: y[:, :, ::-1].reshape(2, -1),
    "stack": lambda y: jnp.concatenate([y, jnp.zeros_like(y[:, :1])], axis=1).reshape(2, -1),
    "shuffle": lambda y: y.reshape(2, 4, 4, 2, 4).swapaxes(3, 4).reshape(2, 4, 4, 8).mean((1, 2)),
    "split": lambda y: jnp.maximum(*jnp.split(y, 2, axis=-1)).mean((1, 2)),
    "taken": lambda y: y[:, jnp.array([2, 0, 1])].reshape(2, -1),
    "cumulated": lambda y: jnp.cumsum(y, axis=1).reshape(2, -1),
    "sorted": lambda y: jnp.sort(y, axis=1)[:, -1].reshape(2, -1),
    "broadcast": lambda y: (jnp.zeros_like(y) + y.mean((1, 2), keepdims=True)).reshape(2, -1),
}


@pytest.mark.parametrize("path", PATHS)
def test_factors_follow_their_channels_to_a_dense_layer(path):
    """The dense layer reads each channel in several rows, or several channels in one: its factor is theirs."""
    x = normal(2, 4, 4, 2)
    width = jax.eval_shape(PATHS[path], jax.ShapeDtypeStruct((2, 4, 4, 8), np.float32)).shape[-1]
    # Channels that a path joins are spread alike.
    spread = np.tile(_spread(4), 2)
    weights = {"first": normal(3, 3, 2, 8) * spread, "b": normal(8, seed=1) * spread, "dense": normal(width, 5, seed=2)}
    fun = lambda p, x: PATHS[path](jax.nn.relu(_conv(x, p["first"]) + p["b"])) @ p["dense"]
    before, after = _equalize(fun, weights, x)
    (found,) = _links(after)
    assert found["writers"] == ["first"] and found["readers"][0].startswith("dense")
    # 10**3 apart before; random ranges of the dense layer and half of the spread (in logarithms) are left.
    spread = lambda program: np.ptp(np.log(_ranges(program, "first", -1)))
    assert spread(after) < spread(before) - np.log(5.0)


def test_a_weight_on_the_left_and_a_contraction_on_the_right():
    spread = _spread(8)[:, None]
    weights = {"first": normal(8, 3) * spread, "b": normal(8, 1) * spread, "second": normal(4, 8)}
    _, after = _equalize(lambda p, x: p["second"] @ jax.nn.relu(p["first"] @ x + p["b"]), weights, normal(3, 5))
    np.testing.assert_allclose(_ranges(after, "first", 0), _ranges(after, "second", 1), rtol=1e-5)


def test_two_contracted_dimensions_are_one():
    weights = {"first": normal(8, 2, 4) * _spread(8).reshape(2, 4), "second": normal(2, 4, 8, seed=1)}
    fun = lambda p, x: jnp.einsum("bhf,hfo->bo", jax.nn.relu(jnp.einsum("bi,ihf->bhf", x, p["first"])), p["second"])
    _, after = _equalize(fun, weights, normal(3, 8))
    first, second = (np.asarray(after.weights[n], np.float64) for n in ("first", "second"))
    first, second = np.abs(first).max(axis=0), np.abs(second).max(axis=2)
    np.testing.assert_allclose(first / first[0, 0], second / second[0, 0], rtol=1e-5)


def test_a_chain_of_three_settles():
    weights = {"a": normal(3, 8) * _spread(8), "b": normal(8, 8) * _spread(8, seed=4), "c": normal(8, 3)}
    fun = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    _, after = _equalize(fun, weights, normal(3, 3))
    for pair in (("a", "b"), ("b", "c")):
        np.testing.assert_allclose(_ranges(after, pair[0], 1), _ranges(after, pair[1], 0), rtol=ALIKE)
    assert len(_links(after)) == 2


def test_a_depthwise_convolution_between_two_others():
    """Nagel et al.: all three ranges of a channel become (r1 r2 r3)**(1/3)."""
    weights = {
        "a": normal(1, 1, 3, 8) * _spread(8),
        "d": normal(3, 3, 1, 8) * _spread(8, 1e2, 4),
        "c": normal(1, 1, 8, 4),
    }
    fun = lambda p, x: _conv(jax.nn.relu6(_conv(jax.nn.relu6(_conv(x, p["a"])), p["d"], 8)), p["c"])
    before, after = _equalize(fun, weights, normal(1, 5, 5, 3))
    sides = (("a", -1), ("d", -1), ("c", -2))
    expected = _relative(np.cbrt(np.prod([_ranges(before, *side) for side in sides], axis=0)))
    for side in sides:
        np.testing.assert_allclose(_ranges(after, *side), expected, rtol=ALIKE)
    assert [(link["writers"], link["readers"]) for link in _links(after)] == [(["a"], ["d"]), (["d"], ["c"])]


@pytest.mark.parametrize("groups", [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_grouped_convolutions(groups):
    weights = {"first": normal(3, 3, 8 // groups[0], 8) * _spread(8), "second": normal(3, 3, 8 // groups[1], 16)}
    fun = lambda p, x: _conv(jax.nn.relu(_conv(x, p["first"], groups[0])), p["second"], groups[1])
    _, after = _equalize(fun, weights, normal(1, 4, 4, 8))
    # Input channel c of the second is in row c % depth, in the columns of its group.
    second, count = np.abs(after.weights["second"]).max(axis=(0, 1)), groups[1]
    read = second.reshape(8 // count, count, 16 // count).max(axis=2).T.ravel()
    np.testing.assert_allclose(_ranges(after, "first", -1), _relative(read), rtol=1e-4)


def test_a_depthwise_multiplier():
    weights = {"first": normal(1, 1, 2, 4) * _spread(4), "d": normal(3, 3, 1, 8), "last": normal(1, 1, 8, 3)}
    fun = lambda p, x: _conv(_conv(jax.nn.relu(_conv(x, p["first"])), p["d"], 4), p["last"])
    _, after = _equalize(fun, weights, normal(1, 4, 4, 2))
    read = np.abs(after.weights["d"]).max(axis=(0, 1, 2)).reshape(4, 2).max(axis=1)
    np.testing.assert_allclose(_ranges(after, "first", -1), _relative(read), rtol=ALIKE)


def test_a_residual_stream_is_solved_jointly():
    """Three weights write a stream and three read it; by its largest ranges, one factor per channel serves all."""
    spread = _spread(8)
    weights = {n: normal(4 if n == "w0" else 8, 8, seed=k) * spread for k, n in enumerate(("w0", "w1", "w2"))}
    weights |= {n: normal(8, 8, seed=k + 5) / spread[:, None] for k, n in enumerate(("r0", "r1", "r2"))}

    def fun(p, x):
        y = x @ p["w0"]
        y = y + jax.nn.relu(y @ p["r0"]) @ p["w1"]
        y = y + jax.nn.relu6(y @ p["r1"]) @ p["w2"]
        return jax.nn.relu(y) @ p["r2"]

    before, after = _equalize(fun, weights, normal(5, 4))
    stream = _links(after)[0]
    assert stream["writers"] == ["w0", "w1", "w2"] and stream["readers"] == ["r0", "r1", "r2"]
    peak = lambda program, names, axis: np.max([_ranges(program, n, axis) for n in names], axis=0)
    # Random ranges differ by a factor of two or so; before, by 10**3.
    for names, axis in ((stream["writers"], -1), (stream["readers"], -2)):
        assert np.ptp(np.log10(peak(before, names, axis))) > 2.5 > 0.7 > np.ptp(np.log10(peak(after, names, axis)))


def test_two_readers_share_their_factors():
    weights = {"first": normal(8, 8) * _spread(8), "second": normal(8, 8, seed=1), "third": normal(8, 8, seed=2)}

    def fun(p, x):
        y = jax.nn.relu(x @ p["first"])
        return y @ p["second"] + y @ p["third"]

    _, after = _equalize(fun, weights, normal(4, 8))
    read = np.maximum(_ranges(after, "second", 0), _ranges(after, "third", 0))
    np.testing.assert_allclose(_ranges(after, "first", 1), _relative(read), rtol=ALIKE)


def test_channels_beside_those_of_an_input_move_alone():
    weights = {"first": normal(8, 8) * _spread(8), "second": normal(16, 4, seed=1)}
    fun = lambda p, x: jnp.concatenate([x, jax.nn.relu(x @ p["first"])], axis=1) @ p["second"]
    before, after = _equalize(fun, weights, normal(4, 8))
    np.testing.assert_array_equal(after.weights["second"][:8], before.weights["second"][:8])
    assert _links(after)[0]["channels"] == 8
    assert np.ptp(np.log(_ranges(after, "first", 1))) < np.ptp(np.log(_ranges(before, "first", 1))) - 1


def _is_a_result(p, x):
    y = x @ p["first"]
    return y, y @ p["second"]


def _gated_by_itself(p, x):
    y = x @ p["first"]
    return (y * jax.nn.relu6(y + 3.0)) @ p["second"]


@pytest.mark.parametrize(
    ("fun", "why"),
    [
        (_is_a_result, "result 0"),
        (lambda p, x: jax.nn.relu(x @ p["first"] + x) @ p["second"], "made of input"),
        (lambda p, x: jax.nn.relu(x @ p["first"]) @ p["first"], "made of input"),
        (lambda p, x: jax.nn.relu(x @ p["first"]) @ p["second"] + jnp.sin(x) @ p["first"], "result 0"),
        (lambda p, x: jax.nn.relu(x @ p["first"]) @ p["second"] @ (p["first"] + x), "read elsewhere"),
        (lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"], "read by tanh in <top level>"),
        (lambda p, x: jax.nn.softmax(x @ p["first"]) @ p["second"], "read by "),
        (_gated_by_itself, "read by mul"),
        (lambda p, x: ((x @ p["first"]) / jnp.abs(x @ p["second"] + 9.0)) @ p["third"], "read by div"),
        (lambda p, x: jnp.where(x @ p["first"] > 0, x @ p["first"], 1.0) @ p["second"], "read by select_n"),
        (lambda p, x: (x @ p["first"]).astype(np.int32) @ p["second"].astype(np.int32), "read by convert_element_type"),
        (lambda p, x: lax.pad(x @ p["first"], np.float32(1), [(0, 0, 0), (0, 4, 0)]) @ p["long"], "read by pad"),
        (lambda p, x: lax.cond(x[0, 0] > 0, jnp.negative, jnp.abs, x @ p["first"]) @ p["second"], "read by cond"),
    ],
    ids="result input tied tied_elsewhere added tanh softmax gated divided where rounded padded branches".split(),
)
def test_does_nothing_where_the_channels_belong_to_others_too(fun, why):
    weights = {"first": normal(8, 8) * _spread(8), "second": normal(8, 8, seed=1), "third": normal(8, 8, seed=2)}
    weights |= {"long": normal(12, 4)}
    before, after = _equalize(fun, weights, normal(8, 8))
    assert _unchanged(before, after)
    assert all(abs(link["largest_factor"] - 1) < 1e-9 for link in _links(after))
    assert any(why in reason for reason in after.notes["equalized"]["pinned"].values())


@pytest.mark.parametrize(
    "fun",
    [
        lambda p, x: jax.nn.relu(x @ p["first"] + p["rows"]) @ p["second"],
        lambda p, x: (x @ p["first"]).T @ p["wide"],
        lambda p, x: jnp.cumsum(x @ p["first"], axis=1) @ p["second"],
    ],
    ids=["row_bias", "transposed", "cumulated"],
)
def test_does_nothing_where_all_channels_must_share_a_factor(fun):
    weights = {"first": normal(8, 8) * _spread(8), "second": normal(8, 8), "rows": normal(4, 1), "wide": normal(4, 3)}
    before, after = _equalize(fun, weights, normal(4, 8))
    assert _unchanged(before, after)


def test_balanced_weights_do_not_change():
    first, second = normal(8, 8), normal(8, 8, seed=1)
    first /= np.abs(first).max(axis=0)
    second /= 3 * np.abs(second).max(axis=1, keepdims=True)
    weights = {"first": first, "b": normal(8), "second": second}
    fun = lambda p, x: jax.nn.relu6(x @ p["first"] + p["b"]) @ p["second"]
    before, after = _equalize(fun, weights, normal(4, 8))
    # Ranges of 1 and 1 / 3 are so up to a rounding of float32, 2**-24; the factors and the weights may be as far off.
    assert _links(after)[0]["largest_factor"] == pytest.approx(1.0, abs=2**-22)
    for name, w in before.weights.items():
        np.testing.assert_allclose(after.weights[name], w, rtol=2**-22)


def test_half_precision_weights_stay():
    weights = {"first": (normal(8, 8) * _spread(8)).astype(jnp.bfloat16), "second": normal(8, 8).astype(jnp.bfloat16)}
    fun = lambda p, x: jax.nn.relu(x @ p["first"]) @ p["second"]
    before, after = _equalize(fun, weights, normal(4, 8).astype(jnp.bfloat16))
    assert _links(after) == [] and _unchanged(before, after)


@pytest.mark.parametrize("tiny", [0.0, 1e-12], ids=["zero", "next_to_zero"])
@pytest.mark.parametrize("which", ["first", "second"])
def test_channels_without_a_range_do_not_grow(which, tiny):
    """A bias alone would otherwise grow with its weights, and be the whole range of the activation."""
    weights = {"first": normal(8, 8), "b": normal(8), "second": normal(8, 8, seed=1)}
    if which == "first":
        weights["first"][:, 2] *= np.float32(tiny)
    else:
        weights["second"][2] *= np.float32(tiny)
    fun = lambda p, x: jax.nn.relu(x @ p["first"] + p["b"]) @ p["second"]
    before, after = _equalize(fun, weights, normal(4, 8))
    bias = next(n for n in before.weights if n.startswith("b"))
    # Ranges and biases of random channels differ by a factor of five or so.
    largest = lambda program: np.abs(program.weights[bias]).max() / np.median(np.abs(program.weights[bias]))
    assert largest(after) < 5 * largest(before)
    assert all(np.isfinite(w).all() for w in after.weights.values())
    for name in ("first", "second"):
        assert np.abs(after.weights[name]).max() < 5 * np.abs(before.weights[name]).max()


def test_a_rescaled_program_ends_the_same():
    """What was moved between channels before does not matter, nor that a channel is all but its bias."""
    spread = _spread(8, 1e6)
    weights = {"first": normal(8, 8), "b": normal(8), "second": normal(8, 8, seed=1)}
    weights["first"][:, 3] *= np.float32(1e-9)
    moved = {
        "first": weights["first"] / spread,
        "b": weights["b"] / spread,
        "second": weights["second"] * spread[:, None],
    }
    fun = lambda p, x: jax.nn.relu(x @ p["first"] + p["b"]) @ p["second"]
    ends = [_equalize(fun, w, normal(4, 8))[1].weights for w in (weights, moved)]
    for name, array in ends[0].items():
        # All channels of a weight may differ by one factor.
        ratio = ends[1][name][array != 0] / array[array != 0]
        np.testing.assert_allclose(ratio, ratio[0], rtol=ALIKE)


def test_norms_are_divided_with_what_they_describe():
    weights = {
        "first": normal(8, 8),
        "mean": normal(8),
        "var": _spread(8),
        "g": _spread(8, seed=1),
        "second": normal(8, 8),
    }

    def fun(p, x):
        y = (x @ p["first"] - p["mean"]) * lax.rsqrt(p["var"]) * p["g"] + 0.5
        return jax.nn.relu(y) @ p["second"]

    before, after = _equalize(fun, weights, normal(4, 8))
    ((key, norm),) = before.notes["norms"].items()
    (writer,) = _links(after)[0]["writers"]
    was, now = (np.abs(np.asarray(p.weights[writer], np.float64)).max(axis=0) for p in (before, after))
    for field in ("mean", "deviation"):
        divided = np.asarray(norm[field]) / (was / now)
        np.testing.assert_allclose(np.ravel(after.notes["norms"][key][field]), np.ravel(divided), rtol=1e-5)


# Integers


def _quantized(fun, weights, x, equalize):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return qc.quantize(fun, [x], params=weights, recipe=qc.Recipe(granularity="tensor", equalize=equalize))


def _integer_sqnr(weights, x, equalize):
    fun = lambda p, x: jax.nn.relu(x @ p["first"] + p["b"]) @ p["second"]
    return sqnr_db([fun(weights, x)], [_quantized(fun, weights, x, equalize)(x)])


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


@pytest.mark.parametrize("link", ["relu6", "clamp", "prelu", "number", "bounds"])
def test_constants_per_channel_stay_in_one_integer_region(link):
    weights = {"first": normal(3, 3, 2, 8) * _spread(8, 30.0), "second": normal(3, 3, 8, 4, seed=2)}
    weights |= {"b": normal(8, seed=1), "s": _spread(8, 2.0)}
    fun = lambda p, x: _conv(LINKS[link](p, _conv(x, p["first"]) + p["b"]), p["second"])
    reports = [_quantized(fun, weights, normal(4, 6, 6, 2), e).report for e in (False, True)]
    assert all(r.islands == () and r.qdq_pairs_after == 0 for r in reports)
    changed = [{r.name: r.changed for r in report.passes} for report in reports]
    assert changed[0]["partition"] == changed[1]["partition"] == "2 regions, 0 islands"


# Only where channels are far apart

WIDE = 64


def _three_products(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


def _apart(first, second):
    """Weights with factors per channel on both hidden layers, taken back by the next."""
    a, b, c = normal(16, WIDE), normal(WIDE, WIDE, seed=1), normal(WIDE, 8, seed=2)
    return {"a": a * first, "b": b / first[:, None] * second, "c": c / second[:, None]}


def _few(factor):
    """One for all channels but two."""
    return np.where(np.arange(WIDE) < 2, factor, 1.0).astype(np.float32)


@pytest.mark.parametrize(
    ("factors", "moves"),
    [
        (_spread(WIDE, 1.0), False),
        (_spread(WIDE, 10.0), False),
        (_spread(WIDE, 1e4), True),
        (_few(100.0), True),
        # Channels that are next to dead take no range from the others.
        (_few(1e-4), False),
    ],
    ids=["alike", "a_little", "far", "two_large", "two_small"],
)
def test_channels_that_are_far_apart_move_and_no_others(factors, moves):
    before, after = _equalize(_three_products, _apart(factors, _spread(WIDE, 4.0)), normal(4, 16), FAR_APART)
    first, second = (link["largest_factor"] for link in _links(after))
    assert (first > FAR_APART) == moves and second == 1.0
    assert _unchanged(before, after) == (not moves)
    np.testing.assert_array_equal(before.weights["c"], after.weights["c"])


def test_by_default_weights_per_channel_survive_channels_that_are_far_apart():
    x, weights = normal(256, 16), _apart(_spread(WIDE, 1e4), _spread(WIDE, 1e4, seed=3))
    found = {}
    for recipe in (qc.Recipe(), qc.Recipe(equalize=False)):
        model = qc.quantize(_three_products, [x], params=weights, recipe=dataclasses.replace(recipe, **NARROW))
        found[recipe.equalizes] = sqnr_db([_three_products(weights, x)], [model(x)])
    # 8 bits of normal draws, whose largest are 4 deviations, and of weights leave more than 30 dB.
    assert found["far_apart"] > 30 and found["nowhere"] < 15, found


@pytest.mark.parametrize("dead", [slice(None), slice(0, 3)], ids=["all", "some"])
def test_channels_of_zeros_stay(dead):
    weights = {"w": normal(4, 8), "b": normal(8, seed=1), "v": normal(8, 4, seed=2)}
    weights["w"][:, dead] = weights["b"][dead] = 0
    fun = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]
    before, after = _equalize(fun, weights, normal(3, 4), FAR_APART)
    assert _unchanged(before, after)
    _equalize(fun, weights, normal(3, 4))


def test_numbers_that_stand_for_infinity_hold_their_channels():
    most = float(np.finfo(np.float32).max)
    weights = {"a": normal(16, WIDE) * _spread(WIDE, 1e4), "c": normal(WIDE, 8, seed=2)}
    before, after = _equalize(lambda p, x: jnp.clip(x @ p["a"], 0, most) @ p["c"], weights, normal(4, 16), FAR_APART)
    assert _unchanged(before, after)


def test_values_without_elements_are_left_alone():
    fun = lambda p, x: (((x @ p["w"]) @ p["v"][:, :0]).sum(-1), (x @ p["w"]).sum(-1))
    before, after = _equalize(fun, {"w": normal(4, 8), "v": normal(8, 4, seed=2)}, normal(3, 4))
    assert _unchanged(before, after)


def test_results_that_are_numbers():
    _, after = _equalize(lambda p, x: (x @ p["w"], 1.0), {"w": normal(4, 4)}, normal(3, 4))
    assert _links(after) == []
