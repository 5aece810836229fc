"""Folds the affine chain behind a conv or dot, such as an inference BatchNorm, into its weights and a bias.

    conv(x, w) -> sub mean -> mul s -> add b        ->      conv(x, w * s) -> add (b - mean * s)

Only factors along the weight's own output dimensions fold: a norm over another axis stays where it is. Arithmetic is in
float64, so outputs agree to float32 rounding; weights of half precision would be rounded again, and stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from qcompiler.errors import QuantizationError
from qcompiler.ir import _compat, classes, contraction, identity
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, rewrite
from qcompiler.passes import _affine


@dataclasses.dataclass
class _Chain:
    """An anchor, the affine equations behind it, and what they compute together: factor * y + shift."""

    anchor: _compat.JaxprEqn
    weight: int
    links: list[_compat.JaxprEqn]
    factor: np.ndarray
    shift: np.ndarray


def fold_norms(program: Program) -> Program:
    """See the module's docstring."""
    constants = Constants(program)
    chains = [c for eqn in program.eqns if (c := _chain_behind(program, constants, eqn)) is not None]
    anchors = {id(c.anchor): c for c in chains}
    links = {id(link): (c, k) for c in chains for k, link in enumerate(c.links)}
    ids = program.ids

    def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if id(eqn) in anchors:
            chain = anchors[id(eqn)]
            held = constants.value(eqn.invars[chain.weight])
            factor = contraction.on_weight(chain.factor, eqn, chain.weight)
            folded = (held.astype(np.float64) * factor).astype(held.dtype)
            if not np.isfinite(folded.astype(np.float32)).all():
                raise QuantizationError(f"folding the norm behind {identity.describe(eqn)} overflows its weights")
            name = ids[eqn.invars[chain.weight]].removeprefix("weight:")
            values[chain.weight] = builder.weight(f"{name}:folded@{ids[eqn.outvars[0]]}", folded)
            return _compat.bind(eqn, values)
        if id(eqn) in links:
            chain, k = links[id(eqn)]
            x = values[0] if eqn.invars[0] not in constants else values[1]
            if k < len(chain.links) - 1 or not np.any(chain.shift):
                return [x]
            out = eqn.outvars[0].aval
            shift = chain.shift.reshape((1,) * (out.ndim - chain.shift.ndim) + chain.shift.shape).astype(out.dtype)
            return [lax.add_p.bind(x, builder.weight(f"{ids[chain.anchor.outvars[0]]}:bias", shift))]
        return None

    return rewrite(program, rule, stage="fold_norms")


def _chain_behind(program: Program, constants: Constants, anchor: _compat.JaxprEqn) -> _Chain | None:
    """The chain behind a dot or conv with one constant operand; None if there is nothing to fold."""
    if anchor.primitive.name not in classes.PRODUCT or not classes.is_float(anchor.outvars[0]):
        return None
    held = [k for k in (0, 1) if anchor.invars[k] in constants]
    if len(held) != 1 or (anchor.primitive.name == "conv_general_dilated" and held != [1]):
        return None
    if anchor.invars[held[0]].aval.dtype.itemsize < 4:
        return None
    chain = _Chain(anchor, held[0], [], np.float64(1), np.float64(0))
    var = anchor.outvars[0]
    while program.use_count(var) == 1 and program.users.get(var):
        eqn = program.users[var][0][0]
        step = _affine.affine_of(eqn, constants)
        if step is None:
            break
        _, a, b = step
        if (
            contraction.on_weight(a, anchor, chain.weight) is None
            or contraction.on_weight(b, anchor, chain.weight) is None
        ):
            break
        chain.factor, chain.shift = chain.factor * a, chain.shift * a + b
        chain.links.append(eqn)
        var = eqn.outvars[0]
    only_bias = len(chain.links) == 1 and chain.links[0].primitive.name == "add"
    return chain if chain.links and not only_bias else None
