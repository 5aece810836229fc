"""Moves channel scales from operands of products to the other operand, where outliers do less harm.

    (x * gamma) @ W        ->      (x * (gamma / s)) @ (s * W)
    P @ (x @ V) @ O        ->      P @ (x @ (V / s)) @ (s * O)
    (act(g) * (x @ U)) @ D ->      (act(g) * (x @ (U / s))) @ (s * D)
    (x @ Q) @ (y @ K)^T    ->      (x @ (Q / s)) @ (y @ (K * s))^T
    gelu(x) @ W            ->      (gelu(x) * (1 / s)) @ (s * W)

s > 0 per contracted channel; `_migration_places` finds where it can be moved, whatever the spelling, and
`_migration_search` chooses it by the error of the quantized products on samples. An activation has one scale for all
its channels, a weight one for each of its outputs, so what a channel has too much of is better placed in the weight
(Xiao et al. 2022, "SmoothQuant", arXiv:2211.10438). Outputs agree to float32 rounding.

`decide` looks at samples, once; `apply` is the same at every batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax

from qcompiler.debug.progress import ProgressBar
from qcompiler.errors import QuantizationError
from qcompiler.ir import _compat
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, rewrite
from qcompiler.passes import _replaced
from qcompiler.passes._migration_places import Place, places
from qcompiler.passes._migration_samples import Seen, canonical, observe
from qcompiler.passes._migration_search import LEAST_GAIN_DB, LEAST_GAIN_FOR_COST_DB, Chosen, Operand, choose

#: Output channels of a weight that factors are tried on.
_CHANNELS = 512

#: Value id of the operand that is divided -> its factors.
Decision = Mapping[str, Chosen]


def decide(program: Program, batches: Sequence[Sequence[Any]], recipe: Any) -> Decision:
    """Chooses factors where they help, on samples.

    Args:
      program: in float, before `partition`.
      batches: flat inputs of the program's own shapes; without any nothing is chosen.
      recipe: a `qcompiler.Recipe`, whose types and estimators the products will get.
    """
    constants = Constants(program)
    found = places(program, constants)
    products = [eqn for place in found for eqn in place.products]
    weights = {(id(eqn), k) for eqn in products for k in (0, 1) if eqn.invars[k] in constants}
    seen = observe(program, products, weights, batches) if batches else {}
    chosen: dict[str, Chosen] = {}
    factors: dict[Any, np.ndarray] = {}
    bar = ProgressBar("migrate: places", len(found))
    for number, place in enumerate(found):
        described = _described(program, constants, place, seen, factors, recipe)
        least = LEAST_GAIN_FOR_COST_DB if place.costs else LEAST_GAIN_DB
        best = choose(described, place.channels, recipe.estimator_for, least) if described else None
        if best is not None:
            chosen[place.id] = best
            _compound(factors, place, best.factors)
        bar.update(number + 1, place.id)
    bar.close()
    return chosen


def _compound(factors: dict[Any, np.ndarray], place: Place, chosen: np.ndarray) -> None:
    """Multiplies the factors of a place into those that are on values already."""
    for key, mark in place.marks.items():
        if not (place.between and key is place.value):
            factors[key] = factors.get(key, np.float64(1)) * chosen[mark.labels] ** mark.power


def _described(
    program: Program,
    constants: Constants,
    place: Place,
    seen: Mapping[tuple[int, int], Seen],
    factors: Mapping[Any, np.ndarray],
    recipe: Any,
) -> list[tuple[Operand, Operand]]:
    """The products of a place that are quantized, as the search sees them; an operand that several read is one."""
    shared: dict[Any, Operand] = {}
    found = []
    for eqn in place.products:
        held = [k for k in (0, 1) if eqn.invars[k] in constants]
        shape = "x".join(str(n) for k in held for n in eqn.invars[k].aval.shape)
        rule = recipe.rule_for(program.ids[eqn.outvars[0]], shape)
        if (rule is not None and rule.keep_float) or any((id(eqn), k) not in seen for k in (0, 1) if k not in held):
            continue
        own = rule and rule.activation
        least = None if own else recipe.activation_sqnr if held else recipe.pair_sqnr
        pair = []
        for k, atom in enumerate(eqn.invars):
            key = (id(eqn), k) if k in held else atom
            values = _weight(constants, eqn, k) if k in held else seen[id(eqn), k]
            if key in factors:
                values = _times(values, canonical(factors[key], eqn, k))
            mark = place.marks.get(key)
            labels = None if mark is None else canonical(mark.labels, eqn, k)
            power = 0 if mark is None else mark.power
            if k in held:
                granularity = (rule and rule.granularity) or recipe.granularity
                per_channel = granularity.channel_group is not None
                pair.append(Operand(values, labels, power, (rule and rule.weight) or recipe.weight, per_channel))
                continue
            qtype, dims = own or recipe.activation, eqn.params["dimension_numbers"]
            wide = None if least is None else recipe.stream
            operand = Operand(values, labels, power, qtype, None, wide, least or 0.0)
            layout = tuple(dims[0][k]), tuple(dims[1][k])
            pair.append(shared.setdefault((key, layout, qtype, wide, least), operand))
        found.append((pair[0], pair[1]))
    return found


def _weight(constants: Constants, eqn: _compat.JaxprEqn, position: int) -> Seen:
    """A weight, with the largest magnitude of all its output channels, and some of them."""
    array = canonical(np.asarray(constants.value(eqn.invars[position])), eqn, position)
    every = -(-array.shape[1] // _CHANNELS)
    return Seen([array[:, ::every]], [np.max(np.abs(array), axis=1, keepdims=True)], every)


def _times(seen: Seen, by: np.ndarray) -> Seen:
    """Values with the factors of another place on them, which may vary along rows, as a weight's output channels."""
    by = by.astype(np.float32)
    parts = [part * by[:, :: seen.every] for part in seen.parts]
    if by.shape[1] == 1:
        return Seen(parts, [peak * by for peak in seen.peaks], seen.every)
    return Seen(parts, [np.max(np.abs(part), axis=1, keepdims=True) for part in parts], seen.every)


