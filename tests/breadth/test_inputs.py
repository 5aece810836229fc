"""Inputs that are no float32: images of bytes, masks, half precision; and what is done to them first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

MAP = (6, 5, 3)
W = np.random.default_rng(0).normal(size=(3, 3, 3, 4)).astype(np.float32)


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


PREPARATIONS = {
    "to-unit": lambda x: x.astype(jnp.float32) / 255,
    "to-symmetric": lambda x: x.astype(jnp.float32) / 127.5 - 1,
    "float-alone": lambda x: x.astype(jnp.float32),
    "standardized": lambda x: (
        (x.astype(jnp.float32) / 255 - np.float32([0.485, 0.456, 0.406])) / np.float32([0.2, 0.3, 0.25])
    ),
    "cast-by-lax": lambda x: lax.convert_element_type(x, jnp.float32) * np.float32(1 / 255),
    "jnp-float32": lambda x: jnp.float32(x) / 255,
}


@pytest.mark.parametrize("name", PREPARATIONS)
def test_bytes(compiled, name):
    """Pixels reach the first product as they are: its noise is that of weights alone."""
    compiled(lambda w, x: jax.nn.relu(conv(PREPARATIONS[name](x), w)), MAP, params=W, data="uint8")


@pytest.mark.parametrize("name", PREPARATIONS)
def test_bytes_elsewhere(compiled, name):
    """Read twice, by a skip; and pooled first."""
    fun = lambda w, x: (lambda y: (conv(y, w), y * 2, jnp.mean(y, axis=(1, 2))))(PREPARATIONS[name](x))
    # Means of 30 bytes: 48 of them were calibrated on, and others may lie outside.
    compiled(fun, MAP, params=W, data="uint8", sqnr=24)


def test_reshaped_bytes(compiled):
    """Views of integers before the cast."""
    fun = lambda x: x.transpose(0, 2, 1, 3)[:, ::2].astype(jnp.float32).reshape(x.shape[0], -1) / 255
    compiled(fun, MAP, data="uint8")


def test_bits(compiled):
    compiled(lambda w, x: (conv(x.astype(jnp.float32), w), x.astype(jnp.float32) * 2 - 1), MAP, params=W, data="bits")


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_integers(compiled, dtype):
    """Integers that a sensor gives."""
    compiled(lambda w, x: conv(x.astype(jnp.float32) / 64, w), MAP, params=W, data=dtype)


def test_half_precision(compiled):
    """A bfloat16 convolution between casts; integers are closer to float32 than it is."""
    fun = lambda w, x: conv(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)).astype(jnp.float32)
    compiled(fun, MAP, params=W)
