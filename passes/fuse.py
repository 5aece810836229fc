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
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler import ops
from qcompiler.errors import VerificationError
from qcompiler.ir import _compat, classes, contraction, replay, scatters
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, build
from qcompiler.numerics import fixed_point
from qcompiler.numerics.types import BIAS, QuantType
from qcompiler.passes import _regions


@dataclasses.dataclass
class Codes:
    """Integers that stand for a real value: (q - zero_point) * scale."""

    q: Any
    scale: Any
    zero_point: Any
    type: QuantType

    def real(self, dtype: Any = np.float32) -> Any:
        """The value as float."""
        value = ops.dequantize(self.q, self.scale, self.zero_point, self.type)
        return value if value.dtype == dtype else value.astype(dtype)

    def shifted(self) -> Any:
        """q - zero_point, int32."""
        q = self.q.astype(jnp.int32)
        return q if self.type.symmetric else q - self.zero_point

    def factors(self) -> list[tuple[int, Any]]:
        """(n, x) pairs with q - zero_point = sum of n * x; every x is an int8 code less a zero point, int32.

        Of b > 8 bits there are two, q = 2**n high + low + 2**(n-1) with n = b - 8 and high = q >> n; the zero point is
        taken apart alike.
        """
        n = self.type.bits - 8
        if not 0 < n <= 8:
            return [(1, self.shifted())]
        z = self.zero_point
        zeros = (None, np.int32(-1 << (n - 1))) if self.type.symmetric else (_high(z, n), _low(z, n))
        codes = [q.astype(jnp.int8).astype(jnp.int32) for q in (_high(self.q, n), _low(self.q, n))]
        high, low = (q if z is None else lax.sub_p.bind(q, z) for q, z in zip(codes, zeros, strict=True))
        return [(1 << n, high), (1, low)]


def _high(x: Any, n: int) -> Any:
    return lax.shift_right_arithmetic_p.bind(x, x.dtype.type(n))


def _low(x: Any, n: int) -> Any:
    """x - 2**n _high(x, n) - 2**(n-1)"""
    return lax.sub_p.bind(lax.and_p.bind(x, x.dtype.type((1 << n) - 1)), x.dtype.type(1 << (n - 1)))


@dataclasses.dataclass
class Sum:
    """A real value as a sum of exact int32 accumulators, the one of the finest scale last."""

    parts: list[Codes]

    def real(self, dtype: Any = np.float32) -> Any:
        """The value as float."""
        value = functools.reduce(lax.add, [part.real() for part in self.parts])
        return value if value.dtype == dtype else value.astype(dtype)

    def plus(self, bias: Any) -> Sum:
        """With an int32 bias of the finest scale."""
        last = self.parts[-1]
        return Sum([*self.parts[:-1], dataclasses.replace(last, q=lax.add_p.bind(last.q, bias))])


def fuse(program: Program) -> Program:
    """See the module's docstring. Notes `pairs_before` and `pairs_after`."""
    return _Fuser(program).run()


class _Fuser:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants = Constants(program)
        self.types = program.notes["types"]

    def run(self) -> Program:
        program = self.program

        def make(builder: Builder, *inputs: Any) -> list[Any]:
            args = [*(builder.get(n) for n in program.weights), *inputs]
            outs = replay.evaluate(program.jaxpr, args, lambda eqn, values: self.rule(builder, eqn, values))
            return [_real(v, x) for v, x in zip(program.outvars, outs, strict=True)]

        fields = {"stats": program.stats, "notes": program.notes, "stage": "fuse"}
        fused = build(make, program.weights, program.input_avals, program.signature, **fields)
        return fused.note("pairs_before", per_op_pairs(program)).note("pairs_after", pairs_left(fused))

    def rule(self, builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if eqn.primitive is ops.fake_quantize_p:
            return [self.pair(builder, eqn, values)]
        if eqn.primitive is ops.dequantize_p:
            return [Codes(*values, eqn.params["type"])]
        if _regions.is_region(eqn) and eqn.params["id"] in self.types:
            return [self.region(builder, eqn, values)]
        if eqn.primitive.name == "convert_element_type" and isinstance(values[0], Codes) and values[0].type == BIAS:
            # A bias of half precision is int32 all the same.
            return values
        reals = [_real(v, x) for v, x in zip(eqn.invars, values, strict=True)]
        # A region that the recipe keeps in float is no region any more: nothing will lower it.
        return replay.evaluate(eqn.params["body"], reals) if _regions.is_region(eqn) else _compat.bind(eqn, reals)

    def pair(self, builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Codes:
        x, scale, zero = values
        qtype = eqn.params["type"]
        if isinstance(x, _Results):
            return Codes(x.codes[x.key(eqn)], scale, zero, qtype)
        if isinstance(x, Codes):
            if x.type == qtype and (x.scale is scale or self.same_encoding(eqn)):
                return x
            return Codes(ops.requantize(x.q, x.scale, x.zero_point, scale, zero, x.type, qtype), scale, zero, qtype)
        if eqn.invars[0] in self.constants:
            codes = fixed_point.quantize_number(*map(self.constants.value, eqn.invars), qtype).astype(qtype.dtype)
            name, own = self.program.weight_of[eqn.invars[1]].removesuffix("/scale"), self.program.ids[eqn.invars[0]]
            own = own.removeprefix("weight:")
            # In an encoding of others, what is known is named after itself too.
            name = name if name.startswith(own) else f"{own}@{name}"
            return Codes(builder.weight(name, codes), scale, zero, qtype)
        return Codes(ops.quantize(x, scale, zero, qtype), scale, zero, qtype)

    def same_encoding(self, eqn: _compat.JaxprEqn) -> bool:
        """Whether a pair behind another has its numbers, though they are those of another value."""
        made = self.program.producer.get(eqn.invars[0])
        if made is None or made.primitive is not ops.fake_quantize_p:
            return False
        numbers = [[self.constants.value(v) for v in e.invars[1:]] for e in (made, eqn)]
        return all(np.array_equal(a, b) for a, b in zip(*numbers, strict=True))

    def encoding_of(self, var: Any) -> list[Any]:
        """The variables of scale and zero point of the pair (or dequantize) behind a region's operand."""
        made = self.program.producer[var]
        while made.primitive.name == "convert_element_type":
            made = self.program.producer[made.invars[0]]
        return made.invars[1:3]

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
        return [_exact(lax.mul_p.bind(values[0].shifted(), values[1].shifted()), accumulator)]
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
