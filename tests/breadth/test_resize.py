"""Upsampling and downsampling: nearest, linear and cubic, as people spell them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

MAP = (4, 6, 3)
UP, DOWN, UNEVEN = (8, 12), (2, 3), (7, 5)


@pytest.mark.parametrize("method", ["nearest", "linear", "bilinear", "cubic", "lanczos3"])
@pytest.mark.parametrize("size", [UP, DOWN, UNEVEN], ids=["up", "down", "uneven"])
def test_resize(compiled, method, size):
    compiled(lambda x: jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), method), MAP)


@pytest.mark.parametrize("antialias", [True, False])
def test_antialias(compiled, antialias):
    fun = lambda x: jax.image.resize(x, (x.shape[0], *DOWN, x.shape[-1]), "linear", antialias=antialias)
    compiled(fun, MAP)


def test_resize_of_one_dimension(compiled):
    """A dimension that keeps its size is left alone."""
    compiled(lambda x: jax.image.resize(x, (x.shape[0], 4, 12, 3), "linear"), MAP)


def test_scale_and_translate(compiled):
    """With corners aligned, as torch's `align_corners=True`."""

    def fun(x):
        scale = jnp.array([7 / 3, 11 / 5], jnp.float32)
        shift = (1 - scale) / 2
        return jax.image.scale_and_translate(
            x, (x.shape[0], 8, 12, 3), (1, 2), scale, shift, method="linear", antialias=False
        )

    compiled(fun, MAP)


def test_nearest_by_repeat(compiled):
    compiled(lambda x: x.repeat(2, axis=1).repeat(2, axis=2), MAP)


def test_nearest_by_broadcast(compiled):
    def fun(x):
        b, h, w, c = x.shape
        return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)

    compiled(fun, MAP)


def test_nearest_by_indices(compiled):
    def fun(x):
        rows, columns = jnp.arange(8) // 2, jnp.arange(12) // 2
        return x[:, rows][:, :, columns]

    compiled(fun, MAP)


def test_bilinear_by_transposed_convolution(compiled):
    """A fixed depthwise kernel with strides (Long et al. 2015, arXiv:1411.4038)."""
    line = np.float32([0.25, 0.75, 0.75, 0.25])
    kernel = np.broadcast_to(np.outer(line, line)[:, :, None, None], (4, 4, 1, 3))

    def fun(w, x):
        return lax.conv_general_dilated(
            x, w, (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2), feature_group_count=3,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    compiled(fun, MAP, params=kernel)


def test_bilinear_by_weights(compiled):
    """Interpolation written out: two rows, two weights."""

    def fun(x):
        place = np.linspace(0, 3, 7, dtype=np.float32)
        low = np.minimum(place.astype(np.int32), 2)
        part = (place - low)[:, None, None]
        return x[:, low] * (1 - part) + x[:, low + 1] * part

    compiled(fun, MAP)


@pytest.mark.parametrize("method", ["nearest", "linear"])
def test_upsampled_skip(compiled, method):
    """A U-Net's or feature pyramid's join of a coarse and a fine map."""

    def fun(x, y):
        y = jax.image.resize(y, (y.shape[0], *MAP), method)
        return jnp.concatenate([x, y], axis=-1), jax.nn.relu(x + y)

    compiled(fun, MAP, (2, 3, 3))


@pytest.mark.parametrize("method", ["nearest", "linear"])
def test_upsample_the_whole_map(compiled, method):
    """A global mean spread out again, as in DeepLab's image pooling (Chen et al. 2017, arXiv:1706.05587)."""

    def fun(x):
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        y = jax.image.resize(y, x.shape, method)
        return jnp.concatenate([x, y], axis=-1)

    compiled(fun, MAP)
