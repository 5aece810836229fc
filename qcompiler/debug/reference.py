"""An independent NumPy interpreter of fused programs: the integers that a backend must give, from the written contract.

    reference.evaluate(program, inputs)                # a program after fuse or fold_zero_points, in NumPy int64
    reference.region(eqn, operands)                    # one region of it

It shares no arithmetic with the backends: nothing of `numerics.fixed_point`, of `backends` or of `jax.lax` is used. The
contract it is written from stands in `numerics.fixed_point` (entry, exit, rescale) and in `quantize_real` of
`backends/lax_int/rules.py` (sums of scaled integers, and the bounds that decide their guard bits). The one exception is
a table, which is defined as the float function at every code, JAX evaluating it op by op.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcompiler.errors import OverflowProofError, QuantizationError
from qcompiler.ir import _compat

#: Roles of region operands that are known before any input.
KNOWN_ROLES = frozenset({"weight", "bias", "scale", "zero_point", "constant"})

_VIEWS = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice rev copy reduce_max reduce_min reduce_window_max"
    " reduce_window_min cummax cummin".split()
)


def evaluate(program: Any, inputs: Sequence[Any], io: str = "float") -> list[np.ndarray]:
    """Runs a program after `fuse` or `fold_zero_points`.

    Args:
      program: a `Program` without islands.
      inputs: flat inputs; with `io="int"` the codes of those that `input_codes` quantizes.
      io: as of `lower`: `float`, or `int` for codes in and codes out.

    Raises:
      QuantizationError: an equation stays float, so that there is no integer it must give.
    """
    env: dict[Any, Any] = {v: np.asarray(w) for v, w in zip(program.invars, program.weights.values(), strict=False)}
    env.update((v, np.asarray(x)) for v, x in zip(program.input_vars, inputs, strict=True))
    entries = _entries(program) if io == "int" else {}
    results = {v for v in program.outvars if isinstance(v, _compat.Var)}
    for eqn in program.eqns:
        values = [_read(env, v) for v in eqn.invars]
        name = eqn.primitive.name
        if name == "qc_region":
            found = region(eqn, values)
        elif name == "qc_quantize":
            found = [values[0] if eqn.invars[0] in entries else quantize(*values, eqn.params["type"])]
        elif name == "qc_dequantize":
            as_codes = io == "int" and eqn.outvars[0] in results
            found = [values[0] if as_codes else dequantize(*values)]
        elif name == "qc_requantize":
            found = requantize(eqn, values)
        else:
            raise QuantizationError(f"{name} is an island: the reference interprets integers only")
        env.update(zip(eqn.outvars, found, strict=True))
    return [_read(env, v) for v in program.outvars]


def input_codes(program: Any, inputs: Sequence[Any]) -> list[np.ndarray]:
    """Inputs as `io="int"` takes them: the codes of every input that one quantize alone reads, the others unchanged."""
    entries = _entries(program)
    weights = dict(zip(program.invars, program.weights.values(), strict=False))
    codes = []
    for var, x in zip(program.input_vars, inputs, strict=True):
        eqn = entries.get(var)
        scale_and_zero = [] if eqn is None else [weights[v] for v in eqn.invars[1:]]
        codes.append(np.asarray(x) if eqn is None else quantize(x, *scale_and_zero, eqn.params["type"]))
    return codes


def _entries(program: Any) -> dict[Any, Any]:
    found = {}
    for var in program.input_vars:
        readers = [eqn for eqn in program.eqns for v in eqn.invars if v is var]
        is_result = any(v is var for v in program.outvars)
        if len(readers) == 1 and not is_result and readers[0].primitive.name == "qc_quantize":
            found[var] = readers[0]
    return found


# The contract of single values


def quantize(x: Any, scale: Any, zero_point: Any, qtype: Any) -> np.ndarray:
    """clamp(rint(x * float32(1 / s)) + z), half to even; NaN becomes the zero point; the steps saturate at 2**24."""
    steps = _steps(x, scale)
    steps = np.where(np.isnan(steps), np.float32(0), steps)
    codes = np.clip(steps, -(2.0**24), 2.0**24).astype(np.int64) + np.asarray(zero_point).astype(np.int64)
    return np.clip(codes, qtype.qmin, qtype.qmax).astype(qtype.dtype)


def dequantize(q: Any, scale: Any, zero_point: Any) -> np.ndarray:
    """(q - z) * s in float32."""
    difference = np.asarray(q).astype(np.int64) - np.asarray(zero_point).astype(np.int64)
    return difference.astype(np.float32) * np.asarray(scale, np.float32)


def _steps(x: Any, scale: Any) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return np.rint(np.asarray(x).astype(np.float32) * (np.float32(1) / np.asarray(scale, np.float32)))


def rescale(x: Any, ratio: Any, largest: float | None = None) -> np.ndarray:
    """floor(x * M * 2**(left - right - 32) + 1/2), M the 31-bit multiplier of `ratio`; int64 in, int64 out.

    With ratio = m * 2**e, m in [1/2, 1): M = rint(m * 2**31), carried into e if it reaches 2**31; right =
    max(1, -e - 1), left = right + e + 1, at most 30. Before that, x saturates at 2**(30 - left) where left > 0, and at
    floor(largest / |ratio|). Ratios with right > 31 become 0.
    """
    x, ratio = np.broadcast_arrays(np.asarray(x, np.int64), np.asarray(ratio, np.float64))
    out = np.empty(x.shape, np.int64)
    for number in np.unique(ratio):
        where = ratio == number
        out[where] = _rescale_by(x[where], float(number), largest)
    return out


def _rescale_by(x: np.ndarray, ratio: float, largest: float | None) -> np.ndarray:
    mantissa, exponent = math.frexp(abs(ratio))
    multiplier = round(math.ldexp(mantissa, 31))
    if multiplier == 1 << 31:
        multiplier, exponent = 1 << 30, exponent + 1
    right = max(1, -exponent - 1)
    if multiplier == 0 or right > 31:
        return np.zeros_like(x)
    left = min(right + exponent + 1, 30)
    limit = 1 << (30 - left) if left > 0 else (1 << 31) - 1
    if largest is not None:
        limit = min(limit, math.floor(largest / abs(ratio)))
    product = (np.clip(x, -limit, limit) << left) * (multiplier if ratio > 0 else -multiplier)
    return (product + (1 << (31 + right))) >> (32 + right)


# Values inside a region; a known array is a plain NumPy array


@dataclasses.dataclass
class _Ints:
    """Exact integers, and the bounds that the contract gives them (int64, broadcasting against the values)."""

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def one_interval(self) -> tuple[int, int]:
        """One interval for all elements, zero among them."""
        return min(0, int(np.min(self.low))), max(0, int(np.max(self.high)))


@dataclasses.dataclass
class _Real:
    """min(max(sum of scale * ints + constant, low), high), scales in float64; infinite ends where nothing clamps."""

    terms: list[tuple[_Ints, np.ndarray]]
    constant: Any = 0.0
    low: Any = -np.inf
    high: Any = np.inf

    def times(self, factor: np.ndarray) -> _Real:
        ends = np.where(factor < 0, self.high, self.low), np.where(factor < 0, self.low, self.high)
        # An end at infinity stays there, of the sign it has below or above; zero times infinity is no number.
        low, high = (
            np.where(np.isinf(e), s, np.where(np.isinf(e), 0, e) * factor) for e, s in zip(ends, _ENDS, strict=True)
        )
        return _Real([(q, s * factor) for q, s in self.terms], self.constant * factor, low, high)

    def plus_number(self, offset: np.ndarray) -> _Real:
        return _Real(self.terms, self.constant + offset, self.low + offset, self.high + offset)

    def plus(self, other: _Real) -> _Real:
        if np.isfinite([np.max(self.low), np.min(self.high), np.max(other.low), np.min(other.high)]).any():
            raise QuantizationError("a clamped value is summed inside a region")
        return _Real([*self.terms, *other.terms], self.constant + other.constant)


_ENDS = (-np.inf, np.inf)


def region(eqn: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    """The results of one fused region.

    Args:
      eqn: the region equation.
      operands: one array per operand, the codes of activations and the weights alike.
    """
    body = _compat.open_jaxpr(eqn.params["body"])
    if eqn.params["kind"] == "table":
        return _table(eqn, body, operands)
    env: dict[Any, Any] = {}
    for var, role, operand in zip(body.invars, eqn.params["roles"], operands, strict=True):
        array = np.asarray(operand)
        if role in KNOWN_ROLES:
            env[var] = array
        else:
            info = np.iinfo(array.dtype)
            env[var] = _Ints(array.astype(np.int64), np.int64(info.min), np.int64(info.max))
    for inner in body.eqns:
        values = [_read(env, v) for v in inner.invars]
        env[inner.outvars[0]] = _apply(inner, values)
    results = [_read(env, v) for v in body.outvars]
    return [np.asarray(r.values).astype(v.aval.dtype) for r, v in zip(results, eqn.outvars, strict=True)]


def _read(env: dict[Any, Any], atom: Any) -> Any:
    return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, _compat.Literal) else env[atom]


def _known(*values: Any) -> bool:
    return all(isinstance(v, np.ndarray | np.generic) for v in values)


def _apply(eqn: Any, values: list[Any]) -> Any:
    name = eqn.primitive.name
    if name in _VIEWS:
        return _view(eqn, values[0])
    if name not in _RULES:
        raise QuantizationError(f"the reference has no rule for {name}")
    return _RULES[name](eqn, values)


def _bounds(value: Any) -> tuple[Any, Any]:
    if isinstance(value, _Ints):
        return value.low, value.high
    return value.astype(np.int64), value.astype(np.int64)


def _whole(value: Any) -> np.ndarray:
    return value.values if isinstance(value, _Ints) else value.astype(np.int64)


def _fits(eqn: Any, ints: _Ints) -> _Ints:
    if max(-int(np.min(ints.low)), int(np.max(ints.high))) > 2**31 - 1:
        raise OverflowProofError(f"{eqn.primitive.name}: the int32 accumulator could overflow")
    return ints


def _convert(eqn: Any, values: list[Any]) -> Any:
    return values[0].astype(eqn.params["new_dtype"]) if _known(values[0]) else values[0]


def _add(eqn: Any, values: list[Any]) -> Any:
    a, b = values
    subtract = eqn.primitive.name == "sub"
    if _known(a, b):
        return a - b if subtract else a + b
    if isinstance(a, _Ints) or isinstance(b, _Ints):
        (a_low, a_high), (b_low, b_high) = _bounds(a), _bounds(b)
        if subtract:
            return _fits(eqn, _Ints(_whole(a) - _whole(b), a_low - b_high, a_high - b_low))
        return _fits(eqn, _Ints(_whole(a) + _whole(b), a_low + b_low, a_high + b_high))
    if isinstance(b, _Real):
        b = b.times(np.float64(-1)) if subtract else b
        return a.plus(b) if isinstance(a, _Real) else b.plus_number(a.astype(np.float64))
    return a.plus_number(-b.astype(np.float64) if subtract else b.astype(np.float64))


def _multiply(eqn: Any, values: list[Any]) -> Any:
    a, b = values
    if _known(a, b):
        return a / b if eqn.primitive.name == "div" else a * b
    if isinstance(a, _Ints) or isinstance(b, _Ints):
        ends = np.broadcast_arrays(*(x * y for x in _bounds(a) for y in _bounds(b)))
        return _fits(eqn, _Ints(_whole(a) * _whole(b), np.minimum.reduce(ends), np.maximum.reduce(ends)))
    real, number = (a, b) if isinstance(a, _Real) else (b, a)
    number = number.astype(np.float64)
    return real.times(1 / number if eqn.primitive.name == "div" else number)


def _negate(eqn: Any, values: list[Any]) -> Any:
    return -values[0] if _known(values[0]) else values[0].times(np.float64(-1))


def _clamp(eqn: Any, values: list[Any]) -> Any:
    name = eqn.primitive.name
    if name == "clamp":
        least, real, most = values
    else:
        real, bound = values if isinstance(values[0], _Real) else values[::-1]
        least, most = (bound, None) if name == "max" else (None, bound)
    low, high = real.low, real.high
    if least is not None:
        low, high = np.maximum(low, least.astype(np.float64)), np.maximum(high, least.astype(np.float64))
    if most is not None:
        low, high = np.minimum(low, most.astype(np.float64)), np.minimum(high, most.astype(np.float64))
    return _Real(real.terms, real.constant, low, high)


def _reduce_sum(eqn: Any, values: list[Any]) -> Any:
    axes = tuple(eqn.params["axes"])
    if _known(values[0]):
        return values[0].sum(axis=axes, dtype=values[0].dtype)
    count = math.prod(values[0].values.shape[d] for d in axes)
    low, high = values[0].one_interval()
    return _fits(eqn, _Ints(values[0].values.sum(axis=axes), np.int64(low * count), np.int64(high * count)))


def _pad(eqn: Any, values: list[Any]) -> Any:
    x, fill = values
    low, high = x.one_interval()
    number = int(fill)
    padded = _spread_and_pad(x.values, eqn.params["padding_config"], number)
    return _Ints(padded, np.int64(min(low, number)), np.int64(max(high, number)))


def _spread_and_pad(x: np.ndarray, config: Sequence[tuple[int, int, int]], fill: int) -> np.ndarray:
    """Padding per dimension as (low, high, interior); negative padding cuts off."""
    for axis, (low, high, interior) in enumerate(config):
        n = x.shape[axis]
        spread = n + max(0, n - 1) * interior
        shape = list(x.shape)
        shape[axis] = spread + low + high
        out = np.full(shape, fill, x.dtype)
        target = low + (interior + 1) * np.arange(n)
        inside = (target >= 0) & (target < shape[axis])
        np.moveaxis(out, axis, 0)[target[inside]] = np.moveaxis(x, axis, 0)[inside]
        x = out
    return x


# Products


def _product(eqn: Any, values: list[Any]) -> Any:
    dot = eqn.primitive.name == "dot_general"
    acc = (_dot if dot else _conv)(_whole(values[0]), _whole(values[1]), eqn.params)
    if _known(values[0]) == _known(values[1]):
        (a, b), (c, d) = values[0].one_interval(), values[1].one_interval()
        corners = [a * c, a * d, b * c, b * d]
        depth = _depth(eqn)
        low, high = np.int64(min(corners) * depth), np.int64(max(corners) * depth)
        return _fits(eqn, _Ints(acc, low, high))
    k = 0 if _known(values[0]) else 1
    low, high = values[1 - k].one_interval()
    # Every weight meets the end of the interval that is worst for it, channel by channel of the result.
    positive, negative = np.maximum(_whole(values[k]), 0), np.minimum(_whole(values[k]), 0)
    least = _per_channel(eqn, k, positive * low + negative * high, acc.ndim)
    most = _per_channel(eqn, k, positive * high + negative * low, acc.ndim)
    return _fits(eqn, _Ints(acc, least, most))


def _depth(eqn: Any) -> int:
    shape = eqn.invars[1].aval.shape
    if eqn.primitive.name == "conv_general_dilated":
        return math.prod(shape) // shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    (_, contract), _ = eqn.params["dimension_numbers"]
    return math.prod(shape[d] for d in contract)


def _per_channel(eqn: Any, k: int, weight: np.ndarray, rank: int) -> np.ndarray:
    """Sums of an array over what the product contracts, in the layout of the result (size one elsewhere)."""
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        sums = np.moveaxis(weight, numbers.rhs_spec[0], 0).reshape(weight.shape[numbers.rhs_spec[0]], -1).sum(axis=1)
        return sums.reshape([-1 if d == numbers.out_spec[1] else 1 for d in range(rank)])
    contract, batch = (dims[k] for dims in eqn.params["dimension_numbers"])
    free = [d for d in range(weight.ndim) if d not in contract and d not in batch]
    sums = (
        weight.transpose(*batch, *free, *contract).reshape(*(weight.shape[d] for d in (*batch, *free)), -1).sum(axis=-1)
    )
    ones = (1,) * (rank - sums.ndim)
    between, after = (ones, ()) if k == 1 else ((), ones)
    head, tail = sums.shape[: len(batch)], sums.shape[len(batch) :]
    return sums.reshape(*head, *between, *tail, *after)


def _dot(lhs: np.ndarray, rhs: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    sides = []
    for x, contract, batch, last in ((lhs, lhs_contract, lhs_batch, True), (rhs, rhs_contract, rhs_batch, False)):
        free = [d for d in range(x.ndim) if d not in contract and d not in batch]
        groups, rows, depth = ([x.shape[d] for d in dims] for dims in (batch, free, contract))
        flat = x.transpose(*batch, *(free if last else contract), *(contract if last else free))
        inner = (math.prod(rows), math.prod(depth)) if last else (math.prod(depth), math.prod(rows))
        sides.append((flat.reshape(math.prod(groups), *inner), groups, rows))
    (a, groups, rows), (b, _, columns) = sides
    return np.matmul(a, b).reshape(*groups, *rows, *columns)


def _conv(image: np.ndarray, kernel: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """One product of all channels per position of the kernel."""
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise QuantizationError("the reference has no rule for a convolution with batch groups")
    image, kernel = image.transpose(numbers.lhs_spec), kernel.transpose(numbers.rhs_spec)
    holes = [(lo, hi, d - 1) for (lo, hi), d in zip(params["padding"], params["lhs_dilation"], strict=True)]
    image = _spread_and_pad(image, [(0, 0, 0), (0, 0, 0), *holes], 0)
    groups, features = params["feature_group_count"], kernel.shape[0]
    strides, spread = params["window_strides"], params["rhs_dilation"]
    window = kernel.shape[2:]
    size = [
        max(0, (n - ((k - 1) * d + 1)) // s + 1)
        for n, k, d, s in zip(image.shape[2:], window, spread, strides, strict=True)
    ]
    out = np.zeros((image.shape[0], groups, features // groups, *size), np.int64)
    image = image.reshape(image.shape[0], groups, -1, *image.shape[2:])
    kernel = kernel.reshape(groups, features // groups, *kernel.shape[1:])
    for position in itertools.product(*map(range, window)):
        starts = [p * d for p, d in zip(position, spread, strict=True)]
        cut = tuple(slice(a, a + (n - 1) * s + 1 if n else a, s) for a, n, s in zip(starts, size, strides, strict=True))
        out += np.einsum("ngc...,gfc->ngf...", image[(..., *cut)], kernel[(..., *position)])
    out = out.reshape(out.shape[0], features, *size)
    return out.transpose(np.argsort(numbers.out_spec))


# Views


def _view(eqn: Any, x: Any) -> Any:
    name, params = eqn.primitive.name, eqn.params
    if _known(x):
        return _move(name, params, x, None)
    low, high = x.one_interval()
    moved = _move(name, params, x.values, np.iinfo(eqn.invars[0].aval.dtype))
    return _Ints(moved, np.int64(low), np.int64(high))


def _move(name: str, params: dict[str, Any], x: np.ndarray, info: Any) -> np.ndarray:
    if name == "reshape":
        if params.get("dimensions") is not None:
            x = x.transpose(params["dimensions"])
        return x.reshape(params["new_sizes"])
    if name == "transpose":
        return x.transpose(params["permutation"])
    if name == "squeeze":
        return np.squeeze(x, tuple(params["dimensions"]))
    if name == "expand_dims":
        return np.expand_dims(x, tuple(params["dimensions"]))
    if name == "broadcast_in_dim":
        shape = [1] * len(params["shape"])
        for dim, n in zip(params["broadcast_dimensions"], x.shape, strict=True):
            shape[dim] = n
        return np.broadcast_to(x.reshape(shape), params["shape"])
    if name == "slice":
        strides = params["strides"] or (1,) * x.ndim
        limits = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        return x[tuple(slice(*limit) for limit in limits)]
    if name == "rev":
        return np.flip(x, tuple(params["dimensions"]))
    if name == "copy":
        return x
    largest = name.endswith("max")
    choose = np.maximum if largest else np.minimum
    if name.startswith("cum"):
        axis = params["axis"]
        return (
            np.flip(choose.accumulate(np.flip(x, axis), axis), axis)
            if params["reverse"]
            else choose.accumulate(x, axis)
        )
    if name in ("reduce_max", "reduce_min"):
        return choose.reduce(x, axis=tuple(params["axes"]))
    return _window(params, x, choose, info.min if largest else info.max)


def _window(params: dict[str, Any], x: np.ndarray, choose: Any, neutral: int) -> np.ndarray:
    holes = [(lo, hi, d - 1) for (lo, hi), d in zip(params["padding"], params["base_dilation"], strict=True)]
    x = _spread_and_pad(x, holes, neutral)
    window, strides, spread = params["window_dimensions"], params["window_strides"], params["window_dilation"]
    size = [
        max(0, (n - ((k - 1) * d + 1)) // s + 1) for n, k, d, s in zip(x.shape, window, spread, strides, strict=True)
    ]
    out = np.full(size, neutral, x.dtype)
    for position in itertools.product(*map(range, window)):
        starts = [p * d for p, d in zip(position, spread, strict=True)]
        cut = tuple(slice(a, a + (n - 1) * s + 1 if n else a, s) for a, n, s in zip(starts, size, strides, strict=True))
        out = choose(out, x[cut])
    return out


# Between integers and reals


def _from_codes(eqn: Any, values: list[Any]) -> Any:
    q, scale, zero = values
    qtype = eqn.params["type"]
    if qtype.bits != 32:
        q = _Ints(q.values, np.maximum(q.low, qtype.qmin), np.minimum(q.high, qtype.qmax))
    if np.any(zero):
        wide = zero.astype(np.int64)
        q = _fits(eqn, _Ints(q.values - wide, q.low - wide, q.high - wide))
    return _Real([(q, scale.astype(np.float64))])


def _to_codes(eqn: Any, values: list[Any]) -> _Ints:
    return _store(*values, eqn.params["type"])


def _store(real: _Real, scale: np.ndarray, zero: np.ndarray, qtype: Any) -> _Ints:
    """A real sum to codes; the specification is the docstring of `quantize_real` in the lax backend."""
    step, zero = np.asarray(scale).astype(np.float64), np.asarray(zero).astype(np.int64)
    terms = _merge(real.terms)
    offset = real.constant / step
    if len(terms) == 1 and not np.any(offset):
        total = rescale(terms[0][0].values, terms[0][1] / step) + zero
    else:
        ratios = [s / step for _, s in terms]
        reach = 0.0
        for ratio, (q, _) in zip(ratios, terms, strict=True):
            reach += float(np.max(np.abs(ratio) * np.maximum(np.abs(q.low), np.abs(q.high))))
        reach += float(np.max(np.abs(offset + zero)))
        guard = 14
        while guard > -30 and reach * 2.0**guard > 2.0**27:
            guard -= 1
        if guard < 0:
            coarse = 0
            finest = min(float(np.abs(r[r != 0]).min(initial=np.inf)) for r in map(np.atleast_1d, ratios))
            while finest < np.inf and 2.0 ** (coarse + 1) <= finest / 2:
                coarse += 1
            guard = max(guard, -coarse)
        largest = 2.0**27 / len(terms) if reach * 2.0**guard > 2.0**27 else None
        total = np.rint((offset + zero) * 2.0**guard).astype(np.int64)
        if np.max(np.abs(total)) > 2**30:
            raise OverflowProofError("a constant of a region does not fit int32")
        for ratio, (q, _) in zip(ratios, terms, strict=True):
            total = total + rescale(q.values, ratio * 2.0**guard, largest)
        if guard < 0:
            total = np.clip(total, -(2 ** (30 + guard)), 2 ** (30 + guard)) << -guard
        else:
            total = (total + ((1 << guard) >> 1)) >> guard
    low, high = (quantize(b, scale, zero, qtype).astype(np.int64) for b in (real.low, real.high))
    codes = np.minimum(np.maximum(total, low), high)
    return _Ints(codes, np.int64(qtype.qmin), np.int64(qtype.qmax))


def _merge(terms: list[tuple[_Ints, np.ndarray]]) -> list[tuple[_Ints, np.ndarray]]:
    """Adds terms of equal scale into the first such one, where int32 holds the sum."""
    merged: list[tuple[_Ints, np.ndarray]] = []
    for q, scale in terms:
        for k, (p, other) in enumerate(merged):
            low, high = p.low + q.low, p.high + q.high
            fits = max(-int(np.min(low)), int(np.max(high))) <= 2**31 - 1
            if fits and np.shape(scale) == np.shape(other) and np.all(scale == other):
                merged[k] = (_Ints(p.values + q.values, low, high), other)
                break
        else:
            merged.append((q, scale))
    return merged


def requantize(eqn: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    """The result of a requantize equation; its operands are codes, scale, zero point, and the new scale, zero point."""
    q, scale_in, zero_in, scale_out, zero_out = map(np.asarray, operands)
    in_type, qtype = eqn.params["in_type"], eqn.params["type"]
    zero = zero_in.astype(np.int64)
    codes = _Ints(q.astype(np.int64) - zero, in_type.qmin - zero, in_type.qmax - zero)
    real = _Real([(codes, scale_in.astype(np.float64))])
    return [_store(real, scale_out, zero_out, qtype).values.astype(qtype.dtype)]


_RULES: dict[str, Callable[[Any, list[Any]], Any]] = {
    "convert_element_type": _convert,
    "add": _add,
    "sub": _add,
    "mul": _multiply,
    "div": _multiply,
    "neg": _negate,
    "max": _clamp,
    "min": _clamp,
    "clamp": _clamp,
    "reduce_sum": _reduce_sum,
    "pad": _pad,
    "dot_general": _product,
    "conv_general_dilated": _product,
    "qc_dequantize": _from_codes,
    "qc_quantize": _to_codes,
    **dict.fromkeys(("copy_p", "name", "stop_gradient"), lambda eqn, values: values[0]),
}


# Tables


def _table(eqn: Any, body: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    """The body at every code of the index, JAX evaluating op by op, then looked up."""
    index_at = next(k for k, role in enumerate(eqn.params["roles"]) if role not in KNOWN_ROLES)
    entry = next(e for e in body.eqns if e.primitive.name == "qc_dequantize")
    qtype = entry.params["type"]
    codes = np.arange(qtype.qmin, qtype.qmax + 1).astype(qtype.dtype)
    env = {v: codes if k == index_at else np.asarray(operands[k]) for k, v in enumerate(body.invars)}
    for inner in body.eqns:
        values = [_read(env, v) for v in inner.invars]
        env[inner.outvars[0]] = _at_codes(inner, values, codes.shape)
    position = np.asarray(operands[index_at]).astype(np.int64) - qtype.qmin
    return [np.asarray(env[v])[position].astype(o.aval.dtype) for v, o in zip(body.outvars, eqn.outvars, strict=True)]


def _at_codes(eqn: Any, values: list[Any], shape: tuple[int, ...]) -> Any:
    name = eqn.primitive.name
    values = [np.asarray(v).reshape(()) if np.size(v) == 1 else np.asarray(v) for v in values]
    if name == "qc_quantize":
        return quantize(*values, eqn.params["type"])
    if name == "qc_dequantize":
        return dequantize(*values)
    if name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims"):
        return values[0]
    if any(v.ndim for v in values):
        values = [np.broadcast_to(v, shape) for v in values]
    return np.asarray(_compat.bind(eqn, values)[0])
