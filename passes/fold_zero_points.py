"""Moves every zero point of a product out of its inner loop, into the int32 bias or into row sums.

    conv (q_x - z_x) q_w + q_b      ->      conv (pad q_x with z_x) q_w + (q_b - z_x * sum(q_w))

    sum_k (a_k - z_a)(b_k - z_b) = sum a_k b_k - z_b sum a_k - z_a sum b_k + K z_a z_b      (Jacob et al. 2018, eq. 7)

A constant operand's sums are known now and join the bias. An activation's are taken at run time, a dot's over each row,
a conv's over each window of the padded codes; they are needed only where the other operand's zero point is not 0. A
weight's may differ from channel to channel. Exact in int32, so the accumulators do not change by a bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from qcompiler import ops
from qcompiler.errors import OverflowProofError
from qcompiler.ir import _compat, classes, contraction, identity, replay
from qcompiler.ir.program import Builder, Program, rewrite
from qcompiler.passes import _contracted_sums, _regions


def fold_zero_points(program: Program) -> Program:
    """See the module's docstring.

    Raises:
      OverflowProofError: the bias of a product does not fit int32 with its zero points folded in.
    """
    known = ops.weights_of(program)

    def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if not _regions.is_region(eqn) or eqn.params["kind"] not in ("dot", "conv"):
            return None
        body = _compat.open_jaxpr(eqn.params["body"])
        reader = _Reader(body, dict(zip(body.invars, map(known, eqn.invars), strict=True)))
        folds = [_fold_of(eqn, anchor, reader) for anchor in body.eqns if anchor.primitive.name in classes.PRODUCT]
        return None if None in folds else _bind_folded(builder, eqn, values, folds)

    return rewrite(program, rule, stage="fold_zero_points")


class _Reader:
    """The equations of a body, and what is known of its values: `value_of` has the arrays of operands, or None."""

    def __init__(self, body: Any, value_of: dict[Any, np.ndarray | None]) -> None:
        self.eqns = body.eqns
        self.producer = {v: e for e in body.eqns for v in e.outvars}
        self.value_of = value_of

    def value(self, atom: Any) -> np.ndarray | None:
        """The number or array that an atom is whatever the inputs are, or None."""
        if isinstance(atom, _compat.Literal):
            return np.asarray(atom.val)
        if atom not in self.producer:
            return self.value_of[atom]
        operands = [self.value(v) for v in self.producer[atom].invars]
        if any(x is None for x in operands):
            return None
        with jax.ensure_compile_time_eval():
            return np.asarray(_compat.bind(self.producer[atom], operands)[0])


@dataclasses.dataclass(eq=False)
class _Fold:
    """What is known of one product of a region.

    Attributes:
      anchor: the product in the body.
      shifts: results of the converts and subtractions between the stored codes and the product.
      zeros: per operand, its zero point: a number, or an array that broadcasts against the result.
      summed: per operand, whether run time must sum it.
      bias: (equation, operand position) of the bias add, or None.
      constant: what joins the accumulator, int64: the bias and the terms that are known now.
    """

    anchor: _compat.JaxprEqn
    shifts: set[Any]
    zeros: list[np.ndarray]
    summed: list[bool]
    bias: tuple[_compat.JaxprEqn, int] | None
    constant: np.ndarray


def _fold_of(eqn: _compat.JaxprEqn, anchor: _compat.JaxprEqn, reader: _Reader) -> _Fold | None:
    """The plan for one product; None where a zero point is not known, or differs along what is contracted."""
    zeros, held, shifts = [], [], set()
    for k, var in enumerate(anchor.invars):
        zero = np.int32(0)
        made = reader.producer.get(var)
        if made is not None and made.primitive.name == "sub":
            shifts.add(var)
            var, zero = made.invars[0], reader.value(made.invars[1])
            made = reader.producer.get(var)
        if made is not None and made.primitive.name == "convert_element_type":
            shifts.add(var)
            var = made.invars[0]
        kept = contraction.channel_dims(anchor, k)
        if zero is None or any(n > 1 and d not in kept for d, n in enumerate(np.shape(zero))):
            return None
        zeros.append(contraction.on_result(np.asarray(zero, np.int64), anchor, k))
        held.append(reader.value_of.get(var))
    constant = zeros[0] * zeros[1] * contraction.depth(anchor)
    for k, array in enumerate(held):
        if array is not None and np.any(zeros[1 - k]):
            constant = constant - zeros[1 - k] * _sum_over_depth(array, anchor, k)
    bias = _bias_add(reader, anchor)
    if bias is not None:
        constant = constant + reader.value_of[bias[0].invars[bias[1]]].astype(np.int64)
    if np.abs(constant).max(initial=0) > np.iinfo(np.int32).max:
        raise OverflowProofError(
            f"the bias of {identity.describe(eqn)} ({eqn.params['id']}), its zero points folded in, does not fit int32"
        )
    some = np.prod(anchor.outvars[0].aval.shape) > 0
    summed = [bool(some and array is None and np.any(zeros[1 - k])) for k, array in enumerate(held)]
    return _Fold(anchor, shifts, zeros, summed, bias, constant)


def _sum_over_depth(held: np.ndarray, anchor: _compat.JaxprEqn, k: int) -> np.ndarray:
    """Sums of a constant operand over what the product contracts, laid out against the result; int64."""
    keep = contraction.channel_dims(anchor, k)
    rest = tuple(d for d in range(held.ndim) if d not in keep)
    return contraction.on_result(held.astype(np.int64).sum(axis=rest, keepdims=True), anchor, k)


def _bias_add(reader: _Reader, anchor: _compat.JaxprEqn) -> tuple[_compat.JaxprEqn, int] | None:
    """The int32 add of a body's constant to the product."""
    for eqn in reader.eqns:
        if eqn.primitive.name == "add" and eqn.outvars[0].aval.dtype == np.int32:
            for k in (0, 1):
                if eqn.invars[1 - k] is anchor.outvars[0] and eqn.invars[k] in reader.value_of:
                    return eqn, k
    return None


