"""What the tests of bad input share: a model, and the expectation that an error is documented and says enough."""

import os
import sys

import jax
import numpy as np
import pytest

import qcompiler as qc


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(5, 8, seed=1)
PARAMS = {"w": normal(8, 16, seed=2), "b": normal(16, seed=3), "v": normal(16, 4, seed=4)}


def mlp(params, x):
    with jax.named_scope("first"):
        h = jax.nn.relu(x @ params["w"] + params["b"])  # first layer
    with jax.named_scope("second"):
        return h @ params["v"]  # second layer


def at(mark):
    """`FILE:LINE `, of the line that ends with the mark, in the caller's file or in this one."""
    for path in (sys._getframe(1).f_code.co_filename, __file__):
        with open(path) as file:
            lines = file.read().splitlines()
        numbers = [k for k, text in enumerate(lines, 1) if text.endswith(f"  # {mark}")]
        if numbers:
            (number,) = numbers
            return f"{os.path.basename(path)}:{number} "
    raise ValueError(f"no line is marked {mark!r}")


def quantize(fun=mlp, batches=None, **options):
    return qc.quantize(fun, [X] if batches is None else batches, **{"params": PARAMS, **options})


def refused(error, *parts):
    """Expects exactly this documented error, with all parts in its message."""

    class Expectation:
        def __enter__(self):
            self.inner = pytest.raises(qc.QuantizationError)
            self.caught = self.inner.__enter__()
            return self.caught

        def __exit__(self, *details):
            handled = self.inner.__exit__(*details)
            assert type(self.caught.value) is error, f"{type(self.caught.value).__name__}: {self.caught.value}"
            for part in parts:
                assert part in str(self.caught.value), f"{part!r} is not in: {self.caught.value}"
            return handled

    return Expectation()


def with_value(array, value):
    changed = np.array(array)
    changed.flat[3] = value
    return changed
