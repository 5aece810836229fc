"""Gives every operand of every region, and every result, its quantized type.

    region[conv] x w b -> y      notes["types"]:  x int8, w int8s[3] (per channel), b int32; result y int16s

Here each layer gets the recipe's types, or those of the first rule that matches it; a factor of a product that 8 bits
would hold badly (probabilities, outlier channels), as calibration shows, gets the stream's 16. What was decided by data
(`qcompiler.precision`) stands where no rule does, and what the recipe gives single values goes before all of that. The
choice is noted per region id, so that it can be read, edited, and applied again to the same model at another batch
size. A layer in half precision is an island with casts around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler import ops, state
from qcompiler.errors import RecipeError
from qcompiler.ir import _compat, classes, contraction, identity, loops
from qcompiler.ir.classes import multiply_adds
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.numerics import ranges
from qcompiler.numerics.fixed_range import FixedRange
from qcompiler.numerics.types import BIAS, QuantType
from qcompiler.passes import _granularity, _half, _regions, _supergroups
from qcompiler.passes._overrides import Overrides


def assign_precision(program: Program, recipe: Any, by_data: Mapping[str, Any] | None = None) -> Program:
    """See the module's docstring.

    Args:
      program: partitioned.
      recipe: a `qcompiler.Recipe`.
      by_data: region id -> the `qcompiler.Rule` that says its types, if no rule of the recipe matches it.

    Returns:
      The program with `notes["types"]` = {region id: [type or None per operand]}, `notes["output_types"]`,
      `notes["island_type"]`, and `notes["float_regions"]`: ids that the recipe keeps in float. Where ranges are given:
      `notes["given_values"]` = {`value@type`: encoding or estimator}, `notes["given_weights"]` = {`region@operand`: the
      same}, `notes["retyped"]` = {value: its type where an island reads it}. `notes["rules"]`: rule and the layers that
      it decides; `notes["supergroups"]`: see `passes._supergroups`.

    Raises:
      RecipeError: a rule or an encoding decides nothing, or does not fit, or a layer's numbers do not fit the half
        precision that a rule gives it.
    """
    parts = loops.nested(program)
    decided = _check_rules(parts, recipe)
    overrides = Overrides(recipe.encodings)
    assigned = loops.everywhere(lambda part: _assigned(part, recipe, by_data or {}, overrides), program)
    overrides.check_used(_names(parts))
    agreement = _supergroups.compared(parts, recipe.supergroups)
    return assigned.note("rules", decided).note("supergroups", agreement)


def _names(parts: Sequence[Program]) -> list[str]:
    """The names that encodings can be given under: of values between regions, and of weights."""
    ids = [i for part in parts for v, i in part.ids.items() if classes.is_float(v)]
    return [i.removeprefix("weight:") for i in ids]


def _assigned(program: Program, recipe: Any, by_data: Mapping[str, Any], overrides: Overrides) -> Program:
    overrides.values, overrides.weights = {}, {}
    types: dict[str, list[QuantType | None]] = {}
    keep_float: dict[str, bool | str] = {}
    for eqn in program.eqns:
        if not _regions.is_region(eqn):
            continue
        region = eqn.params["id"]
        rule = recipe.rule_for(region, _regions.weight_shape(eqn)) or by_data.get(region)
        if rule is not None and rule.keep_float:
            keep_float[region] = rule.keep_float
            continue
        activation, weight = _types_of_products(recipe, rule)
        chosen = [_type_of(role, recipe, activation, weight) for role in eqn.params["roles"]]
        # What a known range clips, more bits would not bring back.
        if rule is None or (rule.activation is None and not isinstance(rule.activation_range, FixedRange)):
            chosen = _widened(program, eqn, chosen, recipe, rule)
        for k, axis in _regions.gathered(eqn).items():
            chosen[k] = dataclasses.replace(weight, symmetric=True, narrow_range=True, axis=axis)
        position = _regions.weight_position(eqn)
        if position is not None:
            anchor = _regions.anchor_of(eqn)
            k = _regions.operand_index(eqn, anchor.invars[position])
            granularity = rule.granularity if rule and rule.granularity else recipe.granularity
            chosen[k] = _granularity.weight_type(weight, granularity, anchor, position)
        types[region] = _overridden(program, eqn, chosen, rule, overrides, types)
    constants = Constants(program)
    outputs = [
        recipe.output if isinstance(v, _compat.Var) and classes.is_float(v) and v not in constants else None
        for v in program.outvars
    ]
    for _, j in state.pairs_of(program):
        outputs[j] = outputs[j] and _read_as(program, program.outvars[j], types, recipe)
    stored = lambda var, wanted: overrides.value(program.ids[_owner(program, var, types)], wanted, "stored")
    outputs = [t and stored(v, t) for v, t in zip(program.outvars, outputs, strict=True)]
    for k, j in state.pairs_of(program):
        if outputs[j] is not None:
            ends = program.input_vars[k], program.outvars[j]
            before, after = (program.ids[_owner(program, v, types)] for v in ends)
            overrides.tie(before, after, _read_as(program, program.outvars[j], types, recipe), outputs[j])
    owners = {_owner(program, v, types): v for v in program.ids if classes.is_float(v) and v not in constants}
    retyped = {program.ids[o]: stored(v, recipe.stream) for o, v in owners.items()}
    program = program.note("types", types).note("output_types", outputs)
    islands = [*program.notes.get("islands", ()), *(_island(program, *kept) for kept in keep_float.items())]
    program = program.note("islands", islands).note("float_regions", list(keep_float))
    program = _half.computed_in(program, {region: dtype for region, dtype in keep_float.items() if dtype is not True})
    program = program.note("given_values", overrides.values).note("given_weights", overrides.weights)
    program = program.note("retyped", {key: t for key, t in retyped.items() if t != recipe.stream})
    return program.note("island_type", recipe.stream).replace(stage="assign_precision")


def _owner(program: Program, var: Any, types: dict[str, Any]) -> Any:
    """The value whose scale a value has: the operand behind views that are in integers."""
    while (made := program.producer.get(var)) is not None and _regions.is_region(made):
        if made.params["kind"] != "view" or made.params["id"] not in types:
            break
        var = made.invars[0]
    return var


def _overridden(
    program: Program,
    eqn: _compat.JaxprEqn,
    chosen: list[QuantType | None],
    rule: Any,
    overrides: Overrides,
    types: dict[str, Any],
) -> list[QuantType | None]:
    """The types of a region's operands, those that the recipe gives single values and layers in place of others."""
    region, position, out = eqn.params["id"], _regions.weight_position(eqn), list(chosen)
    channels = contraction.channel_dims(_regions.anchor_of(eqn), position) if position is not None else ()
    for k, (var, role, qtype) in enumerate(zip(eqn.invars, eqn.params["roles"], chosen, strict=True)):
        name = program.ids.get(var, "")
        if role in ("weight", "rows"):
            given = rule.weight_range if rule else None
            weight = name.removeprefix("weight:"), region, k, var.aval.shape
            out[k] = overrides.weight(*weight, qtype, channels if role == "weight" else (), given)
        elif role == "bias":
            overrides.bias(name.removeprefix("weight:"), region, k)
        elif qtype is not None and name and not name.startswith("weight:"):
            owner = program.ids[_owner(program, var, types)]
            out[k] = overrides.value(owner, qtype, role, rule.activation_range if rule else None)
    return out


