"""Convolutions as nnx and linen spell them, with every padding that Flax knows; normalized and standardized kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx


def conv(flavour, channels_in, channels, kernel, transposed=False, **options):
    """A convolution with bias, as an nnx or a linen module."""
    if flavour == "nnx":
        cls = nnx.ConvTranspose if transposed else nnx.Conv
        return cls(channels_in, channels, kernel, rngs=nnx.Rngs(0), **options)
    return (nn.ConvTranspose if transposed else nn.Conv)(channels, kernel, **options)


FLAVOURS = pytest.mark.parametrize("flavour", ["nnx", "linen"])


@FLAVOURS
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "REFLECT", 2, ((0, 2), (3, 1))], ids=str)
def test_padding(compiled, flavour, padding):
    compiled(conv(flavour, 4, 6, (3, 3), padding=padding), (6, 7, 4), data="positive")


@FLAVOURS
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", ((2, 1),)], ids=str)
def test_padding_in_one_dimension(compiled, flavour, padding):
    compiled(conv(flavour, 4, 6, (3,), padding=padding, kernel_dilation=2), (9, 4), data="positive")


@FLAVOURS
def test_three_dimensions(compiled, flavour):
    compiled(conv(flavour, 3, 5, (2, 3, 3), strides=(1, 2, 1)), (4, 5, 4, 3))


@FLAVOURS
@pytest.mark.parametrize("groups", [2, 4])
def test_groups(compiled, flavour, groups):
    compiled(conv(flavour, 4, 8, (3, 3), strides=2, feature_group_count=groups, padding=((1, 1), (1, 1))), (6, 6, 4))


@FLAVOURS
def test_input_dilation(compiled, flavour):
    layer = conv(flavour, 4, 6, (3, 3), input_dilation=2, padding=((1, 2), (2, 1)))
    compiled(layer, (4, 4, 4), data="positive")


@FLAVOURS
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", ((1, 2), (0, 1))], ids=str)
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_transposed(compiled, flavour, padding, transpose_kernel):
    layer = conv(
        flavour, 4, 6, (3, 3), transposed=True, strides=(2, 2), padding=padding, transpose_kernel=transpose_kernel
    )
    compiled(layer, (4, 3, 4), data="positive")


@FLAVOURS
def test_transposed_in_one_dimension(compiled, flavour):
    compiled(conv(flavour, 4, 6, (4,), transposed=True, strides=(2,)), (5, 4), data="positive")


@FLAVOURS
def test_inputs_with_more_batch_dimensions(compiled, flavour):
    """Flax flattens what comes before the spatial dimensions and unflattens it afterwards."""
    compiled(conv(flavour, 3, 5, (3, 3)), (2, 5, 4, 3))


@FLAVOURS
def test_masked_kernel(compiled, flavour):
    """Masks are constants: an autoregressive convolution."""
    mask = np.ones((3, 3, 4, 6), np.float32)
    mask[1, 1:], mask[2] = 0, 0
    compiled(conv(flavour, 4, 6, (3, 3), mask=mask), (6, 5, 4))


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 0), (0, 2))], ids=str)
def test_local(compiled, padding):
    """linen's ConvLocal has a kernel of its own at every position."""
    compiled(nn.ConvLocal(5, (3, 2), padding=padding), (5, 4, 3), data="positive")


def test_local_in_one_dimension(compiled):
    compiled(nn.ConvLocal(5, (3,), strides=2), (7, 3))


# Kernels computed from weights: one product, and nothing of the computation left.


def test_linen_weight_norm(compiled):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Conv(6, (3, 3)))(x)

    assert compiled(Normed(), (6, 5, 4)).kinds() == ["conv"]


def test_nnx_weight_norm(compiled):
    layer = nnx.WeightNorm(nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    assert compiled(layer, (6, 5, 4)).kinds() == ["conv"]


def test_nnx_spectral_norm(compiled):
    conv = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))
    layer = nnx.SpectralNorm(conv, update_stats=False, error_on_non_matrix=False, rngs=nnx.Rngs(1))
    assert compiled(layer, (6, 5, 4)).kinds() == ["conv"]


class StandardizedConv(nnx.Conv):
    """A convolution whose kernel has mean 0 and deviation 1 per output channel (Qiao et al. 2019, arXiv:1903.10520)."""

    def __call__(self, x):
        kernel = self.kernel[...]
        mean = jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
        deviation = jnp.std(kernel, axis=(0, 1, 2), keepdims=True)
        kernel = (kernel - mean) / (deviation + 1e-5)
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names) + self.bias[...]


class LinenStandardizedConv(nn.Module):
    """The same in linen, with a gain per channel as in NF-ResNets (Brock et al. 2021, arXiv:2101.08692)."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], 6))
        gain = self.param("gain", nn.initializers.ones, (6,))
        fan_in = np.float32(np.prod(kernel.shape[:-1]))
        mean, var = jnp.mean(kernel, axis=(0, 1, 2)), jnp.var(kernel, axis=(0, 1, 2))
        kernel = (kernel - mean) * (gain * jax.lax.rsqrt(jnp.maximum(var * fan_in, 1e-4)))
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("layer", [StandardizedConv(4, 6, (3, 3), rngs=nnx.Rngs(0)), LinenStandardizedConv()])
def test_standardized_kernel(compiled, layer):
    assert compiled(layer, (6, 5, 4)).kinds() == ["conv"]
