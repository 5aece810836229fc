"""ResNets (v1.5: the stride sits on the 3x3 convolution) as nnx and as linen modules.

Padding is symmetric, as in the published weights, so strided layers see the same windows as there. The linen modules
name their parts as the nnx ones do, with list indices joined by an underscore (`blocks/0/conv1` is `blocks_0/conv1`).
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qcompiler.models.layers import conv, linen_conv, linen_norm, norm

Stem = Literal["imagenet", "small"]

_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _block_plan(stage_sizes: Sequence[int], width: int) -> list[tuple[int, int]]:
    """(channels, stride) of each block: channels double and the map halves with every stage but the first."""
    return [
        (width * 2**stage, 2 if stage > 0 and i == 0 else 1)
        for stage, size in enumerate(stage_sizes)
        for i in range(size)
    ]


def _check_stem(stem: str) -> None:
    if stem not in ("imagenet", "small"):
        raise ValueError(f"stem must be 'imagenet' or 'small', got {stem!r}")


# nnx


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut.

    Maps `float[n, h, w, channels_in]` to `float[n, h/stride, w/stride, channels]`.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, channels_in: int, channels: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.conv1 = conv(channels_in, channels, 3, stride, rngs=rngs)
        self.norm1 = norm(channels, rngs=rngs)
        self.conv2 = conv(channels, channels, 3, rngs=rngs)
        self.norm2 = norm(channels, rngs=rngs)
        self.project = stride != 1 or channels_in != channels
        if self.project:
            self.conv_shortcut = conv(channels_in, channels, 1, stride, rngs=rngs)
            self.norm_shortcut = norm(channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.project:
            x = self.norm_shortcut(self.conv_shortcut(x))
        return jax.nn.relu(x + y)


class BottleneckBlock(nnx.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut.

    Maps `float[n, h, w, channels_in]` to `float[n, h/stride, w/stride, 4*channels]`.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, channels_in: int, channels: int, stride: int = 1, *, rngs: nnx.Rngs):
        channels_out = channels * self.expansion
        self.conv1 = conv(channels_in, channels, 1, rngs=rngs)
        self.norm1 = norm(channels, rngs=rngs)
        self.conv2 = conv(channels, channels, 3, stride, rngs=rngs)
        self.norm2 = norm(channels, rngs=rngs)
        self.conv3 = conv(channels, channels_out, 1, rngs=rngs)
        self.norm3 = norm(channels_out, rngs=rngs)
        self.project = stride != 1 or channels_in != channels_out
        if self.project:
            self.conv_shortcut = conv(channels_in, channels_out, 1, stride, rngs=rngs)
            self.norm_shortcut = norm(channels_out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = jax.nn.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.project:
            x = self.norm_shortcut(self.conv_shortcut(x))
        return jax.nn.relu(x + y)


class ResNet(nnx.Module):
    """A residual network of any depth and width; `model.eval()` switches BatchNorm to its running statistics.

    Args:
      block: `BasicBlock` or `BottleneckBlock`.
      stage_sizes: blocks in each stage; the number of stages is free too.
      width: channels of the first stage; every further stage doubles them.
      classes: number of outputs.
      channels: channels of the input images.
      stem: "imagenet" (7x7 stride 2, then max pool) or "small" (3x3 stride 1, for images of about 8 to 64 pixels).
      rngs: where the weights' randomness comes from.

    Calling it maps images `float32[n, height, width, channels]` to logits `float32[n, classes]`.

    Raises:
      ValueError: if `stem` is neither of the two.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[BottleneckBlock],
        stage_sizes: Sequence[int],
        *,
        width: int = 64,
        classes: int = 1000,
        channels: int = 3,
        stem: Stem = "imagenet",
        rngs: nnx.Rngs,
    ):
        _check_stem(stem)
        self.stem = stem
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv_stem = conv(channels, width, kernel, stride, rngs=rngs)
        self.norm_stem = norm(width, rngs=rngs)
        blocks = []
        size = width
        for block_channels, stride in _block_plan(stage_sizes, width):
            blocks.append(block(size, block_channels, stride, rngs=rngs))
            size = block_channels * block.expansion
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(size, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm_stem(self.conv_stem(x)))
        if self.stem == "imagenet":
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(x, axis=(1, 2))
        return self.head(x)


def resnet18(*, rngs: nnx.Rngs, **options) -> ResNet:
    """ResNet-18; `options` are the keyword arguments of `ResNet` (`classes`, `channels`, `width`, `stem`)."""
    return ResNet(BasicBlock, _STAGES[18], rngs=rngs, **options)


