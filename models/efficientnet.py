"""EfficientNet (Tan and Le 2019, arXiv:1905.11946) as an nnx module.

Inverted bottlenecks with depthwise convolutions and SiLU, squeeze-and-excitation on the expanded channels, and one pair
of multipliers that scales channels and blocks. Padding is `SAME`, as in the published weights. Stochastic depth and
dropout, which only training uses, are left out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qcompiler.models.layers import scaled_channels


class Stage(NamedTuple):
    """A row of the paper's Table 1: blocks that share everything but the stride, which only the first has.

    Attributes:
      expansion: hidden channels of a block as a multiple of its input channels.
      channels: output channels, before scaling.
      blocks: before scaling.
      stride: of the first block.
      kernel: size of the depthwise convolutions.
    """

    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel: int


B0_STAGES = (
    Stage(1, 16, 1, 1, 3),
    Stage(6, 24, 2, 2, 3),
    Stage(6, 40, 2, 2, 5),
    Stage(6, 80, 3, 2, 3),
    Stage(6, 112, 3, 1, 5),
    Stage(6, 192, 4, 2, 5),
    Stage(6, 320, 1, 1, 3),
)


class ConvNorm(nnx.Module):
    """A convolution without bias, BatchNorm, and SiLU where `act` is set; `groups` as in `nnx.Conv`."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            channels_in,
            channels,
            (kernel, kernel),
            strides=(stride, stride),
            feature_group_count=groups,
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(channels, momentum=0.99, epsilon=1e-3, rngs=rngs)
        self.act = act

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.conv(x))
        return jax.nn.silu(x) if self.act else x


class SqueezeExcite(nnx.Module):
    """Channels weighted by a sigmoid of their means (Hu et al. 2018, arXiv:1709.01507); the shape stays."""

    def __init__(self, channels: int, hidden: int, *, rngs: nnx.Rngs):
        self.reduce = nnx.Conv(channels, hidden, (1, 1), rngs=rngs)
        self.expand = nnx.Conv(hidden, channels, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * jax.nn.sigmoid(self.expand(jax.nn.silu(self.reduce(means))))


class InvertedBottleneck(nnx.Module):
    """Expands, convolves each channel, weights channels, projects; with a residual where the shape stays.

    Maps `float[n, h, w, channels_in]` to `float[n, ceil(h/stride), ceil(w/stride), channels]`.
    """

    def __init__(self, channels_in: int, channels: int, expansion: int, stride: int, kernel: int, *, rngs: nnx.Rngs):
        hidden = channels_in * expansion
        self.expand = ConvNorm(channels_in, hidden, 1, rngs=rngs) if expansion != 1 else None
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden, rngs=rngs)
        self.squeeze_excite = SqueezeExcite(hidden, max(1, channels_in // 4), rngs=rngs)
        self.project = ConvNorm(hidden, channels, 1, act=False, rngs=rngs)
        self.residual = stride == 1 and channels_in == channels

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.squeeze_excite(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNet(nnx.Module):
    """An EfficientNet of any width and depth; B0 is 1.0 and 1.0, B1 1.0 and 1.1, B2 1.1 and 1.2, B3 1.2 and 1.4.

    Args:
      width: multiplies channels, which stay multiples of 8.
      depth: multiplies blocks, rounded up.
      classes: number of outputs.
      channels: channels of the input images.
      stages: the network at width and depth 1.
      rngs: where the weights' randomness comes from.

    Calling it maps images `float32[n, height, width, channels]` of any size to logits `float32[n, classes]`.
    """

    def __init__(
        self,
        width: float = 1.0,
        depth: float = 1.0,
        *,
        classes: int = 1000,
        channels: int = 3,
        stages: Sequence[Stage] = B0_STAGES,
        rngs: nnx.Rngs,
    ):
        size = scaled_channels(32, width)
        self.stem = ConvNorm(channels, size, 3, 2, rngs=rngs)
        blocks = []
        for stage in stages:
            out = scaled_channels(stage.channels, width)
            for i in range(math.ceil(stage.blocks * depth)):
                stride = stage.stride if i == 0 else 1
                blocks.append(InvertedBottleneck(size, out, stage.expansion, stride, stage.kernel, rngs=rngs))
                size = out
        self.blocks = nnx.List(blocks)
        features = scaled_channels(1280, width)
        self.top = ConvNorm(size, features, 1, rngs=rngs)
        self.head = nnx.Linear(features, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(self.top(x), axis=(1, 2))
        return self.head(x)
