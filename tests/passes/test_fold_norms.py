"""Inference norms go into the weights in front of them; what belongs to another axis, or to others too, stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import linen as nn
from flax import nnx
from jax import lax

from qcompiler.debug.report import sqnr_db
from qcompiler.errors import QuantizationError
from qcompiler.flax_adapter import source_of
from qcompiler.ir.tracing import trace
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.simplify import simplify

# A folded weight is rounded to float32 once more: 2**-24 relative, some 140 dB, of which cancellation eats a part.
LEAST_DB = 80.0
CHAIN = {"mul", "div", "sub", "neg"}


def _aval(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _names(program):
    return [e.primitive.name for e in program.eqns]


def _fold(fun, weights, *inputs):
    before = simplify(trace(fun, weights, tuple(map(_aval, inputs))))
    after = fold_norms(before)
    assert sqnr_db(before.evaluate(inputs), after.evaluate(inputs)) >= LEAST_DB
    assert fold_norms(after).text() == after.text()
    return before, after


def _norm(channels, shape=(-1,)):
    """A BatchNorm's four parameters, laid out for one axis."""
    rng = np.random.default_rng(1)
    gamma, beta, mean = (rng.normal(size=channels).astype(np.float32).reshape(shape) for _ in range(3))
    variance = rng.uniform(0.5, 2.0, channels).astype(np.float32).reshape(shape)
    return {"gamma": gamma, "beta": beta, "mean": mean, "var": variance}


def _apply_norm(p, y):
    return (y - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["gamma"] + p["beta"]


def _conv(x, w, layout="NHWC", groups=1):
    spec = ("NHWC", "HWIO", "NHWC") if layout == "NHWC" else ("NCHW", "OIHW", "NCHW")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=spec, feature_group_count=groups)


class NnxBlock(nnx.Module):
    def __init__(self, make, channels):
        self.layer = make(nnx.Rngs(0))
        self.norm = nnx.BatchNorm(channels, rngs=nnx.Rngs(1))
        for k, v in enumerate((self.norm.mean, self.norm.var, self.norm.scale, self.norm.bias)):
            v[...] = jnp.asarray(np.random.default_rng(k).uniform(0.5, 2.0, channels), jnp.float32)

    def __call__(self, x):
        return jax.nn.relu(self.norm(self.layer(x)))


class LinenBlock(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return jax.nn.relu(nn.BatchNorm(use_running_average=True)(self.layer(x)))


def _nnx_block(make, channels):
    model = NnxBlock(make, channels)
    model.eval()
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda bias: lambda rngs: nnx.Conv(3, 8, (3, 3), use_bias=bias, rngs=rngs), (2, 6, 6, 3)),
        (
            lambda bias: lambda rngs: nnx.Conv(4, 8, (3, 3), feature_group_count=4, use_bias=bias, rngs=rngs),
            (2, 6, 6, 4),
        ),
        (lambda bias: lambda rngs: nnx.Linear(5, 8, use_bias=bias, rngs=rngs), (4, 5)),
        (lambda bias: lambda rngs: nnx.Linear(5, 8, use_bias=bias, rngs=rngs), (2, 4, 5)),
    ],
    ids=["conv", "depthwise", "dot", "dot3d"],
)
def test_nnx_batchnorm_folds(make, shape, bias):
    x = normal(*shape)
    before = simplify(source_of(_nnx_block(make(bias), 8), None, None, None, None).trace((x,), {}))
    after = fold_norms(before)
    assert CHAIN & set(_names(before)) and not CHAIN & set(_names(after))
    assert _names(after).count("add") == 1
    assert sqnr_db(before.evaluate([x]), after.evaluate([x])) >= LEAST_DB


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv(8, (3, 3)), (2, 6, 6, 3)), (nn.Dense(8), (4, 5)), (nn.Dense(8), (2, 4, 5))],
    ids=["conv", "dot", "dot3d"],
)
def test_linen_batchnorm_folds(layer, shape):
    x = normal(*shape)
    model = LinenBlock(layer)
    variables = model.init(jax.random.key(0), x)
    rng = np.random.default_rng(2)
    variables = jax.tree.map(lambda v: v + np.asarray(rng.uniform(0.1, 1.0, v.shape), v.dtype), variables)
    before = simplify(source_of(model, None, variables, None, None).trace((x,), {}))
    after = fold_norms(before)
    assert not CHAIN & set(_names(after)) and _names(after).count("add") == 1
    assert sqnr_db(before.evaluate([x]), after.evaluate([x])) >= LEAST_DB


