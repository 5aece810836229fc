"""Moves quantize and dequantize into the regions, so that integers go in and integers come out.

    qdq x, qdq w -> region[conv]{ conv x w; add b; max 0 } -> qdq
        ->
    region[conv]{ a = conv (q_x - z_x) (q_w - z_w); dequantize (a + q_b); max 0; quantize } -> q_y

Inside, dequantize sinks below the product or sum: the accumulator is exact int32, and its bias is added there. A pair
between two integer types becomes one requantize. What is left between regions is integers; around islands and at the
program's ends stand single quantizes and dequantizes.

Codes of more than 8 bits enter a product as two int8 parts, of int16 q - z = 256 (high - z_high) + (low - z_low), each
with an int32 accumulator of its own, since a single one would overflow; they meet as reals behind it:

    conv q_x q_w      ->      dequantize (conv high q_w) at 256 s  +  dequantize (conv low q_w + q_b) at s

Loops and branches take codes and give codes, in the encodings of `_loop_codes`; their bodies are fused alike.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler import ops, state
from qcompiler.errors import VerificationError
from qcompiler.ir import _compat, classes, contraction, loops, replay, scatters
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, build
from qcompiler.numerics import fixed_point
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import BIAS, QuantType
from qcompiler.passes import _loop_codes, _regions
from qcompiler.passes._codes import Codes, Sum, encoding_weights
from qcompiler.passes._weight_codes import known_codes, numbers_of


def fuse(program: Program) -> Program:
    """See the module's docstring. Notes `pairs_before`, `pairs_after`, and the encodings of state."""
    pairs = state.pairs_of(program)
    if not pairs:
        return _Fuser(program).run()
    wanted = _loop_codes.wanted_of(program)
    encodings = [wanted.get(program.input_vars[k]) for k, _ in pairs]
    entries: list[Any] = [None] * len(program.input_vars)
    exits: list[Any] = [None] * len(program.outvars)
    for (k, j), encoding in zip(pairs, encodings, strict=True):
        entries[k] = exits[j] = encoding
    return _Fuser(program, entries, exits).run().note(state.STATE_CODES, encodings)