def apply(program: Program, decision: Decision) -> Program:
    """Multiplies constants by the factors that were chosen; see the module's docstring.

    Notes `migrated`: per place the value that is divided, the products that read it, the exponent, the largest factor,
    up or down, the gain in dB of the products' error on the samples, and whether a product by 1 / s was added for it.

    Raises:
      QuantizationError: the program has other places or channels than the one that was decided on.
    """
    constants, ids = Constants(program), program.ids
    found = {place.id: place for place in places(program, constants)} if decision else {}
    for name, chosen in decision.items():
        if name not in found or found[name].channels != len(chosen.factors):
            raise QuantizationError(
                f"channel scales were chosen for {name} at other shapes, where the program has none or other channels "
                "at these: quantize with recipe migrate=False, or calibrate at these shapes"
            )
    factors: dict[Any, np.ndarray] = {}
    inserted: dict[tuple[int, int], tuple[str, np.ndarray]] = {}
    for name, chosen in decision.items():
        place = found[name]
        _compound(factors, place, chosen.factors)
        if place.between:
            by = chosen.factors[place.marks[place.value].labels] ** place.marks[place.value].power
            inserted |= {use: (name, by) for use in place.between}
    #: A rewrite is traced more than once, each time with a builder of its own.
    made: dict[tuple[Builder, str], Any] = {}

    def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if all(v in constants for v in eqn.outvars) and any(v is None for v in values):
            # What read it reads a weight of its own now.
            return [None] * len(eqn.outvars)
        uses = [(id(eqn), k) for k in range(len(eqn.invars))]
        for k, (use, atom) in enumerate(zip(uses, eqn.invars, strict=True)):
            if use in inserted:
                name, by = inserted[use]
                if (builder, name) not in made:
                    weight = builder.weight(f"{name}:migrating", by.astype(atom.aval.dtype))
                    made[builder, name] = lax.mul(values[k], weight)
                values[k] = made[builder, name]
            elif use in factors:
                held = np.asarray(constants.value(atom))
                name = ids[atom].removeprefix("weight:") if isinstance(atom, _compat.Var) else f"operand_{k}"
                scaled = (held.astype(np.float64) * factors[use]).astype(held.dtype)
                values[k] = builder.weight(f"{name}:migrated@{ids[eqn.outvars[0]]}", scaled)
        changed = any(use in inserted or use in factors for use in uses)
        return _replaced.bind(eqn, values) if changed else None

    rescaled = {ids[eqn.outvars[0]] for eqn in program.eqns if any((id(eqn), k) in factors for k in (0, 1))}
    norms = {key: norm for key, norm in program.notes.get("norms", {}).items() if key not in rescaled}
    note = [_note(found[name], chosen, ids) for name, chosen in decision.items()]
    return rewrite(program, rule, stage="migrate").note("norms", norms).note("migrated", note)


def _note(place: Place, chosen: Chosen, ids: Mapping[Any, str]) -> dict[str, Any]:
    return {
        "value": place.id,
        "products": [ids[eqn.outvars[0]] for eqn in place.products],
        "exponent": chosen.exponent,
        "gain_db": round(chosen.gain_db, 2),
        "largest_factor": float(np.exp(np.max(np.abs(np.log(chosen.factors))))),
        "inserted": bool(place.between),
    }
