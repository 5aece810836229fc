"""MobileNetV2 (Sandler et al. 2018, table 2) as nnx and as linen modules.

Inverted residuals: a 1x1 convolution widens, a depthwise 3x3 convolution filters, a 1x1 convolution without activation
narrows again; maps of one size are added. Padding is symmetric and list indices in names are as in `models.resnet`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qcompiler.models.depthwise import Depthwise, conv_for
from qcompiler.models.layers import conv, linen_conv, linen_norm, norm, scaled_channels

Plan = Literal["imagenet", "small"]

#: Per stage of table 2: expansion factor t, channels c, blocks n.
_STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
#: Stride of the first block of each stage. The stem's is 2 in both plans: 32 times smaller maps in all, or 8 times.
_STRIDES = {"imagenet": (1, 2, 2, 2, 1, 2, 1), "small": (1, 2, 1, 2, 1, 1, 1)}
_STEM, _HEAD = 32, 1280


def _block_plan(width: float, plan: Plan) -> list[tuple[int, int, int]]:
    """(expansion, channels, stride) of each block.

    Raises:
      ValueError: no such plan, or a width that is not positive.
    """
    if plan not in _STRIDES:
        raise ValueError(f"plan must be one of {', '.join(_STRIDES)}, got {plan!r}")
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    return [
        (expansion, scaled_channels(channels, width), stride if i == 0 else 1)
        for (expansion, channels, count), stride in zip(_STAGES, _STRIDES[plan], strict=True)
        for i in range(count)
    ]


def _head_channels(width: float) -> int:
    """The last layer before pooling widens with `width`, but never narrows."""
    return scaled_channels(_HEAD, max(1.0, width))


# nnx


class InvertedResidual(nnx.Module):
    """The block of table 1; `expansion` 1 leaves the widening convolution out.

    Maps `float[n, h, w, channels_in]` to `float[n, h/stride, w/stride, channels]`.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        stride: int = 1,
        expansion: int = 6,
        *,
        depthwise: Depthwise = "conv",
        rngs: nnx.Rngs,
    ):
        hidden = channels_in * expansion
        self.expand = expansion != 1
        if self.expand:
            self.conv_expand = conv(channels_in, hidden, 1, rngs=rngs)
            self.norm_expand = norm(hidden, rngs=rngs)
        self.conv_depthwise = conv(
            hidden, hidden, 3, stride, feature_group_count=hidden, conv_general_dilated=conv_for(depthwise), rngs=rngs
        )
        self.norm_depthwise = norm(hidden, rngs=rngs)
        self.conv_project = conv(hidden, channels, 1, rngs=rngs)
        self.norm_project = norm(channels, rngs=rngs)
        self.residual = stride == 1 and channels_in == channels

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        if self.expand:
            y = jax.nn.relu6(self.norm_expand(self.conv_expand(y)))
        y = jax.nn.relu6(self.norm_depthwise(self.conv_depthwise(y)))
        y = self.norm_project(self.conv_project(y))
        return x + y if self.residual else y


