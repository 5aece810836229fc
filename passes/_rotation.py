"""A residual stream: the values that can be rotated together, and the constants that take the rotation up.

    x = table[tokens]; x = x + f(norm(x) @ W_in) @ W_out; y = norm(x) @ head

Rotating every x by Q along its channels is undone by the products that contract the channels, made by the constants
that write them, and not seen by sums of squares over them. A stream is grown by def-use from one of its values: whoever
makes or reads a value of it says, by a rule per primitive (`_rotation_rules`), which other values must be rotated, too.
What has no rule is a reason to leave the stream as it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qcompiler.ir import _compat, classes, identity
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.passes import _affine


class Refused(Exception):
    """Why an equation does not let a rotation pass."""


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    """What a value is in the rotated program: x' with x = (x' Q^T) * gain + shift.

    Attributes:
      dim: the channels' dimension.
      gain, shift: `float64[n]` that readers take up; None for 1 and 0.
      centred: the mean over the channels has been subtracted.
    """

    dim: int
    gain: np.ndarray | None = None
    shift: np.ndarray | None = None
    centred: bool = False

    def moved(self, dim: int) -> Mark:
        """The same of a value that has the channels along another dimension."""
        return dataclasses.replace(self, dim=dim)

    @property
    def plain(self) -> bool:
        """Neither gain nor shift."""
        return self.gain is None and self.shift is None

    def same(self, other: Mark) -> bool:
        """Whether both say the same of a value."""
        alike = lambda a, b: a is b or (a is not None and b is not None and np.array_equal(a, b))
        return (
            (self.dim, self.centred) == (other.dim, other.centred)
            and alike(self.gain, other.gain)
            and alike(self.shift, other.shift)
        )


@dataclasses.dataclass(frozen=True)
class Site:
    """A constant operand that is rotated along one of its dimensions.

    Attributes:
      eqn, position: where it is read.
      dim: the dimension.
      reader: the mark of the value that a product contracts with it; None where the constant makes values.
    """

    eqn: _compat.JaxprEqn
    position: int
    dim: int
    reader: Mark | None = None


class Stream:
    """The values of one stream, grown from one of them.

    Attributes:
      channels: how many there are.
      marks: value -> what it becomes.
      sites: constants that are rotated.
      dropped: id of an equation -> the operand that stands for its result: of gains and shifts that readers take up,
        and of means that are zero.
      reasons: why the stream must be left as it is; empty if it can be rotated.
      squares: (x, sum of squares of x, how many times) for x that are not centred.
      sums: (x, sum of x) over the channels.
      subtracted: (equation, x) where a number per row is subtracted from x: its mean, as `_centring` proves.
      uncentred: products that read x with its mean.
    """

    def __init__(self, program: Program, constants: Constants, var: _compat.Var, dim: int, rules: Any) -> None:
        self.program, self.constants = program, constants
        self.channels = var.aval.shape[dim]
        self.marks: dict[_compat.Var, Mark] = {}
        self.sites: dict[tuple[int, int, int], Site] = {}
        self.dropped: dict[int, int] = {}
        self.reasons: list[str] = []
        self.squares: dict[Any, tuple[Any, float]] = {}
        self.sums: dict[Any, Any] = {}
        self.subtracted: dict[int, tuple[_compat.JaxprEqn, Any]] = {}
        self.uncentred: dict[int, _compat.JaxprEqn] = {}
        self._todo: list[_compat.JaxprEqn] = []
        self._grow(var, dim, rules)

    def _grow(self, var: _compat.Var, dim: int, rules: Any) -> None:
        try:
            self.demand(var, Mark(dim))
        except Refused as refused:
            self._note(refused)
        while self._todo:
            eqn = self._todo.pop()
            rule = rules.get(eqn.primitive.name)
            try:
                if rule is None or len(eqn.outvars) != 1:
                    what = "made" if any(v in self.marks for v in eqn.outvars) else "read"
                    raise Refused(f"{what} by {identity.describe(eqn)}")
                rule(self, eqn)
            except Refused as refused:
                self._note(refused)

    def _note(self, refused: Refused) -> None:
        if str(refused) not in self.reasons:
            self.reasons.append(str(refused))

    @property
    def id(self) -> str:
        """Value id of the first value."""
        values = [*self.program.input_vars, *(v for eqn in self.program.eqns for v in eqn.outvars)]
        return self.program.ids[next(v for v in values if v in self.marks)]

    def mark_of(self, atom: Any) -> Mark | None:
        """The mark of a value, None for others and for constants."""
        return self.marks.get(atom) if isinstance(atom, _compat.Var) else None

    def demand(self, atom: Any, mark: Mark) -> None:
        """Marks a value that inputs reach.

        Raises:
          Refused: it cannot be rotated so.
        """
        if (held := self.marks.get(atom)) is not None:
            if not held.same(mark):
                raise Refused(f"{self._name(atom)} is read both with and without its norm's gain or mean")
            return
        made, shape = self.program.producer.get(atom), atom.aval.shape
        if len(shape) <= mark.dim or shape[mark.dim] != self.channels:
            raise Refused(f"{self._name(atom)} has no {self.channels} channels of its own")
        # Growth goes on behind what is refused: a stream that is left has all its values and reasons, too.
        self.marks[atom] = mark
        self._todo += [*([] if made is None else [made]), *(user for user, _ in self.program.users.get(atom, ()))]
        if made is None:
            raise Refused(f"made of {self._name(atom)}")
        if not classes.is_float(atom) or atom.aval.dtype.itemsize < 4:
            raise Refused(f"{self._name(atom)} is {atom.aval.dtype}, which would round the rotated numbers otherwise")
        if any(v is atom for v in self.program.outvars):
            raise Refused(f"{self._name(atom)} is a result")

    def _name(self, atom: Any) -> str:
        return self.program.ids[atom].replace("input:", "input ")

    def write(self, eqn: _compat.JaxprEqn, position: int, dim: int, mark: Mark) -> None:
        """Notes a constant that makes values of the stream, which are to have that mark.

        Raises:
          Refused: it is of half precision, or what it makes is joined to a norm's result.
        """
        if mark.centred or not mark.plain:
            raise Refused(f"{identity.describe(eqn)} makes what is joined to a norm's result")
        self._site(Site(eqn, position, dim))

    def read(self, eqn: _compat.JaxprEqn, position: int, dim: int, mark: Mark) -> None:
        """Notes a constant that a product contracts with a value of the stream.

        Raises:
          Refused: it is of half precision.
        """
        self._site(Site(eqn, position, dim, mark))
        if not mark.centred:
            self.uncentred[id(eqn)] = eqn

    def _site(self, site: Site) -> None:
        dtype = site.eqn.invars[site.position].aval.dtype
        if dtype.itemsize < 4:
            raise Refused(f"a constant of {identity.describe(site.eqn)} is {dtype}, which would be rounded otherwise")
        self.sites[id(site.eqn), site.position, site.dim] = site

    def drop(self, eqn: _compat.JaxprEqn, kept: int) -> None:
        """Lets an operand stand for the result of an equation."""
        self.dropped[id(eqn)] = kept

    def along(self, atom: Any, mark: Mark) -> np.ndarray | None:
        """A constant that varies along the channels alone, `float64[n]`; None for others."""
        value = np.asarray(self.constants.value(atom)).astype(np.float64)
        if value.ndim <= mark.dim or any(n > 1 for d, n in enumerate(value.shape) if d != mark.dim):
            return None
        return np.broadcast_to(value.reshape(-1), (self.channels,))

    def is_of_rows(self, atom: Any, dim: int) -> bool:
        """Whether an operand has one number per row, the same for all channels."""
        if self.mark_of(atom) is not None:
            return False
        if len(atom.aval.shape) <= dim or atom.aval.shape[dim] == 1:
            return True
        if atom in self.constants:
            value = np.asarray(self.constants.value(atom))
            return bool(np.all(value == np.take(value, [0], axis=dim)))
        eqn = self.program.producer.get(atom)
        if eqn is None or eqn.primitive.name != "broadcast_in_dim":
            return False
        dims = eqn.params["broadcast_dimensions"]
        return dim not in dims or eqn.invars[0].aval.shape[dims.index(dim)] == 1

    def row_gain(self, atom: Any, mark: Mark) -> tuple[_compat.JaxprEqn, int, np.ndarray] | None:
        """Of a gain that is multiplied into a number per row: the equation, the operand with the row, the gain."""
        eqn = None if atom in self.constants else self.program.producer.get(atom)
        step = None if eqn is None else _affine.affine_of(eqn, self.constants, spreads=True)
        if eqn is None or step is None or np.any(step[2]) or self.program.use_count(atom) != 1:
            return None
        position = next(k for k, v in enumerate(eqn.invars) if v is step[0])
        gain = self.along(eqn.invars[1 - position], mark) if len(eqn.invars) == 2 else None
        if gain is None or not self.is_of_rows(step[0], mark.dim):
            return None
        return eqn, position, 1.0 / gain if eqn.primitive.name == "div" else gain
