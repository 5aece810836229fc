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
from qcompiler.errors import CalibrationError, OverflowProofError, QuantizationError
from qcompiler.ir import _compat, classes, contraction, identity, loops, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, build
from qcompiler.numerics import fixed_point, groups, types
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.fixed_range import FixedRange
from qcompiler.numerics.ranges import Estimator
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _overrides, _regions


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


#: Of a bias: the step in which it is stored where its channel has no weights that decide it.
_DEAD_BIAS_STEP = 2.0**-20


class _Inserter:
    def __init__(
        self, program: Program, estimator_for: Callable[[QuantType], Any], weight_fractions: Mapping[str, np.ndarray]
    ) -> None:
        self.program, self.estimator_for, self.weight_fractions = program, estimator_for, weight_fractions
        self.types: dict[str, list[QuantType | None]] = program.notes["types"]
        self.constants = Constants(program)
        self.producer = program.producer
        self.needs: dict[Any, list[_Need]] = {}
        self.island_needs: set[Any] = set()
        self._collect_needs()
        self.parameters: dict[tuple[Any, QuantType], tuple[np.ndarray, np.ndarray]] = {}
        self.unfollowed: list[str] = []

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
        return inserted.note("unfollowed", sorted(set(self.unfollowed)))

    def region_operands(self, builder: Builder, eqn: _compat.JaxprEqn, values: list[Any], read: Any) -> list[Any]:
        if eqn.params["kind"] in _regions.REARRANGING:
            return self.rearranged_operands(builder, eqn, values, read)
        scales: dict[int, np.ndarray] = {}
        chosen = self.types[eqn.params["id"]]
        out = list(values)
        for k, (var, role, qtype) in enumerate(zip(eqn.invars, eqn.params["roles"], chosen, strict=True)):
            if role in ("weight", "rows"):
                try:
                    scales[k] = self.weight_scale(eqn, k, qtype)
                except QuantizationError as error:
                    raise QuantizationError(
                        f"weight {self.program.ids[var].removeprefix('weight:')} of {eqn.params['id']} at "
                        f"{identity.source_of(eqn)}: {error}; rescale the layer, or keep it in float by a qc.Rule"
                    ) from error
                if role == "weight":
                    scales[k] = (scales[k] * self.fraction(eqn, k)).astype(np.float32)
            elif role not in ("bias", "constant"):
                out[k] = read(var, values[k], qtype)
                if role in _regions.ANCHORED:
                    scales[k] = self.parameters[self.owner(var), qtype][0]
        for k in (k for k, role in enumerate(eqn.params["roles"]) if role == "rows"):
            out[k] = self.weight(builder, eqn, k, values[k], chosen[k], scales[k])
        anchor = _regions.anchor_of(eqn)
        if anchor is not None:
            self.keep_accumulator_normal(eqn, scales)
            self.make_room_for_bias(eqn, scales)
            for k in (k for k in scales if chosen[k].contracted):
                scales[k] = groups.round_up(scales[k])
            for k in (k for k, role in enumerate(eqn.params["roles"]) if role == "weight"):
                out[k] = self.weight(builder, eqn, k, values[k], chosen[k], scales[k])
            scale = _regions.accumulator_scale(eqn, scales)
            traced = builder.weight(f"{eqn.params['id']}:accumulator/scale", scale)
            for k, role in enumerate(eqn.params["roles"]):
                if role == "bias":
                    out[k] = self.bias(builder, eqn, k, scale, traced)
        return out

    def rearranged_operands(self, builder: Builder, eqn: _compat.JaxprEqn, values: list[Any], read: Any) -> list[Any]:
        """What a view or concatenation reads, all in one encoding; what is known gets a pair of its own."""
        stored, out = self.stored(eqn), list(values)
        for k, (var, role) in enumerate(zip(eqn.invars, eqn.params["roles"], strict=True)):
            if role == "value" and var in self.constants:
                out[k] = ops.fake_quantize(values[k], *self.scale_and_zero(builder, stored), stored.type)
            elif role == "value":
                out[k] = read(var, values[k], stored)
        return out

    def given_weight(self, eqn: _compat.JaxprEqn, k: int) -> Encoding | Estimator | None:
        """What the recipe gives operand k of a region, a weight or a bias."""
        return self.program.notes.get("given_weights", {}).get(f"{eqn.params['id']}@{k}")

    def weight_range(self, eqn: _compat.JaxprEqn, k: int, qtype: QuantType) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the elements that share a scale, as `types.extremes`, or as the recipe estimates them."""
        given, array = self.given_weight(eqn, k), self.constants.value(eqn.invars[k])
        return (
            _overrides.estimated(array, qtype, given) if isinstance(given, Estimator) else types.extremes(array, qtype)
        )

    def weight_scale(self, eqn: _compat.JaxprEqn, k: int, qtype: QuantType) -> np.ndarray:
        """The scales of a weight before its channels are made to fit the region."""
        given = self.given_weight(eqn, k)
        if isinstance(given, Encoding):
            return given.scale
        if qtype.contracted:
            return channel_scale(self.constants.value(eqn.invars[k]), qtype)
        return types.scale_and_zero_point(*self.weight_range(eqn, k, qtype), qtype)[0]

    def weight(
        self, builder: Builder, eqn: _compat.JaxprEqn, k: int, value: Any, qtype: QuantType, scale: np.ndarray
    ) -> Any:
        var, given = eqn.invars[k], self.given_weight(eqn, k)
        array = self.constants.value(var)
        name = f"{self.program.ids[var].removeprefix('weight:')}:{qtype.name}"
        if qtype.contracted:
            name += "" if np.array_equal(channel_scale(array, qtype), scale) else f"@{eqn.params['id']}"
            return _in_groups(builder, name, value, groups.choose(array, qtype, scale))
        if isinstance(given, Encoding):
            zero = given.zero_point
        else:
            # A smaller range is one around zero of the same form.
            low = self.weight_range(eqn, k, qtype)[0]
            low = low * self.fraction(eqn, k) if eqn.params["roles"][k] == "weight" else low
            zero = types.zero_point_for(low, scale, qtype)
        plain = weight_scale(array, qtype)
        name += "" if np.array_equal(plain[0], scale) and np.array_equal(plain[1], zero) else f"@{eqn.params['id']}"
        scale, zero = builder.weight(f"{name}/scale", scale), builder.weight(f"{name}/zero_point", zero)
        return ops.fake_quantize(value, scale, zero, qtype)

    def fraction(self, eqn: _compat.JaxprEqn, k: int) -> Any:
        """What the scales of a region's weight are of those that cover its largest elements; 1 where they are given."""
        if isinstance(self.given_weight(eqn, k), Encoding):
            return np.float32(1)
        return self.weight_fractions.get(eqn.params["id"], np.float32(1))

    def keep_accumulator_normal(self, eqn: _compat.JaxprEqn, scales: dict[int, np.ndarray]) -> None:
        """Raises scales of channels next to zero whose product with the input's would underflow float32."""
        position, anchor = _regions.weight_position(eqn), _regions.anchor_of(eqn)
        factors = [scales[_regions.operand_index(eqn, v)].astype(np.float64) for v in _regions.anchored(anchor)]
        k = None if position is None else _regions.operand_index(eqn, anchor.invars[position])
        given = k is not None and isinstance(self.given_weight(eqn, k), Encoding)
        # Scales that are given are not raised.
        extreme = np.min if given else np.max
        if np.prod([extreme(f) for f in factors if f.size]) < types.SMALLEST_NORMAL:
            raise QuantizationError(
                f"{identity.describe(eqn)} ({eqn.params['id']}): the scales of its operands multiply to less than any "
                "float32 number; rescale the layer, or keep it in float by a qc.Rule"
            )
        if k is not None and not given:
            least = 2 * types.SMALLEST_NORMAL / factors[1 - position]
            scales[k] = np.maximum(scales[k], least).astype(np.float32)

    def make_room_for_bias(self, eqn: _compat.JaxprEqn, scales: dict[int, np.ndarray]) -> None:
        """Raises scales of channels next to zero whose bias would not fit, at most to that of the largest channel.

        Channels of nothing but zeros may have any scale, so they get one that shows their bias finely.
        """
        position = _regions.weight_position(eqn)
        bias = next((v for v, role in zip(eqn.invars, eqn.params["roles"], strict=True) if role == "bias"), None)
        if position is None or bias is None:
            return
        anchor = _regions.anchor_of(eqn)
        k = _regions.operand_index(eqn, anchor.invars[position])
        if isinstance(self.given_weight(eqn, k), Encoding):
            return
        qtype, array = self.types[eqn.params["id"]][k], self.constants.value(eqn.invars[k])
        unit = _regions.accumulator_scale(eqn, {**scales, k: np.ones_like(scales[k])})
        fine = np.abs(self.constants.value(bias).astype(np.float64)) / unit * _DEAD_BIAS_STEP
        channels = qtype.per_channel
        fine = contraction.on_weight(fine, anchor, position) if channels.axis else np.max(fine)
        dead = ~np.any(array, axis=tuple(d for d in range(array.ndim) if d not in channels.axis), keepdims=True)
        wanted = dead.reshape(scales[k].shape) & (fine > types.SMALLEST_SCALE)
        scales[k] = np.where(wanted, fine, scales[k]).astype(np.float32)
        if not channels.axis:
            return
        codes = fixed_point.quantize_bias(self.constants.value(bias), _regions.accumulator_scale(eqn, scales))
        over = contraction.on_weight(np.abs(codes) / 2.0**30, anchor, position)
        over = types.over_blocks(np.maximum, np.broadcast_to(over, scales[k].shape), channels)
        raised = np.minimum(scales[k] * np.maximum(over, 1.0), scales[k].max())
        scales[k] = np.where(over > 1.0, raised, scales[k]).astype(np.float32)

    def bias(self, builder: Builder, eqn: _compat.JaxprEqn, k: int, scale: np.ndarray, traced: Any) -> Any:
        codes = fixed_point.quantize_bias(self.constants.value(eqn.invars[k]), scale)
        if np.abs(codes).max(initial=0) > types.BIAS.qmax:
            raise OverflowProofError(
                f"the bias of {identity.describe(eqn)} ({eqn.params['id']}) is {np.abs(codes).max():.3g} steps of its "
                f"accumulator's scale {float(np.min(scale)):.3g} and does not fit int32: its weights or its input's "
                "range are far too small for it; rescale the layer, or keep it in float by a qc.Rule"
            )
        self.compare_bias(eqn, k, scale)
        q = builder.weight(f"{eqn.params['id']}:bias/int32", codes.astype(np.int32))
        zero = builder.weight("zero", np.zeros((), np.int32))
        value = ops.dequantize(q, traced, zero, types.BIAS)
        return value.astype(eqn.invars[k].aval.dtype)

    def compare_bias(self, eqn: _compat.JaxprEqn, k: int, scale: np.ndarray) -> None:
        """Notes what the recipe gives a bias, where it is not the scale that the bias has by its operands."""
        given = self.given_weight(eqn, k)
        if given is None:
            return
        scales = np.sort(np.unique(given.scale)) if isinstance(given, Encoding) else np.zeros(0)
        own = np.sort(np.unique(scale))
        # A part in a thousand is far less than a bias loses by it, and more than float32 or a file's digits do.
        if scales.shape != own.shape or not np.allclose(scales, own, rtol=1e-3, atol=0.0):
            name = self.program.ids[eqn.invars[k]].removeprefix("weight:")
            self.unfollowed.append(
                f"the encoding of the bias {name}: it is int32 at the product of the scales of input and weight of "
                f"{eqn.params['id']}, from {own[0]:.3g} to {own[-1]:.3g}"
            )