class MobileNetV2(nnx.Module):
    """MobileNetV2 of any width, for images of any size; `model.eval()` switches BatchNorm to its running statistics.

    Args:
      width: factor on all channel counts, which are rounded to multiples of 8; the last layer's 1280 never shrink.
      classes: number of outputs.
      channels: channels of the input images.
      plan: "imagenet" (strides as in the paper, maps 32 times smaller at the end) or "small" (8 times, for images of
        about 32 to 64 pixels).
      depthwise: "conv", `jax.lax`'s grouped convolution, which the compiler reads; or "shifted", the same function to
        rounding, with the same weights, about ten times as fast to train on a CPU (`use_depthwise` changes it later).
      rngs: where the weights' randomness comes from.

    Calling it maps images `float32[n, height, width, channels]` to logits `float32[n, classes]`.

    Raises:
      ValueError: an unknown `plan` or `depthwise`, or a width that is not positive.
    """

    def __init__(
        self,
        width: float = 1.0,
        classes: int = 1000,
        *,
        channels: int = 3,
        plan: Plan = "imagenet",
        depthwise: Depthwise = "conv",
        rngs: nnx.Rngs,
    ):
        size = scaled_channels(_STEM, width)
        blocks_of = _block_plan(width, plan)
        self.conv_stem = conv(channels, size, 3, 2, rngs=rngs)
        self.norm_stem = norm(size, rngs=rngs)
        blocks = []
        for expansion, block_channels, stride in blocks_of:
            blocks.append(InvertedResidual(size, block_channels, stride, expansion, depthwise=depthwise, rngs=rngs))
            size = block_channels
        self.blocks = nnx.List(blocks)
        self.conv_head = conv(size, _head_channels(width), 1, rngs=rngs)
        self.norm_head = norm(_head_channels(width), rngs=rngs)
        self.head = nnx.Linear(_head_channels(width), classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu6(self.norm_stem(self.conv_stem(x)))
        for block in self.blocks:
            x = block(x)
        x = jax.nn.relu6(self.norm_head(self.conv_head(x)))
        x = jnp.mean(x, axis=(1, 2))
        return self.head(x)


def use_depthwise(model: nnx.Module, depthwise: Depthwise) -> None:
    """Changes how the depthwise convolutions of any nnx model are computed, in place; weights stay as they are.

    Raises:
      ValueError: no such way.
    """
    compute = conv_for(depthwise)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv) and module.feature_group_count == module.in_features > 1:
            module.conv_general_dilated = compute


def mobilenet_v2(width: float = 1.0, classes: int = 1000, *, rngs: nnx.Rngs, **options) -> MobileNetV2:
    """MobileNetV2 for 224x224 images unless `options`, keyword arguments of `MobileNetV2`, say otherwise."""
    return MobileNetV2(width, classes, rngs=rngs, **options)


# linen


class LinenInvertedResidual(nn.Module):
    """The linen twin of `InvertedResidual`."""

    channels: int
    stride: int = 1
    expansion: int = 6
    depthwise: Depthwise = "conv"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        hidden = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = linen_conv(hidden, 1, name="conv_expand")(y)
            y = jax.nn.relu6(linen_norm(train, name="norm_expand")(y))
        grouped = {"feature_group_count": hidden, "conv_general_dilated": conv_for(self.depthwise)}
        y = linen_conv(hidden, 3, self.stride, name="conv_depthwise", **grouped)(y)
        y = jax.nn.relu6(linen_norm(train, name="norm_depthwise")(y))
        y = linen_conv(self.channels, 1, name="conv_project")(y)
        y = linen_norm(train, name="norm_project")(y)
        return x + y if self.stride == 1 and x.shape[-1] == self.channels else y


class LinenMobileNetV2(nn.Module):
    """The linen twin of `MobileNetV2`: same fields, but for `channels`, which linen reads off the input.

    `__call__(x, train=False)` maps images `float32[n, height, width, channels]` to logits `float32[n, classes]`;
    with `train=True` make `batch_stats` mutable.

    Raises:
      ValueError: on a call, as `MobileNetV2` does.
    """

    width: float = 1.0
    classes: int = 1000
    plan: Plan = "imagenet"
    depthwise: Depthwise = "conv"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        blocks_of = _block_plan(self.width, self.plan)
        x = linen_conv(scaled_channels(_STEM, self.width), 3, 2, name="conv_stem")(x)
        x = jax.nn.relu6(linen_norm(train, name="norm_stem")(x))
        for i, (expansion, channels, stride) in enumerate(blocks_of):
            x = LinenInvertedResidual(channels, stride, expansion, self.depthwise, name=f"blocks_{i}")(x, train)
        x = linen_conv(_head_channels(self.width), 1, name="conv_head")(x)
        x = jax.nn.relu6(linen_norm(train, name="norm_head")(x))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, name="head")(x)


def linen_mobilenet_v2(width: float = 1.0, classes: int = 1000, **options) -> LinenMobileNetV2:
    """MobileNetV2 for 224x224 images unless `options`, fields of `LinenMobileNetV2`, say otherwise."""
    return LinenMobileNetV2(width, classes, **options)
