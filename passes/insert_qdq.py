"""Puts a quantize/dequantize pair on every edge between regions; float in, float out, differentiable.

    y = region[conv] x w b          ->      y = region[conv] (qdq x) (qdq w) (dequantize b)

A pair is one `fake_quantize`. A region's result gets one pair per encoding that its readers want (int8 for a product,
int16 for a residual add). A view shares its operand's scale and zero point, and what is concatenated has those of the
whole. An input or an island's result is quantized once, to the widest type, and other encodings are derived from that.
Biases are int32 at the scale of the accumulator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qcompiler import ops
from qcompiler.errors import CalibrationError, QuantizationError
from qcompiler.ir import _compat, classes, identity, loops, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, build
from qcompiler.numerics import types
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.fixed_range import FixedRange
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _regions
from qcompiler.passes._weight_pairs import WeightPairs
from qcompiler.passes._weight_pairs import channel_scale as channel_scale
from qcompiler.passes._weight_pairs import weight_scale as weight_scale


def insert_qdq(
    program: Program,
    estimator_for: Callable[[QuantType], Any],
    weight_fractions: Mapping[str, np.ndarray] | None = None,
) -> Program:
    """See the module's docstring.

    Args:
      program: partitioned, with `stats` and with the types that `assign_precision` noted.
      estimator_for: type -> range estimator (`numerics.ranges`).
      weight_fractions: region -> by what the scales of its weight are to be smaller than those that cover its largest
        elements; an array of the scales' shape, at most 1.

    Raises:
      CalibrationError: a value has no stats.
      OverflowProofError: a bias does not fit int32 at the scale of its accumulator.
    """
    return _Inserter(program, estimator_for, weight_fractions or {}).run()


class _Need(NamedTuple):
    """How a reader wants a value stored: the type, and the value from whose range scale and zero point come."""

    type: QuantType
    owner: Any


class _Inserter:
    def __init__(
        self, program: Program, estimator_for: Callable[[QuantType], Any], weight_fractions: Mapping[str, np.ndarray]
    ) -> None:
        self.program, self.estimator_for = program, estimator_for
        self.types: dict[str, list[QuantType | None]] = program.notes["types"]
        self.constants = Constants(program)
        self.weights = WeightPairs(program, self.constants, weight_fractions)
        self.producer = program.producer
        self.needs: dict[Any, list[_Need]] = {}
        self.island_needs: set[Any] = set()
        self._collect_needs()
        self.parameters: dict[tuple[Any, QuantType], tuple[np.ndarray, np.ndarray]] = {}

    def quantized_region(self, eqn: _compat.JaxprEqn | None) -> bool:
        return eqn is not None and _regions.is_region(eqn) and eqn.params["id"] in self.types

    def _collect_needs(self) -> None:
        """Value -> the encodings its readers want; and the values that islands read."""
        island_type = self.program.notes["island_type"]

        def want(var: Any, need: _Need) -> None:
            if need not in self.needs.setdefault(var, []):
                self.needs[var].append(need)

        for var, qtype in zip(self.program.outvars, self.program.notes["output_types"], strict=True):
            if qtype is not None and self.comes_quantized(var):
                want(var, self.own(var, qtype))
        for eqn in reversed(self.program.eqns):
            if self.quantized_region(eqn):
                stored = self.stored(eqn) if eqn.params["kind"] in _regions.REARRANGING else None
                for var, role, qtype in zip(eqn.invars, eqn.params["roles"], self.types[eqn.params["id"]], strict=True):
                    if var in self.constants or not classes.is_float(var):
                        continue
                    if role == "value":
                        want(var, stored)
                    elif qtype is not None:
                        want(var, self.own(var, qtype))
                continue
            for var in eqn.invars:
                real = isinstance(var, _compat.Var) and var not in self.constants and classes.is_float(var)
                if real and (self.comes_quantized(var) or loops.is_loop(eqn)):
                    want(var, self.own(var, island_type))
                    self.island_needs.add(var)

    def own(self, var: Any, qtype: QuantType) -> _Need:
        """A type at the value's own range; that which the recipe gives the value goes before the one that is wanted."""
        owner = self.owner(var)
        if qtype == self.program.notes["island_type"]:
            qtype = self.program.notes.get("retyped", {}).get(self.program.ids[owner], qtype)
        return _Need(qtype, owner)

    def stored(self, eqn: _compat.JaxprEqn) -> _Need:
        """The encoding in which a view or concatenation reads and gives: the widest that its readers want."""
        out = eqn.outvars[0]
        return widest(self.needs.get(out) or [self.own(out, self.program.notes["island_type"])])

    def comes_quantized(self, var: Any) -> bool:
        """Whether the value leaves its producer as integers: it is the result of a region."""
        return self.quantized_region(self.producer.get(var))

    def reads_quantized(self, atom: Any) -> bool:
        """Whether islands read the value as it is stored."""
        return isinstance(atom, _compat.Var) and atom in self.island_needs

    def owner(self, var: Any) -> Any:
        """The value whose scale a value has: the operand behind views."""
        while self.quantized_region(eqn := self.producer.get(var)) and eqn.params["kind"] == "view":
            var = eqn.invars[0]
        return var

    def scale_and_zero(self, builder: Builder, need: _Need) -> tuple[Any, Any]:
        """Traced scale and zero point of an encoding."""
        qtype, owner = need
        key = self.program.ids[owner]
        if (owner, qtype) not in self.parameters:
            self.parameters[owner, qtype] = self.calibrated(owner, key, qtype)
        scale, zero = self.parameters[owner, qtype]
        name = f"{key}:{qtype.name}"
        return builder.weight(f"{name}/scale", scale), builder.weight(f"{name}/zero_point", zero)

    def calibrated(self, owner: Any, key: str, qtype: QuantType) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point as the recipe gives them, or from what calibration saw of a value."""
        given = self.program.notes.get("given_values", {}).get(f"{key}@{qtype.name}")
        if isinstance(given, Encoding):
            return given.scale, given.zero_point
        if isinstance(given, FixedRange):
            return types.scale_and_zero_point(given.low, given.high, qtype)
        if key not in self.program.stats:
            raise CalibrationError(
                f"calibration has not seen {key}: no batch runs that branch, or the function is another; add a batch "
                "that does, or keep the branch in float by a qc.Rule"
            )
        made = self.producer.get(owner)
        place = f"{key} ({identity.describe(made) if made else 'input'})"
        stats = self.program.stats[key]
        if not stats.count and owner.aval.size:
            raise CalibrationError(f"{place}: calibration saw only arrays without elements; add a batch that has some")
        chosen = self.program.notes.get("ranges", {}).get(key, {}).get(qtype.name)
        if chosen is not None and given is None:
            return types.scale_and_zero_point(*chosen, qtype)
        try:
            encoding = Encoding.of_stats(stats, qtype, given or self.estimator_for(qtype))
        except QuantizationError as error:
            raise CalibrationError(
                f"{place}: {error}; rescale it, or keep its readers in float by a qc.Rule"
            ) from error
        return encoding.scale, encoding.zero_point

    def pairs(self, builder: Builder, var: Any, value: Any) -> dict[_Need, Any]:
        """The value behind a pair of each encoding that its readers want."""
        wanted = self.needs.get(var, [])
        if not wanted:
            return {}
        eqn = self.producer.get(var)
        independent = self.quantized_region(eqn) and eqn.params["kind"] not in _regions.REARRANGING
        primary = widest(wanted)
        found: dict[_Need, Any] = {}
        for need in sorted(wanted, key=lambda n: n is not primary):
            source = value if independent or need is primary else found[primary]
            found[need] = ops.fake_quantize(source, *self.scale_and_zero(builder, need), need.type)
        return found

    def run(self) -> Program:
        program = self.program

        def make(builder: Builder, *inputs: Any) -> list[Any]:
            quantized: dict[Any, dict[_Need, Any]] = {}
            for var, value in zip(program.input_vars, inputs, strict=True):
                quantized[var] = self.pairs(builder, var, value)
            island_type = program.notes["island_type"]

            def read(var: Any, value: Any, need: _Need | QuantType | None) -> Any:
                if need is None or not isinstance(var, _compat.Var):
                    return value
                need = need if isinstance(need, _Need) else self.own(var, need)
                return quantized.get(var, {}).get(need, value)

            def rule(eqn: _compat.JaxprEqn, values: list[Any]) -> list[Any]:
                if self.quantized_region(eqn):
                    values = self.region_operands(builder, eqn, values, read)
                else:
                    pairs = zip(eqn.invars, values, strict=True)
                    values = [read(v, x, island_type if self.reads_quantized(v) else None) for v, x in pairs]
                results = _compat.bind(eqn, values)
                for var, result in zip(eqn.outvars, results, strict=True):
                    quantized[var] = self.pairs(builder, var, result)
                return results

            args = [*(builder.get(n) for n in program.weights), *inputs]
            outs = replay.evaluate(program.jaxpr, args, rule)
            return [read(v, x, t) for v, x, t in zip(program.outvars, outs, program.notes["output_types"], strict=True)]

        fields = {"stats": program.stats, "notes": program.notes, "stage": "insert_qdq"}
        inserted = build(make, program.weights, program.input_avals, program.signature, **fields)
        return inserted.note("unfollowed", sorted(set(self.weights.unfollowed)))

    def region_operands(self, builder: Builder, eqn: _compat.JaxprEqn, values: list[Any], read: Any) -> list[Any]:
        if eqn.params["kind"] in _regions.REARRANGING:
            return self.rearranged_operands(builder, eqn, values, read)
        scales: dict[int, np.ndarray] = {}
        out = list(values)
        for k, (var, role, qtype) in enumerate(
            zip(eqn.invars, eqn.params["roles"], self.types[eqn.params["id"]], strict=True)
        ):
            if role in ("weight", "rows"):
                scales[k] = self.weights.first_scale(eqn, k)
            elif role not in ("bias", "constant"):
                out[k] = read(var, values[k], qtype)
                if role in _regions.ANCHORED:
                    scales[k] = self.parameters[self.owner(var), qtype][0]
        known = self.weights.operands(builder, eqn, values, scales)
        return [known.get(k, value) for k, value in enumerate(out)]

    def rearranged_operands(self, builder: Builder, eqn: _compat.JaxprEqn, values: list[Any], read: Any) -> list[Any]:
        """What a view or concatenation reads, all in one encoding; what is known gets a pair of its own."""
        stored, out = self.stored(eqn), list(values)
        for k, (var, role) in enumerate(zip(eqn.invars, eqn.params["roles"], strict=True)):
            if role == "value" and var in self.constants:
                out[k] = ops.fake_quantize(values[k], *self.scale_and_zero(builder, stored), stored.type)
            elif role == "value":
                out[k] = read(var, values[k], stored)
        return out


def widest(wanted: list[_Need]) -> _Need:
    """The encoding with the most bits; the first of equals."""
    return max(wanted, key=lambda need: need.type.bits)
