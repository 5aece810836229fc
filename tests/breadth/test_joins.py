"""Values that meet: residual sums with activations, gates, maxima, products, attention over channels, several heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

MAP = (4, 5, 6)


def dense(x, n, seed=0):
    w = np.random.default_rng([seed, n, x.shape[-1]]).normal(size=(x.shape[-1], n)) / np.sqrt(x.shape[-1])
    return x @ w.astype(np.float32)


def groups(table):
    """Six in a program: compiling takes longer than running."""
    return [list(table)[k : k + 6] for k in range(0, len(table), 6)]


def together(table, names):
    """One function of all, with kernels of their own, so that they share no product."""

    def fun(x, y):
        own = lambda k: lambda x, n, seed=0: dense(x, n, 10 * k + seed)
        return {name: table[name](own(k), x, y) for k, name in enumerate(names)}

    return fun


# Sums

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "hard_swish": jax.nn.hard_swish,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_residual(compiled, name):
    compiled(lambda x: ACTIVATIONS[name](x + dense(x, 6)), MAP)


@pytest.mark.parametrize("name", ["none", "relu", "silu"])
def test_sum_of_many(compiled, name):
    fun = lambda x, y, z: ACTIVATIONS[name](x + dense(y, 6) - 0.5 * z + dense(jax.nn.relu(x), 6))
    compiled(fun, MAP, MAP, MAP)


SUMS = {
    "python-sum": lambda dense, x, y: sum([x, y, dense(x, 6)]),
    "sum-of-stack": lambda dense, x, y: jnp.sum(jnp.stack([x, y]), axis=0),
    "mean-of-stack": lambda dense, x, y: jnp.mean(jnp.stack([x, y, -x]), axis=0),
    "mean-of-two": lambda dense, x, y: (x + y) / 2,
    "linear-interpolation": lambda dense, x, y: x + 0.25 * (y - x),
    "scaled-residual": lambda dense, x, y: x + 0.1 * dense(y, 6),
    "layer-scale": lambda dense, x, y: x + np.float32([0.1, 0.2, 0.3, -0.1, 1, 0]) * dense(y, 6),
    "pre-activation": lambda dense, x, y: x + dense(jax.nn.relu(dense(jax.nn.relu(y), 6)), 6),
    "reversible": lambda dense, x, y: (x + dense(y, 6), y + dense(x + dense(y, 6), 6)),
    "broadcast-row": lambda dense, x, y: x + y[:, :1],
    "broadcast-map": lambda dense, x, y: x + dense(jnp.mean(y, axis=(1, 2), keepdims=True), 6),
    "broadcast-vector": lambda dense, x, y: x + jnp.mean(y, axis=(1, 2))[:, None, None],
    "broadcast-channel": lambda dense, x, y: jax.nn.relu(x - dense(y, 1)),
    "outer-sum": lambda dense, x, y: x[:, :, :1] + y[:, :1],
    "subtract-mean": lambda dense, x, y: x - y.mean(axis=(1, 2), keepdims=True),
    "subtract-own-mean": lambda dense, x, y: x - x.mean(axis=-1, keepdims=True),
}


@pytest.mark.parametrize("names", groups(SUMS), ids=lambda names: names[0])
def test_sums(compiled, names):
    compiled(together(SUMS, names), MAP, MAP, sqnr=28)


# Products

PRODUCTS = {
    "product": lambda dense, x, y: x * y,
    "product-of-three": lambda dense, x, y: x * y * dense(x, 6),
    "product-then-relu": lambda dense, x, y: jax.nn.relu(x * y),
    "product-plus-residual": lambda dense, x, y: x * y + x,
    "gate": lambda dense, x, y: x * jax.nn.sigmoid(y),
    "gate-of-products": lambda dense, x, y: dense(x, 4) * jax.nn.sigmoid(dense(y, 4)),
    "tanh-gate": lambda dense, x, y: jnp.tanh(dense(x, 4)) * jax.nn.sigmoid(dense(y, 4)),
    "hard-gate": lambda dense, x, y: x * jax.nn.hard_sigmoid(y),
    "highway": lambda dense, x, y: jax.nn.sigmoid(y) * dense(x, 6) + (1 - jax.nn.sigmoid(y)) * x,
    "glu": lambda dense, x, y: jax.nn.glu(x),
    "geglu": lambda dense, x, y: (lambda a, b: a * jax.nn.gelu(b))(*jnp.split(dense(x, 8), 2, axis=-1)),
    "swiglu": lambda dense, x, y: dense(jax.nn.silu(dense(x, 8)) * dense(x, 8, 1), 4),
    "simple-gate": lambda dense, x, y: x[..., :3] * x[..., 3:],
    "channel-gate": lambda dense, x, y: x * jax.nn.sigmoid(jnp.mean(y, axis=(1, 2), keepdims=True)),
    "spatial-gate": lambda dense, x, y: x * jax.nn.sigmoid(dense(y, 1)),
    "outer-product": lambda dense, x, y: x[:, :, :1] * y[:, :1],
    "film": lambda dense, x, y: x * (1 + jnp.mean(y, (1, 2))[:, None, None]) + jnp.max(y, (1, 2))[:, None, None],
    "difference-squared": lambda dense, x, y: jnp.square(x - y),
    "self-product": lambda dense, x, y: x * jax.nn.relu(x),
    "quotient-by-one-of-it": lambda dense, x, y: x * (1 / (1 + jax.nn.softplus(y))),
    "einsum-hadamard": lambda dense, x, y: jnp.einsum("bhwc,bhwc->bhwc", x, y),
    "einsum-gate": lambda dense, x, y: jnp.einsum("bhwc,bc->bhwc", x, jax.nn.sigmoid(jnp.mean(y, (1, 2)))),
}


@pytest.mark.parametrize("names", groups(PRODUCTS), ids=lambda names: names[0])
def test_products(compiled, names):
    # Both operands carry the error of one rounding each, a product of three operands more; its rare peaks are clipped.
    compiled(together(PRODUCTS, names), MAP, MAP, sqnr=25)


# Maxima and selections

CHOICES = {
    "maximum": lambda dense, x, y: jnp.maximum(x, y),
    "minimum": lambda dense, x, y: jnp.minimum(x, dense(y, 6)),
    "maxout": lambda dense, x, y: jnp.maximum(dense(x, 4), dense(x, 4, 1)),
    "maxout-by-reshape": lambda dense, x, y: jnp.max(dense(x, 8).reshape(*x.shape[:-1], 4, 2), axis=-1),
    "max-of-stack": lambda dense, x, y: jnp.max(jnp.stack([x, y, 2 * x]), axis=0),
    "max-feature-map": lambda dense, x, y: jnp.maximum(*jnp.split(x, 2, axis=-1)),
    "maximum-broadcast": lambda dense, x, y: jnp.maximum(x, y[:, :1, :1]),
    "relu-of-maximum": lambda dense, x, y: jax.nn.relu6(jnp.maximum(x, y) + 0.5),
}


@pytest.mark.parametrize("names", groups(CHOICES), ids=lambda names: names[0])
def test_choices(compiled, names):
    compiled(together(CHOICES, names), MAP, MAP)


def test_maximum_by_selection(compiled):
    compiled(lambda x, y: jnp.where(x > y, x, y), MAP, MAP)


def test_selection_by_another_value(compiled):
    """Values whose sign a rounding decides go the other way: few, in a range of 12 bits."""
    compiled(lambda x, y: jnp.where(y > 0, x, 0.1 * x), MAP, MAP, sqnr=25)


def test_numbers_that_are_selected_are_scaled_too(compiled):
    """`nan_to_num` chooses zero and the largest numbers instead of some; the product with gains joins its region."""
    gains = np.linspace(0.5, 2, MAP[-1], dtype=np.float32)
    compiled(lambda x, y: jnp.nan_to_num(x + y) * gains, MAP, MAP)


# Squeeze and excite (Hu et al. 2018, arXiv:1709.01507)


class SqueezeExcite(nnx.Module):
    def __init__(self, gate, act):
        self.reduce = nnx.Conv(6, 3, (1, 1), rngs=nnx.Rngs(0))
        self.expand = nnx.Conv(3, 6, (1, 1), rngs=nnx.Rngs(1))
        self.gate, self.act = gate, act

    def __call__(self, x):
        s = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * self.gate(self.expand(self.act(self.reduce(s))))


class LinenSqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        s = nn.avg_pool(x, x.shape[1:3])
        s = nn.Dense(x.shape[-1])(nn.silu(nn.Dense(3)(s)))
        return x * nn.sigmoid(s)


@pytest.mark.parametrize(
    "block",
    [
        SqueezeExcite(jax.nn.sigmoid, jax.nn.relu),
        SqueezeExcite(jax.nn.hard_sigmoid, jax.nn.silu),
        LinenSqueezeExcite(),
        lambda x: x * jax.nn.sigmoid(dense(jax.nn.relu(dense(x.mean((1, 2)), 3)), 6))[:, None, None, :],
    ],
    ids=["nnx", "nnx-hard", "linen", "by-hand"],
)
def test_squeeze_excite(compiled, block):
    compiled(block, MAP)


def test_efficient_channel_attention(compiled):
    """ECA (Wang et al. 2020, arXiv:1910.03151): a 1-D convolution over channels."""

    def fun(w, x):
        s = jnp.mean(x, axis=(1, 2))[..., None]
        s = jax.lax.conv_general_dilated(s, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return x * jax.nn.sigmoid(s[..., 0])[:, None, None]

    compiled(fun, MAP, params=np.float32([0.5, -1, 0.7]).reshape(3, 1, 1))


def test_spatial_attention(compiled):
    """CBAM's (Woo et al. 2018, arXiv:1807.06521): mean and maximum over channels."""

    def fun(w, x):
        s = jnp.concatenate([x.mean(-1, keepdims=True), x.max(-1, keepdims=True)], axis=-1)
        s = jax.lax.conv_general_dilated(s, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x * jax.nn.sigmoid(s)

    compiled(fun, MAP, params=np.random.default_rng(0).normal(size=(3, 3, 2, 1)).astype(np.float32))


# What inference leaves out, and what it returns


class Dropped(nnx.Module):
    """Dropout and stochastic depth (Huang et al. 2016, arXiv:1603.09382), both off in evaluation."""

    def __init__(self):
        self.dense = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.depth = nnx.Dropout(0.2, broadcast_dims=(1, 2, 3), rngs=nnx.Rngs(2))

    def __call__(self, x):
        return x + self.depth(self.dropout(jax.nn.relu(self.dense(x))))


class LinenDropped(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(6)(x)))
        return x + nn.Dropout(0.2, broadcast_dims=(1, 2, 3), deterministic=not train)(y)


