"""Walks a program and its simulation side by side on samples, layer by layer.

    y  = region[conv] x w b                       the program in float, and
    y^ = region[conv] (qdq x^) (qdq w) b^         the one with QDQ pairs: at each such layer, `visit(layer)`

At a layer the visitor sees what the float program reads and gives there, and what the simulation reads behind the
layers that were already changed (Nagel et al. 2020 call that asymmetric reconstruction). What it returns takes the
operands' places, and the walk goes on with it. Only values that are still to be read are held. Layers in the bodies of
loops are not visited: loops run as they are.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler import ops
from qcompiler.debug.progress import ProgressBar
from qcompiler.errors import CalibrationError
from qcompiler.ir import _compat, loops, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.numerics import fixed_point
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _regions
from qcompiler.passes._compiled import compiled


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight behind its QDQ pair.

    Attributes:
      array: the weight, float.
      scale: float32, broadcasts against it.
      zero_point: int32, likewise.
      type: of its codes.
    """

    array: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    type: QuantType

    @property
    def codes(self) -> np.ndarray:
        """The nearest codes, int64."""
        return fixed_point.quantize_number(self.array, self.scale, self.zero_point, self.type)

    def at(self, codes: np.ndarray) -> np.ndarray:
        """The reals that codes stand for, of the weight's dtype: quantizing them again gives the same codes."""
        reals = (codes - self.zero_point).astype(np.float32) * self.scale
        return np.asarray(reals, self.array.dtype)

    @property
    def nearest(self) -> np.ndarray:
        """The weight as nearest rounding leaves it."""
        return self.at(self.codes)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A region with a weight, and what it reads on the samples.

    Attributes:
      id: of the region.
      eqn: the region in the simulation.
      k: which operand is the weight.
      weight: the weight, not rounded.
      operands: per batch, per operand, what the simulation reads; the weight is rounded to nearest.
      float_operands: per batch, per operand, what the float program reads.
    """

    id: str
    eqn: _compat.JaxprEqn
    k: int
    weight: Weight
    operands: list[list[Any]]
    float_operands: list[list[Any]]

    @property
    def anchor(self) -> _compat.JaxprEqn:
        """The product in the region's body."""
        return _regions.anchor_of(self.eqn)

    def values(self, wanted: Sequence[Any], batch: int, *, simulated: bool) -> list[Any]:
        """The values of variables of the body, on a batch."""
        operands = (self.operands if simulated else self.float_operands)[batch]
        body = self.eqn.params["body"]
        key = ("values", str(_compat.open_jaxpr(body)), _places(body, wanted))
        return compiled(key, lambda: _reader(body, wanted))(*operands)


#: What a visitor changes: operand of the region -> the value that it reads instead.
Change = Mapping[int, np.ndarray]


def weight_behind(program: Program, constants: Constants, eqn: _compat.JaxprEqn) -> tuple[int, Weight] | None:
    """The weight of a region's product, and which operand it is; None where no pair stands before one."""
    position = _regions.weight_position(eqn)
    if position is None:
        return None
    k = _regions.operand_index(eqn, _regions.anchor_of(eqn).invars[position])
    pair = program.producer.get(eqn.invars[k])
    if pair is None or pair.primitive is not ops.fake_quantize_p:
        return None
    return k, Weight(*(np.asarray(constants.value(v)) for v in pair.invars), pair.params["type"])


def layers_of(program: Program) -> list[_compat.JaxprEqn]:
    """The regions that are layers to a walk: those of a weight behind a pair, in order."""
    constants = Constants(program)
    found = [e for e in replay.live_equations(program.jaxpr) if _regions.is_region(e)]
    return [e for e in found if weight_behind(program, constants, e) is not None]


def in_loops(program: Program) -> list[str]:
    """The regions with a weight in bodies of loops and branches, which a walk does not visit."""
    bodies = loops.nested(program)[1:]
    return [e.params["id"] for body in bodies for e in body.eqns if is_weighted(e)]


def is_weighted(eqn: _compat.JaxprEqn) -> bool:
    """Whether an equation is a region with a weight."""
    return _regions.is_region(eqn) and _regions.weight_position(eqn) is not None


def walk(
    real: Program,
    simulated: Program,
    batches: Sequence[Sequence[Any]],
    visit: Callable[[Layer], Change | None],
    label: str,
    only: Collection[str] | None = None,
) -> None:
    """Visits every layer in program order; see the module's docstring.

    Args:
      real: partitioned, in float.
      simulated: the same with QDQ pairs: regions have the same ids.
      batches: flat inputs of the programs' own shapes.
      visit: what a layer reads instead of what it read, or None.
      label: of the progress bar.
      only: the layers that are visited; None: all.

    Raises:
      CalibrationError: there is no batch.
    """
    check_batches(batches, label)
    todo = [e for e in layers_of(simulated) if only is None or e.params["id"] in only]
    before, after = Run(real, batches), Run(simulated, batches)
    with contextlib.closing(ProgressBar(label, len(todo))) as bar:
        for done, eqn in enumerate(todo):
            bar.update(done, eqn.params["id"])
            change = visit(layer_at(eqn, before, after))
            if change is not None:
                after.change(eqn, change)
            bar.update(done + 1, eqn.params["id"])


