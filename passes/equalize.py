"""Cross-layer equalization: moves channel scales between a product and the next one, so that both quantize well.

    max(x @ W1 + b1, 0) @ W2      ->      max(x @ (W1 / s) + b1 / s, 0) @ (s * W2)      s = sqrt(range(W1) / range(W2))

Exact through ReLU and straight links, because max(x / s, 0) * s = max(x, 0) for s > 0 (Nagel et al. 2019, "Data-free
quantization through weight equalization and bias correction", eq. 7 to 11). Pairs share layers, so it is repeated until
nothing moves. Outputs agree to float32 rounding. It matters for weights quantized per tensor.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qcompiler.ir import _compat, classes, contraction
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program, rewrite

_SWEEPS = 20
_SETTLED = 1e-3
#: Of the largest range of a weight: int8 cannot show both.
_NEXT_TO_ZERO = 2.0**-16


@dataclasses.dataclass
class _Pair:
    """Two weights that share a channel, by name, with the dimension it is in each; and the biases between them."""

    first: str
    first_dim: int
    second: str
    second_dim: int
    biases: list[tuple[str, int]]


def equalize(program: Program) -> Program:
    """See the module's docstring. Notes `equalized`: pairs of weight names, with the largest factor, up or down."""
    constants = Constants(program)
    pairs = [p for eqn in program.eqns if (p := _pair_behind(program, constants, eqn)) is not None]
    arrays: dict[str, np.ndarray] = {}
    for pair in pairs:
        for name in (pair.first, pair.second, *(b for b, _ in pair.biases)):
            arrays[name] = np.asarray(program.weights[name]).astype(np.float64)
    totals: list[Any] = [1.0] * len(pairs)
    for _ in range(_SWEEPS if pairs else 0):
        moved = 0.0
        for k, pair in enumerate(pairs):
            scale = _scale(arrays[pair.first], pair.first_dim, arrays[pair.second], pair.second_dim)
            arrays[pair.first] = arrays[pair.first] / _along(scale, pair.first_dim, arrays[pair.first].ndim)
            arrays[pair.second] = arrays[pair.second] * _along(scale, pair.second_dim, arrays[pair.second].ndim)
            for name, dim in pair.biases:
                arrays[name] = arrays[name] / _along(scale, dim, arrays[name].ndim)
            totals[k] = totals[k] * scale
            moved = max(moved, _spread(scale))
        if moved < _SETTLED:
            break
    updates = {n: a.astype(program.weights[n].dtype) for n, a in arrays.items()}
    note = [
        {"first": p.first, "second": p.second, "largest_scale": float(np.exp(_spread(s)))}
        for p, s in zip(pairs, totals, strict=True)
    ]
    equalized = rewrite(program, lambda *_: None, stage="equalize", weights=updates).note("equalized", note)
    return equalized.note("norms", _norms_kept(program, {p.first for p in pairs}))


def _norms_kept(program: Program, rescaled: set[str]) -> dict[str, Any]:
    """What `fold_norms` noted of products whose result still has that distribution."""
    names = program.weight_of
    moved = {
        program.ids[eqn.outvars[0]]
        for eqn in program.eqns
        if any(isinstance(v, _compat.Var) and names.get(v) in rescaled for v in eqn.invars)
    }
    return {key: norm for key, norm in program.notes.get("norms", {}).items() if key not in moved}


def _scale(first: np.ndarray, first_dim: int, second: np.ndarray, second_dim: int) -> np.ndarray:
    """sqrt(r1 / r2) per channel; 1 where a channel is next to zero in either weight, which has no range to equalize.

    Its bias is all that such a channel computes, and would grow with the weights until it is the whole tensor's range.
    """
    ranges = [
        np.abs(w).max(axis=tuple(d for d in range(w.ndim) if d != dim), initial=0.0)
        for w, dim in ((first, first_dim), (second, second_dim))
    ]
    dead = np.logical_or(*(r <= _NEXT_TO_ZERO * r.max(initial=0.0) for r in ranges))
    return np.sqrt(np.where(dead, 1.0, ranges[0]) / np.where(dead, 1.0, ranges[1]))


def _spread(scale: Any) -> float:
    return float(np.max(np.abs(np.log(scale)), initial=0.0))


def _along(scale: np.ndarray, dim: int, rank: int) -> np.ndarray:
    return scale.reshape([-1 if d == dim else 1 for d in range(rank)])


def _pair_behind(program: Program, constants: Constants, eqn: _compat.JaxprEqn) -> _Pair | None:
    """The pair that starts at a product, or None: every link must be read once, every weight used once."""
    first = _weight_of(program, constants, eqn)
    if first is None:
        return None
    position, name = first
    dims = contraction.weight_dims(eqn, position)
    biases: list[tuple[str, int]] = []
    var = eqn.outvars[0]
    while program.use_count(var) == 1 and program.users.get(var):
        user, where = program.users[var][0]
        second = _weight_of(program, constants, user)
        if second is not None:
            return _close(program, eqn, name, dims, biases, user, where, second)
        if not _passes_scale(program, constants, user, where, biases):
            return None
        var = user.outvars[0]
    return None


def _weight_of(program: Program, constants: Constants, eqn: _compat.JaxprEqn) -> tuple[int, str] | None:
    """(operand position, name) of the weight of a product with one constant operand that nothing else reads."""
    if eqn.primitive.name not in classes.PRODUCT or eqn.params.get("feature_group_count", 1) != 1:
        return None
    held = [k for k in (0, 1) if eqn.invars[k] in constants]
    if len(held) != 1 or (eqn.primitive.name == "conv_general_dilated" and held != [1]):
        return None
    var = eqn.invars[held[0]]
    name = program.weight_of.get(var) if isinstance(var, _compat.Var) and var.aval.dtype.itemsize >= 4 else None
    return None if name is None or program.use_count(eqn.invars[held[0]]) != 1 else (held[0], name)


def _passes_scale(program: Program, constants: Constants, eqn: _compat.JaxprEqn, where: int, biases: list[Any]) -> bool:
    """Whether f(x / s) = f(x) / s with s along the channel, once the bias collected here is divided too."""
    if eqn.primitive.name == "max":
        number = constants.uniform(eqn.invars[1 - where])
        return number is not None and float(number) == 0.0
    other = eqn.invars[1 - where] if len(eqn.invars) == 2 else None
    if eqn.primitive.name == "add" and isinstance(other, _compat.Var) and other in program.weight_of:
        big = [d for d, n in enumerate(other.aval.shape) if n > 1]
        if program.use_count(other) == 1 and len(big) == 1 and other.aval.ndim == eqn.outvars[0].aval.ndim:
            biases.append((program.weight_of[other], big[0]))
            return True
        return not np.any(program.weights[program.weight_of[other]])
    return False


def _close(
    program: Program,
    eqn: _compat.JaxprEqn,
    name: str,
    dims: dict[int, int],
    biases: list[tuple[str, int]],
    user: _compat.JaxprEqn,
    where: int,
    second: tuple[int, str],
) -> _Pair | None:
    """The pair, if the channel that the second product contracts is one that the first weight makes."""
    position, second_name = second
    if user.primitive.name == "conv_general_dilated":
        numbers = user.params["dimension_numbers"]
        channel, second_dim = numbers.lhs_spec[1], numbers.rhs_spec[1]
    else:
        contract = user.params["dimension_numbers"][0]
        if len(contract[where]) != 1:
            return None
        channel, second_dim = contract[where][0], contract[position][0]
    if channel not in dims or any(dim != channel for _, dim in biases) or name == second_name:
        return None
    return _Pair(name, dims[channel], second_name, second_dim, biases)
