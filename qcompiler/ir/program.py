"""`Program`: one flat jaxpr, its named weights, its signature, and what calibration learned about its values.

The arguments of the jaxpr are the weights, in the order of `Program.weights`, then the inputs, flat. Every stage of the
compiler is such a program, and every one can be run, printed, jitted and (until it is lowered) differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler.ir import _compat, identity, replay


@dataclasses.dataclass(frozen=True)
class Signature:
    """How flat inputs and outputs map to what the user passes and gets.

    Attributes:
      in_tree: tree of `(args, kwargs)`.
      out_tree: tree of the result.
      input_names: one readable name per flat input, `x` or `batch['image']`.
    """

    in_tree: Any
    out_tree: Any
    input_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model at one stage of the compiler; immutable.

    Attributes:
      jaxpr: closed jaxpr without constants; arguments are weights, then inputs.
      weights: name -> array (NumPy, or a JAX array where NumPy has no such dtype), in argument order.
      signature: pytree structure of inputs and outputs.
      stats: value id -> `numerics.ranges.RangeStats`, filled by calibration.
      notes: what passes hand on, keyed by the pass that wrote it; plain JSON-like data.
      stage: name of the last pass.
    """

    jaxpr: Any
    weights: Mapping[str, Any]
    signature: Signature
    stats: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stage: str = "trace"

    @property
    def eqns(self) -> list[_compat.JaxprEqn]:
        """The equations, in order."""
        return list(_compat.open_jaxpr(self.jaxpr).eqns)

    @property
    def invars(self) -> list[_compat.Var]:
        """The arguments: weights, then inputs."""
        return _compat.invars_of(self.jaxpr)

    @property
    def outvars(self) -> list[Any]:
        """The results; variables or literals."""
        return list(_compat.open_jaxpr(self.jaxpr).outvars)

    @property
    def weight_of(self) -> dict[_compat.Var, str]:
        """Weight variable -> its name."""
        return dict(zip(self.invars, self.weights, strict=False))

    @property
    def input_vars(self) -> list[_compat.Var]:
        """Variables of the flat inputs."""
        return self.invars[len(self.weights) :]

    @property
    def input_avals(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of each flat input."""
        return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.input_vars]

    @functools.cached_property
    def ids(self) -> dict[_compat.Var, str]:
        """Variable -> value id: `input:name`, `weight:name`, or the id of the equation (with `.k` for output k > 0)."""
        ids = {v: f"weight:{n}" for v, n in self.weight_of.items()}
        ids.update((v, f"input:{n}") for v, n in zip(self.input_vars, self.signature.input_names, strict=True))
        for eqn, eqn_id in zip(self.eqns, identity.equation_ids(self.eqns), strict=True):
            for k, var in enumerate(eqn.outvars):
                ids[var] = f"{eqn_id}.{k}" if k else eqn_id
        return ids

    @functools.cached_property
    def users(self) -> dict[_compat.Var, list[tuple[_compat.JaxprEqn, int]]]:
        """Variable -> the (equation, operand position) pairs that read it; results of the program are not in it."""
        found: dict[_compat.Var, list[tuple[_compat.JaxprEqn, int]]] = {}
        for eqn in self.eqns:
            for position, var in enumerate(eqn.invars):
                if isinstance(var, _compat.Var):
                    found.setdefault(var, []).append((eqn, position))
        return found

    @functools.cached_property
    def producer(self) -> dict[_compat.Var, _compat.JaxprEqn]:
        """Variable -> the equation that computes it; arguments are absent."""
        return {v: eqn for eqn in self.eqns for v in eqn.outvars}

    def use_count(self, var: _compat.Var) -> int:
        """How often a variable is read, by equations and as a result."""
        return len(self.users.get(var, ())) + sum(1 for v in self.outvars if v is var)

    def __call__(self, *inputs: Any) -> list[Any]:
        """Runs the program on flat inputs (arrays or tracers) and returns flat outputs."""
        return jax.core.eval_jaxpr(
            _compat.open_jaxpr(self.jaxpr), _compat.consts_of(self.jaxpr), *self.weights.values(), *inputs
        )

    def evaluate(self, inputs: Sequence[Any]) -> list[Any]:
        """Runs op by op on concrete flat inputs: no compilation of the whole, every op as JAX runs it alone."""
        return replay.evaluate(self.jaxpr, [*self.weights.values(), *inputs], keep_source=False)

    def replace(self, **changes: Any) -> Program:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def note(self, key: str, value: Any) -> Program:
        """A copy with `notes[key] = value`."""
        return self.replace(notes={**self.notes, key: value})

    def text(self) -> str:
        """The program as text: one equation a line, with its id and source line."""
        from qcompiler.debug import printing

        return printing.program_text(self)

    def __repr__(self) -> str:
        sizes = sum(int(np.prod(w.shape)) * w.dtype.itemsize for w in self.weights.values())
        return f"<Program {self.stage}: {len(self.eqns)} equations, {len(self.weights)} weights, {sizes:,} bytes>"


class Builder:
    """What a rewrite uses to reach weights, by name, and to add new ones.

    Args:
      values: name -> the traced weight.
      arrays: name -> what it holds.
    """

    def __init__(self, values: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._arrays = dict(arrays)
        self.added: dict[str, Any] = {}

    def get(self, name: str) -> Any | None:
        """The (traced) weight `name`, or None if it was dropped because nothing reads it."""
        return self._values.get(name)

    def weight(self, name: str, value: Any | None = None) -> Any:
        """The (traced) weight `name`; with `value`, adds it if there is none of that name yet.

        The same name with another value is an error of the pass, not of the user.
        """
        if name in self._values:
            if value is not None and not _same(self._arrays[name], value):
                raise AssertionError(f"two weights are named {name}")
            return self._values[name]
        if value is None:
            raise KeyError(name)
        self._arrays[name] = self.added[name] = np.asarray(value)
        # A JAX value, as it will be when the rewrite is traced again: rules may tell it from a number.
        self._values[name] = jax.numpy.asarray(value)
        return self._values[name]


def _same(held: Any, value: Any) -> bool:
    """Whether two arrays hold the same numbers of the same type; what is cheap to tell comes first."""
    if held is value:
        return True
    held, value = np.asarray(held), np.asarray(value)
    return held.dtype == value.dtype and held.shape == value.shape and np.array_equal(held, value, equal_nan=True)


def build(
    make: Callable[..., Sequence[Any]],
    weights: Mapping[str, Any],
    input_avals: Sequence[Any],
    signature: Signature,
    **fields: Any,
) -> Program:
    """Traces `make(builder, *inputs) -> flat outputs` into a program, and drops weights that nothing reads.

    Args:
      make: traced twice when it adds weights, so it must be deterministic.
      weights: the weights that exist before.
      input_avals: shape and dtype of each flat input.
      signature: of the new program.
      **fields: further fields of `Program`.
    """
    weights = dict(weights)
    unread: set[str] = set()
    for _ in range(4):
        builders: list[Builder] = []

        def traced(values: Sequence[Any], inputs: Sequence[Any], weights=weights, builders=builders) -> list[Any]:
            builder = Builder(dict(zip(weights, values, strict=True)), weights)
            builders.append(builder)
            return list(make(builder, *inputs))

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Explicitly requested dtype")
            jaxpr = jax.make_jaxpr(traced)([_aval(w) for w in weights.values()], list(input_avals))
        used = {v for eqn in replay.live_equations(jaxpr) for v in eqn.invars if isinstance(v, _compat.Var)}
        used.update(v for v in _compat.open_jaxpr(jaxpr).outvars if isinstance(v, _compat.Var))
        names = [n for n, v in zip(weights, _compat.invars_of(jaxpr), strict=False) if v in used]
        added = {n: w for n, w in builders[-1].added.items() if n not in unread}
        if not added and len(names) == len(weights):
            break
        unread.update(n for n in weights if n not in names)
        weights = {n: weights[n] for n in names} | added
    else:
        raise AssertionError("a rewrite adds other weights each time it is traced")
    if len(replay.live_equations(jaxpr)) < len(_compat.open_jaxpr(jaxpr).eqns) or _compat.consts_of(jaxpr):
        # What a rewrite left unread would still count as a reader of its operands.
        avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in _compat.invars_of(jaxpr)]
        jaxpr = jax.make_jaxpr(lambda args: replay.evaluate(jaxpr, args))(avals)
    if _compat.consts_of(jaxpr):
        raise AssertionError("a rewrite closed over an array instead of naming it with Builder.weight")
    return Program(jaxpr=jaxpr, weights=weights, signature=signature, **fields)


def rewrite(
    program: Program,
    rule: Callable[[Builder, _compat.JaxprEqn, list[Any]], Sequence[Any] | None],
    *,
    stage: str,
    weights: Mapping[str, Any] | None = None,
) -> Program:
    """Replays `program` with `rule(builder, equation, values)` deciding each equation (None: keep it).

    `weights` replaces values of existing weights by name.
    """

    def make(builder: Builder, *inputs: Any) -> list[Any]:
        args = [*(builder.get(n) for n in program.weights), *inputs]
        return replay.evaluate(program.jaxpr, args, lambda eqn, values: rule(builder, eqn, values))

    return build(
        make,
        {**program.weights, **(weights or {})},
        program.input_avals,
        program.signature,
        stats=program.stats,
        notes=program.notes,
        stage=stage,
    )


def _aval(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
