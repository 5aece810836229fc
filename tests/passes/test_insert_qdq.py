"""One quantize/dequantize pair per edge and type, with scales that fit the values and biases that fit int32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

from qcompiler import ops
from qcompiler.debug.report import sqnr_db
from qcompiler.errors import CalibrationError, OverflowProofError
from qcompiler.numerics.types import ACTIVATION, BIAS, INDEX, STREAM, QuantType
from qcompiler.passes._weight_pairs import weight_scale
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.recipe import Recipe

WEIGHTS = {"w": normal(8, 8), "v": normal(8, 8, seed=1), "b": normal(8, seed=2)}
X = normal(16, 8, seed=3)


def _insert(passes, fun, weights=WEIGHTS, x=X, recipe=None):
    found = passes(fun, weights, [x], recipe, until="insert_qdq")
    program = found["insert_qdq"]
    # int8 operands and int16 streams: about 40 dB for one or two layers of Gaussian numbers.
    assert sqnr_db(found["trace"].evaluate([x]), program.evaluate([x])) > 30
    return program


def _pairs(program):
    """(what is quantized, type) per pair."""
    return [(program.ids[e.invars[0]], e.params["type"]) for e in program.eqns if e.primitive is ops.fake_quantize_p]


def _regions(program):
    return {e.params["id"]: e for e in program.eqns if e.primitive is ops.region_p}


def test_one_pair_per_edge(passes):
    program = _insert(passes, lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"])
    channels = QuantType(8, symmetric=True, narrow_range=True, axis=(1,))
    assert _pairs(program) == [
        ("input:arg0", ACTIVATION),
        ("weight:w", channels),
        ("dot_general#0", ACTIVATION),
        ("weight:v", channels),
        ("dot_general#1", STREAM),
    ]


def test_a_value_read_by_a_product_and_a_residual_has_both_types(passes):
    def fun(p, x):
        y = jax.nn.relu(x @ p["w"])
        return y + jnp.tanh(y @ p["v"])

    program = _insert(passes, fun)
    pairs = _pairs(program)
    assert {t for n, t in pairs if n == "dot_general#0"} == {ACTIVATION, STREAM}
    assert {t for n, t in pairs if n == "dot_general#1"} == {INDEX}
    # Both from the region's own result, so that each is rounded once.
    dot = _regions(program)["dot_general#0"]
    readers = [e for e, _ in program.users[dot.outvars[0]]]
    assert [e.primitive for e in readers] == [ops.fake_quantize_p] * 2


def test_an_input_is_quantized_once_and_narrower_types_are_derived(passes):
    program = _insert(passes, lambda p, x: x + x @ p["w"] @ p["v"])
    (wide,) = [e for e, _ in program.users[program.input_vars[0]]]
    assert wide.primitive is ops.fake_quantize_p and wide.params["type"] == STREAM
    narrow = [e for e, _ in program.users[wide.outvars[0]] if e.primitive is ops.fake_quantize_p]
    assert [e.params["type"] for e in narrow] == [ACTIVATION]


def test_views_share_scale_and_zero_point(passes):
    program = _insert(passes, lambda p, x: jnp.max(x.reshape(4, 4, 8), axis=1) @ p["w"])
    view = next(e for e in program.eqns if e.primitive is ops.region_p and e.params["kind"] == "view")
    before = program.producer[view.invars[0]]
    (after,) = [e for e, _ in program.users[view.outvars[0]]]
    assert before.invars[1:] == after.invars[1:] and before.params["type"] == after.params["type"] == ACTIVATION


def test_a_view_is_stored_as_its_widest_reader_wants(passes):
    def fun(p, x):
        y = (x @ p["w"]).T
        return y @ p["square"], y

    program = _insert(passes, fun, {**WEIGHTS, "square": normal(16, 4)})
    view = next(e for e in program.eqns if e.primitive is ops.region_p and e.params["kind"] == "view")
    assert program.producer[view.invars[0]].params["type"] == STREAM


def test_an_island_reads_the_stream_and_its_result_is_quantized_for_its_readers(passes):
    loop = lambda y: jax.lax.fori_loop(0, 3000, lambda _, h: jnp.tanh(h), y)
    program = _insert(passes, lambda p, x: loop(x @ p["w"]) @ p["v"])
    island = next(e for e in program.eqns if e.primitive.name == "scan")
    (read,) = (v for v in island.invars if v.aval.shape)
    (result,) = (v for v in island.outvars if v.aval.shape)
    assert program.producer[read].params["type"] == STREAM
    assert [e.params["type"] for e, _ in program.users[result]] == [ACTIVATION]


def test_an_island_with_numbers_among_its_operands(passes):
    folded = lambda y: jax.lax.reduce(y, np.float32(0.5), lambda a, b: a + 0.5 * b, (1,))
    program = _insert(passes, lambda p, x: folded(x @ p["w"]) * 2.0)
    assert "reduce" in [e.primitive.name for e in program.eqns]


def test_bias_is_int32_at_the_scale_of_the_accumulator(passes):
    program = _insert(passes, lambda p, x: x @ p["w"] + p["b"])
    held = {n: np.asarray(w) for n, w in program.weights.items()}
    accumulator = held["dot_general#0:accumulator/scale"]
    scale_x = next(w for n, w in held.items() if n.startswith("input:") and n.endswith("scale"))
    scale_w = next(w for n, w in held.items() if n.startswith("w:") and n.endswith("scale"))
    np.testing.assert_array_equal(accumulator, scale_x * scale_w)
    bias = held["dot_general#0:bias/int32"]
    assert bias.dtype == np.int32
    np.testing.assert_array_equal(bias.ravel(), np.rint(WEIGHTS["b"] / accumulator.astype(np.float64)).ravel())
    (dequantize,) = [e for e in program.eqns if e.primitive is ops.dequantize_p]
    assert dequantize.params["type"] == BIAS


def test_a_bias_that_does_not_fit_names_layer_and_line(passes):
    def fun(p, x):
        with jax.named_scope("tiny"):
            return x @ p["w"] + p["b"]

    weights = {"w": np.float32(1e-12) * WEIGHTS["w"], "b": np.float32(1e3) * WEIGHTS["b"]}
    with pytest.raises(OverflowProofError, match=r"tiny.*test_insert_qdq\.py:\d+.*does not fit int32.*qc\.Rule"):
        passes(fun, weights, [X], until="insert_qdq")
    with pytest.raises(OverflowProofError):
        passes(fun, weights, [X], Recipe(granularity="tensor"), until="insert_qdq")


@pytest.mark.parametrize("tiny", [0.0, 1e-12, 1e-30])
def test_a_channel_next_to_zero_takes_a_scale_at_which_its_bias_fits(passes, tiny):
    """Trained BatchNorms switch channels off: weights of 1e-8, and a bias of 10**9 steps of them and more."""
    w = WEIGHTS["w"].copy()
    w[:, 3] *= np.float32(tiny)
    weights = {"w": w, "b": WEIGHTS["b"]}
    fun = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"])
    program = _insert(passes, fun, weights)
    bias = program.weights["dot_general#0:bias/int32"].ravel()
    assert abs(int(bias[3])) <= 2**30 + 2**7
    scale = next(
        np.asarray(v) for n, v in program.weights.items() if n.startswith("w:") and n.endswith("/scale")
    ).ravel()
    known = weight_scale(w, QuantType(8, symmetric=True, narrow_range=True, axis=(1,)))[0].ravel()
    np.testing.assert_array_equal(np.delete(scale, 3), np.delete(known, 3))
    assert scale[3] <= max(known[3], known.max())
    out, ref = np.asarray(program.evaluate([X])[0]), np.asarray(fun(weights, X))
    # The channel is its bias, to half a step of int16.
    np.testing.assert_allclose(out[:, 3], ref[:, 3], atol=float(np.abs(ref).max() * 1.25 / 32767))


def test_a_tied_weight_with_one_room_made_keeps_both_scales_apart(passes):
    w = WEIGHTS["w"].copy()
    w[:, 3] *= np.float32(1e-12)

    def fun(p, x):
        return jnp.sin(x @ p["w"] + p["b"]), (10.0 * x[::-1] + 1.0) @ p["w"]

    found = passes(fun, {"w": w, "b": WEIGHTS["b"]}, [X])
    scales = [n for n in found["insert_qdq"].weights if re.match(r"w:int8.*/scale", n)]
    assert len(scales) == 2 and any("@dot_general#0" in n for n in scales)
    for a, b in zip(found["insert_qdq"].evaluate([X]), found["fuse"].evaluate([X]), strict=True):
        # The same codes behind both forms: sums of float32 against int32.
        assert sqnr_db([a], [b]) > 60


def test_a_value_that_calibration_has_not_seen(passes):
    recipe = Recipe()
    program = passes(lambda p, x: x @ p["w"], WEIGHTS, [X], recipe, until="assign_precision")["assign_precision"]
    with pytest.raises(CalibrationError, match=r"calibration has not seen"):
        insert_qdq(program.replace(stats={}), recipe.estimator_for)


def test_the_program_is_differentiable(passes):
    program = _insert(passes, lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"])
    grad = jax.grad(lambda x: jnp.sum(program(x)[0]))(X)
    expected = jax.grad(lambda x: jnp.sum(jax.nn.relu(x @ WEIGHTS["w"] + WEIGHTS["b"]) @ WEIGHTS["v"]))(X)
    # Straight-through: the derivative of the float program at quantized weights; some relus near 0 switch.
    assert sqnr_db([expected], [grad]) > 10


def test_weight_scale_is_full_rank_and_covers_the_weight():
    w = normal(3, 3, 4, 5)
    scale, zero = weight_scale(w, QuantType(8, symmetric=True, narrow_range=True, axis=(3,)))
    assert scale.shape == zero.shape == (1, 1, 1, 5) and not zero.any()
    np.testing.assert_allclose(scale.ravel() * 127, np.abs(w).max(axis=(0, 1, 2)), rtol=1e-6)
    scale, zero = weight_scale(w, QuantType(8, symmetric=True))
    assert scale.shape == zero.shape == ()
    assert weight_scale(np.zeros((2, 0), np.float32), QuantType(8, symmetric=True))[0] == 1


def test_weight_scale_of_blocks_is_repeated_over_them():
    w = normal(6, 8) + np.float32(0.5)
    qtype = QuantType(8, axis=(1,), block_size=(3,))
    scale, zero = weight_scale(w, qtype)
    assert scale.shape == zero.shape == (1, 8)
    for block in (slice(0, 3), slice(3, 6), slice(6, 8)):
        low, high = w[:, block].min(), w[:, block].max()
        np.testing.assert_allclose(scale[0, block], (high - low) / 255, rtol=1e-6)
        np.testing.assert_array_equal(zero[0, block], np.rint(-128 - low / scale[0, block]))
    # Two dimensions, of which one is in blocks.
    both, _ = weight_scale(normal(2, 6, 8), QuantType(8, axis=(0, 2), block_size=(1, 4)))
    assert both.shape == (2, 1, 8) and len(np.unique(both)) == 4
