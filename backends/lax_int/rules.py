"""Lowering rules, keyed by the primitive's name: what an equation of a body does to known, int and real values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import bounds, products
from qcompiler.backends.lax_int.values import Int, Known, Real, Term
from qcompiler.errors import OverflowProofError, QuantizationError
from qcompiler.ir import _compat, classes, contraction, identity
from qcompiler.numerics import fixed_point
from qcompiler.numerics.types import QuantType


@dataclasses.dataclass
class Context:
    """Where a rule works: the region's id, and how it makes an array a weight of the program."""

    region: str
    weight: Callable[[str, np.ndarray], Any]

    def name(self, suffix: str) -> str:
        """A weight name of this region."""
        return f"{self.region}:{suffix}"


#: rule(context, equation, values) -> value
RULES: dict[str, Callable[[Context, _compat.JaxprEqn, list[Any]], Any]] = {}


def rule(*names: str) -> Callable[[Any], Any]:
    """Registers a rule for primitives."""

    def register(fun: Any) -> Any:
        RULES.update(dict.fromkeys(names, fun))
        return fun

    return register


def apply(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    """The value of an equation."""
    if all(isinstance(v, Known) for v in values):
        return known(eqn, values)
    name = eqn.primitive.name
    if name not in RULES:
        raise QuantizationError(f"lax_int has no rule for {identity.describe(eqn)} in region {context.region}")
    return RULES[name](context, eqn, values)


def known(eqn: _compat.JaxprEqn, values: list[Known]) -> Known:
    """An equation on known arrays is computed now."""
    with jax.ensure_compile_time_eval():
        (result,) = _compat.bind(eqn, [jnp.asarray(v.value) for v in values])
    if eqn.primitive.name == "convert_element_type" and values[0].traced is not None:
        return Known(np.asarray(result), _compat.bind(eqn, [values[0].traced])[0])
    return Known(np.asarray(result))


def traced(value: Any) -> Any:
    """The traced integers of an operand."""
    if isinstance(value, Int):
        return value.x
    if value.traced is not None:
        return value.traced
    return value.value[()] if value.value.ndim == 0 else value.value


# Integers


@rule("convert_element_type")
def _convert(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    (x,) = values
    if isinstance(x, Int):
        return Int(_compat.bind(eqn, [x.x])[0], x.low, x.high)
    return x


@rule("add", "sub")
def _add(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    sign = 1 if eqn.primitive.name == "add" else -1
    a, b = values
    if isinstance(a, Int) or isinstance(b, Int):
        low, high = bounds.prove(eqn, *bounds.of_sum(a, b, sign), context.region)
        return Int(_compat.bind(eqn, [traced(a), traced(b)])[0], low, high)
    if isinstance(b, Known):
        return a.shifted(sign * b.value.astype(np.float64))
    b = b.scaled(np.float64(sign))
    if isinstance(a, Known):
        return b.shifted(a.value.astype(np.float64))
    if a.clamped or b.clamped:
        raise QuantizationError(f"{identity.describe(eqn)}: a clamped value is summed inside region {context.region}")
    return a.plus(b)


@rule("mul", "div")
def _multiply(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    a, b = values
    if isinstance(a, Int) or isinstance(b, Int):
        low, high = bounds.prove(eqn, *bounds.of_product(a, b), context.region)
        return Int(_compat.bind(eqn, [traced(a), traced(b)])[0], low, high)
    real, held = (a, b) if isinstance(b, Known) else (b, a)
    factor = held.value.astype(np.float64)
    return real.scaled(1 / factor if eqn.primitive.name == "div" else factor)


@rule("neg")
def _negate(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    return values[0].scaled(np.float64(-1))


@rule("max", "min", "clamp")
def _clamp(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    real = next(v for v in values if isinstance(v, Real))
    if eqn.primitive.name == "clamp":
        low, _, high = values
        return real.at_least(low.value.astype(np.float64)).at_most(high.value.astype(np.float64))
    held = next(v for v in values if isinstance(v, Known)).value.astype(np.float64)
    return real.at_least(held) if eqn.primitive.name == "max" else real.at_most(held)


@rule("dot_general", "conv_general_dilated")
def _product(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    intervals = [bounds.collapse(*bounds.interval(v)) for v in values]
    operands = [traced(v) for v in values]
    if eqn.primitive.name == "dot_general":
        multiply = lambda a, b: products.dot(a, b, eqn.params["dimension_numbers"])
    else:
        kernel = values[1].value if isinstance(values[1], Known) else None
        # The kernel's values are those of the operand as it stands, not of what `through_int8` makes of it.
        multiply = lambda a, b: products.conv(a, b, eqn.params, kernel if b is operands[1] else None)
    x = products.through_int8(multiply, operands, intervals)
    held = next((k for k, v in enumerate(values) if isinstance(v, Known)), None)
    if held is None:
        depth = contraction.depth(eqn)
        corners = [a * b for a in intervals[0] for b in intervals[1]]
        low, high = np.int64(min(corners)) * depth, np.int64(max(corners)) * depth
        return Int(x, *bounds.prove(eqn, low, high, context.region))
    weight = np.asarray(values[held].value)
    rest = [d for d in range(weight.ndim) if d not in contraction.channel_dims(eqn, held)]
    ends = bounds.of_contraction(intervals[1 - held], weight, rest)
    return Int(x, *bounds.prove(eqn, *(contraction.on_result(b, eqn, held) for b in ends), context.region))


@rule("reduce_sum")
def _sum(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    (x,) = values
    count = int(np.prod([eqn.invars[0].aval.shape[d] for d in eqn.params["axes"]]))
    low, high = bounds.collapse(x.low, x.high)
    return Int(_compat.bind(eqn, [x.x])[0], *bounds.prove(eqn, low * count, high * count, context.region))


@rule("pad")
def _pad(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    x, fill = values
    low, high = bounds.collapse(x.low, x.high)
    fill_low, fill_high = bounds.collapse(*bounds.interval(fill))
    return Int(_compat.bind(eqn, [x.x, traced(fill)])[0], min(low, fill_low), max(high, fill_high))


@rule(*sorted(classes.VIEW))
def _view(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    (x, *rest) = values
    if not isinstance(x, Int):
        raise QuantizationError(f"{identity.describe(eqn)}: a view of reals inside region {context.region}")
    return Int(_compat.bind(eqn, [x.x, *map(traced, rest)])[0], *bounds.collapse(x.low, x.high))


@rule(*sorted(classes.IDENTITY - {"copy"}))
def _identity(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    return values[0]


# Between integers and reals


@rule("qc_dequantize")
def _dequantize(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    q, scale, zero = values
    shifted = fixed_point_shift(eqn, q, zero, context)
    return Real([Term(shifted, np.asarray(scale.value).astype(np.float64))])


def fixed_point_shift(eqn: _compat.JaxprEqn, q: Int, zero: Known, context: Context) -> Int:
    """q - zero point, int32."""
    x = lax.convert_element_type(q.x, jnp.int32)
    if not np.any(zero.value):
        return Int(x, q.low, q.high)
    low, high = bounds.prove(eqn, *bounds.of_sum(q, zero, -1), context.region)
    return Int(lax.sub_p.bind(x, traced(zero)), low, high)


@rule("qc_quantize")
def _quantize(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    real, scale, zero = values
    qtype: QuantType = eqn.params["type"]
    return quantize_real(context, real, np.asarray(scale.value), np.asarray(zero.value), qtype)


def quantize_real(context: Context, real: Real, scale: np.ndarray, zero: np.ndarray, qtype: QuantType) -> Int:
    """A real sum to codes: each term rescaled to output steps (with guard bits where there are several), one rounding.

    Everything below is exact, so that it can be implemented again from here (`debug/reference.py` does).

    The sum. A real value is sum_k s_k x_k + c, clamped to [low, high]; x_k are integers, all else is known, in float64.
    `dequantize` gives one term, x = q - z, s = float64(float32 scale). A factor f multiplies every s_k, c and both
    ends, in program order (x / f is x times 1/f); a negative one swaps the ends, an open end stays open. An added
    constant is added to c and to both ends; a sum lists the terms of the left operand first; max and min by a bound
    move both ends. Terms of equal scale (equal shapes and values) are first added as integers, each into the earliest
    such term with which its bounds fit int32.

    One term and c / s_out = 0 everywhere: t = rescale(x, s / s_out) + z.
    Otherwise, with r_k = s_k / s_out and reach R = sum_k max|r_k| B_k + max|c / s_out + z|, B_k the bound of |x_k| (the
    largest of |r_k| B_k over channels, terms added in order):
      g = the largest of 0..14 with R 2**g <= 2**27; if R > 2**27, g = -min(K, A), with K the least for which
        R 2**-K <= 2**27 and 2**A at most half of the smallest |r_k| that is not 0 (A = 0 if there is no such A > 0);
      t = (sum_k rescale(x_k, r_k 2**g) + rint((c / s_out + z) 2**g) + 2**(g-1)) >> g for g > 0, without half and shift
        for g = 0, and clamped to +-2**(30+g), then << -g, for g < 0.
    So where terms are wide and nearly cancel, the sum is in coarser units, but still finer than the terms' own steps.
    If even R 2**g > 2**27, rescale k saturates x_k at floor((2**27 / number of terms) / |r_k 2**g|): the bounds of
    accumulators are pessimistic, and such values would be far beyond the range of the result.
    The code is min(max(t, l), h), with l and h the codes of the ends by the entry's formula in float32, or the ends of
    the type. `rescale` and the entry are specified in `numerics.fixed_point`.

    Bounds of integers, which R depends on: codes have those of their dtype, and where `dequantize` reads them those of
    their type; sums, differences and elementwise products interval arithmetic. An interval used as one for a whole
    array is widened to hold 0. It is used so by: views (shape changes, maxima), which have their operand's; a sum of n
    elements, n times it; padding, with the number padded; a product of two activations of depth n, n times the extreme
    corner; a product with a weight w, per channel of the result sum(max(w, 0)) low + sum(min(w, 0)) high, and likewise
    above.

    Raises:
      OverflowProofError: the constant exceeds 2**30 at g.
    """
    step = scale.astype(np.float64)
    terms = _merged(real.terms, context)
    label = qtype.name
    offset = real.constant / step
    if len(terms) == 1 and not np.any(offset):
        total = _rescaled(context, terms[0], terms[0].scale / step, f"{label}/0")
        if np.any(zero):
            total = lax.add_p.bind(total, _number(context, zero, f"{label}/zero_point"))
    else:
        ratios = [t.scale / step for t in terms]
        reach = sum(float(np.max(np.abs(r) * t.int.magnitude, initial=0)) for r, t in zip(ratios, terms, strict=True))
        reach += float(np.max(np.abs(offset + zero), initial=0))
        guard = fixed_point.guard_bits(
            reach, min(float(np.min(np.abs(r), where=r != 0, initial=np.inf)) for r in ratios)
        )
        constant = np.rint((offset + zero) * 2.0**guard)
        if np.max(np.abs(constant), initial=0) > 2.0**30:
            raise OverflowProofError(
                f"a constant added in region {context.region} is {np.max(np.abs(offset)):.3g} steps of its output, too "
                "large for int32: calibrate on data that reaches it, or keep the layer in float by a qc.Rule"
            )
        most = 2.0**fixed_point.TERM_BITS
        largest = most / len(terms) if reach * 2.0**guard > most else None
        parts = [
            _rescaled(context, t, r * 2.0**guard, f"{label}/{k}", largest)
            for k, (t, r) in enumerate(zip(terms, ratios, strict=True))
        ]
        total = parts[0]
        for part in parts[1:]:
            total = lax.add_p.bind(total, part)
        if np.any(constant):
            total = lax.add_p.bind(total, _number(context, constant, f"{label}/constant"))
        total = fixed_point.round_guard(total, guard)
    ends = [None if b is None else fixed_point.quantize_number(b, scale, zero, qtype) for b in (real.low, real.high)]
    free = (qtype.qmin, qtype.qmax)
    low, high = (
        None if b is None or np.all(b == f) else _number(context, b, f"{label}/{which}")
        for b, f, which in zip(ends, free, ("low", "high"), strict=True)
    )
    q = fixed_point.clamp_to(total, qtype, low, high)
    return Int(q, np.int64(qtype.qmin), np.int64(qtype.qmax))


def _number(context: Context, value: np.ndarray, name: str) -> Any:
    """int32: a number stays a literal, an array becomes a weight."""
    value = np.asarray(value).astype(np.int32)
    return value[()] if value.ndim == 0 else context.weight(context.name(name), value)


def _rescaled(context: Context, term: Term, ratio: np.ndarray, label: str, largest: float | None = None) -> Any:
    multiplier = fixed_point.multiplier_for(ratio, term.int.magnitude, largest)
    rank = term.int.x.ndim

    def constant(name: str, value: np.ndarray) -> Any:
        value = value.reshape((1,) * (rank - value.ndim) + value.shape)
        return context.weight(context.name(f"{label}/{name}"), value)

    return fixed_point.rescale(term.int.x, multiplier, constant=constant)


def _merged(terms: list[Term], context: Context) -> list[Term]:
    """Terms with equal scales added as integers, exactly, where int32 holds the sum."""
    out: list[Term] = []
    for term in terms:
        for k, known_term in enumerate(out):
            same = np.shape(known_term.scale) == np.shape(term.scale) and np.array_equal(known_term.scale, term.scale)
            low, high = bounds.of_sum(known_term.int, term.int, 1)
            if same and max(-np.min(low), np.max(high)) <= bounds.INT32.max:
                out[k] = Term(Int(lax.add_p.bind(known_term.int.x, term.int.x), low, high), term.scale)
                break
        else:
            out.append(term)
    return out
