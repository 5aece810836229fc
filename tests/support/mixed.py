"""A small net with all that layers can share, and the way from a function to a calibrated program."""

import functools

import jax
import jax.numpy as jnp
from draws import normal

import qcompiler as qc

STEM, Q, V = "stem/conv_general_dilated#0", "q/dot_general#0", "v/dot_general#0"
FIRST, SECOND, HEAD = "first/dot_general#0", "second/dot_general#0", "head/dot_general#0"
LAYERS = (STEM, Q, V, FIRST, SECOND, HEAD)

WEIGHTS = {
    "k": normal(3, 3, 2, 8, scale=0.3),
    "q": normal(8, 8, scale=0.4, seed=1),
    "v": normal(8, 8, scale=0.4, seed=2),
    "w": normal(8, 8, scale=0.4, seed=3),
    "head": normal(8, 5, scale=0.5, seed=4),
}
BATCHES = [normal(8, 6, 6, 2, seed=10 + k) for k in range(4)]


def small_net(p, x):
    """stem -> (q, v), which read one value -> w twice, a tied weight -> head."""
    with jax.named_scope("stem"):
        y = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jax.nn.relu(y)
    with jax.named_scope("q"):
        q = jax.nn.relu(y @ p["q"])
    with jax.named_scope("v"):
        v = jax.nn.relu(y @ p["v"])
    with jax.named_scope("first"):
        z = jax.nn.relu((q + v) @ p["w"])
    with jax.named_scope("second"):
        z = jax.nn.relu(z @ p["w"])
    with jax.named_scope("head"):
        return jnp.mean(z, axis=(1, 2)) @ p["head"]


def calibrated(fun, weights, batches, recipe=None):
    """The calibrated stage of a function."""
    return qc.trace(fun, batches[0], params=weights, recipe=recipe).calibrate(batches)


@functools.cache
def small():
    """`small_net`, calibrated."""
    return calibrated(small_net, WEIGHTS, BATCHES)
