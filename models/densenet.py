"""DenseNet (Huang et al. 2017, arXiv:1608.06993) as a linen module.

Each layer reads all maps before it, joined along channels; norm and activation stand before the convolutions, so that
one map is normalized anew by every layer that reads it.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from qcompiler.models.layers import linen_conv, linen_norm


def _norm_relu(x: jax.Array, train: bool, name: str) -> jax.Array:
    return nn.relu(linen_norm(train, name=name)(x))


class DenseLayer(nn.Module):
    """Maps `float[n, h, w, c]` to `float[n, h, w, c + growth]`: the input, and what a bottleneck makes of it."""

    growth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = linen_conv(4 * self.growth, 1, name="conv1")(_norm_relu(x, train, "norm1"))
        y = linen_conv(self.growth, 3, name="conv2")(_norm_relu(y, train, "norm2"))
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Maps `float[n, h, w, c]` to `float[n, h/2, w/2, c*compression]`: fewer channels, then averages of 2x2."""

    compression: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = linen_conv(int(x.shape[-1] * self.compression), 1, name="conv")(_norm_relu(x, train, "norm"))
        # `nn.avg_pool` divides by an integer, which strict dtype promotion refuses.
        return nn.pooling.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4


class DenseNet(nn.Module):
    """A DenseNet-BC of any width and depth; DenseNet-121 is `(6, 12, 24, 16)` and 32.

    Attributes:
      stage_sizes: layers in each dense block; the number of blocks is free too.
      growth: channels that a layer adds.
      compression: share of the channels that a transition keeps.
      classes: number of outputs.
      stem: "imagenet" (7x7 stride 2, then max pool) or "small" (3x3 stride 1, for images of about 8 to 64 pixels).

    `__call__(x, train=False)` maps images `float32[n, height, width, channels]` to logits `float32[n, classes]`; with
    `train=True` make `batch_stats` mutable.

    Raises:
      ValueError: on a call, if `stem` is neither "imagenet" nor "small".
    """

    stage_sizes: Sequence[int] = (6, 12, 24, 16)
    growth: int = 32
    compression: float = 0.5
    classes: int = 1000
    stem: Literal["imagenet", "small"] = "imagenet"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.stem not in ("imagenet", "small"):
            raise ValueError(f"stem must be 'imagenet' or 'small', got {self.stem!r}")
        if self.stem == "imagenet":
            x = _norm_relu(linen_conv(2 * self.growth, 7, 2, name="conv_stem")(x), train, "norm_stem")
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        else:
            x = linen_conv(2 * self.growth, 3, name="conv_stem")(x)
        for stage, layers in enumerate(self.stage_sizes):
            if stage > 0:
                x = Transition(self.compression, name=f"transition_{stage}")(x, train)
            for i in range(layers):
                x = DenseLayer(self.growth, name=f"block_{stage}_layer_{i}")(x, train)
        x = jnp.mean(_norm_relu(x, train, "norm_head"), axis=(1, 2))
        return nn.Dense(self.classes, name="head")(x)