class _Fuser:
    """Fuses a program, or a body of one.

    Args:
      program: with QDQ pairs.
      entries, exits: of a body, the encodings of its inputs and results, None for what is no code; of a program, None.
    """

    def __init__(
        self,
        program: Program,
        entries: Sequence[Encoding | None] | None = None,
        exits: Sequence[Encoding | None] | None = None,
    ) -> None:
        self.program = program
        self.constants = Constants(program)
        self.types = program.notes["types"]
        self.entries = entries or [None] * len(program.input_vars)
        self.exits = exits or [None] * len(program.outvars)
        self.loops = {id(e): self.fused_loop(e) for e in loops.loops_of(program)}
        self.arrives = {v: e for v, e in zip(program.input_vars, self.entries, strict=True) if e is not None}
        for eqn in loops.loops_of(program):
            results = zip(eqn.outvars, self.loops[id(eqn)][0].results, strict=True)
            self.arrives |= {v: e for v, e in results if e is not None}

    def run(self) -> Program:
        program = self.program
        names, scope = program.signature.input_names, program.notes.get("scope")
        where = f"{scope}:" if scope else ""

        def make(builder: Builder, *inputs: Any) -> list[Any]:
            coded = [
                x if e is None else Codes(x, *encoding_weights(builder, f"input:{name}", e), e.type)
                for x, name, e in zip(inputs, names, self.entries, strict=True)
            ]
            args = [*(builder.get(n) for n in program.weights), *coded]
            outs = replay.evaluate(program.jaxpr, args, lambda eqn, values: self.rule(builder, eqn, values))
            return [
                _real(v, x) if e is None else self.codes(builder, v, x, f"{where}result#{k}", e)
                for k, (v, x, e) in enumerate(zip(program.outvars, outs, self.exits, strict=True))
            ]

        avals = [
            a if e is None else jax.ShapeDtypeStruct(a.shape, e.type.dtype)
            for a, e in zip(program.input_avals, self.entries, strict=True)
        ]
        fields = {"stats": program.stats, "notes": program.notes, "stage": "fuse"}
        fused = build(make, program.weights, avals, program.signature, **fields)
        notes = {}
        for eqn in loops.loops_of(program):
            notes[program.ids[eqn.outvars[0]]] = [dict(b.program.notes) for b in self.loops[id(eqn)][1]]
        inside = [n for of_loop in notes.values() for n in of_loop]
        before = per_op_pairs(program) + sum(n["pairs_before"] for n in inside)
        after = pairs_left(fused) + sum(n["pairs_after"] for n in inside)
        return fused.note("pairs_before", before).note("pairs_after", after).note(loops.BODIES, notes)

    def fused_loop(self, eqn: _compat.JaxprEqn) -> tuple[_loop_codes.LoopCodes, list[loops.Body]]:
        """How a loop's ends are coded, and its bodies on codes."""
        plan = _loop_codes.codes_of(self.program, eqn)
        fused = [
            dataclasses.replace(body, program=_Fuser(body.program, plan.entries(body), exits).run())
            for body, exits in zip(plan.bodies, plan.exits, strict=True)
        ]
        return plan, loops.with_own_names(fused, self.program.ids[eqn.outvars[0]], self.program.weights)

    def loop(self, builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> list[Any]:
        """The loop on codes."""
        plan, bodies = self.loops[id(eqn)]
        loop, arrays = self.program.ids[eqn.outvars[0]], {n: w for b in bodies for n, w in b.program.weights.items()}
        operands = [
            self.codes(builder, v, x, f"{loop}:operand#{k}", plan.operands[k]) if k in plan.operands else _real(v, x)
            for k, (v, x) in enumerate(zip(eqn.invars, values, strict=True))
        ]
        results = loops.bind(eqn, operands, bodies, lambda name: builder.weight(name, arrays[name]))
        return [
            x if e is None else Codes(x, *encoding_weights(builder, f"{loop}:result#{k}", e), e.type)
            for k, (x, e) in enumerate(zip(results, plan.results, strict=True))
        ]

    def codes(self, builder: Builder, atom: Any, value: Any, name: str, encoding: Encoding) -> Any:
        """The integers that stand for a value in an encoding."""
        if isinstance(value, Codes) and self.is_in(atom, encoding):
            return value.q
        if atom in self.constants:
            found = encoding.quantize(self.constants.value(atom))
            return found[()] if found.ndim == 0 else builder.weight(f"{name}:{encoding.type.name}", found)
        scale, zero = encoding_weights(builder, name, encoding)
        if isinstance(value, Codes):
            ends = value.scale, value.zero_point, scale, zero
            return ops.requantize(value.q, *ends, value.type, encoding.type)
        return ops.quantize(value, scale, zero, encoding.type)

    def rule(self, builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if eqn.primitive is ops.fake_quantize_p:
            return [self.pair(builder, eqn, values)]
        if eqn.primitive is ops.dequantize_p:
            return [Codes(*values, eqn.params["type"])]
        if id(eqn) in self.loops:
            return self.loop(builder, eqn, values)
        if _regions.is_region(eqn) and eqn.params["id"] in self.types:
            return [self.region(builder, eqn, values)]
        if eqn.primitive.name == "convert_element_type" and isinstance(values[0], Codes) and values[0].type == BIAS:
            # A bias of half precision is int32 all the same.
            return values
        if any(x is None for x in values):
            # Made of weights that only pairs read, which have been taken in.
            return [None] * len(eqn.outvars)
        reals = [_real(v, x) for v, x in zip(eqn.invars, values, strict=True)]
        # A region that the recipe keeps in float is no region any more: nothing will lower it.
        return replay.evaluate(eqn.params["body"], reals) if _regions.is_region(eqn) else _compat.bind(eqn, reals)

    def pair(self, builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Codes:
        x, scale, zero = values
        qtype = eqn.params["type"]
        if isinstance(x, _Results):
            return Codes(x.codes[x.key(eqn)], scale, zero, qtype)
        if isinstance(x, Codes):
            if x.type == qtype and (
                x.scale is scale or self.is_in(eqn.invars[0], _loop_codes.pair(eqn, self.constants))
            ):
                return x
            return Codes(ops.requantize(x.q, x.scale, x.zero_point, scale, zero, x.type, qtype), scale, zero, qtype)
        if eqn.invars[0] in self.constants:
            return known_codes(builder, self.program, self.constants, eqn)
        return Codes(ops.quantize(x, scale, zero, qtype), scale, zero, qtype)

    def is_in(self, atom: Any, encoding: Encoding) -> bool:
        """Whether the codes of a value, behind a pair or an end of a loop, are in an encoding, also another's."""
        known, made = self.arrives.get(atom), self.program.producer.get(atom)
        if known is None and made is not None and made.primitive is ops.fake_quantize_p:
            known = _loop_codes.pair(made, self.constants)
        return known is not None and _loop_codes.same(known, encoding)

    def encoding_of(self, var: Any) -> tuple[Any, Any]:
        """The variables of scale and zero point of the pair (or dequantize) behind a region's operand."""
        made = self.program.producer[var]
        while made.primitive.name == "convert_element_type":
            made = self.program.producer[made.invars[0]]
        numbers = numbers_of(self.program, made)
        return numbers.scale, numbers.zero_points

    def region(self, builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
        """Binds the region on integers; returns what stands for its float result."""
        if eqn.params["kind"] in _regions.REARRANGING:
            return self.rearranged(eqn, values)
        readers = [e for e, _ in self.program.users.get(eqn.outvars[0], []) if classes.is_float(eqn.outvars[0])]
        pairs: dict[Any, Any] = {}
        for reader in readers:
            if reader.primitive is not ops.fake_quantize_p:
                raise VerificationError(f"the result of region {eqn.params['id']} is read by {reader.primitive.name}")
            pairs.setdefault(_Results.key(reader), reader)
        packed = _Operands(eqn, values)
        operand = packed.position
        at_scale = None
        if _regions.anchor_of(eqn) is not None:
            coded = {k: self.encoding_of(v)[0] for k, v in enumerate(eqn.invars) if isinstance(values[k], Codes)}
            held = {k: np.asarray(self.constants.value(scale)) for k, scale in coded.items()}
            scale = _regions.accumulator_scale(eqn, held)
            at_scale = operand(builder.weight(f"{eqn.params['id']}:accumulator/scale", scale), "scale")
        weights = dict(zip(self.program.invars, self.program.weights, strict=False))
        ends = []
        for reader in pairs.values():
            scale, zero = (builder.get(weights[v]) for v in reader.invars[1:])
            ends.append((operand(scale, "scale"), operand(zero, "zero_point"), reader.params["type"]))

        rule = {"table": _table_rule, "wide": _wide_rule}.get(eqn.params["kind"], _body_rule)

        def body(*args: Any) -> list[Any]:
            scale = args[at_scale] if at_scale is not None else None
            (out,) = replay.evaluate(eqn.params["body"], packed.unpack(args), lambda e, xs: rule(e, xs, scale))
            if not classes.is_float(eqn.outvars[0]):
                return [out]
            real = out.real() if isinstance(out, Codes | Sum) else out
            return [ops.quantize(real, args[s], args[z], qtype) for s, z, qtype in ends]

        results = packed.bind(eqn, body)
        return _Results(dict(zip(pairs, results, strict=True))) if classes.is_float(eqn.outvars[0]) else results[0]

    def rearranged(self, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
        """A view or concatenation of codes that are all in one encoding, which the result keeps."""
        k = next(k for k, role in enumerate(eqn.params["roles"]) if role == "value")
        source = values[k]
        scale, zero = (np.asarray(self.constants.value(v)) for v in self.encoding_of(eqn.invars[k]))
        fill = lambda number: fixed_point.quantize_number(number, scale, zero, source.type)[()]
        packed = _Operands(eqn, values, encodings=False)

        def body(*args: Any) -> list[Any]:
            return replay.evaluate(eqn.params["body"], args, lambda e, xs: _rearranging_rule(e, xs, fill))

        (result,) = packed.bind(eqn, body)
        if not classes.is_float(eqn.outvars[0]):
            return result
        return Codes(result, source.scale, source.zero_point, source.type)


class _Operands:
    """Operands of a region on integers: codes, and with them scales and zero points, each distinct one once."""

    def __init__(self, eqn: _compat.JaxprEqn, values: list[Any], encodings: bool = True) -> None:
        self.values: list[Any] = []
        self.roles: list[str] = []
        self.packed: list[tuple[Any, QuantType | None]] = []
        for role, value in zip(eqn.params["roles"], values, strict=True):
            if not isinstance(value, Codes):
                self.packed.append((self.position(value, role), None))
            elif encodings:
                numbers = self.position(value.scale, "scale"), self.position(value.zero_point, "zero_point")
                self.packed.append(((self.position(value.q, role), *numbers), value.type))
            else:
                self.packed.append((self.position(value.q, role), None))

    def position(self, value: Any, role: str) -> int:
        """Where an operand stands; it is added if it is none yet."""
        for k, known in enumerate(self.values):
            if known is value and self.roles[k] == role:
                return k
        self.values.append(value)
        self.roles.append(role)
        return len(self.values) - 1

    def unpack(self, args: Sequence[Any]) -> list[Any]:
        """What the float body reads, from the operands of the integer one."""
        return [
            args[where] if qtype is None else Codes(*(args[i] for i in where), qtype) for where, qtype in self.packed
        ]

    def bind(self, eqn: _compat.JaxprEqn, body: Any) -> list[Any]:
        """The region on these operands."""
        params = {k: eqn.params[k] for k in ("id", "kind")}
        return ops.region(body, *self.values, roles=tuple(self.roles), **params)


@dataclasses.dataclass
class _Results:
    """Stands for the float result of a fused region: its codes, per type and scale that readers want."""

    codes: dict[Any, Any]

    @staticmethod
    def key(pair: _compat.JaxprEqn) -> Any:
        return (pair.params["type"], *pair.invars[1:])


def _real(atom: Any, value: Any) -> Any:
    return value.real(atom.aval.dtype) if isinstance(value, Codes | Sum) else value


def _body_rule(eqn: _compat.JaxprEqn, values: list[Any], accumulator: Any) -> Sequence[Any] | None:
    """One equation of a region's body on codes: dequantize sinks below products, sums and views."""
    name, params = eqn.primitive.name, eqn.params
    coded = [v for v in values if isinstance(v, Codes | Sum)]
    if not coded:
        return _in_float32(eqn, values)
    if name in classes.PRODUCT and len(coded) == 2:
        pairs = itertools.product(*(v.factors() for v in values))
        products = [(m * n, contraction.integer_product(name, params, x, y)) for (m, x), (n, y) in pairs]
        return [Sum([_exact(acc, accumulator if n == 1 else accumulator * np.float32(n)) for n, acc in products])]
    if name == "reduce_sum":
        return [_exact(jnp.sum(values[0].shifted(), axis=params["axes"], dtype=jnp.int32), accumulator)]
    if name == "scatter-add":
        zeros = jnp.zeros(eqn.outvars[0].aval.shape, jnp.int32)
        return [_exact(scatters.bind(eqn, zeros, values[1], values[2].shifted()), accumulator)]
    if name in ("reduce_window_sum", "cumsum"):
        return [_exact(*_compat.bind(eqn, [values[0].shifted()]), accumulator)]
    if name == "mul" and len(coded) == 2:
        return [_exact(lax.mul(values[0].shifted(), values[1].shifted()), accumulator)]
    if name == "add" and {type(v) for v in coded} == {Codes, Sum}:
        product, other = values if isinstance(values[0], Sum) else values[::-1]
        if other.type == BIAS:
            return [product.plus(other.q)]
    if name in classes.IDENTITY or classes.is_float_cast(eqn):
        return [values[0]]
    return _in_float32(eqn, values)


def _rearranging_rule(eqn: _compat.JaxprEqn, values: list[Any], fill: Any) -> Sequence[Any] | None:
    """One equation of a view's body on codes: a number that it brings in becomes the code of that number.

    What a gather finds out of bounds would be NaN, which has no code: it is 0.
    """
    dtype = next((x.dtype for x, v in zip(values, eqn.invars, strict=True) if isinstance(v, _compat.Var)), None)
    code = lambda number: np.asarray(fill(number), dtype)[()]
    pairs = zip(eqn.invars, values, strict=True)
    values = [code(x) if isinstance(v, _compat.Literal) and classes.is_float(v) else x for v, x in pairs]
    if eqn.primitive.name == "gather" and "FILL" in str(eqn.params["mode"]) and classes.is_float(eqn.outvars[0]):
        number = eqn.params["fill_value"]
        number = int(code(0.0 if number is None or np.isnan(number) else number))
        return [eqn.primitive.bind(*values, **{**eqn.params, "fill_value": number})]
    if eqn.primitive.name in classes.PLACE and eqn.primitive.name != "dynamic_update_slice":
        return [scatters.bind(eqn, *values)]
    return _compat.bind(eqn, values)


def _in_float32(eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any]:
    """The equation on reals, float32 where its own type is narrower: integers do not round there."""
    pairs = zip(eqn.invars, values, strict=True)
    wide = [_at_least_float32(x, v.aval.dtype) if classes.is_float(v) else x for v, x in pairs]
    if classes.is_float_cast(eqn):
        return [_at_least_float32(wide[0], eqn.outvars[0].aval.dtype)]
    return _compat.bind(eqn, wide)


def _at_least_float32(value: Any, dtype: Any) -> Any:
    dtype = dtype if dtype.itemsize >= 4 else np.float32
    return value.real(dtype) if isinstance(value, Codes | Sum) else lax.convert_element_type(value, dtype)


def _table_rule(eqn: _compat.JaxprEqn, values: list[Any], accumulator: Any) -> Sequence[Any]:
    """One equation of a table's body: it is evaluated as it stands, so that its own roundings are kept."""
    del accumulator
    return _compat.bind(eqn, [_real(v, x) for v, x in zip(eqn.invars, values, strict=True)])


def _wide_rule(eqn: _compat.JaxprEqn, values: list[Any], accumulator: Any) -> Sequence[Any]:
    """One equation of a wide body, on reals in float32 at least."""
    del accumulator
    return _in_float32(eqn, values)


def _exact(acc: Any, scale: Any) -> Codes:
    return Codes(acc, scale, jnp.int32(0), BIAS)


def per_op_pairs(program: Program) -> int:
    """Pairs that a placement per op would have: one per activation operand of every op inside a region."""
    count = 0
    for eqn in program.eqns:
        if not _regions.is_region(eqn):
            continue
        roles = dict(zip(_compat.invars_of(eqn.params["body"]), eqn.params["roles"], strict=True))
        constant = {v for v, role in roles.items() if role in ("weight", "bias", "constant")}
        for inner in _compat.open_jaxpr(eqn.params["body"]).eqns:
            free = [v for v in inner.invars if isinstance(v, _compat.Var) and v not in constant]
            constant.update(inner.outvars if not free else ())
            count += len(free)
    return count


def pairs_left(program: Program) -> int:
    """Dequantizes whose result is quantized again, with nothing between: pairs that could have been removed."""
    return sum(
        1
        for eqn in program.eqns
        if eqn.primitive is ops.dequantize_p
        and any(user.primitive is ops.quantize_p for user, _ in program.users.get(eqn.outvars[0], []))
    )