@pytest.mark.parametrize(
    ("fun", "weight", "x", "norm"),
    [
        (lambda w, x: _conv(x, w), (3, 3, 3, 8), (2, 5, 5, 3), (-1,)),
        (lambda w, x: _conv(x, w, "NCHW"), (8, 3, 3, 3), (2, 3, 5, 5), (-1, 1, 1)),
        (lambda w, x: _conv(x, w, groups=3), (3, 3, 1, 9), (2, 5, 5, 3), (-1,)),
        (lambda w, x: x @ w, (5, 8), (4, 5), (-1,)),
        (lambda w, x: x @ w, (5, 8), (2, 4, 5), (-1,)),
        (lambda w, x: w @ x, (8, 5), (5, 4), (-1, 1)),
        (lambda w, x: jnp.einsum("io,bti->obt", w, x), (5, 8), (2, 4, 5), (-1, 1, 1)),
        (lambda w, x: jnp.einsum("bij,bjk->bik", x, w), (2, 5, 8), (2, 4, 5), (-1,)),
    ],
    ids=["nhwc", "nchw", "grouped", "dot2d", "dot3d", "left", "left3d", "batched"],
)
def test_hand_written_batchnorm_folds(fun, weight, x, norm):
    weights = {"w": normal(*weight), **_norm(9 if weight[-1] == 9 else 8, norm)}
    before, after = _fold(lambda p, x: jax.nn.relu(_apply_norm(p, fun(p["w"], x))), weights, normal(*x))
    assert CHAIN & set(_names(before)) and not CHAIN & set(_names(after))
    assert [n for n in _names(after) if n not in ("transpose", "broadcast_in_dim")][1:] == ["add", "max"]


def test_several_free_dimensions_each_with_its_own_factor():
    """DenseGeneral makes heads and features; a factor over either or both is along the weight's own dimensions."""
    weights = {
        "w": normal(6, 2, 3),
        "heads": normal(2, 1, seed=1),
        "features": normal(3, seed=2),
        "both": normal(2, 3),
    }

    def fun(p, x):
        return (jnp.einsum("bi,ihf->bhf", x, p["w"]) * p["heads"] - p["both"]) / (2.0 + jnp.abs(p["features"]))

    _, after = _fold(fun, weights, normal(4, 6))
    assert _names(after) == ["dot_general", "add"]


@pytest.mark.parametrize(
    "chain",
    [
        lambda p, y: y * 2.0,
        lambda p, y: y / 3.0,
        lambda p, y: -y,
        lambda p, y: p["beta"] - y,
        lambda p, y: 1.0 - y,
        lambda p, y: y - 1.0,
        lambda p, y: (y + 1.0) + p["beta"],
        lambda p, y: ((y * p["gamma"] + p["beta"]) * 0.5 - p["mean"]) / p["var"],
        lambda p, y: -(p["beta"] - (y - 2.0) * p["gamma"]) / 7.0 + p["mean"],
        lambda p, y: y * 0.0 + p["beta"],
    ],
)
@pytest.mark.parametrize("kind", ["conv", "dot"])
def test_affine_steps_in_a_row_fold_into_one_bias(chain, kind):
    weight, x = (normal(3, 3, 2, 4), normal(1, 4, 4, 2)) if kind == "conv" else (normal(2, 4), normal(3, 2))
    product = _conv if kind == "conv" else jnp.matmul
    _, after = _fold(lambda p, x: chain(p, product(x, p["w"])), {"w": weight, **_norm(4)}, x)
    assert not CHAIN & set(_names(after)) and _names(after).count("add") <= 1


def test_a_bias_alone_stays_as_it_is():
    before, after = _fold(lambda p, x: x @ p["w"] + p["b"], {"w": normal(3, 4), "b": normal(4)}, normal(2, 3))
    assert _names(after) == ["dot_general", "add"] and set(after.weights) == set(before.weights)


