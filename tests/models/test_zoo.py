"""Every convnet of the repository: its shapes, and what the compiler makes of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import qcompiler as qc
from qcompiler import models
from qcompiler.debug import census, fuzz
from qcompiler.debug.report import sqnr_db
from qcompiler.flax_adapter import source_of
from qcompiler.models import efficientnet, layers, resnet, statistics

SIZE = 16
KEY = jax.random.key(0)


def made(build):
    """Makes `build(rngs)` with realistic statistics, and what `qc.quantize` needs for it."""
    return lambda: statistics.realistic(build(nnx.Rngs(0)), KEY, SIZE, batch_size=16)


B0_IN_SMALL = (
    efficientnet.Stage(1, 16, 1, 1, 3),
    efficientnet.Stage(6, 24, 2, 2, 3),
    efficientnet.Stage(6, 40, 2, 2, 5),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One small model.

    Attributes:
      make: returns the model, and keyword arguments of `qc.quantize`.
      sqnr: least SQNR in dB on images that were not calibrated on. Errors of layers add up: about 37 dB for one layer
        of 8-bit operands, 10 log10(n) less after n of them in a row; residual sums and joins keep more.
      outputs: shape of the result for one image.
    """

    make: Any
    sqnr: float
    outputs: tuple[int, ...] = (10,)


ZOO = {
    "mlp": Entry(
        made(lambda r: nnx.Sequential(lambda x: x.reshape(x.shape[0], -1), models.MLP((768, 32, 10), rngs=r))), 28
    ),
    "resnet-basic": Entry(
        made(lambda r: models.ResNet(resnet.BasicBlock, (1, 1), width=16, classes=10, stem="small", rngs=r)), 22
    ),
    "resnet-bottleneck": Entry(
        made(lambda r: models.LinenResNet(resnet.LinenBottleneckBlock, (1, 1), width=8, classes=10)), 22
    ),
    "efficientnet": Entry(made(lambda r: models.EfficientNet(0.5, 1.0, classes=10, stages=B0_IN_SMALL, rngs=r)), 12),
    "densenet": Entry(made(lambda r: models.DenseNet((2, 3), growth=8, classes=10, stem="small")), 20),
    "vgg": Entry(made(lambda r: models.VGG((1, 2, 2), 8, (32,), 10)), 25),
    "vgg-norm": Entry(made(lambda r: models.VGG((1, 2), 8, (32,), 10, norm=True)), 22),
    "convnext": Entry(made(lambda r: models.ConvNeXt((1, 2), 16, classes=10, patch=2, rngs=r)), 22),
    **{
        f"unet-{method}": Entry(made(lambda r, up=method: models.UNet(2, 8, 3, upsampling=up)), 20, (SIZE, SIZE, 3))
        for method in ("transposed", "nearest", "linear")
    },
}


