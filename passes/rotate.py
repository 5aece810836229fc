"""Rotates residual streams, so that no channel stands out: for 4 bits.

    x = E[t]; x = x + f(norm(x) @ W_in) @ W_out; norm(x) @ W_head      norm(x) = g * x / rms(x)
    E' = E Q;   W_in' = Q^T (g W_in);   W_out' = W_out Q;   W_head' = Q^T (g W_head)

x' = x Q is another stream with the same results, because an RMS norm without its gain commutes with a rotation, and the
products undo it (Ashkboos et al. 2024, "QuaRot", arXiv:2404.00456, section 4, stage 1a). Q is a randomized Hadamard
matrix (`numerics.hadamard`), which spreads what a few channels have too much of over all: one scale then serves an
activation, and weights get near to normal. A LayerNorm becomes an RMS norm first, where centred weights make its mean 0
(`_centring`). Nothing is computed at run time that was not before.

Which values are a stream is found by def-use (`_rotation`); what something unknown makes or reads stays as it is. No
data is looked at, and the outcome is the same at every batch size. Outputs agree to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from qcompiler.ir import _compat, contraction
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, rewrite
from qcompiler.numerics import hadamard
from qcompiler.passes import _centring
from qcompiler.passes._rotation import Refused, Site, Stream
from qcompiler.passes._rotation_rules import RULES


def rotate(program: Program) -> Program:
    """See the module's docstring.

    Notes `rotated`: value id of a stream's first value -> `channels`, and either `matrix` (what it was rotated by),
    `centred` (whether means were taken out) and `constants` (names of those that took it up), or `left`, the reasons
    why it was left. Streams are those values whose squares are summed over one dimension. Norms that `fold_norms` noted
    of rotated results are dropped.
    """
    constants = Constants(program)
    streams, note = _streams(program, constants)
    sites: dict[tuple[int, int], list[tuple[Site, Stream, np.ndarray]]] = {}
    for stream in streams:
        matrix, _ = hadamard.randomized(stream.channels)
        for site in stream.sites.values():
            sites.setdefault((id(site.eqn), site.position), []).append((site, stream, matrix))
    arrays, shifts = {}, {}
    for key, found in sites.items():
        arrays[key], shift = _rotated(constants, found)
        if shift is not None:
            shifts[key[0]] = shift
    dropped = {key: kept for stream in streams for key, kept in stream.dropped.items()}
    names, ids = program.weight_of, program.ids
    read = {key: found[0][0].eqn.invars[key[1]] for key, found in sites.items()}
    read = {key: v for key, v in read.items() if isinstance(v, _compat.Var) and v in names}
    alone = {key: names[v] for key, v in read.items() if program.use_count(v) == 1}
    updates = {name: arrays[key] for key, name in alone.items() if arrays[key].shape == program.weights[name].shape}

    def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if id(eqn) in dropped:
            return [values[dropped[id(eqn)]]]
        if eqn.outvars[0] in constants:
            # What it is computed from is gone where only rotated constants were made of it.
            return [None] * len(eqn.outvars) if any(x is None for x in values) else None
        positions = [k for k in range(len(eqn.invars)) if (id(eqn), k) in arrays]
        for k in positions:
            if alone.get((id(eqn), k)) not in updates:
                values[k] = builder.weight(_name(ids, eqn, k), arrays[id(eqn), k])
        if not positions:
            return None
        (result,) = _compat.bind(eqn, values)
        if id(eqn) in shifts:
            bias = builder.weight(f"{ids[eqn.outvars[0]]}:shift", shifts[id(eqn)].astype(eqn.outvars[0].aval.dtype))
            result = lax.add_p.bind(result, bias)
        return [result]

    changed = {ids[site.eqn.outvars[0]] for found in sites.values() for site, _, _ in found}
    norms = {key: norm for key, norm in program.notes.get("norms", {}).items() if key not in changed}
    rotated = rewrite(program, rule, stage="rotate", weights=updates)
    return rotated.note("norms", norms).note("rotated", note)


def _name(ids: Any, eqn: _compat.JaxprEqn, position: int) -> str:
    atom, place = eqn.invars[position], ids[eqn.outvars[0]]
    own = ids.get(atom, "") if isinstance(atom, _compat.Var) else ""
    return f"{own.removeprefix('weight:') or position}:rotated@{place}"


def _streams(program: Program, constants: Constants) -> tuple[list[Stream], dict[str, Any]]:
    """The streams that can be rotated, and what is noted of all."""
    found: list[Stream] = []
    note: dict[str, Any] = {}
    seen: set[_compat.Var] = set()
    for var, dim in _summed_squares(program, constants):
        if var in seen:
            continue
        stream = Stream(program, constants, var, dim, RULES)
        reasons = list(stream.reasons)
        if not reasons and (stream.sums or stream.subtracted):
            try:
                _centring.check(stream)
            except Refused as refused:
                reasons.append(str(refused))
        if any(v in other.marks for other in found for v in stream.marks):
            reasons.append("it is part of another stream, along other channels")
        seen.update(stream.marks)
        if reasons:
            note[stream.id] = {"channels": stream.channels, "left": reasons}
            continue
        found.append(stream)
        atoms = [(site.eqn, site.eqn.invars[site.position], site.position) for site in stream.sites.values()]
        names = {program.ids.get(v, "") if isinstance(v, _compat.Var) else "" for _, v, _ in atoms}
        note[stream.id] = {
            "channels": stream.channels,
            "matrix": hadamard.randomized(stream.channels)[1],
            "centred": bool(stream.sums),
            "constants": sorted(name.removeprefix("weight:") for name in names if name),
        }
    return found, note


def _summed_squares(program: Program, constants: Constants) -> list[tuple[_compat.Var, int]]:
    """Values whose squares are summed over one dimension, and which: what norms are made from.

    Where a number per row was subtracted first, it is the value before.
    """
    found = []
    for eqn in program.eqns:
        if eqn.primitive.name != "reduce_sum" or len(eqn.params["axes"]) != 1:
            continue
        ((dim,), var) = eqn.params["axes"], eqn.invars[0]
        square = program.producer.get(var)
        while square is not None and square.primitive.name in ("convert_element_type", "copy"):
            square = program.producer.get(square.invars[0])
        if square is None or var in constants or var.aval.shape[dim] < 2:
            continue
        name = square.primitive.name
        if name == "square" or (name == "integer_pow" and square.params["y"] == 2):
            x = square.invars[0]
        elif name == "mul" and square.invars[0] is square.invars[1]:
            x = square.invars[0]
        else:
            continue
        made = program.producer.get(x)
        if made is not None and made.primitive.name == "sub" and not any(v in constants for v in made.invars):
            row = made.invars[1].aval.shape
            x = made.invars[0] if len(row) <= dim or row[dim] == 1 else x
        found.append((x, dim))
    return found


def _rotated(
    constants: Constants, found: Sequence[tuple[Site, Stream, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """A constant with the rotations of all streams that it writes and reads; and what it makes of the shifts it reads.

    Shifts are on the result, which another rotation, that of what it writes, is on.
    """
    eqn, position = found[0][0].eqn, found[0][0].position
    held = np.asarray(constants.value(eqn.invars[position]))
    array = held.astype(np.float64)
    for site, stream, matrix in found:
        if site.reader is None:
            array = _spread(array, site, stream.channels)
            if stream.sums:
                array = array - array.mean(axis=site.dim, keepdims=True)
            array = _along(array, site.dim, matrix)
    shift = None
    for site, _, matrix in found:
        if site.reader is not None:
            if site.reader.shift is not None:
                shift = _shift(array * _laid(site.reader.shift, site.dim, array.ndim), site)
            if site.reader.gain is not None:
                array = array * _laid(site.reader.gain, site.dim, array.ndim)
            array = _along(array, site.dim, matrix)
    return array.astype(held.dtype), shift


def _shift(terms: np.ndarray, site: Site) -> np.ndarray:
    """What a product makes of a shift, laid out to broadcast against its result."""
    kept = contraction.channel_dims(site.eqn, site.position)
    total = terms.sum(axis=tuple(d for d in range(terms.ndim) if d not in kept), keepdims=True)
    return contraction.on_result(total, site.eqn, site.position)


def _spread(array: np.ndarray, site: Site, channels: int) -> np.ndarray:
    """A number, or one per row, for each of the channels."""
    rank = site.eqn.outvars[0].aval.ndim if array.ndim == 0 else array.ndim
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    shape = [channels if d == site.dim else n for d, n in enumerate(array.shape)]
    return np.broadcast_to(array, shape)


def _laid(vector: np.ndarray, dim: int, rank: int) -> np.ndarray:
    return vector.reshape([-1 if d == dim else 1 for d in range(rank)])


def _along(array: np.ndarray, dim: int, matrix: np.ndarray) -> np.ndarray:
    """Rows along a dimension times the matrix."""
    return np.moveaxis(np.moveaxis(array, dim, -1) @ matrix, -1, dim)