def resnet34(*, rngs: nnx.Rngs, **options) -> ResNet:
    """ResNet-34; options as for `resnet18`."""
    return ResNet(BasicBlock, _STAGES[34], rngs=rngs, **options)


def resnet50(*, rngs: nnx.Rngs, **options) -> ResNet:
    """ResNet-50; options as for `resnet18`."""
    return ResNet(BottleneckBlock, _STAGES[50], rngs=rngs, **options)


def resnet101(*, rngs: nnx.Rngs, **options) -> ResNet:
    """ResNet-101; options as for `resnet18`."""
    return ResNet(BottleneckBlock, _STAGES[101], rngs=rngs, **options)


def resnet152(*, rngs: nnx.Rngs, **options) -> ResNet:
    """ResNet-152; options as for `resnet18`."""
    return ResNet(BottleneckBlock, _STAGES[152], rngs=rngs, **options)


# linen


class LinenBasicBlock(nn.Module):
    """The linen twin of `BasicBlock`."""

    expansion: ClassVar[int] = 1

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = linen_conv(self.channels, 3, self.stride, name="conv1")(x)
        y = jax.nn.relu(linen_norm(train, name="norm1")(y))
        y = linen_conv(self.channels, 3, name="conv2")(y)
        y = linen_norm(train, name="norm2")(y)
        if x.shape != y.shape:
            x = linen_conv(self.channels, 1, self.stride, name="conv_shortcut")(x)
            x = linen_norm(train, name="norm_shortcut")(x)
        return jax.nn.relu(x + y)


class LinenBottleneckBlock(nn.Module):
    """The linen twin of `BottleneckBlock`."""

    expansion: ClassVar[int] = 4

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = linen_conv(self.channels, 1, name="conv1")(x)
        y = jax.nn.relu(linen_norm(train, name="norm1")(y))
        y = linen_conv(self.channels, 3, self.stride, name="conv2")(y)
        y = jax.nn.relu(linen_norm(train, name="norm2")(y))
        y = linen_conv(self.channels * self.expansion, 1, name="conv3")(y)
        y = linen_norm(train, name="norm3")(y)
        if x.shape != y.shape:
            x = linen_conv(self.channels * self.expansion, 1, self.stride, name="conv_shortcut")(x)
            x = linen_norm(train, name="norm_shortcut")(x)
        return jax.nn.relu(x + y)


class LinenResNet(nn.Module):
    """The linen twin of `ResNet`: same fields, but for `channels`, which linen reads off the input.

    `__call__(x, train=False)` maps images `float32[n, height, width, channels]` to logits `float32[n, classes]`;
    with `train=True` make `batch_stats` mutable.

    Raises:
      ValueError: on a call, if `stem` is neither "imagenet" nor "small".
    """

    block: type[LinenBasicBlock] | type[LinenBottleneckBlock]
    stage_sizes: Sequence[int]
    width: int = 64
    classes: int = 1000
    stem: Stem = "imagenet"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        _check_stem(self.stem)
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = linen_conv(self.width, kernel, stride, name="conv_stem")(x)
        x = jax.nn.relu(linen_norm(train, name="norm_stem")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for i, (channels, stride) in enumerate(_block_plan(self.stage_sizes, self.width)):
            x = self.block(channels, stride, name=f"blocks_{i}")(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, name="head")(x)


def linen_resnet18(**options) -> LinenResNet:
    """ResNet-18; `options` are the fields of `LinenResNet` (`classes`, `width`, `stem`)."""
    return LinenResNet(LinenBasicBlock, _STAGES[18], **options)


def linen_resnet34(**options) -> LinenResNet:
    """ResNet-34; options as for `linen_resnet18`."""
    return LinenResNet(LinenBasicBlock, _STAGES[34], **options)


def linen_resnet50(**options) -> LinenResNet:
    """ResNet-50; options as for `linen_resnet18`."""
    return LinenResNet(LinenBottleneckBlock, _STAGES[50], **options)


def linen_resnet101(**options) -> LinenResNet:
    """ResNet-101; options as for `linen_resnet18`."""
    return LinenResNet(LinenBottleneckBlock, _STAGES[101], **options)


def linen_resnet152(**options) -> LinenResNet:
    """ResNet-152; options as for `linen_resnet18`."""
    return LinenResNet(LinenBottleneckBlock, _STAGES[152], **options)
