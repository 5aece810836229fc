"""Integers go in and out of every region; no removable pair is left; the values are those of the simulation."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

from qcompiler import ops
from qcompiler.debug.report import sqnr_db
from qcompiler.ir import _compat
from qcompiler.numerics.types import ACTIVATION, INDEX, STREAM
from qcompiler.passes import fuse as fuse_module

WEIGHTS = {
    "k": normal(3, 3, 2, 8),
    "d": normal(3, 3, 8, 8, seed=5),
    "w": normal(8, 8),
    "v": normal(8, 8, seed=1),
    "b": normal(8, seed=2),
    "s": np.abs(normal(8, seed=4)) + np.float32(0.5),
}
X = normal(16, 8, seed=3)
IMAGE = normal(2, 6, 6, 2, seed=3)


def _conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _mlp(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]


def _network(p, x):
    y = jax.nn.relu(_conv(x, p["k"]) * p["s"] - p["b"])
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    z = jax.nn.silu(_conv(y, p["d"]) + p["b"])
    y = jax.nn.relu(y + _conv(z, p["d"]))
    return jnp.mean(y, axis=(1, 2)) @ p["w"] + p["b"]


def _islands(p, x):
    y = jnp.sort(x @ p["w"], axis=1)
    return (y * (x @ p["v"])) @ p["v"], y


def _shared(p, x):
    y = jax.nn.relu(x @ p["w"])
    return y + jnp.tanh(y @ p["v"]), y


PROGRAMS = [(_mlp, X), (_network, IMAGE), (_islands, X), (_shared, X), (lambda p, x: x @ (x @ p["w"]).T, X)]
NAMES = ["mlp", "network", "islands", "shared", "two_activations"]


@pytest.mark.parametrize(("fun", "x"), PROGRAMS, ids=NAMES)
def test_integers_between_regions(passes, fun, x):
    found = passes(fun, WEIGHTS, [x], until="fuse")
    program = found["fuse"]
    _compat.check_types(program.jaxpr)
    for eqn in program.eqns:
        if eqn.primitive is ops.region_p:
            assert not any(np.issubdtype(v.aval.dtype, np.floating) for v in eqn.outvars)
            made = [program.producer[v].primitive for v in eqn.invars if v in program.producer]
            assert set(made) <= {ops.quantize_p, ops.requantize_p, ops.region_p}
    assert not [e for e in program.eqns if e.primitive is ops.fake_quantize_p]
    assert program.notes["pairs_after"] == fuse_module.pairs_left(program) == 0
    simulated, fused = (found[n].evaluate([x]) for n in ("insert_qdq", "fuse"))
    # Same codes in, exact sums in int32 against float32: a tie may fall to the other side, one step of 40 dB or more.
    assert sqnr_db(simulated, fused) > 45


def test_the_count_of_pairs_per_op(passes):
    program = passes(_mlp, WEIGHTS, [X], until="fuse")["fuse"]
    # x; the product, its sum with the bias, and relu's input and result: dot, add, max, dot read one activation each.
    assert program.notes["pairs_before"] == 4


def test_a_pair_that_is_left_is_counted(passes):
    program = passes(_mlp, WEIGHTS, [X], until="fuse")["fuse"]

    def make(builder, x):
        scale, zero = builder.weight("s", np.float32(0.1)), builder.weight("z", np.int32(0))
        q = ops.quantize(x, scale, zero, ACTIVATION)
        r = ops.dequantize(q, scale, zero, ACTIVATION)
        return [ops.quantize(r, scale, zero, STREAM), r]

    from qcompiler.ir.program import build

    assert fuse_module.pairs_left(build(make, {}, program.input_avals, program.signature)) == 1


def test_entry_and_exit(passes):
    program = passes(_network, WEIGHTS, [IMAGE], until="fuse")["fuse"]
    outside = collections.Counter(e.primitive.name for e in program.eqns if e.primitive is not ops.region_p)
    # The pooled map is stored in int16 for the residual, and derived from that for the convolution.
    assert outside == {"qc_quantize": 1, "qc_requantize": 1, "qc_dequantize": 1}


def test_an_input_in_two_types_is_quantized_once_and_requantized(passes):
    program = passes(lambda p, x: x + x[::-1] @ p["w"] @ p["v"], WEIGHTS, [X], until="fuse")["fuse"]
    names = [e.primitive.name for e in program.eqns]
    assert names.count("qc_quantize") == 1 and names.count("qc_requantize") == 1


def test_a_region_makes_a_result_per_type(passes):
    program = passes(_shared, WEIGHTS, [X], until="fuse")["fuse"]
    first = next(e for e in program.eqns if e.primitive is ops.region_p)
    assert {v.aval.dtype.name for v in first.outvars} == {"int8", "int16"}


def test_weights_are_codes(passes):
    program = passes(_mlp, WEIGHTS, [X], until="fuse")["fuse"]
    large = {n: w for n, w in program.weights.items() if np.ndim(w) == 2 and min(np.shape(w)) > 1}
    assert sorted(n.partition(":")[0] for n in large) == ["v", "w"]
    for name, codes in large.items():
        w = WEIGHTS[name.partition(":")[0]]
        assert codes.dtype == np.int8 and np.abs(codes).max(axis=0).tolist() == [127] * 8
        # Half a step of each channel's own scale.
        np.testing.assert_allclose(codes * (np.abs(w).max(axis=0) / 127), w, atol=np.abs(w).max() / 127 / 2 * 1.001)


def test_the_bias_is_added_to_the_accumulator(passes):
    program = passes(_mlp, WEIGHTS, [X], until="fuse")["fuse"]
    body = _compat.open_jaxpr(program.eqns[1].params["body"]).eqns
    names = [e.primitive.name for e in body]
    assert names.index("dot_general") < names.index("add") < names.index("qc_dequantize") < names.index("max")
    assert body[names.index("add")].outvars[0].aval.dtype == np.int32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_bodies_of_half_precision_do_not_round_in_between(passes, dtype):
    """Integers do not round to 8 bits of mantissa between the product and the int16 result; nor may the simulation."""
    weights = jax.tree.map(lambda w: np.asarray(w, dtype), WEIGHTS)
    fun = lambda p, x: jax.nn.relu((x @ p["w"] - p["b"]) * p["s"]) + x
    program = passes(fun, weights, [np.asarray(X, dtype)], until="fuse")["fuse"]
    (region,) = [e for e in program.eqns if e.primitive is ops.region_p and e.params["kind"] == "dot"]
    for eqn in _compat.open_jaxpr(region.params["body"]).eqns:
        assert all(v.aval.dtype != dtype for v in eqn.outvars)
    assert [v.aval.dtype for v in program.outvars] == [dtype]


def test_a_table_is_evaluated_as_it_stands(passes):
    found = passes(lambda p, x: jax.nn.silu(x @ p["w"]), WEIGHTS, [X], until="fuse")["fuse"]
    table = next(e for e in found.eqns if e.primitive is ops.region_p and e.params["kind"] == "table")
    body = _compat.open_jaxpr(table.params["body"]).eqns
    assert body[0].params["type"] == INDEX and body[-1].params["type"] == STREAM