def widest(wanted: list[_Need]) -> _Need:
    """The encoding with the most bits; the first of equals."""
    return max(wanted, key=lambda need: need.type.bits)


def _in_groups(builder: Builder, name: str, value: Any, found: groups.Groups) -> Any:
    """A weight behind a pair whose scale is made of the channels' and the groups', which the program holds apart."""
    shape, qtype = value.shape, found.type
    scale, steps = builder.weight(f"{name}/scale", found.channel), builder.weight(f"{name}/steps", found.steps)
    each = groups.expand(steps, shape, qtype).astype(np.float32) * scale
    if qtype.symmetric:
        zeros = builder.weight(f"{name}/zero_point", np.zeros((), np.int32))
    else:
        held = builder.weight(f"{name}/zero_point", found.zero_points)
        zeros = groups.expand(held, shape, qtype).astype(np.int32)
    return ops.fake_quantize(value, each, zeros, qtype)


def weight_scale(array: np.ndarray, qtype: QuantType) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a weight as `fake_quantize` takes them: float32 and int32, broadcastable to it.

    From the extremes of what shares a scale; in groups, from the least squared error of each (`groups.choose`).
    """
    if qtype.contracted:
        found = groups.choose(array, qtype)
        return found.scale(array.shape), found.zero_point(array.shape)
    return types.scale_and_zero_point(*types.extremes(array, qtype), qtype)


def channel_scale(array: np.ndarray, qtype: QuantType) -> np.ndarray:
    """The float scale of a weight's integers in an int32 sum, along which all are the same: one per channel at most."""
    return groups.channel_scale(array, qtype) if qtype.contracted else weight_scale(array, qtype)[0]
