"""Norms before a product go into it where that is exact and costs no precision; what a norm says is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import qcompiler as qc
from qcompiler.debug.report import sqnr_db
from qcompiler.flax_adapter import source_of
from qcompiler.ir.tracing import trace
from qcompiler.passes.equalize import equalize
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.simplify import simplify

# Folded weights are rounded to float32 once more, 2**-24 relative or some 140 dB, of which cancellation eats a part.
LEAST_DB = 80.0
CHAIN = {"mul", "div", "sub", "neg"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def uniform(*shape, seed=0, low=0.5, high=2.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def names(program):
    return [e.primitive.name for e in program.eqns]


def fold(fun, weights, x):
    before = simplify(trace(fun, weights, (jax.ShapeDtypeStruct(x.shape, x.dtype),)))
    after = fold_norms(before)
    assert sqnr_db(before.evaluate([x]), after.evaluate([x])) >= LEAST_DB
    assert fold_norms(after).text() == after.text()
    return before, after


def norm_weights(*shape):
    size = shape or (1,)
    parts = {"gamma": normal(*size, seed=11), "beta": normal(*size, seed=12), "mean": normal(*size, seed=13)}
    return {**parts, "var": uniform(*size, seed=14)}


def norm(p, y):
    return (y - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["gamma"] + p["beta"]


def conv(x, w, padding="VALID", spec=("NHWC", "HWIO", "NHWC"), strides=None, **options):
    return lax.conv_general_dilated(x, w, strides or (1,) * (x.ndim - 2), padding, dimension_numbers=spec, **options)


NCHW = ("NCHW", "OIHW", "NCHW")
NLC = ("NWC", "WIO", "NWC")
NDHWC = ("NDHWC", "DHWIO", "NDHWC")
# name: product, its weight, x, and the shape of the norm's parameters.
PRODUCTS = {
    "dot": (lambda x, w: x @ w, (5, 8), (4, 5), (5,)),
    "dot_3d": (lambda x, w: x @ w, (5, 8), (2, 4, 5), (5,)),
    "dot_left": (lambda x, w: w @ x, (8, 5), (5, 4), (5, 1)),
    "two_contracted": (lambda x, w: jnp.einsum("bij,ijo->bo", x, w), (3, 5, 8), (4, 3, 5), (3, 5)),
    "batch": (lambda x, w: jnp.einsum("bnij,njo->bnio", x, w), (3, 5, 8), (2, 3, 4, 5), (3, 1, 5)),
    "conv": (conv, (3, 3, 3, 8), (2, 6, 6, 3), (3,)),
    "conv_strided_dilated": (
        lambda x, w: conv(x, w, strides=(2, 1), rhs_dilation=(2, 1)),
        (3, 3, 3, 8),
        (2, 7, 6, 3),
        (3,),
    ),
    "conv_nchw": (lambda x, w: conv(x, w, spec=NCHW), (8, 3, 3, 3), (2, 3, 6, 6), (3, 1, 1)),
    "conv_1d": (lambda x, w: conv(x, w, spec=NLC), (3, 4, 8), (2, 9, 4), (4,)),
    "conv_3d": (lambda x, w: conv(x, w, spec=NDHWC), (2, 2, 2, 3, 4), (1, 4, 4, 4, 3), (3,)),
    "depthwise": (lambda x, w: conv(x, w, feature_group_count=4), (3, 3, 1, 8), (2, 6, 6, 4), (4,)),
    "grouped": (lambda x, w: conv(x, w, feature_group_count=2), (3, 3, 2, 6), (2, 6, 6, 4), (4,)),
    "grouped_nchw": (lambda x, w: conv(x, w, spec=NCHW, feature_group_count=2), (6, 2, 3, 3), (2, 4, 6, 6), (4, 1, 1)),
}


@pytest.mark.parametrize(("product", "weight", "x", "channels"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_norm_before_becomes_weights_and_a_bias(product, weight, x, channels):
    weights = {"w": normal(*weight), **norm_weights(*channels)}
    before, after = fold(lambda p, x: jax.nn.relu(product(norm(p, x), p["w"])), weights, normal(*x, seed=5))
    assert CHAIN & set(names(before)) and not CHAIN & set(names(after))
    assert [n for n in names(after) if n != "transpose"][1:] == ["add", "max"]


PADDED = {
    "same": lambda x, w: conv(x, w, "SAME"),
    "one_side": lambda x, w: conv(x, w, ((0, 0), (1, 0))),
    "transposed": lambda x, w: lax.conv_transpose(x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
    "between": lambda x, w: conv(x, w, ((0, 0), (0, 0)), lhs_dilation=(2, 2)),
}


@pytest.mark.parametrize("product", PADDED.values(), ids=PADDED)
def test_padding_lets_a_factor_through_but_no_shift(product):
    weights = {"w": normal(3, 3, 3, 8), "s": uniform(3), **norm_weights(3)}
    _, after = fold(lambda p, x: product(x / p["s"], p["w"]), weights, normal(2, 6, 6, 3))
    assert names(after) == ["conv_general_dilated"]
    before, after = fold(lambda p, x: product(norm(p, x), p["w"]), weights, normal(2, 6, 6, 3))
    assert names(before) == names(after) and CHAIN & set(names(before))


def test_a_factor_folds_up_to_the_shift_that_must_stay():
    weights = {"w": normal(3, 3, 3, 8), "s": uniform(3), "b": normal(3)}
    _, after = fold(lambda p, x: conv((x + p["b"]) * p["s"] * 0.5, p["w"], "SAME"), weights, normal(2, 6, 6, 3))
    assert names(after) == ["add", "conv_general_dilated"]


def test_norms_on_both_sides_leave_one_bias():
    inner = {f"{k}2": v for k, v in norm_weights(8).items()}
    weights = {"w": normal(5, 8), "b": normal(8), **norm_weights(5), **inner}

    def fun(p, x):
        return norm({k: p[f"{k}2"] for k in ("gamma", "beta", "mean", "var")}, norm(p, x) @ p["w"] + p["b"])

    _, after = fold(fun, weights, normal(4, 5))
    assert names(after) == ["dot_general", "add"]


def test_between_two_products_a_norm_belongs_to_the_first():
    weights = {"w": normal(5, 8), "w2": normal(8, 3), "b": normal(8), **norm_weights(8)}
    _, after = fold(lambda p, x: norm(p, x @ p["w"]) @ p["w2"], weights, normal(4, 5))
    assert names(after) == ["dot_general", "add", "dot_general"]
    before, after = fold(lambda p, x: (x @ p["w"] + p["b"]) @ p["w2"], weights, normal(4, 5))
    assert names(after) == names(before)


def behind_relu(p, x):
    return jax.nn.relu(norm(p, x)) @ p["w"]


def read_twice(p, x):
    y = norm(p, x)
    return y @ p["w"] + jnp.sum(y)


def also_a_result(p, x):
    y = norm(p, x)
    return y, y @ p["w"]


def along_the_batch(p, x):
    return (x * p["rows"]) @ p["w"]


@pytest.mark.parametrize(
    "fun",
    [
        behind_relu,
        read_twice,
        also_a_result,
        along_the_batch,
        lambda p, x: (x * p["wide"]) @ p["w"],
        lambda p, x: (x - p["mean"]) @ p["w"],
        lambda p, x: norm({**p, "mean": 40 + p["mean"]}, x) @ p["w"],
        lambda p, x: norm({**p, "var": p["wide"]}, x) @ p["w"],
    ],
    ids="behind_relu read_twice result rows wide_factor shift_alone far_mean wide_deviation".split(),
)
def test_what_must_not_or_had_better_not_fold_stays(fun):
    wide = np.geomspace(1e-3, 1e3, 5).astype(np.float32)
    weights = {"w": normal(5, 8), "rows": uniform(4, 1), "wide": wide, **norm_weights(5)}
    before, after = fold(fun, weights, normal(4, 5))
    assert names(after) == names(before) and set(after.weights) == set(before.weights)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_integers_keep_what_a_norm_before_gives(offset):
    """Near zero the norm folds; far from it int8 would hold little but the offset, which the norm removes in int16."""
    x = offset + uniform(256, 16, low=0.0, high=1.0)
    mean, deviation = np.full(16, offset + 0.5, np.float32), uniform(16, low=0.25, high=0.35)
    params = {"w": normal(16, 8), "mean": mean + normal(16) / 100, "var": deviation**2}
    fun = lambda p, x: ((x - p["mean"]) / jnp.sqrt(p["var"])) @ p["w"]
    qmodel = qc.quantize(fun, [x], params=params, strict=True)
    # int8 operands leave 40 dB or so; int8 over [0, 101] would leave less than 15.
    assert sqnr_db([qmodel.float(x)], [qmodel(x)]) >= 33
    regions = len(qmodel._quantized.programs["assign_precision"].notes["types"])
    assert regions == (1 if offset == 0 else 2)


# What a norm says of its result


SPELLINGS = {
    "rsqrt": norm,
    "sqrt": lambda p, y: (y - p["mean"]) / jnp.sqrt(p["var"] + 1e-5) * p["gamma"] + p["beta"],
    "power": lambda p, y: (y - p["mean"]) * (p["var"] + 1e-5) ** -0.5 * p["gamma"] + p["beta"],
    "one_factor": lambda p, y: (y - p["mean"]) * (p["gamma"] / jnp.sqrt(p["var"] + 1e-5)) + p["beta"],
    "gamma_first": lambda p, y: p["gamma"] * ((y - p["mean"]) * lax.rsqrt(p["var"] + 1e-5)) + p["beta"],
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("kind", ["dot", "conv_nchw", "conv_1d", "conv_3d"])
def test_mean_and_deviation_of_the_folded_result_are_beta_and_gamma(spelling, kind):
    product, weight, x, channels = PRODUCTS[kind]
    features = (4 if kind == "conv_3d" else 8, *channels[1:])
    weights = {"w": normal(*weight), "b": normal(*features, seed=9), **norm_weights(*features)}
    _, after = fold(lambda p, x: 2 * spelling(p, product(x, p["w"]) + p["b"]), weights, normal(*x))
    ((key, found),) = after.notes["norms"].items()
    assert (
        key
        == after.ids[
            next(e for e in after.eqns if e.primitive.name in ("dot_general", "conv_general_dilated")).outvars[0]
        ]
    )
    out = after.eqns[-1].outvars[0].aval
    for name, expected in (("mean", 2 * weights["beta"]), ("deviation", 2 * np.abs(weights["gamma"]))):
        stated = np.broadcast_to(np.asarray(found[name]), out.shape)
        # Through factors of 1/deviation and back, in float32.
        np.testing.assert_allclose(stated, np.broadcast_to(expected, out.shape), rtol=1e-4, atol=1e-5)


def flax_norms():
    rng = np.random.default_rng(3)
    parts = [rng.uniform(0.5, 2.0, 8).astype(np.float32) for _ in range(4)]
    model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    model.eval()
    inner = model.layers[1]
    for variable, value in zip((inner.scale, inner.bias, inner.mean, inner.var), parts, strict=True):
        variable[...] = jnp.asarray(value)
    module = linen.Sequential([linen.Conv(8, (3, 3)), linen.BatchNorm(use_running_average=True)])
    variables = module.init(jax.random.key(0), jnp.zeros((1, 6, 6, 3)))
    variables["params"]["layers_1"] = {"scale": parts[0], "bias": parts[1]}
    variables["batch_stats"]["layers_1"] = {"mean": parts[2], "var": parts[3]}
    return parts, {"nnx": (model, None), "linen": (module, variables)}


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_flax_norms_say_it_too(flavour):
    parts, models = flax_norms()
    model, variables = models[flavour]
    program = simplify(source_of(model, None, variables, None, None).trace((normal(2, 6, 6, 3),), {}))
    ((key, found),) = fold_norms(program).notes["norms"].items()
    assert key.replace("/", "_").endswith("layers_0_conv_general_dilated#0")
    np.testing.assert_allclose(np.ravel(found["mean"]), parts[1], rtol=1e-4)
    np.testing.assert_allclose(np.ravel(found["deviation"]), parts[0], rtol=1e-4)


@pytest.mark.parametrize(
    "chain",
    [
        lambda p, y: y * p["gamma"] + p["beta"],
        lambda p, y: (y - p["mean"]) * p["gamma"] + p["beta"],
        lambda p, y: y * lax.rsqrt(p["var"] + 1e-5) * p["gamma"],
        lambda p, y: (p["mean"] - y) * p["gamma"] + p["beta"],
    ],
    ids=["affine", "no_deviation", "no_mean", "turned"],
)
def test_other_chains_say_nothing(chain):
    weights = {"w": normal(5, 8), **norm_weights(8)}
    _, after = fold(lambda p, x: chain(p, x @ p["w"]), weights, normal(4, 5))
    assert names(after)[0] == "dot_general" and not CHAIN & set(names(after)) and after.notes["norms"] == {}


def test_equalization_keeps_it_true():
    weights = {"w": normal(5, 8), "w2": normal(8, 3), "w3": normal(5, 8, seed=4), **norm_weights(8)}

    def fun(p, x):
        return jax.nn.relu(norm(p, x @ p["w"])) @ p["w2"], norm(p, x @ p["w3"])

    _, after = fold(fun, weights, normal(4, 5))
    divided = equalize(after)
    assert set(after.notes["norms"]) == {"dot_general#0", "dot_general#2"}
    assert divided.notes["norms"]["dot_general#2"] == after.notes["norms"]["dot_general#2"]
    name = next(n for n in after.weights if n.startswith("w:folded"))
    # One factor per column; the weight of the program is its float32 rounding.
    factors = after.weights[name][0] / divided.weights[name][0]
    for field in ("mean", "deviation"):
        was, now = (np.ravel(program.notes["norms"]["dot_general#0"][field]) for program in (after, divided))
        np.testing.assert_allclose(was / now, factors, rtol=1e-5)
    assert np.ptp(factors) > 0.1
