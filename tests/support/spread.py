"""MobileNetV2 rewritten, by hand, so that its channels have very different scales and it computes the same."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qcompiler.models.mobilenet import InvertedResidual, MobileNetV2


class _Capped(InvertedResidual):
    """The block whose clips at 6 are clips at a number per channel: min(x / s, 6 / s) = min(x, 6) / s."""

    def __call__(self, x):
        y = x
        if self.expand:
            y = jnp.minimum(nnx.relu(self.norm_expand(self.conv_expand(y))), self.cap_expand[...])
        y = jnp.minimum(nnx.relu(self.norm_depthwise(self.conv_depthwise(y))), self.cap_depthwise[...])
        y = self.norm_project(self.conv_project(y))
        return x + y if self.residual else y


def spread_channels(model: MobileNetV2, ratio: float, seed: int = 0) -> MobileNetV2:
    """A copy that computes the same, of which each layer's channels are divided by factors up to `ratio` apart.

    What reads the channels is multiplied by them: the filters of the depthwise and the narrowing convolutions, and the
    widening ones for the maps that residual blocks of one size share.
    """
    rng = np.random.default_rng(seed)
    model = nnx.clone(model)
    draw = lambda norm: np.float32(ratio) ** rng.permutation(np.linspace(-0.5, 0.5, norm.scale[...].size)).astype("f4")

    def divide(norm, factors):
        norm.scale[...] = norm.scale[...] / factors
        norm.bias[...] = norm.bias[...] / factors

    stream = np.float32(1)
    for block in model.blocks:
        hidden = stream
        block.cap_expand = nnx.Param(jnp.float32(6.0))
        if block.expand:
            block.conv_expand.kernel[...] = block.conv_expand.kernel[...] * stream[..., None]
            hidden = draw(block.norm_expand)
            divide(block.norm_expand, hidden)
            block.cap_expand = nnx.Param(jnp.asarray(6.0 / hidden))
        # A depthwise kernel's last dimension is what it reads and what it writes.
        block.conv_depthwise.kernel[...] = block.conv_depthwise.kernel[...] * hidden
        filtered = draw(block.norm_depthwise)
        divide(block.norm_depthwise, filtered)
        block.cap_depthwise = nnx.Param(jnp.asarray(6.0 / filtered))
        block.conv_project.kernel[...] = block.conv_project.kernel[...] * filtered[:, None]
        stream = stream if block.residual else draw(block.norm_project)
        divide(block.norm_project, stream)
        block.__class__ = _Capped
    model.conv_head.kernel[...] = model.conv_head.kernel[...] * stream[..., None]
    return model
