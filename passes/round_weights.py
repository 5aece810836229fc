"""Rounds weights so that their layers give what they gave in float, instead of to the nearest codes.

    y = region[conv] (qdq x) (qdq w)      ->      y = region[conv] (qdq x) (qdq w')      w' = s (codes - z)

The rounded weight is real numbers still, each on its code, on which its pair does nothing: the program has the form
that it had. Layers are rounded in order, each fed by those before it as they were rounded, and compared with what the
float program computes there. A weight that others read too is rounded in a copy of its own.

With `AdaRound(unit="block")`, the layers of a block (`_blocks`) are then rounded once more, together.

What is decided, on samples, is an array of codes per region; `apply` puts it into the program at any batch size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler import ops
from qcompiler.debug.progress import ProgressBar
from qcompiler.ir import _compat
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, rewrite
from qcompiler.passes import _adaround, _block_adaround, _blocks, _gptq, _layer_rows, _layerwise
from qcompiler.passes._blocks import Block
from qcompiler.passes._checkpoint import Checkpoint
from qcompiler.passes._layer_rows import LayerRows
from qcompiler.passes._layerwise import Layer, Run, Weight
from qcompiler.rounding import GPTQ, AdaRound


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
      codes: region -> the codes of its weight.
      errors: region -> the squared error on the samples with nearest rounding and with these codes: of GPTQ what the
        layer's rounding adds, of AdaRound that of its results to the float program's, or that of the block with which
        it was rounded, in units of the energy of the block's results.
      left: region -> why its weight stays nearest.
    """

    codes: Mapping[str, np.ndarray]
    errors: Mapping[str, tuple[float, float]]
    left: Mapping[str, str]


def decide(real: Program, simulated: Program, batches: Sequence[Sequence[Any]], options: AdaRound | GPTQ) -> Decision:
    """Rounds every layer that has a weight.

    Args:
      real: partitioned, in float.
      simulated: the same with QDQ pairs.
      batches: flat inputs of the programs' own shapes.
      options: the method.

    Raises:
      CalibrationError: there is no batch.
    """
    rounder = _Rounder(real, simulated, batches, options)
    if isinstance(options, AdaRound) and options.unit == "block":
        rounder.walk_blocks(real, simulated, batches)
    else:
        _layerwise.walk(real, simulated, batches, rounder.visit, _LABEL)
    looped = dict.fromkeys(_layerwise.in_loops(simulated), "it is in the body of a loop, which runs as it is")
    return Decision(rounder.codes, rounder.errors, {**rounder.left, **looped})


_LABEL = "round weights"


class _Rounder:
    """Rounds what a walk comes to, or takes it from a checkpoint."""

    def __init__(
        self, real: Program, simulated: Program, batches: Sequence[Sequence[Any]], options: AdaRound | GPTQ
    ) -> None:
        self.codes: dict[str, np.ndarray] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self.left: dict[str, str] = {}
        self._options = options
        self._checkpoint = Checkpoint(options, real, simulated, batches)

    def visit(self, layer: Layer) -> _layerwise.Change | None:
        """Rounds a layer."""
        saved = self._checkpoint.load(layer.id)
        if saved is None:
            rounded = _rounded(layer, self._options)
            if rounded is None:
                self.left[layer.id] = "its product is no matrix product of rows"
                return None
            chosen, error = rounded
            saved = {"codes": chosen.astype(layer.weight.type.dtype), "errors": np.asarray(error)}
            self._checkpoint.save(layer.id, saved)
        return self._keep(layer.id, layer.k, layer.weight, saved["codes"], saved["errors"])

    def _keep(self, region: str, k: int, weight: Weight, codes: np.ndarray, errors: Any) -> _layerwise.Change:
        self.codes[region] = codes
        self.errors[region] = (float(errors[0]), float(errors[1]))
        self.left.pop(region, None)
        return {k: weight.at(codes.astype(np.int64))}

    def walk_blocks(self, real: Program, simulated: Program, batches: Sequence[Sequence[Any]]) -> None:
        """Rounds block after block, each fed by the rounded ones before it."""
        _layerwise.check_batches(batches, _LABEL)
        assert isinstance(self._options, AdaRound)
        blocks = _blocks.blocks_of(real, simulated, self._options.block_layers)
        before, after = Run(real, batches), Run(simulated, batches)
        with contextlib.closing(ProgressBar(_LABEL, len(blocks))) as bar:
            for done, block in enumerate(blocks):
                bar.update(done, block.layers[-1].params["id"])
                before.up_to(block.first)
                after.up_to(block.eqns[0])
                for eqn, change in zip(block.layers, self._block(block, before, after), strict=True):
                    if change is not None:
                        after.change(eqn, change)
                bar.update(done + 1, block.layers[-1].params["id"])

    def _block(self, block: Block, before: Run, after: Run) -> list[_layerwise.Change | None]:
        """What the layers of a block are to read: rounded one after the other, and then together."""
        regions = [e.params["id"] for e in block.layers]
        name = "block " + " ".join(regions)
        weights = [_weight(after, eqn) for eqn in block.layers]
        saved = self._checkpoint.load(name)
        if saved is None:
            # The layers are tried on branches, so that the walk itself sees none but their last codes.
            before, after = before.branch(block.targets), after.branch(block.reads)
            changes = []
            for eqn in block.layers:
                changes.append(self.visit(_layerwise.layer_at(eqn, before, after)))
                if changes[-1] is not None:
                    after.change(eqn, changes[-1])
            if len(block.layers) == 1 and changes[0] is not None:
                return changes
            before.through(block.last)
            after.up_to(block.eqns[-1])
            start = [self.codes.get(r, w.codes).astype(np.int64) for r, w in zip(regions, weights, strict=True)]
            chosen, errors = _block_adaround.joint_codes(
                block,
                weights,
                start,
                [after.constants.value(v) for v in block.known],
                list(zip(*map(after.values, block.reads), strict=True)),
                list(zip(*map(before.values, block.targets), strict=True)),
                self._options,
            )
            saved = {f"codes {n}": c.astype(w.type.dtype) for n, (c, w) in enumerate(zip(chosen, weights, strict=True))}
            saved["errors"] = np.asarray(errors)
            self._checkpoint.save(name, saved)
        return [
            self._keep(region, k, weight, saved[f"codes {n}"], saved["errors"])
            for n, (region, k, weight) in enumerate(zip(regions, block.operand, weights, strict=True))
        ]


