"""Moves every zero point of a product out of its inner loop, into the int32 bias or into row sums.

    conv (q_x - z_x) q_w + q_b      ->      conv (pad q_x with z_x) q_w + (q_b - z_x * sum(q_w))

    sum_k (a_k - z_a)(b_k - z_b) = sum a_k b_k - z_b sum a_k - z_a sum b_k + K z_a z_b      (Jacob et al. 2018, eq. 7)

A constant operand's sums are known now and join the bias; an activation's are summed at run time, which is needed only
where the other operand's zero point is not 0. Exact in int32, so the integers do not change by a bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler import ops
from qcompiler.errors import OverflowProofError
from qcompiler.ir import _compat, contraction, identity, replay
from qcompiler.ir.program import Builder, Program, rewrite
from qcompiler.passes import _regions


def fold_zero_points(program: Program) -> Program:
    """See the module's docstring."""
    weight_of = program.weight_of

    def known(var: Any) -> np.ndarray | None:
        return program.weights[weight_of[var]] if var in weight_of else None

    def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if not _regions.is_region(eqn) or eqn.params["kind"] not in ("dot", "conv"):
            return None
        fold = _fold_of(eqn, known)
        return None if fold is None else _bind_folded(builder, eqn, values, fold)

    return rewrite(program, rule, stage="fold_zero_points")


@dataclasses.dataclass
class _Fold:
    """What is known of a region's product.

    Attributes:
      anchor: the product in the body.
      codes: per operand, the body variable of its codes.
      zero: per operand, the body variable of its zero point, or None for 0.
      summed: per operand, whether its sums are known only at run time.
      bias: (equation, operand position) of the bias add, or None.
      constant: what joins the accumulator, int64: the bias and the terms that are known now.
    """

    anchor: _compat.JaxprEqn
    codes: list[Any]
    zero: list[Any]
    summed: list[bool]
    bias: tuple[_compat.JaxprEqn, int] | None
    constant: np.ndarray


def _fold_of(eqn: _compat.JaxprEqn, known: Any) -> _Fold | None:
    """The plan for one region; None if it has no zero point to fold."""
    body = _compat.open_jaxpr(eqn.params["body"])
    producer = {v: e for e in body.eqns for v in e.outvars}
    value_of = {v: known(outer) for v, outer in zip(body.invars, eqn.invars, strict=True)}
    anchor = next(e for e in body.eqns if e.primitive.name in ("dot_general", "conv_general_dilated"))
    codes, zeros, numbers, weights = [], [], [], []
    for var in anchor.invars:
        made, zero = producer.get(var), None
        if made is not None and made.primitive.name == "sub":
            var, zero = made.invars
            made = producer.get(var)
        if made is not None and made.primitive.name == "convert_element_type":
            var = made.invars[0]
        number = 0 if zero is None else value_of.get(zero)
        if number is None or np.ndim(number) != 0:
            return None
        codes.append(var)
        zeros.append(zero if int(number) else None)
        numbers.append(int(number))
        weights.append(value_of.get(var))
    conv = anchor.primitive.name == "conv_general_dilated"
    if conv and numbers[1]:
        return None
    constant = np.zeros((), np.int64)
    for k, held in enumerate(weights):
        if held is not None and numbers[1 - k]:
            constant = constant - numbers[1 - k] * _sum_over_depth(held, anchor, k)
    constant = constant + numbers[0] * numbers[1] * contraction.depth(anchor)
    bias = _bias_add(body, anchor)
    if bias is not None:
        held = value_of[bias[0].invars[bias[1]]]
        constant = constant + held.astype(np.int64)
    if np.abs(constant).max(initial=0) > np.iinfo(np.int32).max:
        raise OverflowProofError(
            f"the bias of {identity.describe(eqn)} ({eqn.params['id']}), its zero points folded in, does not fit int32"
        )
    return _Fold(anchor, codes, zeros, [w is None for w in weights], bias, constant)


def _sum_over_depth(held: np.ndarray, anchor: _compat.JaxprEqn, k: int) -> np.ndarray:
    """Sums of a constant operand over what the product contracts, laid out against the result; int64."""
    keep = contraction.channel_dims(anchor, k)
    rest = tuple(d for d in range(held.ndim) if d not in keep)
    return contraction.on_result(held.astype(np.int64).sum(axis=rest, keepdims=True), anchor, k)


def _bias_add(body: Any, anchor: _compat.JaxprEqn) -> tuple[_compat.JaxprEqn, int] | None:
    """The int32 add of a body's constant to the product."""
    for eqn in body.eqns:
        if eqn.primitive.name == "add" and eqn.outvars[0].aval.dtype == np.int32:
            for k in (0, 1):
                if eqn.invars[1 - k] is anchor.outvars[0] and eqn.invars[k] in body.invars:
                    return eqn, k
    return None