def _widened(
    program: Program, eqn: _compat.JaxprEqn, chosen: list[QuantType | None], recipe: Any, rule: Any
) -> list[QuantType | None]:
    """The types of a region's operands, the stream's for a factor of a product that the activation type holds badly."""
    anchor = _regions.anchor_of(eqn)
    if anchor is None or anchor.primitive.name not in classes.PRODUCT:
        return chosen
    alone = eqn.params["roles"].count("activation") == 1
    least = recipe.activation_sqnr if alone else recipe.pair_sqnr
    out = list(chosen)
    for k, (var, role) in enumerate(zip(eqn.invars, eqn.params["roles"], strict=True)):
        qtype = chosen[k]
        if role != "activation" or least is None or qtype.bits > 8:
            continue
        stats = program.stats.get(program.ids[_regions.behind_views(program, var)])
        if stats is None or not stats.count:
            continue
        estimator = rule.activation_range if rule else None
        estimator = estimator if isinstance(estimator, ranges.Estimator) else recipe.estimator_for(qtype)
        range_ = estimator.estimate(stats, qtype.qmin, qtype.qmax, qtype.symmetric)
        if ranges.expected_sqnr_db(stats, range_, qtype.qmin, qtype.qmax, qtype.symmetric) < least:
            out[k] = recipe.stream
    return out


def _read_as(program: Program, var: Any, types: dict[str, list[QuantType | None]], recipe: Any) -> QuantType:
    """The widest type in which regions read a value, views and parts of it too; the activation type if none does."""
    widest, todo = recipe.activation, [var]
    while todo:
        for eqn, k in program.users.get(todo.pop(), ()):
            if not _regions.is_region(eqn):
                continue
            if eqn.params["kind"] in _regions.REARRANGING:
                todo += eqn.outvars
                continue
            qtype = types[eqn.params["id"]][k] if eqn.params["id"] in types else None
            widest = qtype if qtype is not None and qtype.bits > widest.bits else widest
    return widest


