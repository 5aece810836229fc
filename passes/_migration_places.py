"""Finds where a factor per channel can be moved between what makes an operand of a product and the product itself.

The factor of a place divides one operand along what is contracted, and multiplies the other. The one is a norm's
result, which its gain takes up, values behind attention (their product's output channels), the linear branch of a gated
layer, or queries; the other is a weight, or keys. None of these is a pattern: `_migration_rules` says how factors pass.

Where no constant can take it up, a product by 1 / s is put between a computed value and the products with weights that
read it: behind a norm that a residual sum reads too, or whose gain was folded away, and behind GELU and the like.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qcompiler.ir import _compat, classes
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.passes import _affine
from qcompiler.passes._migration_factors import Key, Mark, Spread, completed, numbered
from qcompiler.passes._migration_rules import RULES, contracted_labels

#: What gives a value in wide integers first, to which a factor can be applied before it has 8 bits.
_COMPUTING = classes.ELEMENTWISE | classes.PRODUCT


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A place for a factor per channel, the same at every batch size.

    Attributes:
      id: value id of the operand that is divided.
      value: its variable.
      marks: all values that the factor is on, labels counted from 0.
      channels: how many there are.
      products: dots that contract along the factor.
      between: (id of the product, operand) that read `value` through a product by 1 / s; empty where constants take
        the factor up.
      costs: whether that product is one more than is computed anyway.
    """

    id: str
    value: _compat.Var
    marks: dict[Key, Mark]
    channels: int
    products: tuple[_compat.JaxprEqn, ...]
    between: frozenset[tuple[int, int]] = frozenset()
    costs: bool = False


def places(program: Program, constants: Constants) -> list[Place]:
    """The places of a program, in its order; each contraction belongs to one at most."""
    found: list[Place] = []
    taken: set[int] = set()
    for eqn in program.eqns:
        if eqn.primitive.name != "dot_general" or id(eqn) in taken or classes.is_empty(eqn):
            continue
        held = [k for k in (0, 1) if eqn.invars[k] in constants]
        if len(held) == 2:
            continue
        position = 1 - held[0] if held else 0
        place = _grown(program, constants, eqn, position)
        if place is None and held:
            place = _inserted(program, constants, eqn, position)
        if place is not None:
            if any(other.id == place.id for other in found):
                # The value is contracted along other dimensions, too.
                dims = ",".join(map(str, eqn.params["dimension_numbers"][0][position]))
                place = dataclasses.replace(place, id=f"{place.id}[{dims}]")
            found.append(place)
            taken.update(map(id, place.products))
    return found


def _seeded(program: Program, constants: Constants, eqn: _compat.JaxprEqn, position: int) -> Spread | None:
    """A mark on an operand, with a label per channel that the product contracts: in each head, say, others.

    Where nothing that has the channels varies along a batch dimension, as no weight does from example to example, its
    labels become one.
    """
    atom = eqn.invars[position]
    contract, batch = (dims[position] for dims in eqn.params["dimension_numbers"])
    shape = [n if d in contract or d in batch else 1 for d, n in enumerate(atom.aval.shape)]
    spread = Spread(program, constants)
    if 0 in shape or all(shape[d] == 1 for d in contract) or not classes.is_float(atom) or atom.aval.dtype.itemsize < 4:
        return None
    spread.marks[atom] = Mark(spread.fresh(shape), -1)
    return spread


def _grown(program: Program, constants: Constants, eqn: _compat.JaxprEqn, position: int) -> Place | None:
    """The place at an operand of a product, if constants can take the factor up on all sides."""
    atom = eqn.invars[position]
    spread = _seeded(program, constants, eqn, position)
    if spread is None or not spread.is_free(atom):
        return None
    spread.open = [*(user for user, _ in program.users[atom]), program.producer[atom]]
    spread = completed(spread, RULES)
    if spread is None or not spread.varies(spread.marks[atom].labels):
        return None
    marks, channels = numbered(spread, atom)
    products = [e for e in program.eqns if e.primitive.name == "dot_general" and _contracts(e, marks)]
    return Place(program.ids[atom], atom, marks, channels, tuple(products))


def _contracts(eqn: _compat.JaxprEqn, marks: dict[Key, Mark]) -> bool:
    found = [marks.get(atom) if isinstance(atom, _compat.Var) else None for atom in eqn.invars]
    return any(mark is not None and contracted_labels(eqn, k, mark.labels) for k, mark in enumerate(found))


def _inserted(program: Program, constants: Constants, eqn: _compat.JaxprEqn, position: int) -> Place | None:
    """The place between a computed value and the products with weights that contract its channels."""
    atom, contract = eqn.invars[position], eqn.params["dimension_numbers"][0][position]
    spread = _seeded(program, constants, eqn, position)
    made = program.producer.get(atom)
    if spread is None or made is None or made.primitive.name not in _COMPUTING:
        return None
    products = []
    for user, k in program.users[atom]:
        if user.primitive.name != "dot_general" or user.invars[1 - k] not in constants or classes.is_empty(user):
            continue
        if user.params["dimension_numbers"][0][k] != contract or user.invars[1 - k].aval.dtype.itemsize < 4:
            continue
        (choice,) = RULES["dot_general"](spread, user)
        ((_, own, power),) = [demand for demand in choice(spread) if demand[0] == 1 - k]
        spread.marks[id(user), 1 - k] = Mark(own, power)
        products.append((user, k))
    marks, channels = numbered(spread, atom)
    between = frozenset((id(user), k) for user, k in products)
    costs = not _is_normed(program, constants, atom, contract)
    return Place(program.ids[atom], atom, marks, channels, tuple(user for user, _ in products), between, costs)


def _is_normed(program: Program, constants: Constants, atom: Any, channels: tuple[int, ...]) -> bool:
    """Whether a value is a product by one number per row, as a norm makes it, up to a gain and a bias.

    There a further factor costs nothing: the equation is computed in wide integers anyway.
    """
    while (eqn := program.producer.get(atom)) is not None:
        step = _affine.affine_of(eqn, constants)
        if step is not None:
            atom = step[0]
            continue
        if eqn.primitive.name not in ("mul", "div"):
            return False
        return any(_is_of_rows(program, constants, v, channels) for v in eqn.invars)
    return False


def _is_of_rows(program: Program, constants: Constants, atom: Any, channels: tuple[int, ...]) -> bool:
    """Whether a value is one number per row, of size 1 along the channels; maybe times a constant."""
    if atom in constants:
        return False
    if atom.aval.shape and all(atom.aval.shape[d] == 1 for d in channels):
        return True
    eqn = program.producer.get(atom)
    step = None if eqn is None else _affine.affine_of(eqn, constants, spreads=True)
    return step is not None and not np.any(step[2]) and _is_of_rows(program, constants, step[0], channels)