def _bind_folded(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any], fold: _Fold) -> Sequence[Any]:
    """The region with its product on the stored codes, and one int32 constant behind it."""
    invars = _compat.invars_of(eqn.params["body"])
    bias_var = fold.bias[0].invars[fold.bias[1]] if fold.bias else None
    kept = [k for k, v in enumerate(invars) if v is not bias_var]
    operands, roles = [values[k] for k in kept], [eqn.params["roles"][k] for k in kept]
    if np.any(fold.constant):
        rank = fold.anchor.outvars[0].aval.ndim
        constant = fold.constant.reshape((1,) * (rank - fold.constant.ndim) + fold.constant.shape).astype(np.int32)
        operands.append(builder.weight(f"{eqn.params['id']}:bias/folded", constant))
        roles.append("bias")

    def body(*args: Any) -> list[Any]:
        env: dict[Any, Any] = {invars[k]: arg for k, arg in zip(kept, args, strict=False)}
        constant = args[len(kept)] if len(args) > len(kept) else None

        def rule(inner: _compat.JaxprEqn, xs: list[Any]) -> list[Any] | None:
            if inner is fold.anchor:
                zeros = [None if z is None else env[z] for z in fold.zero]
                acc = _product(inner, [env[v] for v in fold.codes], zeros, fold.summed)
                return [acc if constant is None else lax.add_p.bind(acc, constant)]
            if fold.bias is not None and inner is fold.bias[0]:
                return [xs[1 - fold.bias[1]]]
            if inner.outvars[0] in shifts:
                return [None]
            return None

        shifts = _before(eqn.params["body"], fold)
        return replay.evaluate(eqn.params["body"], [env.get(v) for v in invars], rule)

    return ops.region(body, *operands, id=eqn.params["id"], kind=eqn.params["kind"], roles=tuple(roles))


def _before(body: Any, fold: _Fold) -> set[Any]:
    """Results of the converts and subtractions that led to the product and are not needed any more."""
    producer = {v: e for e in _compat.open_jaxpr(body).eqns for v in e.outvars}
    found = set()
    for var, codes in zip(fold.anchor.invars, fold.codes, strict=True):
        while var is not codes:
            found.add(var)
            var = producer[var].invars[0]
    return found


def _product(anchor: _compat.JaxprEqn, codes: list[Any], zeros: list[Any], summed: list[bool]) -> Any:
    """The product of stored codes, minus the terms that only run time knows: those of operands to be `summed`."""
    if anchor.primitive.name == "conv_general_dilated":
        changes = {}
        if zeros[0] is not None and _pads(anchor):
            codes = [_pad_with(codes[0], zeros[0], anchor), codes[1]]
            none = tuple((0, 0) for _ in anchor.params["padding"])
            changes = {"padding": none, "lhs_dilation": tuple(1 for _ in none)}
        return contraction.integer_product(anchor.primitive.name, {**anchor.params, **changes}, *codes)
    acc = contraction.integer_product(anchor.primitive.name, anchor.params, *codes)
    for k, zero in enumerate(zeros):
        if zero is not None and summed[1 - k]:
            acc = acc - zero * _row_sums(anchor, codes[1 - k], 1 - k)
    return acc


def _row_sums(anchor: _compat.JaxprEqn, codes: Any, k: int) -> Any:
    """Sums of operand `k` of a dot over what it contracts, laid out against the result, int32."""
    contract, batch = (dims[k] for dims in anchor.params["dimension_numbers"])
    rest = [d for d in range(codes.ndim) if d not in contract]
    free = [d for d in rest if d not in batch]
    sums = jnp.sum(codes, axis=tuple(contract), dtype=jnp.int32)
    sums = sums.transpose([rest.index(d) for d in (*batch, *free)])
    ones = (1,) * (anchor.outvars[0].aval.ndim - sums.ndim)
    before, after = ((), ones) if k == 0 else (ones, ())
    return sums.reshape(sums.shape[: len(batch)] + before + sums.shape[len(batch) :] + after)


def _pads(anchor: _compat.JaxprEqn) -> bool:
    return any(p != (0, 0) for p in map(tuple, anchor.params["padding"])) or any(
        d != 1 for d in anchor.params["lhs_dilation"]
    )


def _pad_with(q: Any, zero: Any, anchor: _compat.JaxprEqn) -> Any:
    """Pads (and dilates) the image of a conv with its zero point: real 0."""
    spec = anchor.params["dimension_numbers"].lhs_spec
    config = [(0, 0, 0)] * q.ndim
    pairs = zip(spec[2:], anchor.params["padding"], anchor.params["lhs_dilation"], strict=True)
    for dim, (low, high), dilation in pairs:
        config[dim] = (low, high, dilation - 1)
    return lax.pad(q, zero.astype(q.dtype), config)
