"""High-bias absorption: what a channel never falls below moves behind the next product, as a bias.

    max(x @ W1 + b1, 0) @ W2 + b2    ->    max(x @ W1 + (b1 - c), 0) @ W2 + (b2 + c @ W2)    0 <= c <= min(x @ W1 + b1)

Equalization makes some biases, and with them activations, large; one scale for all channels then has few steps for the
others (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.1.3). As
there, c = max(0, mean - 3 deviations), from the norm that was folded into W1 or else from the samples, but no more than
the least value on the samples, where the function stays the same to float32 rounding. A bound above becomes bound - c.
Where zeros are padded between, c would be missing at the border: nothing is absorbed there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler.ir import _compat, classes, contraction, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.passes._replaced import Operand, with_constants
from qcompiler.passes._scale_groups import compressed, reshaped
from qcompiler.samples import Samples

#: Deviations below the mean that a channel is taken to reach.
_DEVIATIONS = 3.0
#: Of the largest value of an activation: less is not worth moving.
_LEAST = 2.0**-8


@dataclasses.dataclass
class _Candidate:
    """A product and the addition of its bias, behind which a shift can be absorbed.

    Attributes:
      product: id of the product.
      biased: equation that adds the bias, at operand `bias`.
      channels: dimensions of the result that are the weight's channels.
    """

    product: str
    biased: _compat.JaxprEqn
    bias: int
    channels: tuple[int, ...]


def decide(program: Program, samples: Samples) -> dict[str, list[Any]]:
    """How much each channel is shifted, by the samples; without samples nothing is.

    Args:
      program: equalized.
      samples: of the calibration; those of the program's shapes are run.

    Returns:
      Product id -> c, as lists that broadcast against the product's result; only where it is worth it.
    """
    finder = _Finder(program)
    candidates = finder.candidates()
    batches = samples.at(program.input_avals)
    if not candidates or not batches:
        return {}
    decided = {}
    for candidate, (least, most, mean, deviation) in zip(
        candidates, _observed(program, candidates, batches), strict=True
    ):
        norm = program.notes.get("norms", {}).get(candidate.product)
        if norm is not None:
            mean, deviation = (np.asarray(norm[key], np.float64) for key in ("mean", "deviation"))
        shift = np.clip(mean - _DEVIATIONS * deviation, 0.0, np.maximum(least, 0.0))
        shift = np.where(shift > _LEAST * most.max(initial=0.0), shift, 0.0)
        if np.any(shift) and finder.follow(candidate.biased.outvars[0], shift, _Plan()):
            decided[candidate.product] = shift.tolist()
    return decided


def absorb_bias(program: Program, decision: Mapping[str, Any]) -> Program:
    """See the module's docstring.

    Args:
      program: of the shapes that `decide` saw, or of another batch size.
      decision: what it gave.

    Notes `absorbed`: product id -> how many channels were shifted, and the largest shift. Norms that `fold_norms` noted
    are shifted with the results that they describe.
    """
    finder = _Finder(program)
    plan = _Plan()
    norms, note = dict(program.notes.get("norms", {})), {}
    for candidate in finder.candidates():
        if candidate.product not in decision:
            continue
        shift = np.asarray(decision[candidate.product], np.float64)
        finder.shift_constant(candidate.biased, candidate.bias, -shift, plan)
        finder.follow(candidate.biased.outvars[0], shift, plan)
        note[candidate.product] = {"channels": int(np.count_nonzero(shift)), "largest_shift": float(shift.max())}
        if (norm := norms.get(candidate.product)) is not None:
            norms[candidate.product] = {**norm, "mean": (np.asarray(norm["mean"]) - shift).tolist()}
    absorbed = with_constants(program, "absorb_bias", {}, plan.operands(), plan.shifts)
    return absorbed.note("absorbed", note).note("norms", norms)


class _Plan:
    """What changes: constants of equations, from both sides perhaps, and what is added behind products."""

    def __init__(self) -> None:
        self._constants: dict[tuple[int, int], Operand] = {}
        self.shifts: list[tuple[_compat.JaxprEqn, np.ndarray]] = []

    def add(self, eqn: _compat.JaxprEqn, position: int, held: np.ndarray, change: np.ndarray) -> None:
        """Adds to a constant operand."""
        _, _, before = self._constants.get((id(eqn), position), (None, None, held.astype(np.float64)))
        self._constants[id(eqn), position] = (eqn, position, before + change)

    def operands(self) -> list[Operand]:
        """The changed constants, in float32."""
        return [(eqn, k, array.astype(eqn.outvars[0].aval.dtype)) for eqn, k, array in self._constants.values()]


class _Finder:
    """Follows shifts through a program."""

    def __init__(self, program: Program) -> None:
        self.program, self.constants = program, Constants(program)

    def candidates(self) -> list[_Candidate]:
        """The products whose bias can be absorbed by all that reads them."""
        found = []
        for eqn in self.program.eqns:
            weight = self.weight_of(eqn)
            users = self.program.users.get(eqn.outvars[0], []) if weight is not None else []
            if len(users) != 1 or self.program.use_count(eqn.outvars[0]) != 1 or users[0][0].primitive.name != "add":
                continue
            biased, position = users[0]
            if biased.invars[1 - position] not in self.constants or biased.outvars[0].aval.dtype != np.float32:
                continue
            channels = tuple(sorted(contraction.weight_dims(eqn, weight)))
            shape = biased.outvars[0].aval.shape
            trial = np.full([n if d in channels else 1 for d, n in enumerate(shape)], np.finfo(np.float64).tiny)
            if shape == eqn.outvars[0].aval.shape and self.follow(biased.outvars[0], trial, _Plan()):
                found.append(_Candidate(self.program.ids[eqn.outvars[0]], biased, 1 - position, channels))
        return found

    def weight_of(self, eqn: _compat.JaxprEqn) -> int | None:
        """The position of the weight of a product of an activation and a weight."""
        if eqn.primitive.name not in classes.PRODUCT or eqn.outvars[0].aval.dtype != np.float32:
            return None
        held = [k for k in (0, 1) if eqn.invars[k] in self.constants]
        conv = eqn.primitive.name == "conv_general_dilated"
        return held[0] if len(held) == 1 and (not conv or held == [1]) else None

    def follow(self, var: Any, shift: np.ndarray, plan: _Plan, above: bool = True) -> bool:
        """Plans what becomes of the readers of a value that is smaller by a shift; False if one cannot absorb it.

        `above` says that the value was at least the shift, so that a rectifier does not cut off what was shifted.
        """
        users = self.program.users.get(var, [])
        if not users or self.program.use_count(var) != len(users):
            return False
        return all([self.absorb(eqn, position, shift, plan, above) for eqn, position in users])

    def absorb(self, eqn: _compat.JaxprEqn, position: int, shift: np.ndarray, plan: _Plan, above: bool) -> bool:
        """The same for one reader: a product, or a rectifier, bound, mean or view on the way to one."""
        name = eqn.primitive.name
        weight = self.weight_of(eqn)
        if weight is not None:
            return self.close(eqn, weight, shift, plan)
        if name in ("max", "min", "mul", "div"):
            other = eqn.invars[1 - position]
            if other not in self.constants or eqn.invars[position].aval.shape != eqn.outvars[0].aval.shape:
                return False
            held = np.asarray(self.constants.value(other)).astype(np.float64)
            if name == "max" and (np.any(held != 0.0) or np.any(shift < 0.0) or not above):
                return False
            if name == "min":
                above = above and bool(np.all(held >= shift))
                self.shift_constant(eqn, 1 - position, -shift, plan)
            if name == "div" and position:
                return False
            shift = shift * held if name == "mul" else shift / held if name == "div" else shift
        elif name in ("reduce_sum", "reduce_max", "reduce_min"):
            axes = tuple(eqn.params["axes"])
            if any(shift.shape[d] > 1 for d in axes):
                return False
            count = np.prod([eqn.invars[0].aval.shape[d] for d in axes])
            shift = shift.squeeze(axes) * (count if name == "reduce_sum" else 1.0)
        elif name == "reshape" and eqn.params.get("dimensions") is None:
            shift = compressed(reshaped(shift, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape))
        elif name == "transpose":
            shift = shift.transpose(eqn.params["permutation"])
        elif name == "broadcast_in_dim":
            shape = [1] * eqn.outvars[0].aval.ndim
            for d, n in zip(eqn.params["broadcast_dimensions"], shift.shape, strict=True):
                shape[d] = n
            shift = shift.reshape(shape)
        else:
            return False
        return self.follow(eqn.outvars[0], shift, plan, above)

    def close(self, eqn: _compat.JaxprEqn, weight: int, shift: np.ndarray, plan: _Plan) -> bool:
        """Plans the bias of a product whose activation is smaller by a shift."""
        factor = None if contraction.pads(eqn) else contraction.from_operand(shift, eqn, weight)
        if factor is None:
            return False
        terms = np.asarray(self.constants.value(eqn.invars[weight])).astype(np.float64) * factor
        kept = contraction.channel_dims(eqn, weight)
        total = terms.sum(axis=tuple(d for d in range(terms.ndim) if d not in kept), keepdims=True)
        total = contraction.on_result(total, eqn, weight)
        users = self.program.users.get(eqn.outvars[0], [])
        if len(users) == 1 and self.program.use_count(eqn.outvars[0]) == 1 and users[0][0].primitive.name == "add":
            biased, position = users[0]
            if biased.invars[1 - position] in self.constants:
                self.shift_constant(biased, 1 - position, total, plan)
                return True
        plan.shifts.append((eqn, total.astype(eqn.outvars[0].aval.dtype)))
        return True

    def shift_constant(self, eqn: _compat.JaxprEqn, position: int, change: np.ndarray, plan: _Plan) -> None:
        """Plans a change of a constant operand."""
        plan.add(eqn, position, np.asarray(self.constants.value(eqn.invars[position])), change)


def _observed(
    program: Program, candidates: Sequence[_Candidate], batches: Sequence[Sequence[Any]]
) -> list[tuple[np.ndarray, ...]]:
    """Per candidate its least and largest values, mean and deviation, float64, which broadcast against its result."""
    wanted = {id(c.biased): c for c in candidates}

    def run(weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        found: dict[str, Any] = {}

        def watch(eqn: _compat.JaxprEqn, values: list[Any]) -> list[Any] | None:
            if id(eqn) not in wanted:
                return None
            (result,) = _compat.bind(eqn, values)
            candidate = wanted[id(eqn)]
            axes = tuple(d for d in range(result.ndim) if d not in candidate.channels)
            reductions = (jnp.min, jnp.max, jnp.mean, lambda x, **k: jnp.mean(jnp.square(x), **k))
            found[candidate.product] = [reduce(result, axis=axes, keepdims=True) for reduce in reductions]
            return [result]

        replay.evaluate(program.jaxpr, [*weights, *inputs], watch, keep_source=False)
        return [found[c.product] for c in candidates]

    compiled = jax.jit(run)
    weights = list(program.weights.values())
    runs = [jax.tree.map(lambda x: np.asarray(x, np.float64), compiled(weights, list(batch))) for batch in batches]
    out = []
    for parts in zip(*runs, strict=True):
        low, high, mean, square = (np.stack(part) for part in zip(*parts, strict=True))
        mean, square = mean.mean(axis=0), square.mean(axis=0)
        out.append((low.min(axis=0), high.max(axis=0), mean, np.sqrt(np.maximum(square - mean**2, 0.0))))
    return out
