"""Folds the affine chain behind a conv or dot, and the one before it, into its weights and a bias.

    conv(x, w) -> sub mean -> mul s -> add b        ->      conv(x, w * s) -> add (b - mean * s)
    x -> sub mean -> mul s -> add b -> dot w        ->      dot (x, s * w) -> add (b - mean * s) . w

Behind, factors along the weight's own output dimensions fold: a norm over another axis stays where it is. Before, those
along the dimensions that the weight contracts; padding puts zeros between the chain and a conv, so there the chain must
keep zero. A chain before also stays where the product would read much coarser integers than it does behind the chain,
because one scale has to span channels that the norm had made alike.

Arithmetic is in float64, so outputs agree to float32 rounding. Weights of half precision would be rounded again, and
stay as they are: as part of the product's region, the chain is exact in its multipliers all the same.
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

#: How much coarser, root mean square over channels, a product's input may become when a chain before it is folded.
_COARSER = 2.0
#: Standard deviations on either side of the mean that a channel is taken to span.
_REACH = 4.0


@dataclasses.dataclass
class _Composed:
    """What affine equations in a row compute together, factor * x + shift; and the norm among them.

    Attributes:
      centre: (factor, shift, deviation) where a mean has just been subtracted and the deviation is divided by next.
    """

    factor: np.ndarray
    shift: np.ndarray
    centre: tuple[np.ndarray, np.ndarray, np.ndarray] | None


@dataclasses.dataclass
class _Chain:
    """A product, the affine equations before and behind it, and what becomes of them.

    Attributes:
      scale: on the product's weight, from the equations before.
      factor, shift: of the product's result, from all of them.
      distribution: (mean, deviation) of what comes out, per channel, if a norm was behind the product.
    """

    anchor: _compat.JaxprEqn
    weight: int
    before: list[_compat.JaxprEqn]
    behind: list[_compat.JaxprEqn]
    scale: np.ndarray
    factor: np.ndarray
    shift: np.ndarray
    distribution: tuple[np.ndarray, np.ndarray] | None

    @property
    def worthwhile(self) -> bool:
        """A bias alone stays as it is."""
        return bool(self.before) or (bool(self.behind) and [e.primitive.name for e in self.behind] != ["add"])


def fold_norms(program: Program) -> Program:
    """See the module's docstring.

    Notes `norms`: product id -> mean and deviation per channel of the product's folded result, as lists that broadcast
    against it, where a norm behind it says so: its beta, and the magnitude of its gamma.
    """
    chains = _Planner(program).chains()
    anchors = {id(c.anchor): c for c in chains}
    links = {id(link): (c, k) for c in chains for k, link in enumerate(c.behind)}
    passed = {id(link) for c in chains for link in c.before}
    constants, ids = Constants(program), program.ids

    def biased(builder: Builder, chain: _Chain, x: Any, out: Any) -> Any:
        if not np.any(chain.shift):
            return x
        shift = chain.shift.reshape((1,) * (out.ndim - chain.shift.ndim) + chain.shift.shape).astype(out.dtype)
        return lax.add_p.bind(x, builder.weight(f"{ids[chain.anchor.outvars[0]]}:bias", shift))

    def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if id(eqn) in anchors:
            chain = anchors[id(eqn)]
            held = constants.value(eqn.invars[chain.weight])
            factor = contraction.on_weight(chain.factor, eqn, chain.weight) * chain.scale
            folded = (held.astype(np.float64) * factor).astype(held.dtype)
            if not np.isfinite(folded).all() or not np.isfinite(chain.shift.astype(held.dtype)).all():
                raise QuantizationError(f"folding the norm at {identity.describe(eqn)} overflows its weights")
            name = ids[eqn.invars[chain.weight]].removeprefix("weight:")
            values[chain.weight] = builder.weight(f"{name}:folded@{ids[eqn.outvars[0]]}", folded)
            (result,) = _compat.bind(eqn, values)
            return [result if chain.behind else biased(builder, chain, result, eqn.outvars[0].aval)]
        if id(eqn) in links:
            chain, k = links[id(eqn)]
            x = values[0] if eqn.invars[0] not in constants else values[1]
            return [biased(builder, chain, x, eqn.outvars[0].aval) if k == len(chain.behind) - 1 else x]
        if id(eqn) in passed:
            return [values[0] if eqn.invars[0] not in constants else values[1]]
        if eqn.outvars[0] in constants and any(x is None for x in values):
            # Only a product reads it, which has a weight of its own now, and the weight behind it is dropped.
            return [None] * len(eqn.outvars)
        return None

    norms = {
        ids[c.anchor.outvars[0]]: {"mean": c.distribution[0].tolist(), "deviation": c.distribution[1].tolist()}
        for c in chains
        if c.distribution is not None
    }
    return rewrite(program, rule, stage="fold_norms").note("norms", {**program.notes.get("norms", {}), **norms})


class _Planner:
    """Finds the chains of a program."""

    def __init__(self, program: Program) -> None:
        self.program, self.constants = program, Constants(program)
        self.deviations = program.notes.get("deviations", {})

    def chains(self) -> list[_Chain]:
        """Those worth folding; what stands between two products belongs to the first."""
        found = [c for eqn in self.program.eqns if (c := self.behind(eqn)) is not None]
        taken = {id(link) for chain in found for link in chain.behind}
        for chain in found:
            self.add_before(chain, taken)
        return [chain for chain in found if chain.worthwhile]

    def behind(self, anchor: _compat.JaxprEqn) -> _Chain | None:
        """The chain behind a dot or conv with one constant operand, maybe without links; None for other equations."""
        if anchor.primitive.name not in classes.PRODUCT or not classes.is_float(anchor.outvars[0]):
            return None
        held = [k for k in (0, 1) if anchor.invars[k] in self.constants]
        if len(held) != 1 or (anchor.primitive.name == "conv_general_dilated" and held != [1]):
            return None
        weight = held[0]
        if anchor.invars[weight].aval.dtype.itemsize < 4:
            return None
        links: list[_compat.JaxprEqn] = []
        var = anchor.outvars[0]
        while self.program.use_count(var) == 1 and self.program.users.get(var):
            eqn = self.program.users[var][0][0]
            step = _affine.affine_of(eqn, self.constants)
            if step is None or any(contraction.on_weight(c, anchor, weight) is None for c in step[1:]):
                break
            links.append(eqn)
            var = eqn.outvars[0]
        whole = self.compose(links)
        distribution = None
        if whole.centre is not None:
            factor, shift, deviation = whole.centre
            rest = whole.factor / factor
            distribution = whole.shift - rest * shift, np.abs(rest) * deviation
        return _Chain(anchor, weight, [], links, np.float64(1), whole.factor, whole.shift, distribution)

    def add_before(self, chain: _Chain, taken: set[int]) -> None:
        """Adds the longest chain before a product that may fold and does not cost precision."""
        anchor, position = chain.anchor, 1 - chain.weight
        links: list[_compat.JaxprEqn] = []
        best: tuple[int, _Composed] | None = None
        var = anchor.invars[position]
        while self.program.use_count(var) == 1 and (eqn := self.program.producer.get(var)) is not None:
            step = None if id(eqn) in taken else _affine.affine_of(eqn, self.constants)
            if step is None or any(contraction.from_operand(c, anchor, chain.weight) is None for c in step[1:]):
                break
            links.insert(0, eqn)
            var = step[0]
            whole = self.compose(links)
            if not (np.any(whole.shift) and contraction.pads(anchor)) and _coarser(whole) <= _COARSER:
                best = len(links), whole
        if best is None:
            return
        count, whole = best
        chain.before = links[len(links) - count :]
        chain.scale = contraction.from_operand(whole.factor, anchor, chain.weight)
        held = self.constants.value(anchor.invars[chain.weight]).astype(np.float64)
        terms = held * contraction.from_operand(whole.shift, anchor, chain.weight)
        kept = contraction.channel_dims(anchor, chain.weight)
        total = terms.sum(axis=tuple(d for d in range(held.ndim) if d not in kept), keepdims=True)
        chain.shift = chain.shift + chain.factor * contraction.on_result(total, anchor, chain.weight)

    def compose(self, links: Sequence[_compat.JaxprEqn]) -> _Composed:
        """What affine equations compute together, in the order given."""
        whole = _Composed(np.float64(1), np.float64(0), None)
        for k, eqn in enumerate(links):
            step = _affine.affine_of(eqn, self.constants)
            assert step is not None
            deviation = self.deviation(eqn)
            centred = k > 0 and links[k - 1].primitive.name == "sub" and links[k - 1].invars[1] in self.constants
            if deviation is not None and centred and np.all(whole.factor != 0):
                whole.centre = whole.factor, whole.shift, deviation
            whole.factor, whole.shift = whole.factor * step[1], whole.shift * step[1] + step[2]
        return whole

    def deviation(self, eqn: _compat.JaxprEqn) -> np.ndarray | None:
        """The standard deviation that an equation divides by, as `simplify` noted it."""
        names = (self.program.weight_of.get(v) for v in eqn.invars if isinstance(v, _compat.Var))
        found = next((self.deviations[n] for n in names if n in self.deviations), None)
        return None if found is None or eqn.primitive.name not in ("mul", "div") else np.asarray(found, np.float64)


def _coarser(whole: _Composed) -> float:
    """How much coarser one scale is for x than one for factor * x + shift, root mean square over channels.

    With a norm, a channel of x spans `_REACH` deviations around its mean, and zero. Without one, a shift can make x
    need any number of bits more, and channels are taken to be alike behind the factor.
    """
    if whole.centre is not None:
        factor, shift, deviation = np.broadcast_arrays(*whole.centre)
        mean, deviation = -shift / factor, np.maximum(np.abs(deviation / factor), np.finfo(np.float32).tiny)
        low, high = np.min(mean - _REACH * deviation), np.max(mean + _REACH * deviation)
        steps = (max(high, 0.0) - min(low, 0.0)) / (2 * _REACH * deviation)
        return float(np.sqrt(np.mean(np.square(steps))))
    if np.any(whole.shift):
        return np.inf
    size = np.abs(whole.factor)
    return float(np.sqrt(np.mean(np.square(size))) / np.min(size, where=size > 0, initial=np.inf))
