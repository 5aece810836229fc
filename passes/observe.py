"""Marks the values whose ranges calibration needs, and reads them.

    y = region[conv] x w; z = region[conv] y v      ->      y = region[conv] (observe x) w; z = region[conv] (observe y) v

Every real value that will be stored as integers is marked: inputs, region results, and what islands hand to regions.
A view has its operand's range, so it is not marked. Outputs stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler import ops
from qcompiler.errors import CalibrationError
from qcompiler.ir import _compat, classes, identity, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, build
from qcompiler.numerics.ranges import Histogram


def observe(program: Program) -> Program:
    """See the module's docstring."""
    marked = observed_values(program)
    ids = program.ids

    def make(builder: Builder, *inputs: Any) -> list[Any]:
        seen = [ops.observe(x, ids[v]) if v in marked else x for v, x in zip(program.input_vars, inputs, strict=True)]

        def rule(eqn: _compat.JaxprEqn, values: list[Any]) -> list[Any] | None:
            if not any(v in marked for v in eqn.outvars):
                return None
            results = _compat.bind(eqn, values)
            pairs = zip(eqn.outvars, results, strict=True)
            return [ops.observe(r, ids[v]) if v in marked else r for v, r in pairs]

        return replay.evaluate(program.jaxpr, [*(builder.get(n) for n in program.weights), *seen], rule)

    fields = {"stats": program.stats, "notes": program.notes, "stage": "observe"}
    return build(make, program.weights, program.input_avals, program.signature, **fields)


def observed_values(program: Program) -> set[Any]:
    """The variables to mark: real, stored between regions, and not the result of a view."""
    constants = Constants(program)
    producer = program.producer
    found: set[Any] = set()
    for eqn in program.eqns:
        is_region = eqn.primitive is ops.region_p
        candidates = [*eqn.invars, *eqn.outvars] if is_region else []
        for var in candidates:
            if isinstance(var, _compat.Literal) or var in constants or not classes.is_float(var):
                continue
            while (made := producer.get(var)) is not None and made.params.get("kind") == "view":
                var = made.invars[0]
            found.add(var)
    return found


def reader(program: Program) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """A compiled function from flat inputs to {value id: array}, for a program with observers."""

    def read(weights: list[Any], inputs: list[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def rule(eqn: _compat.JaxprEqn, values: list[Any]) -> list[Any] | None:
            if eqn.primitive is ops.observe_p:
                found[eqn.params["id"]] = values[0]
            return None

        replay.evaluate(program.jaxpr, [*weights, *inputs], rule, keep_source=False)
        return found

    compiled = jax.jit(read)
    return lambda inputs: compiled(list(program.weights.values()), list(inputs))


def update(histograms: dict[str, Histogram], values: Mapping[str, Any], where: Mapping[str, str], batch: int) -> None:
    """Adds one batch of observed values to the histograms.

    Args:
      histograms: value id -> histogram, extended in place.
      values: value id -> array, from `reader`.
      where: value id -> place in the user's model, for messages.
      batch: number of the batch, from 0, for messages.

    Raises:
      CalibrationError: a value is NaN or infinite; the first such value in program order is named.
    """
    for key, array in values.items():
        array = np.asarray(array)
        try:
            histograms.setdefault(key, Histogram()).update(array.astype(np.float32, copy=False))
        except ValueError as error:
            bad = "NaN" if np.isnan(array.astype(np.float32)).any() else "infinity"
            raise CalibrationError(
                f"calibration batch {batch} gives {bad} in {key} ({where.get(key, 'unknown place')}): "
                "remove such samples, or mend the layer that makes them"
            ) from error


def places(program: Program) -> dict[str, str]:
    """Value id -> where it is computed, for messages: in program order."""
    found = {f"input:{n}": "an input of the model" for n in program.signature.input_names}
    for eqn in program.eqns:
        found[program.ids[eqn.outvars[0]]] = identity.describe(eqn)
    return found


def stats_of(histograms: Mapping[str, Histogram]) -> dict[str, Any]:
    """Value id -> `RangeStats`."""
    return {key: histogram.stats for key, histogram in histograms.items()}


def without_observers(program: Program) -> Program:
    """The program with every mark removed."""

    def make(builder: Builder, *inputs: Any) -> list[Any]:
        args = [*(builder.get(n) for n in program.weights), *inputs]
        skip: Callable[[Any, Any], Any] = lambda eqn, values: values if eqn.primitive is ops.observe_p else None
        return replay.evaluate(program.jaxpr, args, skip)

    fields = {"stats": program.stats, "notes": program.notes, "stage": program.stage}
    return build(make, program.weights, program.input_avals, program.signature, **fields)


def collect(program: Program, batches: Iterable[Sequence[Any]]) -> Program:
    """The program (with observers) with `stats` filled from batches of flat inputs of its own shapes."""
    read, where = reader(program), places(program)
    histograms: dict[str, Histogram] = {}
    for number, batch in enumerate(batches):
        update(histograms, read(batch), where, number)
    return program.replace(stats=stats_of(histograms))
