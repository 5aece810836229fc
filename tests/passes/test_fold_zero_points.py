"""Folding zero points out of a product changes no bit, whatever is padded, strided, dilated or contracted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

from qcompiler import ops
from qcompiler.errors import OverflowProofError
from qcompiler.ir import _compat
from qcompiler.ir.program import Signature, build
from qcompiler.numerics.types import ACTIVATION, BIAS, STREAM, QuantType
from qcompiler.passes.fold_zero_points import fold_zero_points
from qcompiler.recipe import Recipe


def _regions(program, *kinds):
    return [e for e in program.eqns if e.primitive is ops.region_p and e.params["kind"] in kinds]


def _inner(eqn):
    return [e.primitive.name for e in _compat.open_jaxpr(eqn.params["body"]).eqns]


def _check(passes, fun, weights, x, recipe=None):
    """The folded program, which computes the same integers in every region."""
    found = passes(fun, weights, [x], recipe)
    before, after = found["fuse"], found["fold_zero_points"]
    _compat.check_types(after.jaxpr)
    inputs = x if isinstance(x, tuple) else (x,)
    for k in range(3):
        batch = [np.roll(v, k, 0) * np.float32(1 + k) for v in inputs]
        for a, b in zip(before.evaluate(batch), after.evaluate(batch), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    for eqn in _regions(after, "dot", "conv"):
        names = _inner(eqn)
        # No zero point is subtracted from an operand any more: the product reads codes.
        product = next(
            e
            for e in _compat.open_jaxpr(eqn.params["body"]).eqns
            if e.primitive.name in ("dot_general", "conv_general_dilated")
        )
        assert all(v.aval.dtype == np.int8 for v in product.invars), names
    return after


CONVS = {
    "same": dict(padding="SAME"),
    "valid": dict(padding="VALID"),
    "asymmetric": dict(padding=((2, 0), (0, 3))),
    "negative": dict(padding=((-1, 2), (1, -1))),
    "strided": dict(padding="SAME", window_strides=(2, 3)),
    "dilated": dict(padding="SAME", rhs_dilation=(2, 1)),
    "transposed": dict(padding=((2, 1), (0, 2)), lhs_dilation=(2, 3)),
    "all": dict(padding=((1, 2), (2, 0)), lhs_dilation=(1, 2), rhs_dilation=(2, 1), window_strides=(2, 1)),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CONVS)
def test_convolutions(passes, case, bias):
    options = {"window_strides": (1, 1), **CONVS[case]}
    numbers = ("NHWC", "HWIO", "NHWC")

    def fun(p, x):
        y = lax.conv_general_dilated(x, p["k"], dimension_numbers=numbers, **options)
        return y + p["b"] if bias else y

    weights = {"k": normal(3, 3, 3, 4), "b": normal(4, seed=1)}
    after = _check(passes, fun, weights, normal(2, 8, 9, 3, seed=2, shift=2.0))
    (conv,) = _regions(after, "conv")
    pads = case not in ("valid",)
    assert ("pad" in _inner(conv)) == pads
    assert _inner(conv).count("add") == 1


@pytest.mark.parametrize("case", CONVS)
def test_convolutions_with_affine_weights(passes, case):
    """Window sums of the padded codes, times a zero point per channel; separable, so six slices of a 3x3 window."""
    options = {"window_strides": (1, 1), **CONVS[case]}
    fun = lambda p, x: lax.conv_general_dilated(x, p["k"], dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
    weights = {"k": normal(3, 3, 3, 4) + np.float32([0, 1, -1, 3])}
    after = _check(passes, fun, weights, normal(2, 8, 9, 3, seed=2, shift=2.0), Recipe(weight=QuantType(8)))
    (conv,) = _regions(after, "conv")
    inner = _inner(conv)
    assert inner.count("reduce_sum") == 1 and inner.count("slice") == 6 and inner.count("conv_general_dilated") == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_layouts_and_groups_with_affine_weights(passes, groups):
    fun = lambda p, x: lax.conv_general_dilated(
        x, p["k"], (1, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NHWC"), feature_group_count=groups
    )
    recipe = Recipe(weight=QuantType(8), activation=QuantType(8, symmetric=True))
    _check(passes, fun, {"k": normal(8, 4 // groups, 3, 3)}, normal(2, 4, 6, 7, shift=-2.0), recipe)


def test_dots_with_affine_weights_sum_their_rows(passes):
    recipe = Recipe(weight=QuantType(8), activation=QuantType(12))
    after = _check(passes, lambda p, x: p["w"].T @ x.T, {"w": normal(6, 5, shift=0.5)}, normal(4, 6), recipe)
    (dot,) = _regions(after, "dot")
    # One per part of the 12-bit codes.
    assert _inner(dot).count("reduce_sum") == 2


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_layouts_and_groups(passes, groups):
    fun = lambda p, x: lax.conv_general_dilated(
        x, p["k"], (1, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"), feature_group_count=groups
    )
    _check(passes, fun, {"k": normal(8, 4 // groups, 3, 3)}, normal(2, 4, 6, 7, shift=-2.0))


def test_one_dimensional_convolutions(passes):
    fun = lambda p, x: lax.conv_general_dilated(x, p["k"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    _check(passes, fun, {"k": normal(5, 3, 4)}, normal(2, 9, 3, shift=1.0))


@pytest.mark.parametrize(
    ("fun", "x"),
    [
        (lambda p, x: x @ p["w"], (4, 6)),
        (lambda p, x: x @ p["w"] + p["b"], (2, 3, 6)),
        (lambda p, x: p["w"].T @ x.T, (4, 6)),
        (lambda p, x: jnp.einsum("bij,bjk->bik", x, p["batched"]), (3, 4, 6)),
        (lambda p, x: jnp.einsum("bij,jhf->bihf", x, p["heads"]), (3, 4, 6)),
        (lambda p, x: jnp.einsum("bhf,fhj->bj", x.reshape(3, 2, 3), p["back"]), (3, 6)),
    ],
    ids=["2d", "3d_bias", "left", "batched", "several_free", "several_contracted"],
)
def test_dots_with_a_weight(passes, fun, x):
    weights = {"w": normal(6, 5), "b": normal(5), "batched": normal(3, 6, 5), "heads": normal(6, 2, 3)}
    after = _check(passes, fun, {**weights, "back": normal(3, 2, 5)}, normal(*x, shift=3.0))
    (dot,) = _regions(after, "dot")
    assert "reduce_sum" not in _inner(dot)


@pytest.mark.parametrize(
    "fun",
    [
        lambda p, x, y: jnp.einsum("bij,bkj->bik", x, y),
        lambda p, x, y: jnp.einsum("bij,bkj->bki", x, y),
        lambda p, x, y: jnp.einsum("bij,bij->b", x, y),
        lambda p, x, y: jnp.einsum("bij,ckj->ibck", x, y),
        lambda p, x, y: jnp.einsum("bij,bik->jkb", x, y),
        lambda p, x, y: jnp.einsum("bij,bkj->bik", x, y) * 0.5 - 1.0,
        lambda p, x, y: jnp.einsum("bij,bkj->bik", x, x),
    ],
)
def test_products_of_two_activations_with_both_zero_points(passes, fun):
    x, y = normal(2, 4, 5, shift=1.5), normal(2, 4, 5, seed=1, shift=-0.5)
    after = _check(passes, fun, {}, (x, y))
    (dot,) = _regions(after, "dot")
    assert _inner(dot).count("reduce_sum") == 2


def test_one_zero_point_of_zero_needs_one_sum(passes):
    recipe = Recipe(activation_range="minmax")
    x, y = normal(2, 4, 5, shift=1.5), normal(2, 4, 5, seed=1)
    # Codes of [-128 k, 127 k] have the zero point 0.
    y.ravel()[:2] = [-128.0 / 32, 127.0 / 32]
    y = np.clip(y, -128.0 / 32, 127.0 / 32)
    after = passes(lambda p, x, y: jnp.einsum("bij,bkj->bik", x, y), {}, [(x, y)], recipe)["fold_zero_points"]
    (dot,) = _regions(after, "dot")
    assert _inner(dot).count("reduce_sum") == 1


def test_symmetric_activations_keep_their_bias(passes):
    recipe = Recipe(activation=QuantType(8, symmetric=True))
    fun = lambda p, x: x @ p["w"] + p["b"]
    after = _check(passes, fun, {"w": normal(6, 5), "b": normal(5)}, normal(4, 6), recipe)
    bias = after.weights["dot_general#0:bias/folded"]
    np.testing.assert_array_equal(
        bias.ravel(),
        passes(fun, {"w": normal(6, 5), "b": normal(5)}, [normal(4, 6)], recipe)["insert_qdq"]
        .weights["dot_general#0:bias/int32"]
        .ravel(),
    )


def test_a_network(passes):
    def fun(p, x):
        y = jax.nn.relu(x @ p["w"] + p["b"])
        y = jax.nn.silu(y @ p["v"]) + y
        return jax.nn.softmax(y @ y.T), y

    _check(passes, fun, {"w": normal(6, 5), "v": normal(5, 5), "b": normal(5)}, normal(4, 6, shift=1.0))


def test_a_bias_that_leaves_int32_with_its_zero_points(passes):
    """The bias fits, and what the zero points add to it does not: the layer is named."""

    def make(builder, x):
        held = lambda name, value: builder.weight(name, np.asarray(value))
        scale, zero = held("scale", np.float32(1)), held("zero", np.int32(-128))

        def body(q, w, b, scale, zero):
            acc = lax.dot_general(
                lax.sub(q.astype(jnp.int32), zero),
                w.astype(jnp.int32),
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.int32,
            )
            real = ops.dequantize(lax.add_p.bind(acc, b), scale, np.int32(0), BIAS)
            return [ops.quantize(real, scale, np.int32(0), STREAM)]

        q = ops.quantize(x, scale, zero, ACTIVATION)
        operands = (
            q,
            held("w", np.full((6, 5), 127, np.int8)),
            held("b", np.full((1, 5), 2**31 - 1, np.int32)),
            scale,
            zero,
        )
        roles = ("activation", "weight", "bias", "scale", "zero_point")
        return ops.region(body, *operands, id="far/dot_general#0", kind="dot", roles=roles)

    x = jax.ShapeDtypeStruct((4, 6), np.float32)
    program = build(make, {}, [x], Signature(jax.tree.structure(((0,), {})), jax.tree.structure([0]), ("x",)))
    with pytest.raises(OverflowProofError, match=r"far/dot_general#0.*zero points folded in, does not fit int32"):
        fold_zero_points(program)
