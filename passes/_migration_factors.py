"""A positive factor per channel on values of a program, and where else it must be so that results stay the same.

A *mark* says by what a value is multiplied: `s[label] ** power`, with a label per element that may be the same along
whole dimensions. Marking one value makes demands on the equation that computes it and on those that read it
(`_migration_rules`), which mark further values, until constants have taken up every factor. Where two labels meet in
one element they become one channel: so it comes out by itself that both channels of a rotary pair share a factor, and
all query heads that share a key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.ir import _compat, classes
from qcompiler.ir.constants import HUGE, Constants
from qcompiler.ir.program import Program

#: A variable, or an operand that is constant: (id of the equation, position).
Key = Any
#: The result of an equation, among the positions of its operands.
RESULT = -1
#: What has grown over so many equations without an end ends nowhere.
_MOST_STEPS = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    """A factor on a value.

    Attributes:
      labels: int64 of the value's rank; size 1 along dimensions in which the factor does not vary.
      power: 1 or -1, of the factor of each label.
    """

    labels: np.ndarray
    power: int


#: What an equation demands of one of its operands, or of its result: (position, labels, power).
Demand = tuple[int, np.ndarray, int]


class Conflict(Exception):
    """A value cannot have the factor that is demanded of it."""


class Spread:
    """Marks on the way to being complete; copied where there is a choice."""

    def __init__(self, program: Program, constants: Constants) -> None:
        self.program, self.constants = program, constants
        self.marks: dict[Key, Mark] = {}
        self.open: list[_compat.JaxprEqn] = []
        self._root = np.zeros(0, np.int64)

    def copy(self) -> Spread:
        other = Spread(self.program, self.constants)
        other.marks, other.open, other._root = dict(self.marks), list(self.open), self._root
        return other

    # Labels

    def fresh(self, shape: Sequence[int]) -> np.ndarray:
        """New labels, all different."""
        labels = len(self._root) + np.arange(np.prod(shape, dtype=np.int64))
        self._root = np.append(self._root, labels)
        return labels.reshape(shape)

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """The one label of each channel that stands for it."""
        return self._root[labels]

    def unite(self, first: np.ndarray, second: np.ndarray) -> None:
        """Makes labels that stand in the same place, after broadcasting, one channel."""
        a, b = (x.ravel() for x in np.broadcast_arrays(self.roots(first), self.roots(second)))
        if np.array_equal(a, b):
            return
        from scipy import sparse
        from scipy.sparse import csgraph

        count = len(self._root)
        meetings = sparse.coo_array((np.ones(len(a), bool), (a, b)), (count, count))
        _, channel = csgraph.connected_components(meetings, directed=False)
        _, stands_for = np.unique(channel, return_index=True)
        self._root = stands_for[channel][self._root]

    def tied(self, labels: np.ndarray, dims: Sequence[int]) -> np.ndarray:
        """The labels with size 1 along `dims`: what differed along them is one channel from now on."""
        for dim in dims:
            first = np.take(labels, [0], axis=dim)
            self.unite(labels, first)
            labels = first
        return labels

    def varies(self, labels: np.ndarray) -> bool:
        """Whether there are at least two channels."""
        return np.unique(self.roots(labels)).size > 1

    # Marks

    def mark_of(self, eqn: _compat.JaxprEqn, position: int) -> Mark | None:
        """The mark of an operand, or of the result."""
        return self.marks.get(self._key(eqn, position))

    def _key(self, eqn: _compat.JaxprEqn, position: int) -> Key:
        atom = eqn.outvars[0] if position == RESULT else eqn.invars[position]
        return (id(eqn), position) if atom in self.constants else atom

    def demand(self, eqn: _compat.JaxprEqn, position: int, labels: np.ndarray, power: int) -> None:
        """Marks an operand or the result of an equation.

        Raises:
          Conflict: it has another mark, or can have none.
        """
        key = self._key(eqn, position)
        atom = eqn.outvars[0] if position == RESULT else eqn.invars[position]
        shape = atom.aval.shape
        if not classes.is_float(atom) or atom.aval.dtype.itemsize < 4 or 0 in shape:
            raise Conflict
        constant = atom in self.constants
        if not constant:
            if len(shape) != labels.ndim:
                raise Conflict
            # A constant can be made larger, a computed value has one element for all.
            labels = self.tied(labels, [d for d, n in enumerate(shape) if n == 1 and labels.shape[d] > 1])
        elif len(shape) not in (0, labels.ndim) or self._is_huge(atom):
            raise Conflict
        held = self.marks.get(key)
        if held is not None:
            if held.power != power:
                raise Conflict
            self.unite(held.labels, labels)
            return
        if not constant and not self.is_free(atom):
            raise Conflict
        self.marks[key] = Mark(labels, power)
        if not constant:
            self.open += [self.program.producer[atom], *(user for user, _ in self.program.users[atom])]

    def _is_huge(self, atom: Any) -> bool:
        """Whether a constant is a number that stands for infinity, such as `finfo.max`, which a factor takes there."""
        number = self.constants.uniform(atom)
        return number is not None and abs(number) > HUGE

    def is_free(self, var: _compat.Var) -> bool:
        """Whether a value is computed and read inside of the program alone, so that nobody else sees its numbers."""
        made = self.program.producer.get(var)
        seen = any(v is var for v in self.program.outvars)
        return made is not None and len(made.outvars) == 1 and var in self.program.users and not seen


#: choice(copy of the marks) -> what would satisfy an equation.
Choice = Callable[[Spread], Sequence[Demand]]
#: rule(marks, equation) -> choices, any of which will do.
Rules = Mapping[str, Callable[[Spread, _compat.JaxprEqn], Sequence[Choice]]]


def completed(spread: Spread, rules: Rules) -> Spread | None:
    """The marks with all that they demand, or None where some factor finds no constant to take it up.

    Alternatives are tried in the order in which the rules give them.
    """
    steps = 0
    todo = [spread]
    while todo:
        spread = todo.pop()
        if not spread.open:
            return spread
        steps += 1
        if steps > _MOST_STEPS:
            return None
        eqn = spread.open.pop()
        rule = rules.get(eqn.primitive.name)
        if rule is None:
            continue
        branches = []
        for choice in rule(spread, eqn):
            branch = spread.copy()
            try:
                for position, labels, power in choice(branch):
                    branch.demand(eqn, position, labels, power)
            except Conflict:
                continue
            branches.append(branch)
        todo += branches[::-1]
    return None


def numbered(spread: Spread, first: Key) -> tuple[dict[Key, Mark], int]:
    """The marks with channels numbered in order of appearance, from the mark `first` on, and how many there are."""
    keys = [first, *(k for k in spread.marks if k is not first)]
    roots = {k: _without_repetition(spread.roots(spread.marks[k].labels)) for k in keys}
    values, at = np.unique(np.concatenate([r.ravel() for r in roots.values()]), return_index=True)
    order = np.empty(len(values), np.int64)
    order[np.argsort(at)] = np.arange(len(values))
    marks = {
        k: Mark(order[np.searchsorted(values, r)].reshape(r.shape), spread.marks[k].power) for k, r in roots.items()
    }
    return marks, len(values)


def _without_repetition(labels: np.ndarray) -> np.ndarray:
    """The labels with size 1 along dimensions in which they do not vary."""
    for dim in range(labels.ndim):
        first = np.take(labels, [0], axis=dim)
        if np.array_equal(np.broadcast_to(first, labels.shape), labels):
            labels = first
    return labels
