"""What grows into one region of general arithmetic, what stops it, and what stays with the cheaper kinds."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

from qcompiler import ops
from qcompiler.ir import _compat, replay

WEIGHTS = {
    "w": normal(8, 8),
    "v": normal(8, 8, seed=1),
    "b": normal(8, seed=2),
    "s": np.abs(normal(8, seed=3)),
    "k": normal(3, 3, 8, 8, seed=4),
}
X = normal(4, 8, seed=6)
IMAGE = normal(2, 4, 4, 8, seed=7)


@pytest.fixture
def grown(passes):
    """`grown(fun, *inputs)`: (regions of the partitioned program, its simplified program); there are no islands."""

    def run(fun, *inputs):
        found = passes(fun, WEIGHTS, [inputs or (X,)], until="partition")
        assert not found["partition"].notes["islands"]
        regions = [e for e in found["partition"].eqns if e.primitive is ops.region_p]
        return regions, found["fold_norms"]

    return run


def _kinds(regions):
    return [e.params["kind"] for e in regions]


def _body(region):
    return [e.primitive.name for e in _compat.open_jaxpr(region.params["body"]).eqns]


def _conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


# One region


def _norm_of_deviations(p, x):
    d = x - jnp.mean(x, axis=-1, keepdims=True)
    return d / jnp.sqrt(jnp.mean(d * d, axis=-1, keepdims=True) + 1e-6) * p["s"] + p["b"]


def _norm_of_moments(p, x):
    """As Flax computes it."""
    mean, mean2 = jnp.mean(x, axis=-1), jnp.mean(lax.square(x), axis=-1)
    scale = lax.rsqrt(jnp.maximum(mean2 - lax.square(mean), 0.0) + 1e-6)
    return (x - mean[..., None]) * (scale[..., None] * p["s"]) + p["b"]


def _norm_of_var(p, x):
    scale = p["s"] * lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-6)
    return scale * (x - jnp.mean(x, axis=-1, keepdims=True)) + p["b"]


def _rms_norm(p, x):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * p["s"]


def _group_norm(p, x):
    groups = x.reshape(*x.shape[:-1], 2, 4)
    axes = (1, 2, 4)
    mean, var = jnp.mean(groups, axis=axes, keepdims=True), jnp.var(groups, axis=axes, keepdims=True)
    return ((groups - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * p["s"] + p["b"]


@pytest.mark.parametrize(
    ("fun", "x"),
    [
        (lambda p, x: jax.nn.softmax(x), X),
        (lambda p, x: jnp.exp(x) / jnp.sum(jnp.exp(x), axis=-1, keepdims=True), X),
        (lambda p, x: jax.nn.log_softmax(x), X),
        (lambda p, x: jax.nn.logsumexp(x, axis=-1), X),
        (_norm_of_deviations, X),
        (_norm_of_moments, X),
        (_norm_of_var, X),
        (_rms_norm, X),
        (_group_norm, IMAGE),
        (lambda p, x: x / jnp.linalg.norm(x, axis=-1, keepdims=True), X),
        (lambda p, x: x / jnp.maximum(jnp.sum(jnp.abs(x), axis=-1, keepdims=True), 1e-12), X),
        (lambda p, x: jax.nn.standardize(x), X),
        (lambda p, x: x[:, :4] / (1.0 + jnp.abs(x[:, 4:])), X),
        (lambda p, x: x > jnp.mean(x), X),
    ],
    ids=(
        "softmax softmax_by_hand log_softmax logsumexp norm_of_deviations norm_of_moments norm_of_var rms_norm"
        " group_norm l2_norm l1_norm standardize quotient above_mean"
    ).split(),
)
def test_one_region(grown, fun, x):
    regions, before = grown(fun, x)
    wide = regions[-1]
    # What reads halves of an input is a view before it.
    assert set(_kinds(regions[:-1])) <= {"view"} and wide.params["kind"] == "wide"
    # Census: every live equation is in a region, once, and none was made up.
    expected = collections.Counter(e.primitive.name for e in replay.live_equations(before.jaxpr))
    assert sum((collections.Counter(_body(r)) for r in regions), collections.Counter()) == expected
    assert set(wide.params["roles"]) <= {"term", "constant"} and "term" in wide.params["roles"]


def test_a_function_of_what_is_normalized_is_a_table(grown):
    regions, _ = grown(lambda p, x: jax.nn.silu(_rms_norm(p, x)), X)
    assert _kinds(regions) == ["wide", "table"]


# What stops it


def test_the_epilogue_of_a_product_stays_with_it(grown):
    regions, _ = grown(lambda p, x: jax.nn.softmax((x @ p["w"]) * 0.125 + p["b"]))
    assert _kinds(regions) == ["dot", "wide"]
    # The factor is in the weights now; the bias is added where the product is rounded.
    assert _body(regions[0])[:1] == ["dot_general"] and "add" in _body(regions[0])
    assert regions[1].params["roles"] == ("term",)


def test_a_residual_joins_the_product_and_the_norm_reads_the_sum(grown):
    regions, _ = grown(lambda p, x: (lambda y: (y, _rms_norm(p, y)))(x + x @ p["w"]))
    assert _kinds(regions) == ["dot", "wide"]
    assert _body(regions[0]) == ["dot_general", "add"] and regions[0].params["roles"] == (
        "activation",
        "weight",
        "term",
    )


@pytest.mark.parametrize("value", [-1e4, -1e9, -np.inf])
def test_a_mask_belongs_to_what_it_is_for(grown, value):
    mask = np.where(np.tril(np.ones((4, 4), bool)), 0, value).astype(np.float32)
    added, _ = grown(lambda p, x: jax.nn.softmax(x @ x.T + mask) @ x)
    chosen, _ = grown(lambda p, x: jax.nn.softmax(jnp.where(mask == 0, x @ x.T, value)) @ x)
    for regions, name in ((added, "add"), (chosen, "select_n")):
        assert _kinds(regions) == ["view", "dot", "wide", "dot"]
        assert _body(regions[1]) == ["dot_general"] and name in _body(regions[2])


def test_a_bias_of_scores_is_no_mask(grown):
    bias = normal(4, 4, seed=9)
    regions, _ = grown(lambda p, x: jax.nn.softmax(x @ x.T + bias) @ x)
    assert _body(regions[1]) == ["dot_general", "add"]


def test_a_value_that_others_read_is_stored(grown):
    def fun(p, x):
        e = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
        return e, e / jnp.sum(e, axis=-1, keepdims=True)

    regions, _ = grown(fun)
    assert _kinds(regions) == ["wide", "wide"]
    assert _body(regions[0])[-1] == "exp" and "exp" not in _body(regions[1])


def test_what_a_product_reads_is_stored(grown):
    regions, _ = grown(lambda p, x: _rms_norm(p, _norm_of_var(p, x) @ p["w"]))
    assert _kinds(regions) == ["wide", "dot", "wide"]


def test_integers_that_the_model_makes_of_integers_stay_outside(passes):
    index = np.arange(3, dtype=np.int32)
    program = passes(lambda p, i: p["w"][i], WEIGHTS, [index], until="partition")["partition"]
    (region,) = (e for e in program.eqns if e.primitive is ops.region_p)
    assert (region.params["kind"], region.params["roles"]) == ("wide", ("rows", "integer"))
    assert {e.primitive.name for e in program.eqns} >= {"lt", "add", "select_n", "broadcast_in_dim"}


# What stays as it was


def _squeeze_excite(p, x):
    y = jax.nn.silu(_conv(x, p["k"]))
    s = jnp.mean(y, axis=(1, 2), keepdims=True)
    return y * jax.nn.sigmoid(jax.nn.silu(s @ p["w"]) @ p["v"])


@pytest.mark.parametrize(
    ("fun", "x", "kinds"),
    [
        (_squeeze_excite, IMAGE, "conv table reduce view dot table dot table product"),
        (lambda p, x: (jax.nn.silu(x @ p["w"]) * (x @ p["v"])) @ p["w"], X, "dot table dot product dot"),
        (lambda p, x: jnp.mean(jax.nn.relu(_conv(x, p["k"])), axis=(1, 2)), IMAGE, "conv reduce"),
        (lambda p, x: jnp.mean(x, axis=(1, 2)) @ p["w"], IMAGE, "reduce dot"),
        (lambda p, x: jnp.max(x, axis=(1, 2)) @ p["w"], IMAGE, "view dot"),
        (lambda p, x: x * p["s"] + p["b"], X, "linear"),
        (lambda p, x: 1.0 / (1.0 + jnp.exp(-x)), X, "table"),
        (lambda p, x: jnp.cumsum(x, axis=1), X, "reduce"),
    ],
    ids="squeeze_excite swiglu pool_of_relu pool max_pool affine sigmoid cumsum".split(),
)
def test_cheaper_kinds_stay(grown, fun, x, kinds):
    assert _kinds(grown(fun, x)[0]) == kinds.split()


ACTIVATIONS = [jax.nn.silu, jax.nn.gelu, jax.nn.hard_swish, jnp.tanh, jax.nn.softplus, jax.nn.mish, jax.nn.elu]
ACTIVATIONS += [lambda x: jax.nn.gelu(x, approximate=False), lambda x: jnp.exp(-jnp.abs(x))]


@pytest.mark.parametrize("fun", ACTIVATIONS)
def test_sums_of_activations_are_of_stored_values(grown, fun):
    assert _kinds(grown(lambda p, x: jnp.mean(fun(x @ p["w"] + p["b"]), axis=1))[0]) == ["dot", "table", "reduce"]


SPREADING = [jnp.exp, jnp.square, lambda x: x**3, lambda x: 1 / x, lambda x: x * x, lambda x: jnp.expm1(0.01 * x)]
SPREADING += [lambda x: jnp.where(x > 0, x * x, 0.0), lambda x: lax.rsqrt(jnp.abs(x))]


@pytest.mark.parametrize("fun", SPREADING)
def test_sums_of_what_spreads_over_binades_are_not(grown, fun):
    assert _kinds(grown(lambda p, x: jnp.mean(fun(x @ p["w"] + p["b"]), axis=1))[0]) == ["dot", "wide"]
