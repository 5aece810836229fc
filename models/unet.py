"""U-Net (Ronneberger et al. 2015, arXiv:1505.04597) with padding and BatchNorm, as a linen module.

The coarse half is brought back to size either by transposed convolutions, as in the paper, or by interpolation and a
convolution, which leaves no checkerboards (Odena et al. 2016, doi:10.23915/distill.00003).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

Upsampling = Literal["transposed", "nearest", "linear"]


class DoubleConv(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU: `float[n, h, w, c]` to `float[n, h, w, channels]`."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(2):
            init = nn.initializers.he_normal()
            x = nn.Conv(self.channels, (3, 3), use_bias=False, kernel_init=init, name=f"conv_{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm_{i}")(x))
        return x


class Upsample(nn.Module):
    """Twice the height and width: `float[n, h, w, c]` to `float[n, 2h, 2w, channels]`."""

    channels: int
    method: Upsampling

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.method == "transposed":
            return nn.ConvTranspose(self.channels, (2, 2), strides=(2, 2), name="conv")(x)
        n, h, w, c = x.shape
        x = jax.image.resize(x, (n, 2 * h, 2 * w, c), self.method)
        return nn.Conv(self.channels, (1, 1), name="conv")(x)


class UNet(nn.Module):
    """A U-Net of any width and depth; the paper's is 4 and 64.

    Attributes:
      depth: how many times the map is halved; height and width must be multiples of `2**depth`.
      width: channels at full resolution; every halving doubles them.
      classes: channels of the output.
      upsampling: "transposed", "nearest" or "linear".

    `__call__(x, train=False)` maps images `float32[n, height, width, channels]` to logits per pixel
    `float32[n, height, width, classes]`; with `train=True` make `batch_stats` mutable.

    Raises:
      ValueError: on a call, for another `upsampling`, or an image whose size is no multiple of `2**depth`.
    """

    depth: int = 4
    width: int = 64
    classes: int = 2
    upsampling: Upsampling = "transposed"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.upsampling not in ("transposed", "nearest", "linear"):
            raise ValueError(f"upsampling must be 'transposed', 'nearest' or 'linear', got {self.upsampling!r}")
        if any(size % 2**self.depth for size in x.shape[1:3]):
            raise ValueError(f"height and width must be multiples of {2**self.depth}, got {x.shape[1]}x{x.shape[2]}")
        skips = []
        for level in range(self.depth):
            x = DoubleConv(self.width * 2**level, name=f"down_{level}")(x, train)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = DoubleConv(self.width * 2**self.depth, name="bottom")(x, train)
        for level in reversed(range(self.depth)):
            x = Upsample(self.width * 2**level, self.upsampling, name=f"upsample_{level}")(x)
            x = jnp.concatenate([skips[level], x], axis=-1)
            x = DoubleConv(self.width * 2**level, name=f"up_{level}")(x, train)
        return nn.Conv(self.classes, (1, 1), name="head")(x)
