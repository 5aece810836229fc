"""The layers of a program: what is chosen for, what they cost, which share a type, and where reals meet integers.

A layer is a region whose product meets a weight. Two kinds of layers share a type:

* those that read the same value, views of it too (queries, keys and values; a block and its shortcut; all that reads a
  concatenation, whose parts are in one encoding): its codes are then written once, so they share the activations' type;
* those that read the same weight, which is then stored once, so they share the weights' type and granularity.

Terms of a residual sum need no group: between products they are stored in the recipe's stream type whatever its ends
are. Nor does int8 beside int16 cost a conversion: a region writes each encoding that its readers want. A change between
integers and floats does cost one, of every element of the value.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from qcompiler.candidates import Candidate
from qcompiler.errors import RecipeError
from qcompiler.ir import _compat, classes, loops
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.numerics import packing
from qcompiler.passes import _granularity, _regions
from qcompiler.precision.knapsack import Conversion, Group

#: Bytes of a scale (float32) and of a zero point (int32).
_NUMBER_BYTES = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A layer of a program.

    Attributes:
      id: of its region.
      eqn: the region.
      part: the program that it stands in: the whole, or a body of a loop.
      weight: name of its weight.
      array: the weight itself.
      macs: multiply-adds of one call, in all steps of loops.
      steps: how often it runs in one call.
      reads: the value behind views that its activation is.
      owns_weight: whether it is the first that reads its weight, and pays for it.
    """

    id: str
    eqn: Any
    part: Program
    weight: str
    array: np.ndarray
    macs: int
    steps: int
    reads: Any
    owns_weight: bool

    @property
    def elements(self) -> int:
        """Of the weight, 0 where another layer has paid for it."""
        return self.array.size if self.owns_weight else 0

    def code_bytes(self, candidate: Candidate) -> int:
        """Bytes of the weight as the program stores it, without scales: floats as they are, few bits packed."""
        bits = candidate.weight_bits
        if candidate.weight is not None and packing.is_packed(bits):
            return packing.packed_size(self.elements, bits)
        return self.elements * (bits // 8 if candidate.weight is None else candidate.weight.dtype.itemsize)

    def scale_bytes(self, candidate: Candidate) -> int:
        """Bytes of the weight's scales, and of its zero points if it is affine, in a candidate's granularity.

        A channel, or several that share one, has a float32 scale and an int32 zero point; a group along the input an
        int8 step and an int8 zero point, beside the channel's scale.
        """
        if candidate.weight is None or not self.owns_weight:
            return 0
        anchor: Any = _regions.anchor_of(self.eqn)
        position: Any = _regions.weight_position(self.eqn)
        qtype = _granularity.weight_type(candidate.weight, candidate.granularity, anchor, position)
        blocks = lambda of: math.prod(-(-self.array.shape[d] // size) for d, size in of.blocks.items())
        numbers = 1 if qtype.symmetric else 2
        if qtype.contracted:
            return blocks(qtype.per_channel) * _NUMBER_BYTES + blocks(qtype) * numbers
        return blocks(qtype) * _NUMBER_BYTES * numbers


def layers_of(program: Program) -> list[Layer]:
    """The layers of a partitioned program without observers, in program order, those in loops' bodies too."""
    found: list[Layer] = []
    paid: set[str] = set()
    for part, steps in _parts(program, 1):
        names, constants = part.weight_of, Constants(part)
        for eqn in part.eqns:
            position = _regions.weight_position(eqn) if _regions.is_region(eqn) else None
            if position is None:
                continue
            anchor, operands = cast(Any, _regions.anchor_of(eqn)), cast(Any, eqn.invars)
            weight = operands[_regions.operand_index(eqn, anchor.invars[position])]
            other = operands[_regions.operand_index(eqn, anchor.invars[1 - position])]
            name = names.get(weight, part.ids[weight])
            macs = sum(map(classes.multiply_adds, _compat.open_jaxpr(eqn.params["body"]).eqns))
            found.append(
                Layer(
                    id=eqn.params["id"],
                    eqn=eqn,
                    part=part,
                    weight=name,
                    array=np.asarray(constants.value(weight)),
                    macs=steps * macs,
                    steps=steps,
                    reads=_regions.behind_views(part, other),
                    owns_weight=name not in paid,
                )
            )
            paid.add(name)
    return found


def _parts(program: Program, steps: int) -> Iterator[tuple[Program, int]]:
    """The program and all bodies in it, with how often each runs."""
    yield program, steps
    for eqn in loops.loops_of(program):
        for body in loops.bodies(program, eqn):
            yield from _parts(body.program, steps * body.program.notes.get("steps", 1))


def groups_of(layers: Sequence[Layer], candidates: Mapping[str, Candidate]) -> list[Group]:
    """Layers that share a type; see the module's docstring."""
    by_value, by_weight = defaultdict(list), defaultdict(list)
    for layer in layers:
        by_value[id(layer.part), layer.reads].append(layer)
        by_weight[layer.weight].append(layer)
    kinds: list[tuple[Any, Callable[[Candidate], Any], Callable[[Layer], str]]] = [
        (by_value, _activation_label, lambda layer: f"read {layer.part.ids[layer.reads]}"),
        (by_weight, _weight_label, lambda layer: f"share the weight {layer.weight}"),
    ]
    return [
        Group(tuple(layer.id for layer in same), {n: label(c) for n, c in candidates.items()}, why(same[0]))
        for table, label, why in kinds
        for same in table.values()
        if len(same) > 1
    ]


def _activation_label(candidate: Candidate) -> Any:
    """What must be equal for one encoding of the activations; whatever is computed in floats reads them as reals."""
    return "float" if candidate.activation is None else candidate.activation


def _weight_label(candidate: Candidate) -> Any:
    if candidate.weight is None:
        return candidate.float_dtype
    return candidate.weight, candidate.granularity


def conversions_of(
    layers: Sequence[Layer], candidates: Mapping[str, Candidate], cost: Callable[[int], Mapping[str, float]]
) -> list[Conversion]:
    """The edges between layers on which reals and integers are changed into each other.

    Args:
      layers: of a program.
      candidates: by name.
      cost: number of elements -> resource -> what converting them costs.
    """
    label = {n: "float" if c.is_float else "integer" for n, c in candidates.items()}
    if len(set(label.values())) < 2:
        return []
    made_by = {id(v): layer for layer in layers for v in layer.eqn.outvars}
    found, seen = [], set()
    for layer in layers:
        first = made_by.get(id(layer.reads))
        # A value is converted once, whoever reads it.
        if first is not None and id(layer.reads) not in seen:
            seen.add(id(layer.reads))
            of_value = cost(layer.steps * int(np.prod(layer.reads.aval.shape)))
            changes: dict[tuple[Hashable, Hashable], Mapping[str, float]]
            changes = {("integer", "float"): of_value, ("float", "integer"): of_value}
            found.append(Conversion(first.id, layer.id, label, changes))
    return found


def entering(layers: Sequence[Layer], layer: Layer) -> int:
    """Elements that a layer in float has to have dequantized, and quantizes, at edges to what is no layer."""
    made = {id(v) for other in layers for v in other.eqn.outvars}
    read = {id(other.reads) for other in layers}
    reads = 0 if id(layer.reads) in made else np.prod(layer.reads.aval.shape)
    writes = sum(np.prod(v.aval.shape) for v in layer.eqn.outvars if id(v) not in read)
    return layer.steps * int(reads + writes)


def static_costs(layer: Layer, candidate: Candidate) -> dict[str, float]:
    """What a candidate takes that follows from shapes alone.

    Returns:
      `weight_bits`: of all elements of the weight, without scales; `weight_bytes`: as stored, scales counted;
      `bit_operations`: bits of a weight times bits of an activation times multiply-adds (HAWQ-V3, section 3.4).
    """
    bits = candidate.weight_bits * layer.elements
    return {
        "weight_bits": float(bits),
        "weight_bytes": float(layer.code_bytes(candidate) + layer.scale_bytes(candidate)),
        "bit_operations": float(candidate.weight_bits) * candidate.activation_bits * layer.macs,
    }


def free_layers(layers: Sequence[Layer], ruled: Collection[str]) -> list[Layer]:
    """The layers that no rule of the user decides; of those that share a weight, the first pays for it.

    Raises:
      RecipeError: there are none.
    """
    if free := [layer for layer in layers if layer.id not in ruled]:
        first = {layer.weight: layer.id for layer in reversed(free)}
        return [dataclasses.replace(layer, owns_weight=first[layer.weight] == layer.id) for layer in free]
    why = "rules decide all of them" if layers else "no product of the program meets a weight"
    raise RecipeError(f"there are no layers to choose a precision for: {why}; drop precision=")