def _bind_folded(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any], folds: list[_Fold]) -> Sequence[Any]:
    """The region with its products on the stored codes, and one int32 constant behind each."""
    invars = _compat.invars_of(eqn.params["body"])
    dropped = {fold.bias[0].invars[fold.bias[1]] for fold in folds if fold.bias}
    kept = [k for k, v in enumerate(invars) if v not in dropped]
    operands, roles = [values[k] for k in kept], [eqn.params["roles"][k] for k in kept]
    # (product, what it is) -> operand; arrays of a body are operands of its region, numbers literals.
    places: dict[tuple[int, Any], int] = {}

    def hold(product: int, what: Any, array: np.ndarray, name: str, role: str) -> None:
        rank = folds[product].anchor.outvars[0].aval.ndim
        places[product, what] = len(operands)
        array = array.reshape((1,) * (rank - array.ndim) + array.shape).astype(np.int32)
        operands.append(builder.weight(f"{eqn.params['id']}:{name}" + (f"/{product}" if product else ""), array))
        roles.append(role)

    for i, fold in enumerate(folds):
        if np.any(fold.constant):
            hold(i, "constant", fold.constant, "bias/folded", "bias")
        for k in (0, 1):
            if fold.summed[1 - k] and fold.zeros[k].ndim:
                hold(i, k, fold.zeros[k], f"zero_point/{k}", "zero_point")

    of_anchor = {id(fold.anchor): (i, fold) for i, fold in enumerate(folds)}
    of_bias = {id(fold.bias[0]): 1 - fold.bias[1] for fold in folds if fold.bias}
    shifts = set().union(*(fold.shifts for fold in folds))

    def body(*args: Any) -> list[Any]:
        env: dict[Any, Any] = {invars[k]: arg for k, arg in zip(kept, args, strict=False)}

        def rule(inner: _compat.JaxprEqn, xs: list[Any]) -> list[Any] | None:
            if id(inner) in of_anchor:
                i, fold = of_anchor[id(inner)]
                zeros = [args[places[i, k]] if (i, k) in places else np.int32(z) for k, z in enumerate(fold.zeros)]
                acc = _product(fold, xs, zeros)
                return [lax.add_p.bind(acc, args[places[i, "constant"]]) if (i, "constant") in places else acc]
            if id(inner) in of_bias:
                return [xs[of_bias[id(inner)]]]
            return [xs[0]] if inner.outvars[0] in shifts else None

        return replay.evaluate(eqn.params["body"], [env.get(v) for v in invars], rule)

    return ops.region(body, *operands, id=eqn.params["id"], kind=eqn.params["kind"], roles=tuple(roles))


def _product(fold: _Fold, codes: list[Any], zeros: list[Any]) -> Any:
    """The product of stored codes, minus the terms that only run time knows: those of operands to be `summed`."""
    anchor, params = fold.anchor, fold.anchor.params
    if anchor.primitive.name == "conv_general_dilated" and _pads(anchor) and (np.any(fold.zeros[0]) or fold.summed[0]):
        codes = [_pad_with(codes[0], int(fold.zeros[0]), anchor), codes[1]]
        none = tuple((0, 0) for _ in params["padding"])
        params = {**params, "padding": none, "lhs_dilation": tuple(1 for _ in none)}
    acc = contraction.integer_product(anchor.primitive.name, params, *codes)
    for k, zero in enumerate(zeros):
        if fold.summed[1 - k]:
            sums = _contracted_sums.contracted_sums(anchor, codes[1 - k], 1 - k)
            acc = lax.sub_p.bind(acc, lax.mul(sums, zero))
    return acc


def _pads(anchor: _compat.JaxprEqn) -> bool:
    return any(p != (0, 0) for p in map(tuple, anchor.params["padding"])) or any(
        d != 1 for d in anchor.params["lhs_dilation"]
    )


def _pad_with(q: Any, zero: int, anchor: _compat.JaxprEqn) -> Any:
    """Pads (and dilates) the image of a conv with its zero point: real 0."""
    spec = anchor.params["dimension_numbers"].lhs_spec
    config = [(0, 0, 0)] * q.ndim
    pairs = zip(spec[2:], anchor.params["padding"], anchor.params["lhs_dilation"], strict=True)
    for dim, (low, high), dilation in pairs:
        config[dim] = (low, high, dilation - 1)
    return lax.pad(q, q.dtype.type(zero), config)
