"""A small MobileNetV2 whose channels were spread by hand comes out of equalization as if they had not been."""

import copy
import warnings

import jax
import numpy as np
import pytest
from draws import normal
from flax import nnx

import qcompiler as qc
from benchmarks.spread import spread_channels
from qcompiler.debug.report import sqnr_db
from qcompiler.models.layers import conv, norm
from qcompiler.models.mobilenet import InvertedResidual

RATIO = 1e3


class _Small(nnx.Module):
    """A stem, two blocks of which the second is residual, a head."""

    def __init__(self, rngs):
        self.conv_stem, self.norm_stem = conv(3, 8, 3, 2, rngs=rngs), norm(8, rngs=rngs)
        self.blocks = nnx.List([InvertedResidual(8, 8, 1, 2, rngs=rngs), InvertedResidual(8, 8, 1, 3, rngs=rngs)])
        self.conv_head, self.norm_head = conv(8, 24, 1, rngs=rngs), norm(24, rngs=rngs)
        self.head = nnx.Linear(24, 5, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu6(self.norm_stem(self.conv_stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(jax.nn.relu6(self.norm_head(self.conv_head(x))).mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def models():
    """The network, after some steps of its norms' statistics, and its spread twin."""
    model = _Small(nnx.Rngs(0))
    step = nnx.jit(lambda model, x: model(x))
    for seed in range(50):
        step(model, normal(16, 12, 12, 3, seed=seed))
    model.eval()
    return model, spread_channels(model, RATIO)


X = normal(64, 12, 12, 3, seed=100)


def _quantized(model, equalize):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return qc.quantize(copy.deepcopy(model), [X], recipe=qc.Recipe(granularity="tensor", equalize=equalize))


def test_spreading_by_hand_keeps_the_function(models):
    # Factors round each weight once more, 2**-24.
    assert sqnr_db(*([np.asarray(m(X))] for m in models)) >= 100


@pytest.mark.slow
def test_spread_channels_recover(models):
    exact = [np.asarray(models[0](X))]
    plain, spread, collapsed = (_quantized(m, e) for m, e in ((models[0], True), (models[1], True), (models[1], False)))
    found = [sqnr_db(exact, [q(X)]) for q in (plain, spread, collapsed)]
    assert abs(found[0] - found[1]) <= 1.0, found
    # One int8 scale over channels 10**3 apart in every layer leaves next to nothing.
    assert found[2] <= 10.0 and found[0] >= found[2] + 15.0, found
    reports = [q.report for q in (plain, spread, collapsed)]
    # Bounds per channel, in place of 6, are in the same integer regions.
    assert all(r.islands == () and r.qdq_pairs_after == 0 for r in reports)
    assert len({r.qdq_pairs_before for r in reports}) == 1
