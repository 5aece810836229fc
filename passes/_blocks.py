"""Blocks: consecutive regions between two points of a program where no more than one activation is live.

    x -> conv1 -> conv2 -> add x -> conv3          blocks:  conv1, conv2, add x  |  conv3

Between conv1 and conv2, x is live beside the first result, so they belong together: residual and transformer blocks
come out by themselves (the units of Li et al. 2021, "BRECQ", section 3.2, without names for them). Values that no
layer reaches, such as masks and the tables of rotary embeddings, may be live anywhere. A loop or an island ends a
block, and so does a largest number of layers; a block that ends so may have several results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qcompiler.ir import _compat, replay
from qcompiler.ir.program import Program
from qcompiler.passes import _layerwise, _regions


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A block of the simulation.

    Attributes:
      layers: its regions with a weight behind a pair, in order.
      operand: of each, which operand is the weight.
      eqns: what computes the results from `reads` and `known`, in order.
      reads: variables of activations that come from outside.
      known: variables of constants, but for the layers' weights.
      results: variables of the results, before their pairs.
      first, last: equations of the float program, from the first region to the last.
      targets: what the results are there.
    """

    layers: tuple[_compat.JaxprEqn, ...]
    operand: tuple[int, ...]
    eqns: tuple[_compat.JaxprEqn, ...]
    reads: tuple[Any, ...]
    known: tuple[Any, ...]
    results: tuple[Any, ...]
    first: _compat.JaxprEqn
    last: _compat.JaxprEqn
    targets: tuple[Any, ...]

    def __call__(self, weights: Sequence[Any], known: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """The results, differentiable in the weights; pairs of activations pass gradients straight through.

        Args:
          weights: of the layers, as they are to be read.
          known: arrays for `known`.
          values: arrays for `reads`.
        """
        env = dict(zip((*self.reads, *self.known), (*values, *known), strict=True))
        weight_of = {id(e): (k, w) for e, k, w in zip(self.layers, self.operand, weights, strict=True)}
        for eqn in self.eqns:
            at, weight = weight_of.get(id(eqn), (None, None))
            operands = [
                weight if k == at else v.val if isinstance(v, _compat.Literal) else env[v]
                for k, v in enumerate(eqn.invars)
            ]
            env.update(zip(eqn.outvars, _compat.bind(eqn, operands), strict=True))
        return [env[v] for v in self.results]


def blocks_of(real: Program, simulated: Program, most: int) -> list[Block]:
    """The blocks of a program, in order; together they have every layer.

    Args:
      real: partitioned, in float.
      simulated: the same with QDQ pairs: regions have the same ids.
      most: layers in a block.
    """
    layers = {e.params["id"] for e in _layerwise.layers_of(simulated)}
    eqns = replay.live_equations(real.jaxpr)
    last_read = {v: n for n, e in enumerate(eqns) for v in e.invars if isinstance(v, _compat.Var)}
    found: list[list[_compat.JaxprEqn]] = []
    reached: set[Any] = set()
    live: set[Any] = set()
    regions: list[_compat.JaxprEqn] = []

    def is_layer(eqn: _compat.JaxprEqn) -> bool:
        return _regions.is_region(eqn) and eqn.params["id"] in layers

    def end() -> None:
        if any(map(is_layer, regions)):
            found.append(list(regions))
        regions.clear()

    for n, eqn in enumerate(eqns):
        if not is_layer(eqn) and not any(isinstance(v, _compat.Var) and v in reached for v in eqn.invars):
            continue
        reached.update(eqn.outvars)
        live = {v for v in {*live, *eqn.outvars} if last_read.get(v, -1) > n}
        if not _regions.is_region(eqn):
            end()
            continue
        if is_layer(eqn) and sum(map(is_layer, regions)) == most:
            end()
        regions.append(eqn)
        # Views and other regions without a weight go with the layers behind them.
        if len(live) <= 1 and any(map(is_layer, regions)):
            end()
    end()
    return [_block(real, simulated, regions) for regions in found]


def _block(real: Program, simulated: Program, regions: Sequence[_compat.JaxprEqn]) -> Block:
    own = {id(e) for e in regions}
    leaves = lambda v: any(id(e) not in own for e, _ in real.users.get(v, ())) or any(v is out for out in real.outvars)
    ids = {e.params["id"] for e in regions}
    twins = {e.params["id"]: e for e in simulated.eqns if _regions.is_region(e) and e.params["id"] in ids}
    pairs = [(v, twins[e.params["id"]].outvars[k]) for e in regions for k, v in enumerate(e.outvars) if leaves(v)]
    results = tuple(twin for _, twin in pairs)
    eqns = _between({id(e) for e in twins.values()}, results, replay.live_equations(simulated.jaxpr))
    layers, operand = [], []
    weights: set[tuple[int, int]] = set()
    constants = _layerwise.Constants(simulated)
    for eqn in eqns:
        weight = _layerwise.weight_behind(simulated, constants, eqn) if _regions.is_region(eqn) else None
        if weight is not None:
            layers.append(eqn)
            operand.append(weight[0])
            weights.add((id(eqn), weight[0]))
    made = {v for e in eqns for v in e.outvars}
    read = [v for e in eqns for k, v in enumerate(e.invars) if (id(e), k) not in weights]
    outside = list(dict.fromkeys(v for v in read if isinstance(v, _compat.Var) and v not in made))
    return Block(
        tuple(layers),
        tuple(operand),
        tuple(eqns),
        tuple(v for v in outside if v not in constants),
        tuple(v for v in outside if v in constants),
        results,
        regions[0],
        regions[-1],
        tuple(v for v, _ in pairs),
    )


def _between(own: set[int], results: Sequence[Any], eqns: Sequence[_compat.JaxprEqn]) -> list[_compat.JaxprEqn]:
    """The equations that results depend on, from regions on: these and what reads them."""
    touched: set[Any] = set()
    behind = []
    for eqn in eqns:
        if id(eqn) in own or any(isinstance(v, _compat.Var) and v in touched for v in eqn.invars):
            touched.update(eqn.outvars)
            behind.append(eqn)
    needed, kept = set(results), []
    for eqn in reversed(behind):
        if any(v in needed for v in eqn.outvars):
            needed.update(v for v in eqn.invars if isinstance(v, _compat.Var))
            kept.append(eqn)
    return kept[::-1]