def check_batches(batches: Sequence[Any], label: str) -> None:
    """Raises `CalibrationError` where there is none to walk on."""
    if not batches:
        raise CalibrationError(
            f"{label}: no calibration samples of these shapes were kept; calibrate on at least one batch of the size "
            "that the model was traced with"
        )


def layer_at(eqn: _compat.JaxprEqn, before: Run, after: Run) -> Layer:
    """A layer of the simulation, with what it reads: runs both programs up to it."""
    found = weight_behind(after.program, after.constants, eqn)
    assert found is not None
    after.up_to(eqn)
    twin = before.up_to_region(eqn.params["id"])
    return Layer(eqn.params["id"], eqn, *found, after.operands(eqn), before.operands(twin))


class Run:
    """One of the two programs, run as far as it is needed.

    Args:
      program: the program.
      batches: flat inputs of its own shapes.
    """

    def __init__(self, program: Program, batches: Sequence[Sequence[Any]]) -> None:
        self.program, self.constants = program, Constants(program)
        self._eqns = replay.live_equations(program.jaxpr)
        self._next = 0
        self._last_use = {v: k for k, e in enumerate(self._eqns) for v in e.invars if isinstance(v, _compat.Var)}
        self._values = {v: [jax.numpy.asarray(b[k]) for b in batches] for k, v in enumerate(program.input_vars)}
        self._count = len(batches)
        self._changes: dict[int, Change] = {}
        self._held: frozenset[Any] = frozenset()

    def branch(self, held: Iterable[Any]) -> Run:
        """The same so far, to be run on its own; values in `held` stay readable there."""
        other = copy.copy(self)
        other._values, other._changes, other._held = dict(self._values), dict(self._changes), frozenset(held)
        return other

    def values(self, var: Any) -> list[Any]:
        """Per batch, a value that is still to be read, or is held."""
        return self._values[var]

    def through(self, eqn: _compat.JaxprEqn) -> None:
        """Runs everything up to an equation, and it."""
        self.up_to(eqn)
        self._step(eqn)
        self._next += 1

    def up_to(self, eqn: _compat.JaxprEqn) -> None:
        """Runs everything before an equation."""
        while self._eqns[self._next] is not eqn:
            self._step(self._eqns[self._next])
            self._next += 1

    def up_to_region(self, region: str) -> _compat.JaxprEqn:
        """Runs everything before a region, and gives its equation."""
        eqn = next(e for e in self._eqns[self._next :] if _regions.is_region(e) and e.params["id"] == region)
        self.up_to(eqn)
        return eqn

    def change(self, eqn: _compat.JaxprEqn, change: Change) -> None:
        """Has an equation that is still to run read other operands."""
        self._changes[id(eqn)] = change

    def operands(self, eqn: _compat.JaxprEqn) -> list[list[Any]]:
        """Per batch, what an equation reads."""
        change = self._changes.get(id(eqn), {})
        columns = []
        for k, atom in enumerate(eqn.invars):
            known = change[k] if k in change else self.constants.value(atom) if atom in self.constants else None
            columns.append(self._values[atom] if known is None else [known] * self._count)
        return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in range(self._count)]

    def _step(self, eqn: _compat.JaxprEqn) -> None:
        if not all(v in self.constants for v in eqn.outvars):
            results = [_run(eqn, values) for values in self.operands(eqn)]
            for k, var in enumerate(eqn.outvars):
                self._values[var] = [r[k] for r in results]
        for var in {v for v in (*eqn.invars, *eqn.outvars) if isinstance(v, _compat.Var)}:
            if self._last_use.get(var, -1) <= self._next and var not in self._held:
                self._values.pop(var, None)


def _run(eqn: _compat.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """An equation on concrete values; regions compiled."""
    if not _regions.is_region(eqn):
        return _compat.bind(eqn, values)
    key = ("region", str(_compat.open_jaxpr(eqn.params["body"])))
    return compiled(key, lambda: lambda *xs: _compat.bind(eqn, xs))(*values)


def _places(body: Any, wanted: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """Where the variables stand in a body, alike in all bodies of one text."""
    inner = _compat.open_jaxpr(body)
    places = {v: (-1, k) for k, v in enumerate(inner.invars)}
    places |= {v: (n, k) for n, e in enumerate(inner.eqns) for k, v in enumerate(e.outvars)}
    return tuple(places[v] for v in wanted)


def _reader(body: Any, wanted: Sequence[Any]) -> Callable[..., list[Any]]:
    """A function from the operands of a body to values in it; what they do not need, XLA drops."""

    def read(*operands: Any) -> list[Any]:
        inner = _compat.open_jaxpr(body)
        env: dict[Any, Any] = dict(zip(inner.invars, operands, strict=True))
        for eqn in inner.eqns:
            values = [v.val if isinstance(v, _compat.Literal) else env[v] for v in eqn.invars]
            env.update(zip(eqn.outvars, _compat.bind(eqn, values), strict=True))
        return [env[v] for v in wanted]

    return read
