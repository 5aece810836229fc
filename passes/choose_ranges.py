"""Chooses the ranges of what products read: by the error in their results, or with an estimator per value.

    x -> region[conv] -> y      notes["ranges"]: {"x": {"int8": (low, high)}} with the least |y(Q(x)) - y|²

The range that serves a tensor best is not the one that serves its readers best: a layer may not care about the channel
with the outliers, or about nothing else. Candidates are the estimator's range and fractions of what was seen, affine
and symmetric, coarse and then finer around the best. Where several layers read a value, their errors count relative to
their results' power. A range as good as the best whose zero point is 0 wins, as a centred distribution has, because its
zero points cost nothing.

Only values of 8 bits and fewer are looked at, since wider ones have bits to spare; values in bodies of loops keep the
estimator's range.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler import ops
from qcompiler.errors import QuantizationError
from qcompiler.ir import _compat, classes, replay
from qcompiler.ir.program import Program
from qcompiler.numerics import types
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _regions

#: Value id -> name of the type -> (low, high).
Ranges = Mapping[str, Mapping[str, tuple[float, float]]]

#: Of each end that was seen: what is tried first, and then around the best of that.
_COARSE, _FINE = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1), (1.25, 1.1, 1.0, 0.9, 0.8)
#: A chosen range must beat the estimator's by this, relative to its error, or the estimator's stands.
_WORTHWHILE = 0.01
#: Errors this close are equal, so that a zero point of 0 decides.
_EQUAL = 0.005


def choose_ranges(program: Program, chosen: Ranges) -> Program:
    """Notes `ranges`, which `insert_qdq` reads in place of the estimators; see `by_output_error`."""
    return program.note("ranges", {key: dict(by_type) for key, by_type in chosen.items()}).replace(
        stage="choose_ranges"
    )


def by_estimator(program: Program, estimator_of: Callable[[str, QuantType], Any]) -> Ranges:
    """The ranges by an estimator per value.

    Args:
      program: with types and stats.
      estimator_of: (value id, type) -> estimator, or None to leave the value to the recipe.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for read in _reads(program):
        estimator = estimator_of(read.region, read.type)
        stats = program.stats.get(read.owner)
        if estimator is None or stats is None or not stats.count:
            continue
        by_type = found.setdefault(read.owner, {})
        # Of several readers the first has the most to say: it is the nearest to where the value is made.
        by_type.setdefault(
            read.type.name, estimator.estimate(stats, read.type.qmin, read.type.qmax, read.type.symmetric)
        )
    return found


def by_output_error(
    program: Program,
    batches: Sequence[Sequence[Any]],
    estimator_for: Callable[[QuantType], Any],
    step: Callable[[], None] = lambda: None,
) -> Ranges:
    """The ranges that leave the least squared error in what products make of the values.

    Args:
      program: partitioned, with types and stats.
      batches: flat inputs of the program's shapes.
      estimator_for: type -> estimator, whose range is the first candidate.
      step: called behind every layer.
    """
    reads: dict[str, list[_Read]] = {}
    for read in _reads(program):
        stats = program.stats.get(read.owner)
        if stats is not None and stats.count:
            reads.setdefault(read.region, []).append(read)
    search = {
        (read.owner, read.type): _Search(program.stats[read.owner], read.type, estimator_for(read.type))
        for of_region in reads.values()
        for read in of_region
    }
    compiled: dict[tuple[str, int, int], Any] = {}

    def rule(eqn: _compat.JaxprEqn, values: list[Any]) -> None:
        for read in reads.get(eqn.params["id"], ()) if _regions.is_region(eqn) else ():
            found = search[read.owner, read.type]
            key = (read.region, read.operand, len(found.encodings))
            if key not in compiled:
                compiled[key] = jax.jit(_errors_of(eqn, read))
            found.errors += np.asarray(compiled[key](values, *found.ends()), np.float64)
            step()
        return None

    for refine in (False, True):
        for found in search.values():
            found.propose(refine)
        for batch in batches:
            replay.evaluate(program.jaxpr, [*program.weights.values(), *batch], rule, keep_source=False)
    chosen: dict[str, dict[str, tuple[float, float]]] = {}
    for (owner, qtype), found in search.items():
        encoding = found.best()
        if encoding is not None:
            chosen.setdefault(owner, {})[qtype.name] = _range_of(encoding)
    return chosen


@dataclasses.dataclass(frozen=True)
class _Read:
    """An operand of a product: its region, its position there, the value that owns its range, and its type."""

    region: str
    operand: int
    owner: str
    type: QuantType


