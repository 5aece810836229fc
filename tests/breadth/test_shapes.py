"""Changes of shape: concatenation, padding, slices, splits, stacks, repeats, shuffles; no value is computed anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

MAP = (4, 6, 4)


def dense(x, n, seed=0):
    """A product behind the change of shape, so that not only inputs and results are tried."""
    w = np.random.default_rng([seed, n, x.shape[-1]]).normal(size=(x.shape[-1], n)) / np.sqrt(x.shape[-1])
    return x @ w.astype(np.float32)


VIEWS = {
    "flatten": lambda x: x.reshape(x.shape[0], -1),
    "ravel-one-sample": lambda x: jax.vmap(jnp.ravel)(x),
    "transpose": lambda x: x.transpose(0, 2, 1, 3),
    "swapaxes": lambda x: jnp.swapaxes(x, 1, 3),
    "moveaxis": lambda x: jnp.moveaxis(x, -1, 1),
    "nhwc-to-nchw-and-back": lambda x: jax.nn.relu(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
    "expand-and-squeeze": lambda x: jnp.squeeze(jnp.expand_dims(x, 2), 2) * 2,
    "slice": lambda x: x[:, 1:3, ::2],
    "slice-negative-step": lambda x: x[:, ::-1, :, ::-2],
    "slice-one": lambda x: x[:, 1, ..., -1],
    "ellipsis-none": lambda x: x[:, None, ..., None],
    "dynamic-slice-at-constants": lambda x: lax.dynamic_slice(x, (0, 1, 2, 0), (x.shape[0], 2, 3, 4)),
    "dynamic-slice-in-dim": lambda x: lax.dynamic_slice_in_dim(x, 1, 2, axis=1),
    "slice-in-dim": lambda x: lax.slice_in_dim(x, 1, 3, axis=1),
    "index-in-dim": lambda x: lax.index_in_dim(x, 1, axis=1),
    "take-constant": lambda x: jnp.take(x, jnp.array([2, 0, 2]), axis=2),
    "take-scalar": lambda x: jnp.take(x, 1, axis=2),
    "index-by-array": lambda x: x[:, :, np.array([3, 1])],
    "index-by-arrays": lambda x: x[:, np.array([0, 3, 1]), np.array([5, 2, 2])],
    "boolean-mask": lambda x: x[:, np.array([True, False, True, True])],
    "flip": lambda x: jnp.flip(x, axis=(1, 2)),
    "rot90": lambda x: jnp.rot90(x, axes=(1, 2)),
    "roll": lambda x: jnp.roll(x, (1, -2), axis=(1, 2)),
    "repeat": lambda x: jnp.repeat(x, 2, axis=1),
    "repeat-twice": lambda x: jnp.repeat(jnp.repeat(x, 2, axis=1), 3, axis=2),
    "repeat-array": lambda x: jnp.repeat(x, np.array([1, 0, 2, 1]), axis=1, total_repeat_length=4),
    "tile": lambda x: jnp.tile(x, (1, 2, 1, 3)),
    "broadcast": lambda x: jnp.broadcast_to(x[:, :, None], (x.shape[0], 4, 3, 6, 4)),
    "kronecker": lambda x: jnp.kron(x, np.ones((1, 2, 2, 1), np.float32)),
    "diagonal": lambda x: jnp.diagonal(x[:, :, :4], axis1=1, axis2=2),
    "einsum-transpose": lambda x: jnp.einsum("bhwc->bcwh", x),
}


GROUPS = [list(VIEWS)[k : k + 6] for k in range(0, len(VIEWS), 6)]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_views(compiled, names):
    """Of an input, and between two products."""

    def fun(x):
        between = lambda view, k: dense(view(jax.nn.relu(dense(x, 4, seed=k))), 5)
        return {name: (VIEWS[name](x), between(VIEWS[name], k)) for k, name in enumerate(names)}

    # Two products: roundings of two operands and two kernels.
    compiled(fun, MAP, sqnr=27)


def depth_to_space(x, n):
    """Pixel shuffle (Shi et al. 2016, arXiv:1609.05158)."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, n, n, c // n**2).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * n, w * n, c // n**2)