@pytest.mark.parametrize("model", [Dropped(), LinenDropped()], ids=["nnx", "linen"])
def test_dropout_in_evaluation(compiled, model):
    compiled(model, MAP)


def test_scaled_branch_of_stochastic_depth(compiled):
    """The original formulation scales by the survival probability at test time."""
    compiled(lambda x: jax.nn.relu(x + 0.8 * dense(x, 6)), MAP)


def test_heads(compiled):
    """A dictionary of outputs from one trunk."""

    def fun(x):
        h = jax.nn.relu(dense(x, 6))
        pooled = h.mean(axis=(1, 2))
        return {
            "classes": dense(pooled, 4),
            "box": jax.nn.sigmoid(dense(pooled, 4, 1)),
            "mask": dense(h, 2),
            "features": [h, pooled],
        }

    compiled(fun, MAP, sqnr=28)


def test_one_value_returned_twice(compiled):
    compiled(lambda x: (lambda y: (y, y, jax.nn.relu(y)))(dense(x, 4)), MAP)


def test_shared_layer(compiled):
    """One kernel on two inputs: a Siamese network's distance."""
    compiled(lambda w, x, y: jnp.abs(x @ w - y @ w), MAP, MAP, params=np.eye(6, 5, dtype=np.float32) + 0.2)
