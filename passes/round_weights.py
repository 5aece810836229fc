"""Rounds weights so that their layers give what they gave in float, instead of to the nearest codes.

    y = region[conv] (qdq x) (qdq w)      ->      y = region[conv] (qdq x) (qdq w')      w' = s (codes - z)

The rounded weight is real numbers still, each on its code, on which its pair does nothing: the program has the form
that it had. Layers are rounded in order, each fed by those before it as they were rounded, and compared with what the
float program computes there. A weight that others read too is rounded in a copy of its own.

What is decided, on samples, is an array of codes per region; `apply` puts it into the program at any batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler import ops
from qcompiler.ir import _compat
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, rewrite
from qcompiler.passes import _adaround, _gptq, _layer_rows, _layerwise
from qcompiler.passes._checkpoint import Checkpoint
from qcompiler.passes._layer_rows import LayerRows
from qcompiler.passes._layerwise import Layer
from qcompiler.rounding import GPTQ, AdaRound


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
      codes: region -> the codes of its weight.
      errors: region -> the layer's squared error on the samples, with nearest rounding and with these codes.
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
    codes: dict[str, np.ndarray] = {}
    errors: dict[str, tuple[float, float]] = {}
    left: dict[str, str] = {}
    checkpoint = Checkpoint(options, real, simulated, batches)

    def visit(layer: Layer) -> _layerwise.Change | None:
        saved = checkpoint.load(layer.id)
        if saved is None:
            rows = _layer_rows.rows_of(layer, options.rows, options.seed)
            if rows is None:
                left[layer.id] = "its product is no matrix product of rows"
                return None
            chosen, error = _rounded(layer, rows, options)
            saved = {"codes": chosen.astype(layer.weight.type.dtype), "errors": np.asarray(error)}
            checkpoint.save(layer.id, saved)
        codes[layer.id] = saved["codes"]
        errors[layer.id] = (float(saved["errors"][0]), float(saved["errors"][1]))
        return {layer.k: layer.weight.at(saved["codes"].astype(np.int64))}

    _layerwise.walk(real, simulated, batches, visit, "round weights")
    return Decision(codes, errors, left)


def _rounded(layer: Layer, rows: LayerRows, options: AdaRound | GPTQ) -> tuple[np.ndarray, tuple[float, float]]:
    """The codes of a layer's weight, and its error with nearest ones and with these; never worse than nearest."""
    weight, product = layer.weight, rows.product
    spread = lambda array: np.asarray(product.matrix(np.broadcast_to(array, weight.array.shape)))
    matrix, scale, zero = (spread(a) for a in (weight.array, weight.scale, weight.zero_point))
    nearest = spread(weight.codes)
    if isinstance(options, AdaRound):
        found = _adaround.learned_codes(rows, matrix, scale, zero, weight.type, options)
    else:
        found = _gptq.compensated_codes(rows.x, matrix, scale, zero, weight.type, options)
    total = lambda codes: np.asarray(rows.error(spread(weight.at(product.weight(codes)))), np.float64)
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
