"""Shifted multiply-adds against `jax.lax`'s grouped convolution: values, gradients, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qcompiler.models import depthwise, mobilenet

LAYOUT = ("NHWC", "HWIO", "NHWC")
CASES = {
    "plain": dict(shape=(2, 9, 8, 6), window=(3, 3), strides=(1, 1), padding=((1, 1), (1, 1))),
    "strided": dict(shape=(3, 9, 8, 6), window=(3, 3), strides=(2, 2), padding="SAME"),
    "valid": dict(shape=(2, 7, 10, 4), window=(3, 2), strides=(2, 3), padding="VALID"),
    "uneven padding": dict(shape=(2, 6, 6, 3), window=(2, 3), strides=(1, 1), padding=((0, 2), (3, 1))),
    "dilated": dict(shape=(2, 9, 9, 5), window=(3, 3), strides=(1, 1), padding="SAME", rhs_dilation=(2, 3)),
    "multiplier": dict(shape=(2, 6, 5, 3), window=(3, 3), strides=(1, 2), padding="SAME", multiplier=2),
    "many rows": dict(shape=(5, 17, 13, 2), window=(3, 3), strides=(1, 1), padding="SAME"),
    "larger than the map": dict(shape=(2, 2, 2, 4), window=(5, 5), strides=(1, 1), padding="SAME"),
}


def operands(shape, window, multiplier=1):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(*window, 1, shape[3] * multiplier)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(kernel)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_the_convolution_s(case):
    x, kernel = operands(case["shape"], case["window"], case.get("multiplier", 1))
    options = {
        "window_strides": case["strides"],
        "padding": case["padding"],
        "rhs_dilation": case.get("rhs_dilation"),
        "dimension_numbers": LAYOUT,
        "feature_group_count": x.shape[3],
    }
    shape = jax.eval_shape(lambda x, k: jax.lax.conv_general_dilated(x, k, **options), x, kernel).shape
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=shape).astype(np.float32))

    def run(conv, x, kernel, cotangent):
        value, pull = jax.vjp(lambda x, k: conv(x, k, **options), x, kernel)
        return value, *pull(cotangent)

    both = jax.jit(lambda *args: [run(c, *args) for c in (depthwise.shifted_depthwise, jax.lax.conv_general_dilated)])
    for shifted, conv in zip(*both(x, kernel, cotangent), strict=True):
        assert shifted.shape == conv.shape
        # The same products summed in another order: some units of 2**-24 of the largest sum.
        np.testing.assert_allclose(shifted, conv, rtol=0, atol=4e-6 * float(np.abs(conv).max()))


def test_refuses_what_it_does_not_compute():
    x, kernel = operands((2, 6, 6, 4), (3, 3))
    call = lambda **changed: depthwise.shifted_depthwise(
        x,
        changed.pop("kernel", kernel),
        (1, 1),
        "SAME",
        **{"dimension_numbers": LAYOUT, "feature_group_count": 4, **changed},
    )
    with pytest.raises(ValueError, match="one group per channel"):
        call(feature_group_count=2, kernel=jnp.zeros((3, 3, 2, 4)))
    with pytest.raises(ValueError, match="NHWC"):
        call(dimension_numbers=("NCHW", "HWIO", "NHWC"), feature_group_count=6, kernel=jnp.zeros((3, 3, 1, 6)))
    with pytest.raises(ValueError, match="lhs_dilation"):
        call(lhs_dilation=(2, 2))
    with pytest.raises(ValueError, match="preferred_element_type"):
        call(preferred_element_type=jnp.float32)
    with pytest.raises(ValueError, match="depthwise must be one of conv, shifted"):
        depthwise.conv_for("im2col")


def test_a_model_changes_its_way_and_keeps_its_function():
    block = mobilenet.InvertedResidual(8, 8, rngs=nnx.Rngs(0))
    block.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 9, 8)).astype(np.float32))

    def run():
        graphdef, state = nnx.split(block)
        call = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
        return str(call.trace(state, x).jaxpr).count("feature_group_count=48"), call(state, x)

    grouped, results = run()
    mobilenet.use_depthwise(block, "shifted")
    ungrouped, shifted = run()
    mobilenet.use_depthwise(block, "conv")
    assert (grouped, ungrouped, run()[0]) == (1, 0, 1)
    # Rounding of three layers.
    np.testing.assert_allclose(shifted, results, rtol=0, atol=4e-6 * float(np.abs(results).max()))
    with pytest.raises(ValueError, match="depthwise must be one of"):
        mobilenet.use_depthwise(block, "winograd")
