"""Blocks of layers rounded together: better than one after the other where errors can make up for each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

import qcompiler as qc
from qcompiler.errors import CalibrationError, RecipeError
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _blocks, round_weights

W3 = QuantType(3, symmetric=True, narrow_range=True)
LAYER = qc.AdaRound(iterations=300, batch=128)
BLOCK = qc.AdaRound(iterations=300, batch=128, unit="block")
X = (normal(256, 4, seed=3) @ normal(4, 16, seed=4)).astype(np.float32)
WEIGHTS = {name: normal(16, 16, seed=n, scale=0.25) for n, name in enumerate("sabcde")}


def _residual(p, x):
    """A stem, two residual blocks, and a head."""
    x = jax.nn.relu(x @ p["s"])
    x = jax.nn.relu(x + jax.nn.relu(x @ p["a"]) @ p["b"])
    x = jax.nn.relu(x + jax.nn.relu(x @ p["c"]) @ p["d"])
    return x @ p["e"]


def _programs(passes, fun, weights, x, recipe=None):
    found = passes(fun, weights, [x], recipe or qc.Recipe(weight=W3), until="insert_qdq")
    return found["assign_precision"], found["insert_qdq"]


def _layers(real, simulated, most=8):
    return [[e.params["id"] for e in block.layers] for block in _blocks.blocks_of(real, simulated, most)]
