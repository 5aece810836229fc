"""Pooling: maximum, minimum, average and sum; in windows, over the whole map, and to a given size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

MAP = (6, 7, 3)


@pytest.mark.parametrize("library", [nn.pooling, nnx], ids=["linen", "nnx"])
@pytest.mark.parametrize("padding", ["VALID", "SAME", ((1, 1), (0, 2))], ids=str)
@pytest.mark.parametrize("kind", ["max_pool", "min_pool", "avg_pool"])
def test_flax_pools(compiled, library, kind, padding):
    pool = getattr(library, kind)
    compiled(lambda x: pool(x, (3, 2), strides=(2, 1), padding=padding), MAP, data="negative")


@pytest.mark.parametrize("library", [nn, nnx], ids=["linen", "nnx"])
@pytest.mark.parametrize("padding", ["SAME", ((1, 1), (0, 1))], ids=str)
def test_average_without_padding_in_the_count(compiled, library, padding):
    """Border windows divide by fewer elements."""
    pool = lambda x: library.avg_pool(x, (3, 2), strides=(2, 1), padding=padding, count_include_pad=False)
    compiled(pool, MAP, data="negative")


@pytest.mark.parametrize("shape", [(9, 3), (4, 5, 4, 3)], ids=["1-D", "3-D"])
@pytest.mark.parametrize("kind", ["max_pool", "avg_pool"])
def test_other_ranks(compiled, kind, shape):
    pool = getattr(nn, kind)
    window = (2,) * (len(shape) - 1)
    compiled(lambda x: pool(x, window, strides=window), shape)


@pytest.mark.parametrize(("init", "operation"), [(-np.inf, lax.max), (np.inf, lax.min), (0.0, lax.add)])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_reduce_window(compiled, init, operation, layout):
    spatial = lambda n: (1, n, n, 1) if layout == "NHWC" else (1, 1, n, n)
    fun = lambda x: lax.reduce_window(x, np.float32(init), operation, spatial(3), spatial(2), "SAME")
    compiled(fun, MAP, data="negative")


def test_dilated_window(compiled):
    fun = lambda x: lax.reduce_window(
        x, -np.float32(np.inf), lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", window_dilation=(1, 2, 2, 1)
    )
    compiled(fun, MAP)


def test_sum_window_over_channels(compiled):
    """As local response normalization sums its neighbours."""
    fun = lambda x: lax.reduce_window(x, np.float32(0), lax.add, (1, 1, 1, 3), (1, 1, 1, 1), "SAME")
    compiled(fun, (4, 3, 8))


def test_cumulative_sum_of_windows_larger_than_the_map(compiled):
    fun = lambda x: nn.avg_pool(x, (9, 9), strides=(1, 1), padding="SAME")
    compiled(fun, (3, 4, 3))


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: jnp.mean(x, axis=(1, 2)),
        lambda x: jnp.mean(x, axis=(1, 2), keepdims=True),
        lambda x: x.mean(axis=1).mean(axis=1),
        lambda x: jnp.max(x, axis=(1, 2)),
        lambda x: jnp.min(x, axis=(1, 2)),
        lambda x: jnp.sum(x, axis=(1, 2)),
        lambda x: nn.avg_pool(x, (6, 7)),
        lambda x: nn.max_pool(x, (6, 7)),
        lambda x: jnp.concatenate([jnp.mean(x, axis=(1, 2)), jnp.max(x, axis=(1, 2))], axis=-1),
        lambda x: jnp.mean(x, axis=(1, 2)) + jnp.max(x, axis=(1, 2)),
        lambda x: jnp.einsum("bhwc->bc", x) / 42,
        lambda x: jnp.mean(x.reshape(x.shape[0], -1, x.shape[-1]), axis=1),
    ],
    ids=["mean", "keepdims", "mean-twice", "max", "min", "sum", "avg_pool", "max_pool", "cat", "add", "einsum", "flat"],
)
def test_global(compiled, pool):
    compiled(pool, MAP)


def adaptive(x, size, reduce):
    """torch's adaptive pooling: window i spans floor(i·n/size) to ceil((i+1)·n/size)."""
    bounds = lambda n: [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    rows = [
        jnp.stack([reduce(x[:, a:b, c:d], axis=(1, 2)) for c, d in bounds(x.shape[2])], axis=1)
        for a, b in bounds(x.shape[1])
    ]
    return jnp.stack(rows, axis=1)


@pytest.mark.parametrize("reduce", [jnp.mean, jnp.max], ids=["mean", "max"])
def test_adaptive(compiled, reduce):
    """Windows of several sizes that overlap."""
    compiled(lambda x: adaptive(x, 2, reduce), (5, 4, 3))


def test_adaptive_by_reshape(compiled):
    """Where the map divides evenly."""
    compiled(lambda x: x.reshape(x.shape[0], 3, 2, 2, 4, 3).mean(axis=(2, 4)), (6, 8, 3))


def test_pool_pyramid(compiled):
    """Spatial pyramid pooling (He et al. 2014, arXiv:1406.4729): pools of several sizes, flattened and joined."""

    def fun(x):
        pools = [nn.max_pool(x, (n, n), strides=(n, n)) for n in (1, 2, 4)]
        return jnp.concatenate([p.reshape(p.shape[0], -1) for p in pools], axis=1)

    compiled(fun, (4, 4, 3))


def test_blur_pool(compiled):
    """A fixed depthwise binomial filter with stride (Zhang 2019, arXiv:1904.11486)."""
    kernel = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16

    def fun(x):
        w = jnp.broadcast_to(jnp.asarray(kernel)[:, :, None, None], (3, 3, 1, x.shape[-1]))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        names = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            padded, w, (2, 2), "VALID", dimension_numbers=names, feature_group_count=x.shape[-1]
        )

    compiled(fun, (6, 8, 4))


def test_generalized_mean(compiled):
    """GeM pooling with exponent 3 (Radenović et al. 2018, arXiv:1711.02512), on positive values."""
    fun = lambda x: jnp.mean(jnp.maximum(x, 1e-6) ** 3, axis=(1, 2)) ** (1 / 3)
    # The cube spends two thirds of the bits of a value on its largest third.
    compiled(fun, MAP, data="positive", sqnr=25)


def test_softmax_free_attention_pool(compiled):
    """A weighted mean, by weights from a sigmoid of a linear score."""

    def fun(w, x):
        gate = jax.nn.sigmoid(x @ w)
        return jnp.mean(x * gate, axis=(1, 2))

    compiled(fun, MAP, params=np.float32([[0.5], [-1.0], [0.7]]))
