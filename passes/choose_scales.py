"""Chooses the scales of weights by what their layers give, before `insert_qdq` puts them into the program.

    min over s of |f(W x) - f(Q_s(W) x^)|^2,  s in {i / N s_max},  for each channel or group that has a scale

AIMET calls it sequential MSE: layers in order, each fed by those before it at their chosen scales. A channel's error
does not depend on the scales of others, so all of them are tried at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.ir.program import Program
from qcompiler.numerics import types
from qcompiler.passes import _layer_rows, _layerwise
from qcompiler.passes._checkpoint import Checkpoint
from qcompiler.passes._layer_rows import LayerRows
from qcompiler.passes._layerwise import Layer, Weight
from qcompiler.rounding import SequentialMSE


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
      fractions: region -> what the scales of its weight are multiplied with; of the shape of the scales.
      errors: region -> the layer's squared error on the samples, at the largest scales and at these.
      left: region -> why its scales stay.
    """

    fractions: Mapping[str, np.ndarray]
    errors: Mapping[str, tuple[float, float]]
    left: Mapping[str, str]


def decide(real: Program, simulated: Program, batches: Sequence[Sequence[Any]], options: SequentialMSE) -> Decision:
    """Chooses the scales of every layer that has a weight.

    Args:
      real: partitioned, in float.
      simulated: the same with QDQ pairs, at scales that cover the largest weight.
      batches: flat inputs of the programs' own shapes.
      options: of the method.

    Raises:
      CalibrationError: there is no batch.
    """
    fractions: dict[str, np.ndarray] = {}
    errors: dict[str, tuple[float, float]] = {}
    left: dict[str, str] = {}
    checkpoint = Checkpoint(options, real, simulated, batches)

    given = simulated.notes.get("given_weights", {})

    def visit(layer: Layer) -> _layerwise.Change | None:
        if f"{layer.id}@{layer.k}" in given:
            left[layer.id] = "the recipe gives its encoding"
            return None
        saved = checkpoint.load(layer.id)
        if saved is None:
            rows = _layer_rows.rows_of(layer, options.rows, options.seed)
            if rows is None:
                left[layer.id] = "its product is no matrix product of rows"
                return None
            chosen, error = best_fractions(rows, layer.weight, options.candidates)
            saved = {"fractions": chosen, "errors": np.asarray(error)}
            checkpoint.save(layer.id, saved)
        fractions[layer.id] = saved["fractions"]
        errors[layer.id] = (float(saved["errors"][0]), float(saved["errors"][1]))
        return {layer.k: scaled(layer.weight, fractions[layer.id]).nearest}

    _layerwise.walk(real, simulated, batches, visit, "choose scales")
    return Decision(fractions, errors, left)


def scaled(weight: Weight, fractions: np.ndarray) -> Weight:
    """The weight at fractions of its scales; the range keeps its form, so zero points stay."""
    return dataclasses.replace(weight, scale=(weight.scale * fractions).astype(np.float32))


def best_fractions(rows: LayerRows, weight: Weight, candidates: int) -> tuple[np.ndarray, tuple[float, float]]:
    """The fraction of each scale with the least error, and the whole error at 1 and at these.

    Args:
      rows: of the layer.
      weight: at scales that cover its largest elements.
      candidates: how many fractions of 1 are tried.
    """
    product = rows.product
    tried = np.arange(candidates, 0, -1) / candidates
    costs = []
    for fraction in tried:
        reals = scaled(weight, np.float32(fraction)).nearest
        error = np.asarray(rows.error(np.asarray(product.matrix(reals))), np.float64)
        costs.append(_per_scale(product, error, weight))
    best = np.argmin(costs, axis=0)
    chosen = tried[best].astype(np.float32).reshape(weight.scale.shape)
    shared = scaled(weight, chosen).nearest
    total = lambda reals: float(np.sum(np.asarray(rows.error(np.asarray(product.matrix(reals))), np.float64)))
    return chosen, (total(weight.nearest), total(shared))


def _per_scale(product: Any, error: np.ndarray, weight: Weight) -> np.ndarray:
    """The error of groups and features `[groups, features]`, summed over those that share a scale; of its shape."""
    depth = product.depth
    spread = np.broadcast_to(error[:, None, :], (error.shape[0], depth, error.shape[1])) / depth
    on_weight = product.weight(spread)
    axis = weight.type.axis
    summed = on_weight.sum(axis=tuple(d for d in range(on_weight.ndim) if d not in axis), keepdims=True)
    return types.over_blocks(np.add, summed, weight.type).reshape(weight.scale.shape)
