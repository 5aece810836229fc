"""AdaRound of all weights of a block at once, for the block's result (BRECQ: Li et al. 2021, arXiv:2102.05426, eq. 10).

    min over V1, V2, .. of |B(x) - B_q(x^)|^2 + lambda sum(1 - |2 h(V) - 1|^beta)

B_q is the block with its QDQ pairs on what the rounded layers before it give, B the float one on what those give in
float. Between the layers, gradients pass activations' pairs straight through. It starts between the float weights and
the codes that layer after layer found; of nearest codes, those, and what is learned, the best on the samples is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler.numerics.types import QuantType
from qcompiler.passes import _adaround
from qcompiler.passes._blocks import Block
from qcompiler.passes._compiled import compiled
from qcompiler.passes._layerwise import Weight
from qcompiler.rounding import AdaRound

#: Bytes of what a block reads and gives on the samples, at most: of larger ones, fewer batches are seen.
_MOST_BYTES = 1 << 28
#: Where learning starts, from the float weight (0) to the codes that were there (1).
_TOWARDS_START = 0.5


def joint_codes(
    block: Block,
    weights: Sequence[Weight],
    start: Sequence[np.ndarray],
    known: Sequence[Any],
    values: Sequence[Sequence[Any]],
    targets: Sequence[Sequence[Any]],
    options: AdaRound,
) -> tuple[list[np.ndarray], tuple[float, float]]:
    """The codes of all layers, and the block's error with nearest ones and with these.

    Errors are sums over the samples of squared errors, each result's in units of its own energy in float.

    Args:
      block: of the simulation.
      weights: of its layers, not rounded.
      start: their codes so far, int64.
      known: arrays of `block.known`.
      values: per batch, `block.reads`.
      targets: per batch, the results in float.
      options: of the method.
    """
    size = sum(np.size(x) * 4 for x in (*values[0], *targets[0]))
    count = min(len(values), max(1, _MOST_BYTES // max(1, size)))
    stacked = lambda batches: [jnp.stack(column) for column in zip(*batches[:count], strict=True)]
    arrays = (list(map(jnp.asarray, known)), stacked(values), stacked(targets))
    energy = [max(float(jnp.sum(jnp.square(t.astype(jnp.float32)))), np.finfo(np.float32).tiny) for t in arrays[2]]
    arrays = (*arrays, [np.float32(1 / e) for e in energy])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype), arrays)
    one = lambda columns: [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in columns]
    reals = [jax.ShapeDtypeStruct(w.array.shape, w.array.dtype) for w in weights]
    key = (str(jax.make_jaxpr(block)(reals, shapes[0], one(shapes[1]))), count)

    measure = compiled(("block error", *key), lambda: lambda reals, at, arrays: _off(block, reals, at, arrays))
    total = lambda codes: _total(measure, weights, codes, arrays, count)
    nearest = [w.codes for w in weights]
    # Per batch, so that the learned error is in units of it, as that of single layers is.
    unit = total(nearest) / count
    candidates = [list(start), nearest]
    if unit > 0:
        candidates.append(_learned(block, weights, start, arrays, unit, count, key, options))
    errors = [total(codes) for codes in candidates]
    best = min(range(len(candidates)), key=lambda k: (errors[k] if np.isfinite(errors[k]) else np.inf, k))
    return candidates[best], (errors[1], errors[best])


def _off(block: Block, reals: Sequence[Any], at: Any, arrays: Any) -> Any:
    """The error of a batch with weights."""
    known, values, targets, scales = arrays
    pick = lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False)
    results = block(reals, known, [pick(x) for x in values])
    difference = lambda y, t: jnp.sum(jnp.square(y.astype(jnp.float32) - pick(t).astype(jnp.float32)))
    return sum(difference(y, t) * s for y, t, s in zip(results, targets, scales, strict=True))


def _total(measure: Any, weights: Sequence[Weight], codes: Sequence[np.ndarray], arrays: Any, count: int) -> float:
    reals = [w.at(c) for w, c in zip(weights, codes, strict=True)]
    return float(sum(np.float64(measure(reals, np.int32(at), arrays)) for at in range(count)))


def _learned(
    block: Block,
    weights: Sequence[Weight],
    start: Sequence[np.ndarray],
    arrays: Any,
    unit: float,
    count: int,
    key: Any,
    options: AdaRound,
) -> list[np.ndarray]:
    """What gradient descent finds; `unit` is the error of a batch that the loss is in units of."""
    qtypes = [w.type for w in weights]
    lowest, v = [], []
    for weight, codes in zip(weights, start, strict=True):
        steps = weight.array.astype(np.float32) * (np.float32(1) / weight.scale)
        floor = np.floor(steps)
        lowest.append(floor + weight.zero_point)
        up = np.clip(codes - lowest[-1], 0, 1)
        v.append(_adaround.logit(steps - floor + _TOWARDS_START * (up - (steps - floor))))
    fixed = [
        tuple(jnp.asarray(a, jnp.float32) for a in (low, w.zero_point, w.scale))
        for low, w in zip(lowest, weights, strict=True)
    ]
    run = compiled(
        ("block", *key, tuple(qtypes), _adaround.key_of(options)),
        lambda: _chunk_of(block, qtypes, [w.array.dtype for w in weights], options),
        donate_argnums=0,
    )
    state = (v, _adaround.adam(options).init(v))
    seen = np.random.default_rng(options.seed).integers(0, count, options.iterations).astype(np.int32)
    for first in range(0, options.iterations, _adaround.CHUNK):
        chosen = seen[first : first + _adaround.CHUNK]
        state, open_share = run(state, np.int32(first), jnp.asarray(chosen), arrays, fixed, np.float32(unit))
        if first >= options.warm_start * options.iterations and float(open_share) == 0.0:
            break
    ups = [np.asarray(_adaround.rectified_sigmoid(x)) >= 0.5 for x in state[0]]
    return [np.clip(low + up, t.qmin, t.qmax).astype(np.int64) for low, up, t in zip(lowest, ups, qtypes, strict=True)]


def _chunk_of(block: Block, qtypes: Sequence[QuantType], dtypes: Sequence[Any], options: AdaRound) -> Any:
    """The function that takes some steps: (state, first step, batches, arrays, weights, unit) to state.

    It also gives the share of roundings that are not decided yet.
    """

    def spread(v: Sequence[Any]) -> Any:
        return jnp.concatenate([_adaround.rectified_sigmoid(x).reshape(-1) for x in v])

    def run(state: Any, start: Any, chosen: Any, arrays: Any, fixed: Any, unit: Any) -> Any:
        def loss(v: Any, at: Any, step: Any) -> Any:
            reals = [
                ((_adaround.soft_codes(x, low, t) - zero) * scale).astype(dtype)
                for x, (low, zero, scale), t, dtype in zip(v, fixed, qtypes, dtypes, strict=True)
            ]
            return _off(block, reals, at, arrays) / unit + _adaround.indecision(spread(v), step, options)

        state = _adaround.take_steps(loss, state, start, chosen, options)
        return state, _adaround.undecided(spread(state[0]))

    return run