def space_to_depth(x, n):
    b, h, w, c = x.shape
    return x.reshape(b, h // n, n, w // n, n, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // n, w // n, c * n**2)


def space_to_depth_by_slices(x):
    """The focus layer of YOLOv5."""
    return jnp.concatenate([x[:, i::2, j::2] for i in range(2) for j in range(2)], axis=-1)


def channel_shuffle(x, groups):
    """ShuffleNet's (Zhang et al. 2018, arXiv:1707.01083)."""
    *outer, c = x.shape
    return jnp.swapaxes(x.reshape(*outer, groups, c // groups), -1, -2).reshape(*outer, c)


def patches(x):
    """3x3 patches as channels; lax spells it as a convolution with a kernel of zeros and ones."""
    return lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    "shuffle",
    [
        lambda x: depth_to_space(x, 2),
        lambda x: space_to_depth(x, 2),
        space_to_depth_by_slices,
        lambda x: channel_shuffle(x, 2),
        patches,
    ],
    ids=["depth-to-space", "space-to-depth", "space-to-depth-by-slices", "channel-shuffle", "patches"],
)
def test_shuffles(compiled, shuffle):
    compiled(lambda x: dense(shuffle(dense(x, 4)), 5), MAP, sqnr=26)


# Concatenation

JOINS = {
    "concatenate": lambda x, y: jnp.concatenate([x, y], axis=-1),
    "concatenate-rows": lambda x, y: jnp.concatenate([x, y, x[:, :1]], axis=1),
    "lax-concatenate": lambda x, y: lax.concatenate([x, y], 2),
    "hstack": lambda x, y: jnp.hstack([x, y]),
    "dstack": lambda x, y: jnp.dstack([x, y]),
    "append": lambda x, y: jnp.append(x, y, axis=-1),
    "stack": lambda x, y: jnp.stack([x, y], axis=1),
    "stack-last": lambda x, y: jnp.stack([x, y, x], axis=-1),
    "interleave": lambda x, y: jnp.stack([x, y], axis=-1).reshape(*x.shape[:-1], -1),
    "concatenate-with-constant": lambda x, y: jnp.concatenate([x, jnp.ones_like(y), y], axis=-1),
    "concatenate-with-zeros": lambda x, y: (
        jnp.concatenate([x, jnp.zeros_like(y[..., :2])], axis=-1) * 1 + y[:, :1, :1, :1]
    ),
}


@pytest.mark.parametrize("name", JOINS)
def test_concatenation(compiled, name):
    compiled(JOINS[name], MAP, MAP)


@pytest.mark.parametrize("small", [0.01, 1.0, 30.0])
def test_concatenation_of_ranges(compiled, small):
    """Operands of other ranges come to one scale; measured over both together, the larger decides."""
    compiled(lambda x, y: dense(jnp.concatenate([x, small * y], axis=-1), 5), MAP, MAP)


def test_concatenation_of_branches(compiled):
    """An Inception-like join of products, pooled and plain values."""

    def fun(x):
        branches = [jax.nn.relu(dense(x, 3)), dense(x, 2, seed=1), jnp.maximum(x, -1), jnp.tanh(x)]
        return dense(jnp.concatenate(branches, axis=-1), 5)

    compiled(fun, MAP, sqnr=28)


def test_concatenated_twice(compiled):
    """A DenseNet's nested joins: one value in two concatenations of other ranges."""

    def fun(x):
        a = jnp.concatenate([x, jax.nn.relu(dense(x, 2))], axis=-1)
        b = jnp.concatenate([a, 3 * dense(a, 2)], axis=-1)
        return dense(jax.nn.relu(b), 4), a

    compiled(fun, MAP, sqnr=28)


# Padding

PADS = {
    "zeros": dict(mode="constant"),
    "nonzero": dict(mode="constant", constant_values=1.5),
    "far-away": dict(mode="constant", constant_values=-20.0),
    "reflect": dict(mode="reflect"),
    "symmetric": dict(mode="symmetric"),
    "edge": dict(mode="edge"),
    "wrap": dict(mode="wrap"),
}


@pytest.mark.parametrize("name", PADS)
@pytest.mark.parametrize("data", ["positive", "normal"])
def test_pad(compiled, name, data):
    compiled(lambda x: jnp.pad(x, ((0, 0), (1, 2), (2, 1), (0, 0)), **PADS[name]), MAP, data=data)


def test_pad_before_a_convolution(compiled):
    """Explicit zeros, as ported networks pad; equal to the convolution's own padding."""
    w = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)

    def fun(w, x):
        x = jnp.pad(jax.nn.relu(x), ((0, 0), (1, 1), (0, 2), (0, 0)))
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    compiled(fun, MAP, params=w, data="positive")


@pytest.mark.parametrize("value", [-np.inf, np.finfo(np.float32).min, -1e9])
def test_pad_before_max_pool(compiled, value):
    """The padding never wins, and must not enter a range."""

    def fun(x):
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.float32(value))
        return lax.reduce_window(x, np.float32(-np.inf), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")

    compiled(fun, MAP, data="negative")


def test_lax_pad_with_interior_and_cropping(compiled):
    fun = lambda x: lax.pad(x, np.float32(0), ((0, 0, 0), (1, -1, 1), (0, 2, 2), (0, 0, 0)))
    compiled(fun, MAP, data="positive")


def test_pad_channels_of_a_shortcut(compiled):
    """ResNet's option A: a strided, zero-padded shortcut."""

    def fun(x):
        short = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
        return jax.nn.relu(dense(x[:, ::2, ::2], 8) + short)

    compiled(fun, MAP)


# Splitting


def halves(x):
    a, b = jnp.split(x, 2, axis=-1)
    return a - 2 * b


def thirds_by_lax(x):
    a, b, c = lax.split(x, (1, 2, 1), axis=3)
    return jnp.concatenate([c, b * 2, a], axis=-1)


def at_indices(x):
    a, b, c = jnp.split(x, [1, 4], axis=2)
    return a, dense(b, 3), c


def unstacked(x):
    rows = jnp.unstack(x, axis=1)
    return rows[0] + rows[3]


def array_split(x):
    a, b = jnp.array_split(x, 2, axis=2)
    return jnp.maximum(a, b)


def iterated(x):
    first, *_, last = x.transpose(1, 0, 2, 3)
    return first - last


@pytest.mark.parametrize("fun", [halves, thirds_by_lax, at_indices, unstacked, array_split, iterated])
def test_split(compiled, fun):
    compiled(fun, MAP)


@pytest.mark.parametrize(
    "fun",
    [
        lambda x, y: x.at[:, 1, 2:4].set(0.5) + y,
        lambda x, y: x.at[:, 1:3].set(y[:, :2]),
        lambda x, y: jax.lax.dynamic_update_slice(x, y[:, :2], (0, 1, 0, 0)),
        lambda x, y: x.at[:, 1:3].add(y[:, :2]),
    ],
    ids=["set-number", "set", "dynamic-update-slice", "add"],
)
def test_updates(compiled, fun):
    """Part of a value replaced, at positions known before."""
    compiled(fun, MAP, MAP)


MASK = (np.arange(6) % 2 == 0)[:, None]


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: x * MASK.astype(np.float32),
        lambda x: jnp.where(MASK, x, 0.0),
        lambda x: jnp.where(MASK, x, -x),
        lambda x: jnp.where(MASK, jnp.tanh(x), x[:, ::-1]),
    ],
    ids=["product", "zero", "negated", "two-values"],
)
def test_constant_mask(compiled, fun):
    compiled(fun, MAP)
