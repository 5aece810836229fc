"""What a layer takes on this machine: its region alone, compiled for each candidate, timed in turn.

Layers of one shape are timed once per process. A layer alone reads and writes memory that inside of a program may stay
in caches, and what XLA fuses across layers is not seen: the sum over layers is a measure to compare assignments by.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler.backends import lax_int
from qcompiler.candidates import Candidate
from qcompiler.debug import timing
from qcompiler.debug.progress import ProgressBar
from qcompiler.ir import _compat
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, Signature, build
from qcompiler.numerics import fixed_point
from qcompiler.numerics.types import ACTIVATION
from qcompiler.passes import _regions, assign_precision, fold_zero_points, fuse, insert_qdq
from qcompiler.precision.layers import Layer

#: How often every contender is timed.
ROUNDS = 15
#: Elements of the array whose conversion is timed.
_CONVERTED = 1 << 20

#: What was timed in this process: shape of the region and candidate -> seconds of each round.
_known: dict[Hashable, list[float]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Latencies:
    """Measured times of layers.

    Attributes:
      table: layer id -> candidate -> ms per call of the model.
      ms_per_element: of changing a real into an integer, or back.
      noise: median over what was timed of the median relative deviation from its median.
    """

    table: Mapping[str, Mapping[str, float]]
    ms_per_element: float
    noise: float

    def ms(self, layer: Layer, candidate: str) -> float:
        """Milliseconds of a layer in all its steps."""
        return self.table[layer.id][candidate]

    def conversion_ms(self, elements: int) -> float:
        """Milliseconds of converting so many elements."""
        return self.ms_per_element * elements


def measure(
    layers: Sequence[Layer], candidates: Mapping[str, Candidate], recipe: Any, rounds: int = ROUNDS
) -> Latencies:
    """Times every layer as every candidate.

    Args:
      layers: of a calibrated program.
      candidates: by name.
      recipe: whose types hold besides, and whose range estimators.
      rounds: in which all candidates of a layer take their turn.
    """
    bar = ProgressBar("latency", len(layers))
    found: dict[str, dict[str, float]] = {}
    spread: list[float] = []
    plain = dataclasses.replace(recipe, rules=(), encodings={}, supergroups=(), precision=None)
    try:
        for number, layer in enumerate(layers, 1):
            keys = {name: (_shape_of(layer), candidate) for name, candidate in candidates.items()}
            if lacking := [name for name, key in keys.items() if key not in _known]:
                calls = {name: _call(alone(layer, candidates[name], plain)) for name in lacking}
                _known.update({keys[name]: times for name, times in _timed(calls, rounds).items()})
            found[layer.id] = {name: 1e3 * layer.steps * _median(_known[key]) for name, key in keys.items()}
            spread += [_spread(_known[key]) for key in keys.values()]
            bar.update(number)
    finally:
        bar.close()
    return Latencies(found, 1e3 * _seconds_per_element(rounds), statistics.median(spread))


def _timed(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, less those of a call that does nothing in the same round."""
    empty = _call_of(lambda x: x + jnp.int32(1), [np.zeros((), np.int32)])
    times = timing.interleaved({"": empty, **calls}, rounds)
    nothing = times.pop("")
    return {name: [max(t - n, 0.0) for t, n in zip(of_call, nothing, strict=True)] for name, of_call in times.items()}


def _median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def _spread(seconds: Sequence[float]) -> float:
    """Median absolute deviation from the median, as a share of it."""
    middle = _median(seconds)
    return _median([abs(t - middle) for t in seconds]) / middle if middle > 0 else 0.0


def _shape_of(layer: Layer) -> Hashable:
    """What two layers have alike that take the same time: body, shapes and roles."""
    body = _compat.open_jaxpr(layer.eqn.params["body"])
    avals: list[Any] = [v.aval for v in (*body.invars, *body.outvars)]
    shapes = tuple((aval.shape, str(aval.dtype)) for aval in avals)
    return str(body), shapes, layer.eqn.params["roles"]


def alone(layer: Layer, candidate: Candidate, recipe: Any) -> Program:
    """A lowered program of one layer: codes in, codes out; reals in and out for a candidate in float.

    Args:
      layer: of a calibrated program.
      candidate: how it is stored.
      recipe: without rules.
    """
    part, eqn = layer.part, layer.eqn
    constants = Constants(part)
    fixed = {
        v: part.ids[v].removeprefix("weight:") for v in eqn.invars if isinstance(v, _compat.Var) and v in constants
    }
    inputs = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, _compat.Var) and v not in constants))

    def make(builder: Builder, *values: Any) -> list[Any]:
        given = dict(zip(inputs, values, strict=True)) | {v: builder.get(name) for v, name in fixed.items()}
        return _compat.bind(eqn, [v.val if isinstance(v, _compat.Literal) else given[v] for v in eqn.invars])

    names = tuple(f"operand{k}" for k in range(len(inputs)))
    trees = (jax.tree.structure(([0] * len(inputs), {})), jax.tree.structure([0] * len(eqn.outvars)))
    stats = dict(part.stats)
    for name, var in zip(names, inputs, strict=True):
        observed = part.ids[_regions.behind_views(part, var)]
        if observed in stats:
            stats[f"input:{name}"] = stats[observed]
    avals: list[Any] = [v.aval for v in inputs]
    program = build(
        make,
        {name: constants.value(v) for v, name in fixed.items()},
        avals,
        Signature(*trees, names),
        stats=stats,
        stage="partition",
    )
    # The next layer reads what this one does, or narrower.
    narrow = dataclasses.replace(recipe, output=candidate.activation or ACTIVATION)
    program = assign_precision.assign_precision(program, narrow, {layer.id: candidate.rule("*")})
    program = fuse.fuse(insert_qdq.insert_qdq(program, narrow.estimator_for))
    return lax_int.lower(fold_zero_points.fold_zero_points(program), "int")


def _call(program: Program) -> Callable[[], Any]:
    """A compiled call on random operands."""
    random = np.random.default_rng(0)

    def draw(aval: Any) -> np.ndarray:
        if jnp.issubdtype(aval.dtype, np.floating):
            return random.normal(size=aval.shape).astype(aval.dtype)
        if aval.dtype == bool:
            return random.integers(0, 2, aval.shape).astype(bool)
        limits = np.iinfo(aval.dtype)
        return random.integers(limits.min, limits.max, aval.shape, aval.dtype, endpoint=True)

    return _call_of(lambda *flat: program(*flat), [draw(a) for a in program.input_avals])


def _call_of(function: Callable[..., Any], operands: Sequence[np.ndarray]) -> Callable[[], Any]:
    compiled, held = jax.jit(function), [jax.device_put(x) for x in operands]
    return lambda: compiled(*held)


@functools.lru_cache(maxsize=1)
def _seconds_per_element(rounds: int) -> float:
    """Of quantizing reals to int8 codes."""
    x = np.linspace(-1.0, 1.0, _CONVERTED, dtype=np.float32)
    scale, zero = np.float32(1 / 127), np.int32(0)
    call = _call_of(lambda x: fixed_point.quantize(x, scale, zero, ACTIVATION), [x])
    return _median(_timed({"convert": call}, rounds)["convert"]) / _CONVERTED