def _weight(run: Run, eqn: _compat.JaxprEqn) -> Weight:
    found = _layerwise.weight_behind(run.program, run.constants, eqn)
    assert found is not None
    return found[1]


def _rounded(layer: Layer, options: AdaRound | GPTQ) -> tuple[np.ndarray, tuple[float, float]] | None:
    """The codes of a layer's weight, and its error with nearest ones and with these; never worse than nearest.

    AdaRound learns what makes up for the layers before it too, and its errors are against the float program. GPTQ makes
    up for the layer's own rounding; chosen by more than that, features fit their rounding to what came before them on
    the samples, and lose elsewhere. None where the product is no matrix product of rows.
    """
    read = _layer_rows.rows_of if isinstance(options, AdaRound) else _layer_rows.inputs_of
    rows = read(layer, options.rows, options.seed)
    if rows is None:
        return None
    weight, product = layer.weight, rows.product
    spread = lambda array: np.asarray(product.matrix(np.broadcast_to(array, weight.array.shape)))
    matrix, scale, zero = (spread(a) for a in (weight.array, weight.scale, weight.zero_point))
    nearest = spread(weight.codes)
    if isinstance(rows, LayerRows):
        found = _adaround.learned_codes(rows, matrix, scale, zero, weight.type, options)
        error = rows.error
    else:
        found = _gptq.compensated_codes(rows.x, matrix, scale, zero, weight.type, options)
        error = lambda reals: rows.rounding_error(reals - matrix)
    total = lambda codes: np.asarray(error(spread(weight.at(product.weight(codes)))), np.float64)
    before, after = total(nearest), total(found)
    # Features are independent of each other: each keeps the better of the two.
    better = (after < before)[:, None, :]
    chosen = product.weight(np.where(better, found, nearest))
    return chosen, (float(before.sum()), float(np.minimum(before, after).sum()))


def apply(program: Program, decision: Decision) -> Program:
    """The program with QDQ pairs, with weights on the decided codes. Notes `rounded`: region -> its two errors."""
    constants = Constants(program)
    arrays: dict[int, tuple[str, np.ndarray]] = {}
    for eqn in _layerwise.layers_of(program):
        region = eqn.params["id"]
        if region in decision.codes:
            k, weight = _layerwise.weight_behind(program, constants, eqn)
            pair = program.producer[eqn.invars[k]]
            name = program.ids[pair.invars[0]].removeprefix("weight:")
            reals = weight.at(decision.codes[region].astype(np.int64))
            arrays[id(pair)] = (f"{name}:rounded@{region}", reals)

    def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if id(eqn) not in arrays:
            return None
        _, scale, zero = values
        return [ops.fake_quantize(builder.weight(*arrays[id(eqn)]), scale, zero, eqn.params["type"])]

    rounded = rewrite(program, rule, stage="round_weights")
    note = {region: {"nearest": a, "rounded": b} for region, (a, b) in decision.errors.items()}
    return rounded.note("rounded", note).note("left_nearest", dict(decision.left))
