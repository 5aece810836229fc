"""Functions of one value: piecewise linear, as tables, per channel; alone, behind a product, and behind a join."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

CHANNELS = 5
SLOPES = np.float32([0.1, 0.25, 0.0, -0.5, 1.0])

FUNCTIONS = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "leaky_relu_by_where": lambda x: jnp.where(x > 0, x, 0.2 * x),
    "leaky_relu_by_max": lambda x: jnp.maximum(x, 0.2 * x),
    "leaky_relu_by_relus": lambda x: jax.nn.relu(x) - 0.2 * jax.nn.relu(-x),
    "prelu": lambda x: jnp.where(x >= 0, x, SLOPES * x),
    "prelu_by_parts": lambda x: jnp.maximum(x, 0) + SLOPES * jnp.minimum(x, 0),
    "hard_tanh": jax.nn.hard_tanh,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "hard_swish_by_hand": lambda x: x * jnp.clip(x + 3, 0, 6) / 6,
    "hard_shrink": lambda x: jnp.where(jnp.abs(x) > 0.5, x, 0.0),
    "soft_shrink": lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0),
    "threshold": lambda x: jnp.where(x > 0.3, x, -1.0),
    "silu": jax.nn.silu,
    "silu_by_hand": lambda x: x * jax.nn.sigmoid(x),
    "silu_by_exp": lambda x: x / (1 + jnp.exp(-x)),
    "swish_per_channel": lambda x: x * jax.nn.sigmoid(SLOPES * x),
    "gelu": jax.nn.gelu,
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": lambda x: jax.nn.celu(x, 0.5),
    "mish": jax.nn.mish,
    "mish_by_hand": lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x))),
    "softplus": jax.nn.softplus,
    "soft_sign": jax.nn.soft_sign,
    "squareplus": jax.nn.squareplus,
    "sigmoid": jax.nn.sigmoid,
    "log_sigmoid": jax.nn.log_sigmoid,
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "abs": jnp.abs,
    "square": jnp.square,
    "cube": lambda x: x**3,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "sparse_plus": jax.nn.sparse_plus,
    "gaussian": lambda x: jnp.exp(-x * x),
    "affine_per_channel": lambda x: x * SLOPES + 2 * SLOPES,
    "negate": jnp.negative,
    "clip": lambda x: jnp.clip(x, -0.5, 1.2),
    "clip_per_channel": lambda x: jnp.clip(x, -1 - jnp.abs(SLOPES), SLOPES + 0.5),
    "relu_n_per_channel": lambda x: jnp.minimum(jnp.maximum(x, 0), jnp.abs(SLOPES) + 0.5),
    "sign": jnp.sign,
    "round": jnp.round,
    "floor": jnp.floor,
    "sigmoid_per_channel": lambda x: jax.nn.sigmoid(SLOPES * x + 1),
    "tanh_of_affine_per_channel": lambda x: jnp.tanh(x * SLOPES + 0.5) * SLOPES,
}
#: A step of the index moves these by their whole range at one place: the error there is no rounding.
STEPS = ("sign", "round", "floor", "threshold", "hard_shrink")
#: Eight in a program: compiling takes longer than running.
SMOOTH = [name for name in FUNCTIONS if name not in STEPS]
GROUPS = [STEPS, *(SMOOTH[k : k + 8] for k in range(0, len(SMOOTH), 8))]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_alone(compiled, names):
    # An index of 12 bits resolves a range of 8 deviations in 1/512; slopes and curvature cost up to 20 dB of 60.
    fun = lambda x: {name: FUNCTIONS[name](x) for name in names}
    compiled(fun, (12, CHANNELS), sqnr=12 if names is STEPS else 35)


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_behind_a_product(compiled, names):
    weights = np.random.default_rng(0).normal(size=(len(names), 6, CHANNELS)).astype(np.float32) / 2

    def fun(weights, x):
        return {name: FUNCTIONS[name](x @ w + 0.1) for name, w in zip(names, weights, strict=True)}

    # Where a function is flat, the product's 38 dB become less of a smaller signal.
    compiled(fun, (8, 6), params=list(weights), sqnr=10 if names is STEPS else 27)


@pytest.mark.parametrize("name", ["leaky_relu", "prelu", "silu", "hard_swish", "elu", "relu6", "clip_per_channel"])
def test_behind_a_join(compiled, name):
    w = np.random.default_rng(0).normal(size=(CHANNELS, CHANNELS)).astype(np.float32) / 2
    compiled(lambda w, x: FUNCTIONS[name](x + x @ w), (8, CHANNELS), params=w)


class Net(nnx.Module):
    """nnx's PReLU; slopes per channel by its parameter's shape."""

    def __init__(self, slopes):
        self.dense = nnx.Linear(6, CHANNELS, rngs=nnx.Rngs(0))
        self.act = nnx.PReLU(slopes)

    def __call__(self, x):
        return self.act(self.dense(x))


@pytest.mark.parametrize("slopes", [0.25, SLOPES], ids=["shared", "per-channel"])
def test_nnx_prelu(compiled, slopes):
    compiled(Net(slopes), (8, 6))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.PReLU(negative_slope_init=0.25)(nn.Dense(CHANNELS)(x))


def test_linen_prelu(compiled):
    compiled(LinenNet(), (8, 6))


@pytest.mark.parametrize(
    "act",
    [lambda x, s: jnp.where(x >= 0, x, s * x), lambda x, s: jax.nn.silu(x * s + 0.5), lambda x, s: jnp.minimum(x, s)],
    ids=["prelu", "silu-of-affine", "clip"],
)
def test_channels_in_the_middle(compiled, act):
    """NCHW: slopes along the second dimension."""
    compiled(lambda x: act(x, SLOPES[:, None, None]), (CHANNELS, 4, 3))


def test_crelu(compiled):
    """Shang et al. 2016, arXiv:1603.05201."""
    compiled(lambda x: jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1), (8, CHANNELS))


def test_several_functions_of_one_value(compiled):
    compiled(lambda x: (jnp.tanh(x), jax.nn.sigmoid(x), -x), (8, CHANNELS))
