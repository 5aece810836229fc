"""What several convnets are made of: a convolution without bias, the BatchNorm behind it, channels scaled by a width.

Padding is symmetric, so strided layers see the same windows as in most published weights.
"""

from typing import Any

import jax
from flax import linen as nn
from flax import nnx


def _geometry(kernel: int, stride: int) -> dict[str, Any]:
    """Keyword arguments that a convolution of either flavour takes."""
    return {
        "kernel_size": (kernel, kernel),
        "strides": (stride, stride),
        "padding": kernel // 2,
        "use_bias": False,
        "kernel_init": jax.nn.initializers.he_normal(),
    }


def conv(channels_in: int, channels: int, kernel: int, stride: int = 1, *, rngs: nnx.Rngs, **options: Any) -> nnx.Conv:
    """A square 2-D convolution; `options` are others of `nnx.Conv`."""
    return nnx.Conv(channels_in, channels, **_geometry(kernel, stride), rngs=rngs, **options)


def norm(channels: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """BatchNorm over all dimensions but the last."""
    return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)


def linen_conv(channels: int, kernel: int, stride: int = 1, *, name: str, **options: Any) -> nn.Conv:
    """The linen twin of `conv`."""
    return nn.Conv(channels, **_geometry(kernel, stride), name=name, **options)


def linen_norm(train: bool, *, name: str) -> nn.BatchNorm:
    """The linen twin of `norm`; `train`: normalize by the batch's own statistics."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


def scaled_channels(channels: int, width: float, divisor: int = 8) -> int:
    """`channels * width` as the nearest multiple of `divisor` at most a tenth below, as MobileNet's authors have it."""
    target = channels * width
    rounded = max(divisor, int(target + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * target else rounded
