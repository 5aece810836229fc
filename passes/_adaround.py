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
CHUNK = 100
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
    v = logit(steps - floor)
    count = rows.x.shape[1]
    batch = min(options.batch, count)
    nearest = (np.clip(np.rint(steps) + zero, qtype.qmin, qtype.qmax) - zero) * scale
    # Per row, so that the learned error is in units of it.
    unit = float(jnp.sum(rows.error(nearest))) / count
    starts = np.random.default_rng(options.seed).integers(0, count - batch + 1, options.iterations).astype(np.int32)
    arrays = (rows.x, list(rows.sides), rows.target)
    fixed = (jnp.asarray(floor + zero, jnp.float32), jnp.asarray(zero, jnp.float32), jnp.asarray(scale, jnp.float32))
    state = (v, adam(options).init(v))
    run = compiled(
        ("adaround", _text(rows, batch), qtype, key_of(options), count),
        lambda: _chunk_of(rows, batch, qtype, options),
        donate_argnums=0,
    )
    for start in range(0, options.iterations, CHUNK):
        chosen = starts[start : start + CHUNK]
        state, open_share = run(state, np.int32(start), jnp.asarray(chosen), arrays, fixed, np.float32(unit))
        if start >= options.warm_start * options.iterations and float(open_share) == 0.0:
            break
    up = np.asarray(rectified_sigmoid(state[0])) >= 0.5
    return np.clip(floor + up + zero, qtype.qmin, qtype.qmax).astype(np.int64)


def adam(options: AdaRound) -> optax.GradientTransformation:
    """What learns V."""
    return optax.adam(options.learning_rate)


def key_of(options: AdaRound) -> Any:
    """What of the options decides a step."""
    return options.iterations, options.learning_rate, options.regularization, options.beta, options.warm_start


def logit(h: np.ndarray) -> Any:
    """The V of which h is the rectified sigmoid (eq. 23), float32; h is 0 to 1."""
    inner = (h - _GAMMA) / (_ZETA - _GAMMA)
    return jnp.asarray(np.log(inner / (1 - inner)), jnp.float32)


def rectified_sigmoid(v: Any) -> Any:
    """h(V), eq. 23."""
    return jnp.clip(jax.nn.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA, 0.0, 1.0)


def soft_codes(v: Any, lowest: Any, qtype: QuantType) -> Any:
    """The codes that V stands for while it is learned, eq. 22; `lowest` is floor(W / s) + z."""
    return jnp.clip(lowest + rectified_sigmoid(v), qtype.qmin, qtype.qmax)


def indecision(h: Any, step: Any, options: AdaRound) -> Any:
    """The weighted term that drives h to 0 or 1 at a step, of its mean (eq. 24)."""
    warm = options.warm_start * options.iterations
    first, last = options.beta
    done = jnp.clip((step - warm) / max(options.iterations - warm, 1.0), 0.0, 1.0)
    beta = last + 0.5 * (first - last) * (1 + jnp.cos(done * np.float32(np.pi)))
    middle = jnp.mean(1 - jnp.abs(2 * h - 1) ** beta)
    return jnp.where(step < warm, 0.0, options.regularization) * middle


def undecided(h: Any) -> Any:
    """The share of h that is neither 0 nor 1 yet."""
    return jnp.mean((jnp.minimum(h, 1 - h) > _DECIDED).astype(jnp.float32))


def take_steps(loss: Any, state: Any, start: Any, chosen: Any, options: AdaRound) -> Any:
    """Some steps of Adam.

    Args:
      loss: (V, an element of `chosen`, number of the step) to a number; V may be a tree.
      state: V and the memory of Adam.
      start: number of the first step.
      chosen: what each step sees.
      options: of the method.

    Returns:
      The state behind them.
    """

    def step(carry: Any, at: Any) -> Any:
        v, memory, number = carry
        gradient = jax.grad(loss)(v, at, number.astype(jnp.float32))
        # Optax raises a number to the power of an integer, the count of steps.
        with jax.numpy_dtype_promotion("standard"):
            update, memory = adam(options).update(gradient, memory)
        return (optax.apply_updates(v, update), memory, number + 1), None

    (v, memory, _), _ = jax.lax.scan(step, (*state, start), chosen)
    return v, memory


def _text(rows: LayerRows, batch: int) -> str:
    """The epilogue on a batch of rows: alike in layers that compute the same."""
    groups, _, features = rows.target.shape
    product = jax.ShapeDtypeStruct((groups, batch, features), rows.x.dtype)
    return str(jax.make_jaxpr(lambda y, sides: rows.epilogue(y, sides))(product, list(_batch_of(rows.sides, 0, batch))))


def _batch_of(sides: Any, start: Any, batch: int) -> list[Any]:
    sliced = lambda s: jax.lax.dynamic_slice_in_dim(s, start, batch, axis=1)
    return [sliced(s) if jnp.ndim(s) and s.shape[1] > 1 else s for s in sides]


def _chunk_of(rows: LayerRows, batch: int, qtype: QuantType, options: AdaRound) -> Any:
    """The function that takes some steps: (state, first step, where batches start, rows, weight, unit) to state.

    It also gives the share of roundings that are not decided yet.
    """
    epilogue = rows.epilogue

    def loss(v: Any, at: Any, step: Any, arrays: Any, fixed: Any, unit: Any) -> Any:
        x, sides, target = arrays
        lowest, zero, scale = fixed
        soft = (soft_codes(v, lowest, qtype) - zero) * scale
        part = lambda array: jax.lax.dynamic_slice_in_dim(array, at, batch, axis=1)
        y = epilogue(jnp.matmul(part(x), soft.astype(x.dtype)), _batch_of(sides, at, batch))
        error = jnp.sum(jnp.square(y.astype(jnp.float32) - part(target).astype(jnp.float32))) / batch
        return error / unit + indecision(rectified_sigmoid(v), step, options)

    def run(state: Any, start: Any, starts: Any, arrays: Any, fixed: Any, unit: Any) -> Any:
        seen = lambda v, at, step: loss(v, at, step, arrays, fixed, unit)
        state = take_steps(seen, state, start, starts, options)
        return state, undecided(rectified_sigmoid(state[0]))

    return run
