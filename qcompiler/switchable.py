"""A calibrated program in which every layer's operands pass through a quantizer that a number chooses at run time.

    y = region[conv] x w b      ->      y = region[conv] (stored x choice[k]) (stored w choice[k]) b

Choice 0 leaves a layer real, choice c stores its operands as candidate c - 1 does. Scales, zero points and ranges of
all candidates are arrays that the choice indexes, so that one compiled program runs every configuration. What is
stored between layers stays real: sums, tables and biases have 16 or 32 bits and cost little beside the operands of
products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.candidates import Candidate
from qcompiler.errors import CalibrationError, QuantizationError
from qcompiler.ir import Program, _compat, classes, identity, loops, replay
from qcompiler.ir.constants import Constants
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _regions, assign_precision, insert_qdq, observe
from qcompiler.recipe import Recipe

#: Ways to store an operand; the numbers index the branches of `stored`.
_REAL, _INTEGER, _BFLOAT16, _FLOAT16 = range(4)
_KINDS = {"float32": _REAL, "bfloat16": _BFLOAT16, "float16": _FLOAT16}

#: What becomes of a layer's operands: `(layer id, region's operands) -> operands`.
Hook = Callable[[str, list[Any]], list[Any]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A region with a product.

    Attributes:
      id: of the region.
      primitive: of the product.
      macs: its multiply-adds in one call, those of every step of a loop together.
      weights: elements of its weight; 0 where activations meet each other.
    """

    id: str
    primitive: str
    macs: int
    weights: int

    @property
    def module_path(self) -> str:
        """In the parameter tree; empty at the top."""
        return self.id.rpartition("/")[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Ways:
    """How one operand may be stored; row 0 is real, row c that of candidate c - 1. A pytree with static `kinds`.

    Attributes:
      scale: float32[1 + candidates, ...], the rest broadcasting to the operand.
      low, high: the least and the largest code, less the zero point, likewise.
      kinds: real, integer, or half precision, per row.
    """

    scale: Any
    low: Any
    high: Any
    kinds: tuple[int, ...]


jax.tree_util.register_dataclass(Ways, data_fields=["scale", "low", "high"], meta_fields=["kinds"])


def stored(x: Any, ways: Ways, row: Any) -> Any:
    """`x` as it comes back from where it is stored, in its own dtype; bit for bit what `ops.fake_quantize` gives.

    Args:
      x: float array.
      ways: of this operand.
      row: int32 scalar, traced, or an int.
    """
    arrays = (ways.scale, ways.low, ways.high)
    if isinstance(row, int):
        return _BRANCHES[ways.kinds[row]](x, *(a[row] for a in arrays))
    found = sorted(set(ways.kinds))
    index = jnp.asarray([found.index(kind) for kind in ways.kinds], jnp.int32)[row]
    branch = lambda kind: lambda x: _BRANCHES[kind](x, *(jnp.asarray(a)[row] for a in arrays))
    return lax.switch(index, [branch(kind) for kind in found], x)


def _as_integer(x: Any, scale: Any, low: Any, high: Any) -> Any:
    """clamp(rint(x / s) + z) - z = clamp(rint(x / s), qmin - z, qmax - z); NaN is stored as zero."""
    steps = lax.round(x.astype(jnp.float32) * (np.float32(1) / scale), lax.RoundingMethod.TO_NEAREST_EVEN)
    steps = jnp.where(jnp.isnan(steps), np.float32(0), steps)
    return (jnp.clip(steps, low, high) * scale).astype(x.dtype)


_BRANCHES: dict[int, Callable[..., Any]] = {
    _REAL: lambda x, *_: x,
    _INTEGER: _as_integer,
    _BFLOAT16: lambda x, *_: lax.reduce_precision(x, 8, 7),
    _FLOAT16: lambda x, *_: lax.reduce_precision(x, 5, 10),
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """The program or a body of one of its loops, with the bodies in it by the loops' identity."""

    program: Program
    times: int
    bodies: Mapping[int, list[tuple[loops.Body, _Part]]]

    @classmethod
    def of(cls, program: Program, times: int = 1) -> _Part:
        bodies = {
            id(eqn): [
                (body, cls.of(body.program, times * body.program.notes.get("steps", 1)))
                for body in loops.bodies(program, eqn)
            ]
            for eqn in loops.loops_of(program)
        }
        return cls(program, times, bodies)

    def all(self) -> list[_Part]:
        """It and every part in it."""
        return [self, *(inner for found in self.bodies.values() for _, part in found for inner in part.all())]


class Switchable:
    """See the module's docstring.

    Args:
      program: partitioned and calibrated, with observers or without.
      recipe: whose range estimators activations get.
      candidates: by name.

    Attributes:
      layers: in program order.
      candidates: as given.
      weights: name -> weight of the program.
      layer_weights: layer id -> its weight; layers without one are absent.
      weight_operand: layer id -> which operand of the region that is, likewise.
      weight_ways: layer id -> how its weight may be stored, likewise.
      activation_ways: layer id -> operand of the region -> how it may be stored.

    Raises:
      CalibrationError: a layer reads what calibration has not seen.
      QuantizationError: there is no layer with a product, or a range that float32 has no scale for.
    """

    def __init__(self, program: Program, recipe: Recipe, candidates: Mapping[str, Candidate]) -> None:
        program = observe.without_observers(program)
        self.program, self.candidates, self._recipe = program, dict(candidates), recipe
        self.weights = dict(program.weights)
        self.layers: list[Layer] = []
        self.layer_weights: dict[str, np.ndarray] = {}
        self.weight_operand: dict[str, int] = {}
        self.weight_ways: dict[str, Ways] = {}
        self.activation_ways: dict[str, dict[int, Ways]] = {}
        self._part = _Part.of(program)
        types = [self._types(candidate) for candidate in self.candidates.values()]
        for part in self._part.all():
            constants = Constants(part.program)
            for eqn in part.program.eqns:
                anchor = _regions.anchor_of(eqn) if _regions.is_region(eqn) else None
                if anchor is not None and anchor.primitive.name in classes.PRODUCT:
                    self._add(part, eqn, anchor, constants, [found.get(eqn.params["id"]) for found in types])
        if not self.layers:
            raise QuantizationError("the program has no layer with a product, so there is nothing to choose for")

    def _types(self, candidate: Candidate) -> dict[str, list[QuantType | None]]:
        """Region id -> type per operand, where every layer has this candidate; nothing is said of what stays real."""
        recipe = dataclasses.replace(
            self._recipe,
            weight=candidate.weight or self._recipe.weight,
            activation=candidate.activation or self._recipe.activation,
            granularity=candidate.granularity,
            # An activation that 8 bits hold badly is what sensitivity shall show.
            activation_sqnr=None,
            pair_sqnr=None,
            rules=(),
        )
        typed = assign_precision.assign_precision(self.program, recipe)
        return {region: chosen for part in loops.nested(typed) for region, chosen in part.notes["types"].items()}

    def _add(
        self, part: _Part, eqn: _compat.JaxprEqn, anchor: _compat.JaxprEqn, constants: Constants, types: list[Any]
    ) -> None:
        layer, roles = eqn.params["id"], eqn.params["roles"]
        size = 0
        self.activation_ways[layer] = {}
        for k, (var, role) in enumerate(zip(eqn.invars, roles, strict=True)):
            if role not in ("weight", "activation"):
                continue
            # Sums and terms of the same region have roles of their own, so that these meet in the product.
            encode = self._weight_encoder(constants, eqn, k) if role == "weight" else self._encoder(part, var)
            rows = [
                (_KINDS[c.float_dtype], None) if getattr(c, role) is None else (_INTEGER, encode(chosen[k]))
                for c, chosen in zip(self.candidates.values(), types, strict=True)
            ]
            shape: tuple[int, ...] = getattr(var.aval, "shape", ())
            ways = _ways(rows, len(shape))
            if role == "activation":
                self.activation_ways[layer][k] = ways
                continue
            self.weight_operand[layer], self.weight_ways[layer] = k, ways
            self.layer_weights[layer] = np.asarray(constants.value(var))
            size = self.layer_weights[layer].size
        macs = part.times * classes.multiply_adds(anchor)
        self.layers.append(Layer(layer, anchor.primitive.name, macs, size))

    def _weight_encoder(self, constants: Constants, eqn: _compat.JaxprEqn, k: int) -> Callable[[QuantType], Encoding]:
        array = constants.value(eqn.invars[k])

        def encode(qtype: QuantType) -> Encoding:
            try:
                return Encoding(qtype, *insert_qdq.weight_scale(array, qtype))
            except QuantizationError as error:
                raise QuantizationError(
                    f"the weight of {eqn.params['id']} at {identity.source_of(eqn)}: {error}; rescale the layer"
                ) from error

        return encode

    def _encoder(self, part: _Part, var: Any) -> Callable[[QuantType], Encoding]:
        program = part.program
        key = program.ids[_regions.behind_views(program, var)]

        def encode(qtype: QuantType) -> Encoding:
            stats = program.stats.get(key)
            if stats is None or not stats.count:
                raise CalibrationError(f"calibration has not seen {key}: no batch runs that branch; add one that does")
            try:
                return Encoding.of_stats(stats, qtype, self._recipe.estimator_for(qtype))
            except QuantizationError as error:
                raise CalibrationError(f"{key}: {error}; rescale it") from error

        return encode

    def same_as(self, layer: str, row: int) -> int:
        """The first row that stores all operands of a layer as `row` does; its own type matters to no absent weight."""
        ways = [*self.activation_ways[layer].values()]
        ways += [self.weight_ways[layer]] if layer in self.weight_ways else []
        same = lambda other: all(
            w.kinds[other] == w.kinds[row] and all(np.array_equal(a[other], a[row]) for a in (w.scale, w.low, w.high))
            for w in ways
        )
        return next(other for other in range(row + 1) if same(other))

    def tables(self) -> dict[str, Any]:
        """What `outputs` reads besides inputs, as arguments of a compiled function."""
        return {"weights": self.weights, "weight_ways": self.weight_ways}

    def outputs(self, tables: Mapping[str, Any], choices: Any, inputs: Sequence[Any]) -> list[Any]:
        """Flat results of one configuration; traceable.

        Args:
          tables: see `tables`.
          choices: int32[layers], a row of each layer's `Ways`.
          inputs: flat, of the program's shapes.
        """
        position = {layer.id: k for k, layer in enumerate(self.layers)}

        def hook(layer: str, values: list[Any]) -> list[Any]:
            out, row = list(values), choices[position[layer]]
            for k, ways in self.activation_ways[layer].items():
                out[k] = stored(values[k], ways, row)
            if layer in self.weight_ways:
                k = self.weight_operand[layer]
                out[k] = stored(values[k], tables["weight_ways"][layer], row)
            return out

        return self.evaluate(tables["weights"], inputs, hook)

    def evaluate(self, weights: Mapping[str, Any], inputs: Sequence[Any], hook: Hook) -> list[Any]:
        """Flat results of the float program, a hook having its way with the operands of every layer; traceable.

        Args:
          weights: name -> (traced) weight.
          inputs: flat.
          hook: sees layers in bodies of loops, too, there on the tracers of one step.
        """
        return _evaluate(self._part, weights, inputs, hook, frozenset(self.activation_ways))


def _ways(rows: Sequence[tuple[int, Encoding | None]], rank: int) -> Ways:
    """The rows behind that of a real operand, of arrays that broadcast to one another."""
    kinds: list[int] = [_REAL]
    arrays: list[tuple[Any, Any, Any]] = [(1.0, 0.0, 0.0)]
    for kind, encoding in rows:
        kinds.append(kind)
        if encoding is None:
            arrays.append((1.0, 0.0, 0.0))
            continue
        zero = encoding.zero_point
        arrays.append((encoding.scale, encoding.type.qmin - zero, encoding.type.qmax - zero))
    full = lambda a: np.asarray(a, np.float32).reshape((1,) * rank if np.ndim(a) == 0 else np.shape(a))
    shaped = [tuple(full(a) for a in row) for row in arrays]
    scale, low, high = (np.stack(np.broadcast_arrays(*column)) for column in zip(*shaped, strict=True))
    return Ways(scale, low, high, tuple(kinds))


def _evaluate(
    part: _Part, weights: Mapping[str, Any], inputs: Sequence[Any], hook: Hook, layers: frozenset[str]
) -> list[Any]:
    def rule(eqn: _compat.JaxprEqn, values: list[Any]) -> list[Any] | None:
        if _regions.is_region(eqn) and eqn.params["id"] in layers:
            return _compat.bind(eqn, hook(eqn.params["id"], values))
        if id(eqn) in part.bodies:
            parts = {id(body): inner for body, inner in part.bodies[id(eqn)]}
            run = lambda body, given: _evaluate(parts[id(body)], weights, given, hook, layers)
            return loops.bind(eqn, values, [body for body, _ in part.bodies[id(eqn)]], weights.__getitem__, run)
        return None

    args = [*(weights[name] for name in part.program.weights), *inputs]
    return replay.evaluate(part.program.jaxpr, args, rule, keep_source=False)
