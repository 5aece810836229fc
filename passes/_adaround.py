"""AdaRound (Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization").

    W_q = s (clip(floor(W / s) + h(V) + z, qmin, qmax) - z)                    eq. 22
    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)                       eq. 23
    min over V of |f(W x) - f(W_q x^)|^2 + lambda sum(1 - |2 h(V) - 1|^beta)   eq. 21, 24, 25

V is learned by Adam on rows of the layer; beta falls from large to small, which at first leaves h free in the middle
and then drives it to 0 or 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qcompiler.numerics.types import QuantType
from qcompiler.passes._compiled import compiled
from qcompiler.passes._layer_rows import LayerRows
from qcompiler.rounding import AdaRound

#: Stretch of the sigmoid, so that 0 and 1 are reached.
_GAMMA, _ZETA = -0.1, 1.1
#: Steps between two looks at whether all is decided.
_CHUNK = 100
_DECIDED = 1e-3


def learned_codes(
    rows: LayerRows, weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, qtype: QuantType, options: AdaRound
) -> np.ndarray:
    """The codes that gradient descent finds.

    Args:
      rows: of the layer.
      weight: float [groups, depth, features].
      scale, zero: of each element, of that shape.
      qtype: of the codes.
      options: of the method.

    Returns:
      int64 [groups, depth, features], each the floor or the ceiling of `weight / scale`, plus the zero point, clipped.
    """
    steps = weight.astype(np.float32) * (np.float32(1) / scale)
    floor = np.floor(steps)
    # Where h(V) is the fraction, the soft weight is the float one.
    inner = (steps - floor - _GAMMA) / (_ZETA - _GAMMA)
    v = jnp.asarray(np.log(inner / (1 - inner)), jnp.float32)
    count = rows.x.shape[1]
    batch = min(options.batch, count)
    nearest = (np.clip(np.rint(steps) + zero, qtype.qmin, qtype.qmax) - zero) * scale
    # Per row, so that the learned error is in units of it.
    unit = float(jnp.sum(rows.error(nearest))) / count
    starts = np.random.default_rng(options.seed).integers(0, count - batch + 1, options.iterations).astype(np.int32)
    arrays = (rows.x, list(rows.sides), rows.target)
    fixed = (jnp.asarray(floor + zero, jnp.float32), jnp.asarray(zero, jnp.float32), jnp.asarray(scale, jnp.float32))
    state = (v, _adam(options).init(v))
    run = compiled(
        ("adaround", _text(rows, batch), qtype, _key(options), count),
        lambda: _chunk_of(rows, batch, qtype, options),
        donate_argnums=0,
    )
    for start in range(0, options.iterations, _CHUNK):
        chosen = starts[start : start + _CHUNK]
        state, open_share = run(state, np.int32(start), jnp.asarray(chosen), arrays, fixed, np.float32(unit))
        if start >= options.warm_start * options.iterations and float(open_share) == 0.0:
            break
    up = np.asarray(_rectified_sigmoid(state[0])) >= 0.5
    return np.clip(floor + up + zero, qtype.qmin, qtype.qmax).astype(np.int64)


def _adam(options: AdaRound) -> optax.GradientTransformation:
    return optax.adam(options.learning_rate)


def _key(options: AdaRound) -> Any:
    """What of the options decides a step."""
    return options.iterations, options.learning_rate, options.regularization, options.beta, options.warm_start


def _text(rows: LayerRows, batch: int) -> str:
    """The epilogue on a batch of rows: alike in layers that compute the same."""
    groups, _, features = rows.target.shape
    product = jax.ShapeDtypeStruct((groups, batch, features), rows.x.dtype)
    return str(jax.make_jaxpr(lambda y, sides: rows.epilogue(y, sides))(product, list(_batch_of(rows.sides, 0, batch))))


def _batch_of(sides: Any, start: Any, batch: int) -> list[Any]:
    sliced = lambda s: jax.lax.dynamic_slice_in_dim(s, start, batch, axis=1)
    return [sliced(s) if jnp.ndim(s) and s.shape[1] > 1 else s for s in sides]


def _rectified_sigmoid(v: Any) -> Any:
    return jnp.clip(jax.nn.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA, 0.0, 1.0)


def _chunk_of(rows: LayerRows, batch: int, qtype: QuantType, options: AdaRound) -> Any:
    """The function that takes some steps: (state, first step, where batches start, rows, weight, unit) to state.

    It also gives the share of roundings that are not decided yet.
    """
    epilogue, adam = rows.epilogue, _adam(options)
    first, last = options.beta
    warm = options.warm_start * options.iterations

    def loss(v: Any, at: Any, step: Any, arrays: Any, fixed: Any, unit: Any) -> Any:
        x, sides, target = arrays
        floor, zero, scale = fixed
        h = _rectified_sigmoid(v)
        soft = (jnp.clip(floor + h, qtype.qmin, qtype.qmax) - zero) * scale
        part = lambda array: jax.lax.dynamic_slice_in_dim(array, at, batch, axis=1)
        y = epilogue(jnp.matmul(part(x), soft.astype(x.dtype)), _batch_of(sides, at, batch))
        error = jnp.sum(jnp.square(y.astype(jnp.float32) - part(target).astype(jnp.float32))) / batch
        done = jnp.clip((step - warm) / max(options.iterations - warm, 1.0), 0.0, 1.0)
        beta = last + 0.5 * (first - last) * (1 + jnp.cos(done * np.float32(np.pi)))
        middle = jnp.mean(1 - jnp.abs(2 * h - 1) ** beta)
        return error / unit + jnp.where(step < warm, 0.0, options.regularization) * middle

    def run(state: Any, start: Any, starts: Any, arrays: Any, fixed: Any, unit: Any) -> Any:
        def step(carry: Any, at: Any) -> Any:
            v, memory, number = carry
            gradient = jax.grad(loss)(v, at, number.astype(jnp.float32), arrays, fixed, unit)
            # Optax raises a number to the power of an integer, the count of steps.
            with jax.numpy_dtype_promotion("standard"):
                update, memory = adam.update(gradient, memory)
            return (optax.apply_updates(v, update), memory, number + 1), None

        (v, memory, _), _ = jax.lax.scan(step, (*state, start), starts)
        h = _rectified_sigmoid(v)
        undecided = jnp.mean((jnp.minimum(h, 1 - h) > _DECIDED).astype(jnp.float32))
        return (v, memory), undecided

    return run
