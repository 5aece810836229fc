"""The models of the repository through the whole compiler."""

import jax
import numpy as np
import pytest
from flax import nnx

import qcompiler as qc
from qcompiler.debug import census
from qcompiler.debug.report import sqnr_db
from qcompiler.models import flavours, mlp, resnet, statistics


def _images(count, size, seed=1, channels=3):
    return np.asarray(statistics.smooth_images(jax.random.key(seed), (count, size, size, channels)))


@pytest.fixture(scope="module")
def small_resnet():
    """A calibrated nnx ResNet of four blocks, with images."""
    model = resnet.ResNet(resnet.BasicBlock, (2, 2), width=32, classes=10, rngs=nnx.Rngs(0))
    return statistics.calibrate_batch_norm(model, jax.random.key(0), 32), _images(12, 32)


def test_linen_and_nnx_resnets_give_the_same_integers(small_resnet):
    model, images = small_resnet
    linen = resnet.LinenResNet(resnet.LinenBasicBlock, (2, 2), width=32, classes=10)
    variables = flavours.linen_variables(model)
    one = qc.quantize(model, [images[:4]])
    other = qc.quantize(linen, [images[:4]], variables=variables, apply_kwargs={"train": False})
    np.testing.assert_array_equal(one(images[4:]), other(images[4:]))
    regions = [e.params["id"].replace("/", "_") for e in one._quantized.program.eqns if "id" in e.params]
    assert regions == [e.params["id"].replace("/", "_") for e in other._quantized.program.eqns if "id" in e.params]


def test_resnet_is_integers_alone(small_resnet):
    model, images = small_resnet
    qmodel = qc.quantize(model, [images[:4]], io="int", strict=True)
    assert qmodel.report.integer_only and qmodel.report.qdq_pairs_after == 0
    assert census.float_avals(qmodel.program) == []
    qmodel.check_integer_only()


def test_resnet_keeps_its_outputs(small_resnet):
    model, images = small_resnet
    qmodel = qc.quantize(model, [images[:4]])
    # Eight-bit operands in ten layers of random weights, whose errors add up; a wrong scale or zero point gives < 10
    # dB.
    assert sqnr_db([qmodel.float(images[4:])], [qmodel(images[4:])]) > 20
    # Integers and simulation round differently only at ties, but a step in an early layer moves later ones.
    assert sqnr_db([qmodel.simulate(images[4:])], [qmodel(images[4:])]) > 25


@pytest.mark.parametrize("linen", [False, True])
def test_mlp(linen):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 24)).astype(np.float32)
    if linen:
        model = mlp.LinenMLP((32, 32, 10))
        qmodel = qc.quantize(model, [x[:32]], variables=model.init(jax.random.key(0), x), strict=True)
    else:
        qmodel = qc.quantize(mlp.MLP((24, 32, 32, 10), rngs=nnx.Rngs(0)), [x[:32]], strict=True)
    assert qmodel.report.integer_only
    # int8 noise is 6.02 * 8 + 1.76 - 11 (a Gaussian's peak) = 39 dB per rounding; three layers of two roundings each.
    assert sqnr_db([qmodel.float(x[32:])], [qmodel(x[32:])]) > 28


@pytest.mark.slow
def test_resnet50_has_no_island_and_no_pair_left():
    model = statistics.calibrate_batch_norm(resnet.resnet50(rngs=nnx.Rngs(0)), jax.random.key(0), 64)
    qmodel = qc.quantize(model, [_images(2, 64)], strict=True)
    assert len(qmodel.report.islands) == 0
    assert qmodel.report.qdq_pairs_before > 100 and qmodel.report.qdq_pairs_after == 0
    products = {"conv_general_dilated", "dot_general"}
    operands = [v.aval.dtype for e in qmodel.program.eqns if e.primitive.name in products for v in e.invars]
    assert len(operands) == 2 * 54 and set(operands) == {np.dtype(np.int8)}
    assert qmodel.report.weight_bytes < 0.26 * qmodel.report.float_weight_bytes


@pytest.mark.slow
def test_digits_lose_at_most_one_image(trained_digits):
    model, data = trained_digits
    qmodel = qc.quantize(model, [data.calibration.images], strict=True)
    right = [
        int(np.sum(np.argmax(np.asarray(predict(data.test.images)), -1) == np.asarray(data.test.labels)))
        for predict in (qmodel.float, qmodel)
    ]
    assert right[0] > 0.97 * len(data.test.labels)
    assert right[0] - right[1] <= 1