def test_two_layers_with_one_weight_fold_apart():
    weights = {"w": normal(4, 4), "s": normal(4, seed=1), "t": normal(4, seed=2)}
    _, after = _fold(lambda p, x: (jax.nn.relu((x @ p["w"]) * p["s"]) @ p["w"]) * p["t"], weights, normal(3, 4))
    assert _names(after) == ["dot_general", "max", "dot_general"] and len(after.weights) == 2


def _shared(p, x):
    y = x @ p["w"]
    return y * p["gamma"], y


def _read_twice(p, x):
    y = x @ p["w"]
    return y * p["gamma"] + jnp.sin(y)


@pytest.mark.parametrize(
    ("fun", "x"),
    [
        (_shared, (4, 5)),
        (_read_twice, (4, 5)),
        (lambda p, x: (x @ p["w"]) * p["rows"], (4, 5)),
        # The bug of pytorch/ao#4116: a norm over the middle axis of a 3-D value, as large as the weight's own axis.
        (lambda p, x: (x @ p["w"]) * p["middle"], (2, 8, 5)),
        (lambda p, x: (x @ p["w"]) * p["whole"], (4, 5)),
        (lambda p, x: (x @ p["w"]) / p["some_zero"], (4, 5)),
        (lambda p, x: p["gamma"] / (x @ p["w"]), (4, 5)),
        (lambda p, x: (x @ p["w"]) * x[:, :1], (4, 5)),
        (lambda p, x: jax.nn.relu(x @ p["w"]) * p["gamma"], (4, 5)),
    ],
    ids=[
        "program_result",
        "two_readers",
        "rows",
        "middle_axis",
        "full_shape",
        "zero_divisor",
        "reciprocal",
        "activation",
    ]
    + ["behind_relu"],
)
def test_what_must_not_fold_stays(fun, x):
    zero = normal(8)
    zero[3] = 0.0
    weights = {"w": normal(5, 8), "gamma": normal(8, seed=3), "rows": normal(4, 1), "middle": normal(8, 1)}
    weights |= {"whole": normal(4, 8), "some_zero": zero}
    before, after = _fold_exactly(fun, weights, normal(*x))
    assert _names(after) == _names(before)


def _fold_exactly(fun, weights, x):
    before = simplify(trace(fun, weights, (_aval(x),)))
    after = fold_norms(before)
    for a, b in zip(before.evaluate([x]), after.evaluate([x]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    return before, after


def test_a_chain_folds_up_to_what_cannot_fold():
    weights = {"w": normal(5, 8), "gamma": normal(8, seed=3), "rows": normal(4, 1)}
    _, after = _fold(lambda p, x: (x @ p["w"] * p["gamma"] - 1.0) * p["rows"] * 2.0, weights, normal(4, 5))
    assert _names(after) == ["dot_general", "add", "mul", "mul"]


def test_a_result_in_the_middle_of_a_chain_ends_it():
    def fun(p, x):
        y = x @ p["w"] * p["gamma"]
        return y, y - 1.0

    before, after = _fold(fun, {"w": normal(5, 8), "gamma": normal(8, seed=3)}, normal(4, 5))
    assert _names(before) == ["dot_general", "mul", "sub"] and _names(after) == ["dot_general", "sub"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_of_half_precision_are_not_rounded_again(dtype):
    weights = jax.tree.map(lambda w: np.asarray(w, dtype), {"w": normal(5, 8), "gamma": normal(8), "beta": normal(8)})
    fun = lambda p, x: (x @ p["w"]) * p["gamma"] + p["beta"]
    before, after = _fold_exactly(fun, weights, np.asarray(normal(4, 5), dtype))
    assert _names(before) == _names(after)


def test_products_without_one_constant_operand_stay():
    before, after = _fold_exactly(lambda p, x: (x @ x.T) * 2.0, {}, normal(4, 4))
    assert _names(before) == _names(after)


def test_a_factor_that_overflows_the_weights_is_an_error_with_its_place():
    with pytest.raises(QuantizationError, match=r"overflows its weights"), np.errstate(over="ignore"):
        fun = lambda p, x: (x @ p["w"]) * np.float32(1e30)
        fold_norms(
            simplify(trace(fun, {"w": np.full((5, 8), 1e30, np.float32)}, (jax.ShapeDtypeStruct((4, 5), np.float32),)))
        )
