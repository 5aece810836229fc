"""Channels of very different scales in a network that computes the same as before: what weights per tensor fail at.

    x -> conv -> norm -> clip(0, 6) -> conv'      ->      x -> conv -> norm / s -> clip(0, 6 / s) -> s * conv'

Exact, because min(max(x / s, 0), 6 / s) = min(max(x, 0), 6) / s for s > 0. Nagel et al. 2019 ("Data-free quantization
through weight equalization and bias correction", arXiv:1906.04721) meet such ranges in a published MobileNetV2; ours,
trained here, has none of its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qcompiler.models.mobilenet import InvertedResidual, MobileNetV2


class ClippedResidual(InvertedResidual):
    """The block with a clip per channel, `top_expand` and `top_depthwise`, in place of each ReLU6."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        if self.expand:
            y = jnp.minimum(jax.nn.relu(self.norm_expand(self.conv_expand(y))), self.top_expand[...])
        y = jnp.minimum(jax.nn.relu(self.norm_depthwise(self.conv_depthwise(y))), self.top_depthwise[...])
        y = self.norm_project(self.conv_project(y))
        return x + y if self.residual else y


def spread_channels(model: MobileNetV2, ratio: float, seed: int = 0) -> MobileNetV2:
    """A copy whose layers' output channels are divided by factors up to `ratio` apart, and what reads them multiplied.

    Args:
      model: trained, in evaluation mode, depthwise convolutions computed by `jax.lax`.
      ratio: largest factor over smallest within a layer; the factors are evenly spaced in their logarithm. Maps that
        several residual blocks add to have one set of factors.
      seed: which channel gets which factor.
    """
    draw = np.random.default_rng(seed)
    model = nnx.clone(model)
    entering = np.float32(1)
    for block in model.blocks:
        block.__class__ = ClippedResidual
        hidden = entering
        if block.expand:
            _multiply(block.conv_expand, entering, dim=2)
            hidden = _factors(draw, block.norm_expand, ratio)
            _divide(block.norm_expand, hidden)
            block.top_expand = nnx.Param(jnp.asarray(6 / hidden))
        # A depthwise kernel's last dimension is both what it reads and what it writes.
        _multiply(block.conv_depthwise, hidden, dim=3)
        filtered = _factors(draw, block.norm_depthwise, ratio)
        _divide(block.norm_depthwise, filtered)
        block.top_depthwise = nnx.Param(jnp.asarray(6 / filtered))
        _multiply(block.conv_project, filtered, dim=2)
        leaving = entering if block.residual else _factors(draw, block.norm_project, ratio)
        _divide(block.norm_project, leaving)
        entering = leaving
    _multiply(model.conv_head, entering, dim=2)
    return model


def _factors(draw: np.random.Generator, norm: nnx.BatchNorm, ratio: float) -> np.ndarray:
    """`float32[channels]` of the norm."""
    exponents = np.linspace(-0.5, 0.5, norm.scale[...].size)
    return (ratio ** draw.permutation(exponents)).astype(np.float32)


def _divide(norm: nnx.BatchNorm, factors: np.ndarray) -> None:
    norm.scale[...] = norm.scale[...] / factors
    norm.bias[...] = norm.bias[...] / factors


def _multiply(conv: nnx.Conv, factors: np.ndarray, dim: int) -> None:
    shape = [-1 if d == dim else 1 for d in range(4)]
    conv.kernel[...] = conv.kernel[...] * np.reshape(factors, shape)
