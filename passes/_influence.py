"""How much the outputs of a program depend on each number that its layers' products give.

    influence of y_i  =  E[(d outputs / d y_i)^2]

the diagonal of the output error's curvature (the Fisher information of a Gaussian around the outputs): an error e of a
product costs the outputs sum_i influence_i e_i^2, to second order. It tells rows that nobody reads, as those of padded
tokens, and large values that a norm will divide by themselves, from those that matter, whatever the model is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler.debug.progress import ProgressBar
from qcompiler.ir import _compat, classes, contraction, replay
from qcompiler.ir.program import Program
from qcompiler.passes import _layerwise, _regions

#: Estimates per batch, each by one pass back from random signs on the outputs.
_DRAWS = 4
#: Elements of a result that are kept per batch: of larger ones some rows.
_MOST_ELEMENTS = 1 << 19


@dataclasses.dataclass(frozen=True, eq=False)
class Influence:
    """Of one product's result.

    Attributes:
      channels: dimensions of the result that its weight has.
      drawn: int[rows], which rows, with channels last, are kept.
      weights: per batch float32[rows, channels], with a mean of 1 over all rows of a channel.
    """

    channels: tuple[int, ...]
    drawn: np.ndarray
    weights: list[np.ndarray]

    def mean(self, errors: Iterable[np.ndarray]) -> np.ndarray:
        """Per channel, the mean that leaves the outputs the least error: of the result's rank, one outside of channels.

        Args:
          errors: per batch, of the result's shape.
        """
        sums = []
        for error, weight in zip(errors, self.weights, strict=True):
            shape = [n if d in self.channels else 1 for d, n in enumerate(error.shape)]
            off = _rows(error, self.channels)[self.drawn].astype(np.float64)
            sums.append((off * weight).mean(axis=0).reshape(shape))
        return np.mean(sums, axis=0)


def influences(program: Program, batches: Sequence[Sequence[Any]], seed: int = 0) -> dict[str, Influence]:
    """The influence of every product with a weight: region -> `Influence`. Regions in bodies of loops are left out.

    Empty where the outputs have no derivatives: there are no real ones, a loop has no known length, or JAX knows none.

    Args:
      program: partitioned, in float.
      batches: flat inputs of its own shapes.
      seed: of signs and rows.
    """
    layers = [e for e in replay.live_equations(program.jaxpr) if _layerwise.is_weighted(e)]
    layers = [e for e in layers if not classes.is_empty(_regions.anchor_of(e))]
    reals = [k for k, v in enumerate(program.outvars) if classes.is_float(v)]
    if not layers or not reals:
        return {}
    channels = {e.params["id"]: _channels(e) for e in layers}
    shapes = {e.params["id"]: _regions.anchor_of(e).outvars[0].aval for e in layers}
    drawn = {region: _drawn(aval.shape, channels[region], seed) for region, aval in shapes.items()}

    def projected(taps: Mapping[str, Any], key: Any, args: Sequence[Any]) -> Any:
        outputs = replay.evaluate(
            program.jaxpr, args, lambda eqn, values: _tapped(eqn, values, taps), keep_source=False
        )
        total = jnp.float32(0)
        for k in reals:
            signs = jax.random.rademacher(jax.random.fold_in(key, k), outputs[k].shape, jnp.float32)
            total += jnp.sum(signs * jnp.where(jnp.isfinite(outputs[k]), outputs[k], 0).astype(jnp.float32))
        return total

    @jax.jit
    def squares(key: Any, weights: Sequence[Any], inputs: Sequence[Any]) -> dict[str, Any]:
        taps = {region: jnp.zeros(aval.shape, aval.dtype) for region, aval in shapes.items()}
        found = jax.grad(projected)(taps, key, [*weights, *inputs])
        return {r: jnp.square(_rows(g, channels[r])[drawn[r]].astype(jnp.float32)) for r, g in found.items()}

    summed: dict[str, list[np.ndarray]] = {region: [] for region in shapes}
    key, weights = jax.random.key(seed), list(map(jnp.asarray, program.weights.values()))
    with contextlib.closing(ProgressBar("influence on outputs", len(batches))) as bar:
        for number, batch in enumerate(batches):
            draws = []
            for draw in range(_DRAWS):
                try:
                    draws.append(squares(jax.random.fold_in(key, number * _DRAWS + draw), weights, list(batch)))
                except (NotImplementedError, ValueError):
                    # So JAX says that a primitive has no derivative, each in words of its own.
                    return {}
            for region, parts in summed.items():
                parts.append(np.sum([np.asarray(found[region]) for found in draws], axis=0))
            bar.update(number + 1)
    return {r: Influence(channels[r], drawn[r], _normalized(parts)) for r, parts in summed.items()}


def _channels(eqn: _compat.JaxprEqn) -> tuple[int, ...]:
    return tuple(sorted(contraction.weight_dims(_regions.anchor_of(eqn), _regions.weight_position(eqn))))


def _rows(array: Any, channels: tuple[int, ...]) -> Any:
    """A result as (rows, channels)."""
    rest = [d for d in range(array.ndim) if d not in channels]
    count = int(np.prod([array.shape[d] for d in channels], dtype=np.int64))
    return array.transpose(*rest, *channels).reshape(-1, count)


def _drawn(shape: tuple[int, ...], channels: tuple[int, ...], seed: int) -> np.ndarray:
    count = int(np.prod([shape[d] for d in channels], dtype=np.int64))
    rows = int(np.prod(shape, dtype=np.int64)) // max(1, count)
    kept = min(rows, max(1, _MOST_ELEMENTS // max(1, count)))
    return np.sort(np.random.default_rng(seed).permutation(rows)[:kept])


def _tapped(eqn: _compat.JaxprEqn, values: Sequence[Any], taps: Mapping[str, Any]) -> list[Any] | None:
    """A layer with a tap added to its product."""
    if not _regions.is_region(eqn) or eqn.params["id"] not in taps:
        return None
    anchor, tap = _regions.anchor_of(eqn), taps[eqn.params["id"]]
    add = lambda inner, given: [_compat.bind(inner, given)[0] + tap] if inner is anchor else None
    return replay.evaluate(eqn.params["body"], values, add, keep_source=False)


def _normalized(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """With a mean of 1 over all rows of a channel; 1 where nothing depends on it."""
    mean = np.mean([np.mean(part, axis=0) for part in parts], axis=0)
    known = np.isfinite(mean) & (mean > 0)
    return [np.where(known, part / np.where(known, mean, 1), 1).astype(np.float32) for part in parts]