@pytest.fixture(scope="module")
def zoo():
    """name -> (model, keyword arguments), made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = ZOO[name].make()
        return made[name]

    return get


def images(count, seed):
    return np.asarray(statistics.smooth_images(jax.random.key(seed), (count, SIZE, SIZE, 3)))


#: Those that compile in a few seconds.
QUICK = {"mlp", "resnet-basic", "vgg-norm"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ZOO])
def test_integers_alone_near_float(zoo, name):
    model, options = zoo(name)
    qmodel = qc.quantize(model, [images(16, 1)], strict=True, io="int", **options)
    assert qmodel.report.islands == () and qmodel.report.qdq_pairs_after == 0
    assert census.float_avals(qmodel.program) == []
    # One byte a weight; scales, biases and tables are few in networks of useful size, but count in these.
    held = qc.quantize(model, [images(16, 1)], verify="off", **options)
    unseen = images(8, 2)
    expected = held.float(unseen)
    assert expected.shape == (8, *ZOO[name].outputs)
    found = sqnr_db([expected], [held(unseen)])
    assert found > ZOO[name].sqnr, f"{found:.1f} dB"


@pytest.mark.parametrize("name", ZOO)
def test_bit_exact(zoo, name):
    """Jitted integers against the reference, and every region against its simulation."""
    model, options = zoo(name)
    source = source_of(model, **options)
    x = images(2, 3)
    fuzz.check(fuzz.compile_stages(source.fun, source.weights, [x]), [x])


class Normed(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(4, (3, 3), name="conv")(x)
        return linen.BatchNorm(use_running_average=not train, momentum=0.97, name="norm")(x)


def test_linen_statistics_are_those_of_all_batches():
    module = Normed()
    before = module.init(KEY, jnp.zeros((1, SIZE, SIZE, 3)))
    after = statistics.calibrate_linen_batch_norm(module, before, KEY, SIZE, batches=2)
    image_key = jax.random.split(KEY)[1]
    batches = [statistics.smooth_images(jax.random.fold_in(image_key, i), (4, SIZE, SIZE, 3)) for i in range(2)]
    convolved = linen.Conv(4, (3, 3)).apply({"params": before["params"]["conv"]}, jnp.concatenate(batches))
    stats = after["batch_stats"]["norm"]
    # Solved from running statistics of momentum 0.97 in float32: 1e-7 / 0.03.
    np.testing.assert_allclose(stats["mean"], jnp.mean(convolved, (0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], jnp.var(convolved, (0, 1, 2)), rtol=1e-4)
    assert not np.array_equal(after["params"]["norm"]["scale"], before["params"]["norm"]["scale"])
    assert after["params"]["conv"]["kernel"] is before["params"]["conv"]["kernel"]


def test_statistics_need_a_norm():
    module = models.VGG((1,), 4, (), 2)
    variables = module.init(KEY, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="VGG has no BatchNorm"):
        statistics.calibrate_linen_batch_norm(module, variables, KEY, 8)
    with pytest.raises(ValueError, match="at least 1"):
        statistics.calibrate_linen_batch_norm(Normed(), {}, KEY, 8, batches=0)


def shapes_of(module, size=32):
    """What a linen module or its output is made of, without computing it."""
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    return jax.eval_shape(lambda x: module.init_with_output(KEY, x), image)


def count(params):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("module", "size", "parameters"),
    [
        # torchvision's counts of trainable parameters.
        (models.vgg(11), 224, 132_863_336),
        (models.vgg(16), 224, 138_357_544),
        (models.vgg(16, norm=True), 224, 138_357_544 + 4224),
        (models.DenseNet(), 64, 7_978_856),
    ],
    ids=["vgg11", "vgg16", "vgg16-norm", "densenet121"],
)
def test_linen_sizes_are_the_published_ones(module, size, parameters):
    assert count(shapes_of(module, size)[1]["params"]) == parameters


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: models.EfficientNet(rngs=nnx.Rngs(0)), 5_288_548),
        # Tiny has 28,589,128 with its norms: two values a channel at the stem, before every further stage, in every
        # block, and before the head.
        (lambda: models.ConvNeXt(rngs=nnx.Rngs(0)), 28_589_128 - 2 * (96 + 96 + 192 + 384 + 6624 + 768)),
    ],
    ids=["efficientnet-b0", "convnext-tiny"],
)
def test_nnx_sizes_are_the_published_ones(build, parameters):
    assert count(nnx.state(nnx.eval_shape(build), nnx.Param)) == parameters


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="stem"):
        shapes_of(models.DenseNet((1,), 4, stem="large"))
    with pytest.raises(ValueError, match="upsampling"):
        shapes_of(models.UNet(1, 4, upsampling="cubic"))
    with pytest.raises(ValueError, match="multiples of 8"):
        shapes_of(models.UNet(3, 4), size=20)
    with pytest.raises(ValueError, match="11, 13, 16, 19"):
        models.vgg(12)


def test_channels_scale_by_eights():
    assert [layers.scaled_channels(c, w) for c, w in ((32, 1.0), (16, 1.1), (40, 1.4), (24, 0.35), (3, 1))] == [
        32, 16, 56, 8, 8,
    ]  # fmt: skip