def _reads(program: Program) -> list[_Read]:
    """The activations of products that have 8 bits or fewer, in program order."""
    found = []
    for eqn in program.eqns:
        chosen = program.notes["types"].get(eqn.params["id"]) if _regions.is_region(eqn) else None
        anchor = _regions.anchor_of(eqn) if chosen is not None else None
        if anchor is None or anchor.primitive.name not in classes.PRODUCT:
            continue
        for k, (var, role, qtype) in enumerate(zip(eqn.invars, eqn.params["roles"], chosen, strict=True)):
            if role == "activation" and isinstance(var, _compat.Var) and qtype.bits <= 8:
                found.append(_Read(eqn.params["id"], k, program.ids[_regions.behind_views(program, var)], qtype))
    return found


class _Search:
    """The encodings tried for one value, and what error each left.

    Attributes:
      encodings: the estimator's, which has to be beaten, then those tried now.
      errors: of each, summed over readers and batches.
    """

    def __init__(self, stats: Any, qtype: QuantType, estimator: Any) -> None:
        self.type = qtype
        self.low, self.high = min(stats.min, 0.0), max(stats.max, 0.0)
        self.encodings = [Encoding.of_stats(stats, qtype, estimator)]
        self.errors = np.zeros(1)

    def ends(self) -> list[np.ndarray]:
        """Scales and zero points."""
        return [np.stack([getattr(e, name) for e in self.encodings]) for name in ("scale", "zero_point")]

    def propose(self, refine: bool) -> None:
        """Fills `encodings` anew: coarsely, or around the best affine and the best centred one of before."""
        ends: list[tuple[float, float]] = []
        if refine:
            order = np.argsort(self.errors, kind="stable")
            affine = _range_of(self.encodings[order[0]])
            centred = next((self.encodings[k] for k in order if not np.any(self.encodings[k].zero_point)), None)
            tops = [] if centred is None else [float(centred.scale) * self.type.qmax * f for f in _FINE]
        else:
            affine = self.low, self.high
            tops = [f * max(-self.low, self.high) for f in _COARSE]
        if not self.type.symmetric:
            fractions = _FINE if refine else _COARSE
            sides = [
                [max(f * affine[0], self.low) for f in fractions],
                [min(f * affine[1], self.high) for f in fractions],
            ]
            ends += itertools.product(*(dict.fromkeys(side) for side in sides))
        # With as many steps below zero as the type has, the zero point is 0.
        ends += [(self.type.qmin * top / self.type.qmax, top) for top in tops]
        self.encodings = [self.encodings[0], *filter(None, (_encoding(low, high, self.type) for low, high in ends))]
        self.errors = np.zeros(len(self.encodings))

    def best(self) -> Encoding | None:
        """The encoding to take in place of the estimator's, or None where that stands."""
        if not np.isfinite(self.errors).all():
            return None
        near = self.errors <= (1 + _EQUAL) * self.errors.min()
        centred = [k for k, e in enumerate(self.encodings) if near[k] and not np.any(e.zero_point)]
        if not centred and self.errors.min() >= (1 - _WORTHWHILE) * self.errors[0]:
            return None
        best = min(centred or range(len(near)), key=self.errors.__getitem__)
        return self.encodings[best] if best else None


def _encoding(low: float, high: float, qtype: QuantType) -> Encoding | None:
    """The encoding of a range; None where float32 has no scale for it."""
    try:
        return Encoding(qtype, *types.scale_and_zero_point(low, high, qtype))
    except QuantizationError:
        return None


def _errors_of(eqn: _compat.JaxprEqn, read: _Read) -> Callable[..., Any]:
    """(operands, scales, zero points) -> squared error per candidate, relative to the power of the region's result."""

    def errors(values: list[Any], scales: Any, zeros: Any) -> Any:
        wide = lambda results: [lax.convert_element_type(y, jnp.float32) for y in results if classes.is_float(y)]
        exact = wide(_compat.bind(eqn, values))

        def one(ends: tuple[Any, Any]) -> Any:
            changed = list(values)
            changed[read.operand] = ops.fake_quantize(values[read.operand], *ends, read.type)
            pairs = zip(wide(_compat.bind(eqn, changed)), exact, strict=True)
            return sum(jnp.sum(jnp.square(y - y0)) for y, y0 in pairs)

        power = sum(jnp.sum(jnp.square(y)) for y in exact)
        return lax.map(one, (scales, zeros)) / jnp.maximum(power, np.float32(types.SMALLEST_NORMAL))

    return errors


def _range_of(encoding: Encoding) -> tuple[float, float]:
    """The reals that the encoding spans, as `types.scale_and_zero_point` takes them."""
    qtype, scale = encoding.type, float(encoding.scale)
    if qtype.symmetric:
        return -qtype.qmax * scale, qtype.qmax * scale
    zero = int(encoding.zero_point)
    return (qtype.qmin - zero) * scale, (qtype.qmax - zero) * scale
