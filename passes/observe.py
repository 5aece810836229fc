"""Marks the values whose ranges calibration needs, and reads them.

    y = region[conv] x w; z = region[conv] y v
        ->
    y = region[conv] (observe x) w; z = region[conv] (observe y) v

Every real value that will be stored as integers is marked: inputs, region results, what loops read, and what islands
hand to regions.
A view has its operand's range, so it is not marked. Outputs stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler import ops, state
from qcompiler.errors import CalibrationError, QuantizationError
from qcompiler.ir import _compat, classes, identity, loops, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, build
from qcompiler.numerics import masks
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.ranges import Histogram
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _masks, _observed_loops, _regions


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
    found: set[Any] = set()
    for eqn in program.eqns:
        is_region = eqn.primitive is ops.region_p
        candidates = [*eqn.invars, *eqn.outvars] if is_region else eqn.invars if loops.is_loop(eqn) else []
        for var in candidates:
            if isinstance(var, _compat.Literal) or var in constants or not classes.is_float(var):
                continue
            found.add(_regions.behind_views(program, var))
    return found


def reader(program: Program, results: bool = False) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """A compiled function from flat inputs to {value id: array} in program order, for a program with observers.

    With `results`, `result#k` tells whether real result k holds NaN: what an island gives out is not marked.
    """

    real = {f"result#{k}": k for k, v in enumerate(program.outvars) if results and classes.is_float(v)}
    run = _observed_loops.runner(program)
    marked = observed_ids(program)

    def ordered(inputs: Sequence[Any]) -> dict[str, Any]:
        outputs, found = run(list(program.weights.values()), list(inputs))
        found = found | {key: np.isnan(np.asarray(outputs[k], np.float32)).any() for key, k in real.items()}
        # What jit returns is sorted by name; the first bad value of a batch is the first in program order. A body that
        # never runs has none.
        return {key: found[key] for key in (*marked, *real) if key in found}

    return ordered


class Collector:
    """Histograms of a program's observed values, over any number of batches.

    The program sees its inputs as they will be stored, quantized with the range known so far: a norm behind a row of
    small values must be calibrated on what quantization leaves of that row.

    Args:
      program: with observers.
      input_types: value id of an input -> its type; others are read as they are.
      estimator_for: type -> range estimator.
    """

    def __init__(
        self,
        program: Program,
        input_types: Mapping[str, QuantType] | None = None,
        estimator_for: Callable[[QuantType], Any] | None = None,
    ) -> None:
        self._input_types = dict(input_types or {})
        self._estimator_for = estimator_for
        self._where = places(program)
        self._masked: set[str] = set()
        self._may_mask: set[str] = set()
        for part in loops.nested(program):
            numbers = _masks.never_masks(part)
            constants, inputs = Constants(part), set(part.input_vars) - numbers
            masked = _masks.masked_values(part, constants, masks.MASK) - numbers
            self._masked.update(part.ids[v] for v in masked)
            may_mask = _masks.masked_values(part, constants, masks.MASK, inputs) - numbers
            self._may_mask.update(part.ids[v] for v in may_mask)
        self._inputs = [f"input:{n}" for n in program.signature.input_names]
        self._histograms: dict[str, Histogram] = {}
        # What is state has one range, before a call and after it.
        self._same = {_observed(program, program.outvars[j]): self._inputs[k] for k, j in state.pairs_of(program)}
        self._batches = 0

    def add(
        self,
        read: Callable[[Sequence[Any]], Mapping[str, Any]],
        inputs: Sequence[Any],
        number: int | None = None,
    ) -> None:
        """Adds one batch of flat inputs, read by `reader` of the program at their shapes; messages call it `number`.

        Raises:
          CalibrationError: a value is NaN or infinite; the first such value in program order is named.
        """
        self._batches = self._batches if number is None else number
        stored = [
            self._stored(key, x) if key in self._input_types else x for key, x in zip(self._inputs, inputs, strict=True)
        ]
        values = read(stored)
        for key, value in values.items():
            if key.startswith("result#"):
                if value:
                    raise CalibrationError(
                        f"calibration batch {self._batches} gives NaN in {key} of the model: remove such samples, or "
                        "mend the layer that makes them"
                    )
            elif key not in self._input_types:
                self._update(key, value)
        self._batches += 1

    def _stored(self, key: str, x: Any) -> np.ndarray:
        """An input behind the pair that it will get."""
        self._update(key, x)
        x, qtype = np.asarray(x), self._input_types[key]
        if not x.size:
            return x
        try:
            encoding = Encoding.of_stats(self._histograms[key].stats, qtype, self._estimator_for(qtype))
        except QuantizationError:
            # Later batches may widen a range that is too narrow; what is left is an error where a region reads it.
            return x
        return encoding.dequantize(encoding.quantize(x)).astype(x.dtype)

    def _update(self, key: str, array: Any) -> None:
        array = np.asarray(array).astype(np.float32, copy=False)
        if array.size and key in self._may_mask:
            # In inputs, and what they are added to, a large positive number is a mistake.
            array = masks.brought_near(array, above=key in self._masked)
        try:
            self._histograms.setdefault(self._same.get(key, key), Histogram()).update(array)
        except ValueError as error:
            bad = "NaN" if np.isnan(array).any() else "infinity"
            if key in self._inputs:
                name = key.removeprefix("input:")
                raise CalibrationError(
                    f"calibration batch {self._batches}: input {name} holds {bad}; remove such samples"
                ) from error
            raise CalibrationError(
                f"calibration batch {self._batches} gives {bad} in {key} ({self._where.get(key, 'unknown place')}): "
                "remove such samples, or mend the layer that makes them"
            ) from error

    @property
    def stats(self) -> dict[str, Any]:
        """Value id -> `RangeStats`."""
        found = {key: histogram.stats for key, histogram in self._histograms.items()}
        return found | {key: found[same] for key, same in self._same.items() if same in found}


def _observed(program: Program, atom: Any) -> str:
    """The id under which a value is observed, views of it too; an empty one if it is not."""
    if not isinstance(atom, _compat.Var):
        return ""
    made = program.producer.get(_regions.behind_views(program, atom))
    return made.params["id"] if made is not None and made.primitive is ops.observe_p else ""


def places(program: Program) -> dict[str, str]:
    """Value id -> where it is computed, for messages: in program order."""
    found = {f"input:{n}": "an input of the model" for n in program.signature.input_names}
    for part in loops.nested(program):
        found |= {f"input:{n}": "read by the body of a loop" for n in part.signature.input_names if part is not program}
        for eqn in part.eqns:
            if eqn.primitive is not ops.observe_p:
                found[part.ids[eqn.outvars[0]]] = identity.describe(eqn)
    return found


def without_observers(program: Program) -> Program:
    """The program with every mark removed."""
    return loops.everywhere(_unmarked, program)


def _unmarked(program: Program) -> Program:
    def make(builder: Builder, *inputs: Any) -> list[Any]:
        args = [*(builder.get(n) for n in program.weights), *inputs]
        skip: Callable[[Any, Any], Any] = lambda eqn, values: values if eqn.primitive is ops.observe_p else None
        return replay.evaluate(program.jaxpr, args, skip)

    fields = {"stats": program.stats, "notes": program.notes, "stage": program.stage}
    return build(make, program.weights, program.input_avals, program.signature, **fields)


def collect(program: Program, batches: Iterable[Sequence[Any]]) -> Program:
    """The program (with observers) with `stats` filled from batches of flat inputs of its own shapes."""
    collector, read = Collector(program), reader(program)
    for batch in batches:
        collector.add(read, batch)
    return program.replace(stats=collector.stats)


def observed_ids(program: Program) -> list[str]:
    """Ids of the marked values, in program order: programs of one model at other batch sizes agree on them."""
    every = [eqn for part in loops.nested(program) for eqn in part.eqns]
    return [eqn.params["id"] for eqn in every if eqn.primitive is ops.observe_p]
