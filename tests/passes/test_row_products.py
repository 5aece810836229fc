"""Dots and convs as matrix products of rows, and what stands behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

from qcompiler.ir import _compat
from qcompiler.passes._epilogues import Epilogue
from qcompiler.passes._row_products import RowProduct


def _conv(x, w, layout=("NHWC", "HWIO", "NHWC"), strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, **options)


#: name -> (function of x and w, their shapes, which is the weight)
PRODUCTS = {
    "dot": (lambda x, w: x @ w, (5, 3), (3, 4), 1),
    "weight_left": (lambda x, w: w @ x, (3, 5), (4, 3), 0),
    "rank_3": (lambda x, w: jnp.einsum("bsi,iho->bsho", x, w), (2, 3, 4), (4, 2, 5), 1),
    "two_contracted": (lambda x, w: jnp.einsum("bhd,hdo->bo", x, w), (6, 2, 3), (2, 3, 4), 1),
    "batched": (lambda x, w: jnp.einsum("bgi,gio->bgo", x, w), (5, 2, 3), (2, 3, 4), 1),
    "conv": (_conv, (2, 5, 6, 3), (3, 2, 3, 4), 1),
    "strided": (lambda x, w: _conv(x, w, strides=(2, 3), padding="VALID"), (2, 7, 8, 3), (3, 2, 3, 4), 1),
    "dilated": (lambda x, w: _conv(x, w, rhs_dilation=(2, 1)), (1, 7, 6, 2), (3, 3, 2, 4), 1),
    "transposed": (
        lambda x, w: _conv(x, w, padding=[(2, 1), (1, 2)], lhs_dilation=(2, 2)),
        (1, 3, 4, 2),
        (3, 3, 2, 4),
        1,
    ),
    "grouped": (lambda x, w: _conv(x, w, feature_group_count=2), (2, 4, 4, 4), (3, 3, 2, 6), 1),
    "depthwise": (lambda x, w: _conv(x, w, feature_group_count=4), (2, 4, 4, 4), (3, 3, 1, 8), 1),
    "nchw": (lambda x, w: _conv(x, w, layout=("NCHW", "OIHW", "NCHW")), (2, 3, 4, 5), (4, 3, 3, 3), 1),
    "conv_1d": (lambda x, w: _conv(x, w, ("NWC", "WIO", "NWC"), (2,)), (2, 7, 3), (3, 3, 4), 1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_rows_is_the_product(name):
    fun, shape, weight_shape, position = PRODUCTS[name]
    x, w = normal(*shape), normal(*weight_shape, seed=1)
    jaxpr = jax.make_jaxpr(lambda x, w: fun(x, w))(x, w)
    anchor = next(e for e in _all(jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated"))
    # jnp.einsum may swap the operands.
    position = 1 if anchor.invars[1].aval.shape == w.shape else 0
    operands = (w, x) if position == 0 else (x, w)
    (y,) = _compat.bind(anchor, [jnp.asarray(a) for a in operands])
    product = RowProduct.of(anchor, position)
    rows, matrix, out = product.rows(jnp.asarray(x)), product.matrix(w), product.result_rows(y)
    assert rows.shape[0] == matrix.shape[0] == out.shape[0] and rows.shape[1] == out.shape[1]
    assert product.depth == rows.shape[2] == matrix.shape[1] and out.shape[2] == matrix.shape[2]
    # Both are float32 sums of at most 18 products, in another order.
    np.testing.assert_allclose(rows @ matrix, out, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(product.weight(matrix), w)
    channels = [n if k in product.channels else 1 for k, n in enumerate(y.shape)]
    assert product.result_rows(jnp.zeros(channels)).shape == (out.shape[0], 1, out.shape[2])


def _all(jaxpr):
    for eqn in _compat.open_jaxpr(jaxpr).eqns:
        yield eqn
        for inner in _compat.sub_jaxprs(eqn):
            yield from _all(inner)


def test_a_conv_in_batch_groups_is_none():
    fun = lambda x, w: _conv(x, w, batch_group_count=2)
    (anchor,) = _compat.open_jaxpr(jax.make_jaxpr(fun)(normal(4, 5, 5, 3), normal(3, 3, 3, 4))).eqns
    assert RowProduct.of(anchor, 1) is None


def _epilogue(fun, *operands):
    body = jax.make_jaxpr(fun)(*operands)
    anchor = next(e for e in _compat.open_jaxpr(body).eqns if e.primitive.name == "dot_general")
    return Epilogue.of(body, anchor)


X, W, B, T = normal(4, 3), normal(3, 5, seed=1), normal(1, 5, seed=2), normal(4, 5, seed=3)


def test_the_epilogue_is_all_that_is_elementwise():
    fun = lambda x, w, b, t: (lax.max(lax.dot(x, w) + b + t * np.float32(2), np.float32(0)),)
    epilogue = _epilogue(fun, X, W, B, T)
    assert [e.primitive.name for e in epilogue.eqns] == ["add", "add", "max"] and len(epilogue.sides) == 2
    product = X @ W
    np.testing.assert_array_equal(epilogue(product, [B, 2 * T]), np.maximum(product + B + 2 * T, 0))


def test_the_epilogue_ends_before_a_view():
    fun = lambda x, w, b: (lax.max(lax.dot(x, w) + b, np.float32(0)).T,)
    assert [e.primitive.name for e in _epilogue(fun, X, W, B).eqns] == ["add", "max"]


def test_the_epilogue_ends_where_two_values_go_on():
    def fun(x, w, b):
        y = lax.dot(x, w) + b
        return (lax.tanh(y) * y).T, y.T

    epilogue = _epilogue(fun, X, W, B)
    assert [e.primitive.name for e in epilogue.eqns] == ["add"]
    assert _epilogue(lambda x, w: (lax.dot(x, w).T,), X, W).eqns == ()
