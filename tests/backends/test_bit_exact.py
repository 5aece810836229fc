"""The lowered program against the independent reference, bit for bit, op by op and shape by shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qcompiler.debug import fuzz, reference
from qcompiler.numerics.types import QuantType
from qcompiler.recipe import Recipe

#: Of a case's elements, how many may be a step from the simulation: the integers round half up where floats round half
#: to even, and float32 (24 bits) of an int16 result errs by up to 2**-8 of a step. Measured: one element in 5,000; the
#: two come from cases with few elements.
OFF_BY_ONE = 2, 0.005


def normal(*shape, seed=0, scale=1.0, shift=0.0):
    return (np.random.default_rng([seed, *shape]).normal(size=shape) * scale + shift).astype(np.float32)


CASES = {}


def case(name, fun, shape, weights=None, inputs=1, recipe=None, scale=1.0, shift=0.3):
    """`fun(weights, *inputs)`, each input of `shape` after the batch."""
    assert name not in CASES
    CASES[name] = fun, {k: normal(*s, seed=7) for k, s in (weights or {}).items()}, shape, inputs, recipe, scale, shift


def conv(x, w, strides=None, padding="SAME", layout="NHWC", **options):
    spatial = x.ndim - 2
    names = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}[spatial]
    if layout == "NCHW":
        names = ("NCHW", "OIHW", "NCHW")
    strides = strides or (1,) * spatial
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=names, **options)


def conv_case(name, shape, kernel, bias=None, act=lambda y: y, **options):
    weights = {"w": kernel} | ({"b": bias} if bias else {})
    case(name, lambda w, x: act(conv(x, w["w"], **options) + w.get("b", np.float32(0))), shape, weights)


IMAGE = (7, 6, 5)
conv_case("conv", IMAGE, (3, 3, 5, 4))
conv_case("conv-bias-relu", IMAGE, (3, 3, 5, 4), (4,), jax.nn.relu)
conv_case("conv-1x1", IMAGE, (1, 1, 5, 4), (4,))
conv_case("conv-1x1-strides", IMAGE, (1, 1, 5, 4), (4,), strides=(2, 3))
conv_case("conv-valid-strides", IMAGE, (3, 2, 5, 4), (4,), strides=(2, 1), padding="VALID")
conv_case("conv-same-strides", IMAGE, (3, 3, 5, 4), strides=(2, 2))
conv_case("conv-asymmetric-padding", IMAGE, (3, 3, 5, 4), padding=((0, 2), (3, 1)))
conv_case("conv-padding-on-one-side", IMAGE, (3, 3, 5, 4), padding=((0, 0), (0, 1)), strides=(2, 2))
conv_case("conv-dilation", IMAGE, (3, 2, 5, 4), (4,), rhs_dilation=(2, 3))
conv_case("conv-lhs-dilation", IMAGE, (3, 3, 5, 4), (4,), padding=((1, 2), (2, 1)), lhs_dilation=(2, 3))
conv_case(
    "conv-lhs-dilation-strides", IMAGE, (3, 2, 5, 4), padding=((0, 0), (0, 1)), lhs_dilation=(2, 1), strides=(1, 2)
)
conv_case("conv-groups", (6, 5, 8), (3, 3, 4, 6), (6,), feature_group_count=2)
conv_case("conv-depthwise", (6, 5, 8), (3, 3, 1, 8), (8,), jax.nn.relu6, feature_group_count=8)
conv_case("conv-depthwise-strides", (6, 5, 8), (3, 3, 1, 8), strides=(2, 2), feature_group_count=8)
conv_case("conv-depthwise-multiplier", (6, 5, 3), (3, 3, 1, 6), feature_group_count=3)
conv_case("conv-larger-than-the-map", (2, 3, 5), (5, 5, 5, 4), padding=((2, 2), (2, 2)))
conv_case("conv-of-the-whole-map", (4, 3, 5), (4, 3, 5, 4), (4,), padding="VALID")
conv_case("conv-nchw", (5, 7, 6), (4, 5, 3, 3), layout="NCHW", strides=(2, 1))
conv_case("conv-nchw-depthwise", (4, 7, 6), (4, 1, 3, 3), layout="NCHW", feature_group_count=4)
conv_case("conv-1d", (9, 5), (3, 5, 4), (4,), strides=(2,))
conv_case("conv-1d-dilation", (9, 5), (3, 5, 4), padding=((4, 0),), rhs_dilation=(2,))
conv_case("conv-1d-lhs-dilation", (9, 5), (3, 5, 4), padding=((1, 2),), lhs_dilation=(2,))
for channels in (1, 3, 8, 16, 20):
    conv_case(f"conv-{channels}-channels", (5, 4, channels), (3, 3, channels, 20), (20,), jax.nn.relu)
    conv_case(f"conv-to-{channels}-channels", (5, 4, 20), (3, 3, 20, channels))


def dot_case(name, shape, weights, fun, **options):
    case(name, fun, shape, weights, **options)


dot_case("dot", (6,), {"w": (6, 5)}, lambda w, x: x @ w["w"])
dot_case("dot-bias-relu", (6,), {"w": (6, 5), "b": (5,)}, lambda w, x: jax.nn.relu(x @ w["w"] + w["b"]))
dot_case("dot-3d", (4, 6), {"w": (6, 5), "b": (5,)}, lambda w, x: x @ w["w"] + w["b"])
dot_case("dot-n1", (6,), {"w": (6, 1), "b": (1,)}, lambda w, x: x @ w["w"] + w["b"])
dot_case("dot-k1", (4, 1), {"w": (1, 5)}, lambda w, x: x @ w["w"])
dot_case("dot-two-contracted", (4, 6), {"w": (4, 6, 5)}, lambda w, x: jnp.tensordot(x, w["w"], 2))
dot_case("dot-weight-left", (6, 3), {"w": (4, 6)}, lambda w, x: jnp.einsum("ij,bjk->bik", w["w"], x))
dot_case("dot-weight-left-matrix", (6,), {"w": (4, 6)}, lambda w, x: w["w"] @ x.T)
dot_case("dot-of-heads", (4, 3, 6), {"w": (3, 6, 5)}, lambda w, x: jnp.einsum("bthd,hde->bthe", x, w["w"]))
dot_case("dots-in-a-row", (6,), {"u": (6, 8), "w": (8, 3)}, lambda w, x: jax.nn.relu(x @ w["u"]) @ w["w"])
case("scores", lambda w, x, y: jnp.einsum("bqd,bkd->bqk", x, y), (4, 6), inputs=2, shift=0.9)
case("scores-of-itself", lambda w, x: jnp.einsum("bqd,bkd->bqk", x, x), (4, 6), shift=-0.9)
case("scores-scaled", lambda w, x, y: jnp.einsum("bqhd,bkhd->bhqk", x, y) / 8 - 1, (4, 2, 6), inputs=2, shift=0.9)
case("values", lambda w, x, y: x.transpose(0, 2, 1) @ y, (4, 3), inputs=2, shift=-0.4)

VECTOR, MAP = (12,), (4, 5, 3)
for name, act in {
    "relu": jax.nn.relu,
    "relu6": lambda x: jax.nn.relu6(4 * x),
    "clip": lambda x: jnp.clip(x, -0.3, 0.7),
    "clip-one-number": lambda x: jnp.clip(x, 0.5, 0.5),
    "relu-negated": lambda x: 1 - 2 * jax.nn.relu(x),
    "gelu": jax.nn.gelu,
    "gelu-erf": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "hard-swish": jax.nn.hard_swish,
    "leaky-relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
    "square": jnp.square,
}.items():
    case(f"act-{name}", lambda w, x, act=act: act(x), VECTOR)
    case(f"dot-{name}", lambda w, x, act=act: act(x @ w["w"] + w["b"]), (6,), {"w": (6, 5), "b": (5,)})
case(
    "clip-per-channel",
    lambda w, x: -w["s"] * jax.nn.relu(x @ w["w"]) + w["b"],
    (6,),
    {"w": (6, 5), "s": (5,), "b": (5,)},
)

SMALL = {"w": (3, 3, 3, 3), "b": (3,)}
case("residual", lambda w, x: x + conv(x, w["w"]) + w["b"], MAP, SMALL)
case("residual-relu", lambda w, x: jax.nn.relu(x + (conv(x, w["w"]) + w["b"])), MAP, SMALL)
case("residual-sub", lambda w, x: x - conv(x, w["w"]), MAP, SMALL)
case("residual-sub-relu", lambda w, x: jax.nn.relu6(conv(x, w["w"]) - x), MAP, SMALL)
case("residual-of-activation", lambda w, x: jax.nn.relu(x) + conv(x, w["w"]), MAP, SMALL)
case("add-of-inputs", lambda w, x, y: x + y, VECTOR, inputs=2)
case("add-of-three", lambda w, x, y, z: jax.nn.relu((x - y * 100) + z * 0.01), VECTOR, inputs=3)
# Terms far wider than the result leave few guard bits; many elements, so that one bit more or less would show.
case("clip-of-wide-sum", lambda w, x, y: jnp.clip(x * 1000 + y, -30, 30), (4000,), inputs=2)
case("add-to-itself", lambda w, x: x + x, VECTOR)
case("sub-from-itself", lambda w, x: x - x, VECTOR)
case("channels-scaled", lambda w, x: x * w["s"] + w["b"], MAP, {"s": (3,), "b": (3,)})
case("channels-scaled-relu", lambda w, x: jax.nn.relu(x * w["s"] + w["b"]), MAP, {"s": (3,), "b": (3,)})
case("affine-chain", lambda w, x: ((x * 3 - 1) / 7 + 0.5) * -2, VECTOR)
case("affine-of-large", lambda w, x: x * 1e-4 + 5, VECTOR, scale=1e4)
case("negated", lambda w, x: -x, VECTOR)


def max_pool(x, padding="VALID", window=2, stride=2):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), padding)


case("max-pool", lambda w, x: max_pool(x), MAP)
case("max-pool-same", lambda w, x: max_pool(x, "SAME", 3), MAP, shift=-3.0)
case("conv-relu-max-pool", lambda w, x: max_pool(jax.nn.relu(conv(x, w["w"])), "SAME", 3), MAP, SMALL)
case("min-pool", lambda w, x: -max_pool(-x), MAP)
case("mean", lambda w, x: jnp.mean(x, (1, 2)), MAP)
case("mean-relu-dot", lambda w, x: jnp.mean(jax.nn.relu(conv(x, w["w"])), (1, 2)) @ w["v"], MAP, SMALL | {"v": (3, 4)})
case("sum", lambda w, x: jnp.sum(x, 1), MAP)
case("max", lambda w, x: jnp.max(x, (1, 2)), MAP)
case("transpose", lambda w, x: x.transpose(0, 2, 1, 3) * 2, MAP)
case("reshape", lambda w, x: x.reshape(x.shape[0], -1) @ w["w"], MAP, {"w": (60, 4)})
case("views", lambda w, x: jnp.flip(x.transpose(0, 3, 1, 2), 2)[:, :, ::2, 1:].reshape(x.shape[0], -1), MAP)
case("view-of-an-input", lambda w, x: x.reshape(x.shape[0], -1), MAP)
case("broadcast", lambda w, x: x - jnp.broadcast_to(jnp.mean(x, 1, keepdims=True), x.shape), VECTOR)
case("two-types", lambda w, x: (h := jax.nn.relu(conv(x, w["w"]))) + conv(h, w["w"]), MAP, SMALL)
case("two-results", lambda w, x: ((h := x @ w["w"] + w["b"]), jax.nn.gelu(h), h + x), (5,), {"w": (5, 5), "b": (5,)})
case("input-twice", lambda w, x: (x @ w["w"]) + x, (5,), {"w": (5, 5)})
case("input-thrice", lambda w, x: (jnp.tanh(x) @ w["w"] + x, x @ w["w"]), (5,), {"w": (5, 5)})
case("uniform-kernel", lambda w, x: conv(x, jnp.full((3, 3, 3, 2), 0.25)), MAP)
case("zero-channel", lambda w, x: x @ (w["w"] * np.float32([1, 0, 1, 0])) + w["b"], (6,), {"w": (6, 4), "b": (4,)})
case(
    "bias-read-by-others",
    lambda w, x: (((h := x @ w["w"] + 1.5) * jax.nn.sigmoid(h)) + h, h @ w["v"]),
    (6,),
    {"w": (6, 5), "v": (5, 3)},
)
NARROW = Recipe(weight=QuantType(4, symmetric=True), activation=QuantType(5), stream=QuantType(11), output=QuantType(6))
case("few-bits", lambda w, x: jax.nn.relu(x + conv(x, w["w"]) + w["b"]), MAP, SMALL, recipe=NARROW)
case("per-tensor", lambda w, x: jnp.tanh(conv(x, w["w"]) + w["b"]), MAP, SMALL, recipe=Recipe(granularity="tensor"))
SYMMETRIC = Recipe(
    activation=QuantType(8, symmetric=True), stream=QuantType(8), index=QuantType(8), output=QuantType(8)
)
case("symmetric", lambda w, x: jax.nn.gelu(x + conv(x, w["w"])), MAP, SMALL, recipe=SYMMETRIC)

#: Results that mix the samples of a batch, or put it elsewhere.
NOT_BY_SAMPLE = {"dot-weight-left-matrix"}
FLOATS = ("f16[", "f32[", "f64[", "bf16[", "f8e")


@pytest.fixture(scope="module")
def compiled():
    """name -> (stages, inputs) at batch 3, compiled once."""
    cache = {}

    def get(name):
        if name not in cache:
            fun, weights, shape, count, recipe, scale, shift = CASES[name]
            inputs = [normal(3, *shape, seed=k, scale=scale, shift=shift) for k in range(count)]
            cache[name] = fuzz.compile_stages(fun, weights, inputs, recipe), inputs
        return cache[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_bit_exact(name, compiled):
    """Regions, accumulators and results; under jit and vmap; no float in the compiled text."""
    stages, inputs = compiled(name)
    found = fuzz.check(stages, inputs)
    assert found.off_by_one <= OFF_BY_ONE[0] + OFF_BY_ONE[1] * found.elements, found.worst
    codes = reference.input_codes(stages.folded, inputs)
    text = jax.jit(stages.lowered).lower(*codes).compile().as_text()
    assert not [t for t in FLOATS if t in text]
    # Twice the batch in another order, by vmap.
    stacked = [np.stack([q, q[::-1]]) for q in codes]
    mapped = jax.jit(jax.vmap(stages.lowered))(*stacked)
    fuzz.assert_same([m[0] for m in mapped], found.codes, "vmap")
    reverse = reference.evaluate(stages.folded, [q[::-1] for q in codes], io="int")
    fuzz.assert_same([m[1] for m in mapped], reverse, "vmap, the second of the stack")


@pytest.mark.parametrize("name", CASES)
def test_one_sample_gives_what_it_gives_in_a_batch(name, compiled):
    """The same decisions at batch size one: same integers as the reference's, and as the sample's in the batch."""
    fun, weights, _, _, recipe, _, _ = CASES[name]
    stages, inputs = compiled(name)
    first = [x[:1] for x in inputs]
    one = fuzz.compile_stages(fun, weights, first, recipe, stats=stages.fused.stats)
    codes = reference.input_codes(one.folded, first)
    got = [np.asarray(r) for r in jax.jit(one.lowered)(*codes)]
    fuzz.assert_same(got, reference.evaluate(one.folded, codes, io="int"), "one sample")
    if name not in NOT_BY_SAMPLE:
        batch = reference.evaluate(stages.folded, reference.input_codes(stages.folded, inputs), io="int")
        fuzz.assert_same(got, [r[:1] for r in batch], "one sample against the batch")


EAGER = [
    "conv-bias-relu", "conv-1d", "conv-groups", "dot", "scores-of-itself", "act-gelu", "dot-silu", "residual-relu",
    "add-of-three", "clip-per-channel", "max-pool-same", "mean-relu-dot", "input-thrice", "two-types", "few-bits",
]  # fmt: skip


@pytest.mark.parametrize("name", EAGER)
def test_op_by_op_is_the_same(name, compiled):
    """Without jit, where every op is compiled alone: the integers again, and the float bodies bit for bit."""
    stages, inputs = compiled(name)
    codes = reference.input_codes(stages.folded, inputs)
    expected = reference.evaluate(stages.folded, codes, io="int")
    fuzz.assert_same(stages.lowered.evaluate(codes), expected, "op by op")
    fuzz.assert_same(stages.lowered(*codes), expected, "called")
    fuzz.assert_same(stages.folded.evaluate(inputs), stages.fused.evaluate(inputs), "folded against fused")


@pytest.mark.parametrize("name", ["conv-bias-relu", "dot-weight-left", "scores", "conv-asymmetric-padding"])
def test_fused_without_folding_lowers_too(name, compiled):
    from qcompiler.backends import lax_int

    stages, inputs = compiled(name)
    codes = reference.input_codes(stages.fused, inputs)
    got = jax.jit(lax_int.lower(stages.fused, io="int"))(*codes)
    fuzz.assert_same(got, reference.evaluate(stages.fused, codes, io="int"), "fused")


def test_wide_terms_that_nearly_cancel_keep_their_difference():
    """Two stored values of 2**35 output steps each: their sum is in coarser units instead of saturating."""
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(200, 8)) * 1e6).astype(np.float32)
    b = (a + rng.normal(size=a.shape)).astype(np.float32)
    stages = fuzz.compile_stages(lambda weights, x, y: x - y, {}, [a, b])
    codes = reference.input_codes(stages.folded, [a, b])
    (integers,) = stages.lowered.evaluate(codes)
    (expected,) = reference.evaluate(stages.folded, codes, io="int")
    np.testing.assert_array_equal(np.asarray(integers), expected)
    # In float64 from the stored codes. The unit of the sum is 2**10 output steps here; two terms are rounded to it.
    scales = {n: np.float64(w) for n, w in stages.folded.weights.items() if n.endswith("scale")}
    of_x, of_y, of_result = (
        next(s for n, s in scales.items() if n.startswith(start)) for start in ("input:x0", "input:x1", "sub")
    )
    exact = (codes[0] * of_x - codes[1] * of_y) / of_result
    assert np.max(np.abs(np.asarray(integers) - np.clip(exact, -32768, 32767))) <= 2**10
