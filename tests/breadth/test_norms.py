"""BatchNorm in evaluation, as linen, nnx and hand-written code spell it, where it can be folded and where not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

MAP = (5, 6, 4)


class ConvNorm(nnx.Module):
    def __init__(self, kernel=(3, 3), order="conv-norm-act", **options):
        self.conv = nnx.Conv(4, 6, kernel, rngs=nnx.Rngs(0), **options)
        self.norm = nnx.BatchNorm(4 if order == "norm-act-conv" else 6, rngs=nnx.Rngs(1))
        self.order = order

    def __call__(self, x):
        if self.order == "norm-act-conv":
            return self.conv(jax.nn.relu(self.norm(x)))
        if self.order == "conv-act-norm":
            return self.norm(jax.nn.relu(self.conv(x)))
        return jax.nn.relu(self.norm(self.conv(x)))


class LinenConvNorm(nn.Module):
    order: str = "conv-norm-act"
    kernel: tuple = (3, 3)

    @nn.compact
    def __call__(self, x, train=False):
        conv, norm = nn.Conv(6, self.kernel), nn.BatchNorm(use_running_average=not train)
        if self.order == "norm-act-conv":
            return conv(nn.relu(norm(x)))
        if self.order == "conv-act-norm":
            return norm(nn.relu(conv(x)))
        return nn.relu(norm(conv(x)))


ORDERS = ["conv-norm-act", "conv-act-norm", "norm-act-conv"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("model", [ConvNorm, LinenConvNorm])
def test_batch_norm(compiled, model, order):
    found = compiled(model(order=order), MAP)
    # Behind its convolution a norm costs nothing; before, it is a region of its own.
    assert len(found.kinds()) == 1 + (order == "norm-act-conv")


@pytest.mark.parametrize(("shape", "kernel"), [((9, 4), (3,)), ((3, 4, 5, 4), (2, 3, 3)), ((4,), ())])
def test_other_ranks(compiled, shape, kernel):
    """Over sequences, volumes and rows."""
    if kernel:
        compiled(ConvNorm(kernel), shape)
        compiled(LinenConvNorm(kernel=kernel), shape)
    else:
        compiled(nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.BatchNorm(6, rngs=nnx.Rngs(1))), shape)


@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)])
def test_without_scale_or_bias(compiled, affine):
    scale, bias = affine

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3), use_bias=False)(x)
            return nn.relu(nn.BatchNorm(use_running_average=True, use_scale=scale, use_bias=bias)(x))

    assert compiled(Net(), MAP).kinds() == ["conv"]


def test_axis_one(compiled):
    """NCHW: statistics along the second dimension."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.lecun_normal(), (6, 4, 3, 3))
            y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
            return nn.relu(nn.BatchNorm(use_running_average=True, axis=1)(y))

    assert compiled(Net(), (4, 5, 6)).kinds() == ["conv"]


@pytest.mark.parametrize("layer", ["depthwise", "grouped", "transposed", "local"])
def test_behind_other_products(compiled, layer):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = {
                "depthwise": nn.Conv(4, (3, 3), feature_group_count=4),
                "grouped": nn.Conv(6, (3, 3), feature_group_count=2),
                "transposed": nn.ConvTranspose(6, (3, 3), strides=(2, 2)),
                "local": nn.ConvLocal(6, (3, 3)),
            }[layer](x)
            return nn.relu(nn.BatchNorm(use_running_average=True)(x))

    compiled(Net(), MAP, data="positive")


def statistics(n, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.uniform(low, high, n).astype(np.float32)
    return {"mean": draw(-1, 1), "var": draw(0.3, 2), "scale": draw(0.5, 1.5), "bias": draw(-1, 1)}


HAND_WRITTEN = {
    "textbook": lambda x, s: (x - s["mean"]) / jnp.sqrt(s["var"] + 1e-5) * s["scale"] + s["bias"],
    "scale-and-shift": lambda x, s: (
        x * (s["scale"] / jnp.sqrt(s["var"] + 1e-5)) + (s["bias"] - s["mean"] * s["scale"] / jnp.sqrt(s["var"] + 1e-5))
    ),
    "rsqrt-first": lambda x, s: s["scale"] * ((x - s["mean"]) * lax.rsqrt(s["var"] + 1e-5)) + s["bias"],
    "jax-nn-standardize": lambda x, s: (
        jax.nn.standardize(x, mean=s["mean"], variance=s["var"]) * s["scale"] + s["bias"]
    ),
    "negative-scale": lambda x, s: s["bias"] - (x - s["mean"]) * s["scale"],
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written(compiled, name):
    """Behind a convolution it vanishes into it; alone it is one affine region."""
    w = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype(np.float32) / 3
    norm = HAND_WRITTEN[name]

    def fun(p, x):
        y = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(norm(y, p["stats"]))

    assert compiled(fun, MAP, params={"w": w, "stats": statistics(6)}).kinds() == ["conv"]
    assert len(compiled(lambda p, x: norm(x, p), MAP, params=statistics(4)).kinds()) == 1


def test_norm_of_a_concatenation(compiled):
    """DenseNet's order: a norm over joined maps, which belongs to none of the products."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = jnp.concatenate([x, nn.relu(nn.Conv(3, (3, 3))(x))], axis=-1)
            y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
            return nn.Conv(5, (1, 1))(y)

    compiled(Net(), MAP)


def test_norm_before_unpadded_convolution(compiled):
    """Without padding and activation the norm folds forward; with padding zeros would be normalized too."""

    class Net(nn.Module):
        padding: str

        @nn.compact
        def __call__(self, x):
            return nn.Conv(6, (3, 3), padding=self.padding)(nn.BatchNorm(use_running_average=True)(x))

    compiled(Net("VALID"), MAP)
    compiled(Net("SAME"), MAP, data="positive")


def test_input_standardization(compiled):
    """The mean and deviation of ImageNet's channels, before the first convolution."""
    mean, deviation = np.float32([0.485, 0.456, 0.406, 0.4]), np.float32([0.229, 0.224, 0.225, 0.3])
    w = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype(np.float32)

    def fun(w, x):
        names = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated((x - mean) / deviation, w, (2, 2), "SAME", dimension_numbers=names)

    compiled(fun, MAP, params=w)