def _check_rules(parts: Sequence[Program], recipe: Any) -> list[dict[str, Any]]:
    """The layers that each rule decides, and those that none does.

    Raises:
      RecipeError: a rule matches no layer, or none that earlier ones leave, or gives what none of them has.
    """
    found = []
    regions = [e for part in parts for e in part.eqns if _regions.is_region(e)]
    roles = {e.params["id"]: set(e.params["roles"]) for e in regions}
    shapes = {e.params["id"]: _regions.weight_shape(e) for e in regions}
    free = dict(roles)
    for rule in recipe.rules:
        matched = [region for region in roles if rule.matches(region, shapes[region])]
        islands = [i["id"] for part in parts for i in part.notes.get("islands", ()) if rule.matches(i["id"], "")]
        if not matched and islands and not rule.keep_float:
            raise RecipeError(f"{rule} matches only what stays float anyway: {_some(islands)}")
        if not matched and not islands:
            raise RecipeError(f"{rule} matches no layer; layers are {_some(list(roles))}")
        found.append({"rule": repr(rule), "layers": [region for region in matched if region in free]})
        decided = [free.pop(region) for region in matched if region in free]
        if matched and not decided:
            raise RecipeError(
                f"{rule} never decides: the first rule that matches a layer does, and earlier rules match all of "
                f"{_some(matched)}; put it before them, or drop it"
            )
        for name, what, role in (
            ("weight", "type", "weight"),
            ("granularity", "granularity", "weight"),
            ("activation", "type", "activation"),
            ("weight_range", "range", "weight"),
        ):
            if getattr(rule, name) is not None and not any(role in found for found in decided):
                raise RecipeError(f"{rule} gives a {what} to the {role} of layers that have none: {_some(matched)}")
    return [*found, {"rule": None, "layers": list(free)}]


def _types_of_products(recipe: Any, rule: Any) -> tuple[QuantType, QuantType]:
    """Types of activations and weights in a layer that a rule (or None) speaks of."""
    return (rule and rule.activation) or recipe.activation, (rule and rule.weight) or recipe.weight


def _type_of(role: str, recipe: Any, activation: QuantType, weight: QuantType) -> QuantType | None:
    """The type of an operand in a role; None where it follows from other types, or stays real until `lower`."""
    by_role = {
        "activation": activation,
        "weight": weight,
        "bias": BIAS,
        "term": recipe.stream,
        "reduced": recipe.stream,
        "factor": recipe.stream,
        "index": recipe.index,
    }
    return by_role.get(role)


def input_types(program: Program, recipe: Any) -> dict[str, QuantType]:
    """Value id of each input that regions read -> the widest type that they will want, before types are assigned.

    With it calibration observes the model on inputs as they will be stored. Inputs of views and of islands get the
    recipe's stream type.
    """
    found: dict[str, QuantType] = {}
    for var in program.input_vars:
        observed = [e.outvars[0] for e, _ in program.users.get(var, ()) if e.primitive is ops.observe_p]
        for eqn, k in [use for v in (var, *observed) for use in program.users.get(v, ())]:
            if not _regions.is_region(eqn):
                continue
            rule = recipe.rule_for(eqn.params["id"], _regions.weight_shape(eqn))
            pair = _types_of_products(recipe, rule)
            role = eqn.params["roles"][k]
            qtype = _type_of(role, recipe, *pair) or recipe.stream
            given = rule.activation_range if rule else None
            qtype = Overrides(recipe.encodings).value(program.ids[var], qtype, role, given)
            known = found.setdefault(program.ids[var], qtype)
            found[program.ids[var]] = max(known, qtype, key=lambda t: t.bits)
    return found


def _island(program: Program, region: str, dtype: bool | str) -> dict[str, Any]:
    """The note of a region that the recipe keeps in float, as `partition` writes them."""
    eqn = next(e for e in program.eqns if _regions.is_region(e) and e.params["id"] == region)
    path, _, name = region.rpartition("/")
    inner = _compat.open_jaxpr(eqn.params["body"]).eqns
    return {
        "id": region,
        "primitive": name.partition("#")[0],
        "module_path": path,
        "source": identity.source_of(eqn),
        "reason": f"the recipe keeps it in {'float' if dtype is True else dtype}",
        "macs": sum(multiply_adds(e) for e in inner),
    }


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
