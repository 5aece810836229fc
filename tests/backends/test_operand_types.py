"""Every type of weight with every type of activation, in every kind of product: bit-exact, and as fine as promised."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qcompiler import ops
from qcompiler.debug import fuzz, reference
from qcompiler.debug.report import sqnr_db
from qcompiler.ir import _compat
from qcompiler.numerics import packing
from qcompiler.numerics.types import QuantType
from qcompiler.recipe import Granularity, Recipe

ACTIVATIONS = {
    "sym8": QuantType(8, symmetric=True),
    "affine8": QuantType(8),
    "sym16": QuantType(16, symmetric=True),
    "affine16": QuantType(16),
}
WEIGHTS = {"sym": QuantType(8, symmetric=True, narrow_range=True), "affine": QuantType(8)}
GRANULARITIES = {"tensor": "tensor", "channel": "channel", "group": Granularity(channel_group=3)}
#: SQNR in dB, smallest and largest, of one product whose weights have no error (`_weights`). 8 bits: 6 dB each less
#: some 8 for a Gaussian in a range three to four deviations wide. 16 bits: twice 6 * 8 more, less the rounding of the
#: result, which is of the same 16 bits, and 2 dB for the margin of their range; only a bound on that is stated.
SQNR_DB = {8: (33, 55), 16: (75, 110)}


def _normal(*shape, seed=0, shift=0.3):
    return (np.random.default_rng([seed, *shape]).normal(size=shape) + shift).astype(np.float32)


def _conv(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options)


#: name -> function, shape of the input after the batch, shape of the weight, dimensions of its channels.
PRODUCTS = {
    "dot": (lambda p, x: x @ p["w"] + p["b"], (7, 6), (6, 8), (1,)),
    "conv": (lambda p, x: _conv(x, p["w"]) + p["b"], (5, 6, 6), (3, 3, 6, 8), (3,)),
    "depthwise": (lambda p, x: _conv(x, p["w"], feature_group_count=8), (5, 6, 8), (3, 3, 1, 8), (3,)),
    "grouped": (lambda p, x: _conv(x, p["w"], feature_group_count=2), (5, 6, 6), (3, 3, 3, 8), (3,)),
    "1x1": (lambda p, x: _conv(x, p["w"]) + p["b"], (5, 6, 6), (1, 1, 6, 8), (3,)),
    "left": (lambda p, x: jnp.einsum("ij,bjk->bik", p["w"], x), (6, 5), (8, 6), (0,)),
    "batched": (lambda p, x: jnp.einsum("bthd,hde->bthe", x, p["w"]), (4, 3, 6), (3, 6, 8), (0, 2)),
}


def _weights(shape, channels, affine):
    """Whole numbers that fill the codes of every channel, so that quantization leaves them as they are."""
    low, high = (-100, 155) if affine else (-127, 127)
    codes = np.random.default_rng(0).integers(low, high + 1, shape)
    first = np.moveaxis(codes, channels, range(len(channels)))
    flat = first.reshape(*first.shape[: len(channels)], -1)
    flat[..., 0], flat[..., 1] = low, high
    codes = np.moveaxis(flat.reshape(first.shape), range(len(channels)), channels)
    return {"w": (codes / 128).astype(np.float32), "b": _normal(8)}


def _products(program):
    """(operand dtypes, result dtype) of every product in the regions of a program."""
    bodies = (_compat.open_jaxpr(e.params["body"]) for e in program.eqns if e.primitive is ops.region_p)
    inner = (e for body in bodies for e in body.eqns if e.primitive.name in ("dot_general", "conv_general_dilated"))
    return [(*(v.aval.dtype.name for v in e.invars), e.outvars[0].aval.dtype.name) for e in inner]


def _check(fun, weights, inputs, recipe):
    """The stages of a program that is right, whose lowered form holds no float type."""
    stages = fuzz.compile_stages(fun, weights, inputs, recipe)
    found = fuzz.check(stages, inputs)
    # Integers round half up where floats round half to even; see `test_bit_exact`.
    assert found.off_by_one <= 2 + 0.005 * found.elements
    codes = reference.input_codes(stages.folded, inputs)
    text = jax.jit(stages.lowered).lower(*codes).as_text()
    assert re.search(r"xi32>", text) and not re.search(r"[x<](b?f(8|16|32|64))", text)
    return stages


EVERY = list(itertools.product(PRODUCTS, WEIGHTS, GRANULARITIES, ACTIVATIONS))
#: Every pair of two choices at least once; the rest are slow for their number.
QUICK = {
    (p, list(WEIGHTS)[(i + j // 2) % 2], list(GRANULARITIES)[(i + j) % 3], a)
    for (i, p), (j, a) in itertools.product(enumerate(PRODUCTS), enumerate(ACTIVATIONS))
    if (i + j) % 2 == 0
}


@pytest.mark.parametrize(
    ("product", "weight", "granularity", "activation"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in EVERY],
)
def test_every_type_with_every_other(product, weight, granularity, activation):
    fun, shape, kernel, channels = PRODUCTS[product]
    qtype = ACTIVATIONS[activation]
    recipe = Recipe(weight=WEIGHTS[weight], granularity=GRANULARITIES[granularity], activation=qtype)
    x = _normal(4, *shape)
    stages = _check(fun, _weights(kernel, channels, weight == "affine"), [x], recipe)
    assert _products(stages.folded) == [("int8", "int8", "int32")] * (qtype.bits // 8)
    least, most = SQNR_DB[qtype.bits]
    assert least < sqnr_db(stages.float.evaluate([x]), stages.folded.evaluate([x])) < most


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (3, True), (5, False), (7, True)])
def test_weights_of_few_bits(bits, symmetric):
    weight = QuantType(bits, symmetric=symmetric, narrow_range=symmetric)
    fun, shape, kernel, _ = PRODUCTS["dot"]
    stages = _check(fun, {"w": _normal(*kernel), "b": _normal(8)}, [_normal(4, *shape)], Recipe(weight=weight))
    (codes,) = (w for n, w in stages.lowered.weights.items() if n.startswith("w:"))
    if packing.is_packed(bits):
        assert codes.dtype == np.uint8 and codes.size == packing.packed_size(kernel[0] * kernel[1], bits)
        codes = np.asarray(packing.unpack(codes, bits, kernel))
    assert codes.dtype == np.int8 and codes.min() >= weight.qmin and codes.max() <= weight.qmax
    assert len(np.unique(codes)) > min(2**bits, 32) // 2


@pytest.mark.parametrize("bits", [9, 12, 15])
def test_activations_of_every_width(bits):
    """The parts get as many bits as there are; SQNR grows by 6 dB for each until the 16-bit result is the limit."""
    fun, shape, kernel, channels = PRODUCTS["dot"]
    x = _normal(16, *shape)
    stages = _check(fun, _weights(kernel, channels, True), [x], Recipe(activation=QuantType(bits), weight=QuantType(8)))
    level = sqnr_db(stages.float.evaluate([x]), stages.folded.evaluate([x]))
    assert level > min(6.02 * bits - 14, 75)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (16, True), (16, False)])
def test_products_of_two_activations(bits, symmetric):
    """Two parts each make four products, two of which have one scale and become one sum."""
    x, y = _normal(3, 4, 6), _normal(3, 5, 6, seed=1, shift=-0.4)
    qtype = QuantType(bits, symmetric=symmetric)

    def fun(p, x, y):
        return jnp.einsum("bqd,bkd->bqk", x, y) / 8

    stages = _check(fun, {}, [x, y], Recipe(activation=qtype))
    assert _products(stages.folded) == [("int8", "int8", "int32")] * (bits // 8) ** 2
    level = sqnr_db(stages.float.evaluate([x, y]), stages.folded.evaluate([x, y]))
    assert SQNR_DB[bits][0] < level < SQNR_DB[bits][1]


def test_a_product_too_deep_for_one_accumulator():
    """int16 times int8 over 4,096 could reach 2**34; each part of it keeps below 2**27."""
    x = np.full((2, 4096), 3.0, np.float32)
    x[0] *= -1
    weights = {
        "w": np.where(np.arange(4096)[:, None] % 7 == 0, -1.0, 1.0).astype(np.float32) * np.ones((1, 4), np.float32)
    }
    stages = _check(lambda p, x: x @ p["w"], weights, [x], Recipe(activation=QuantType(16, symmetric=True)))
    exact = x.astype(np.float64) @ weights["w"]
    # One step of a result that spans 1.25 times its range in 16 bits.
    np.testing.assert_allclose(stages.folded.evaluate([x])[0], exact, atol=1.25 * np.abs(exact).max() / 32767)


def test_a_value_is_product_operand_and_term_at_16_bits():
    """It is taken apart for the product alone."""
    w = {"w": _normal(6, 6), "v": _normal(6, 6, seed=2)}

    def fun(p, x):
        y = x + jax.nn.relu(x @ p["w"])
        return y @ p["v"] + y, jnp.einsum("bi,ci->bc", x, x)

    _check(fun, w, [_normal(5, 6)], Recipe(activation=QuantType(16, symmetric=True), weight=QuantType(8)))
