"""What the operands of products are on samples: their largest magnitude per channel, and some of their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.debug.progress import ProgressBar
from qcompiler.ir import _compat, replay
from qcompiler.ir.program import Program

#: Rows of a product with weights, of all samples together; elements of each operand of a product without.
_ROWS, _ELEMENTS = 512, 1 << 18


@dataclasses.dataclass(eq=False)
class Seen:
    """An operand of a product on samples, as (batch, row, contracted).

    Attributes:
      parts: float32, some of the rows, per sample; one for a weight.
      peaks: float32 (batch, 1, contracted) per part, largest magnitude of all its rows.
      every: which rows: each so many-th.
    """

    parts: list[np.ndarray]
    peaks: list[np.ndarray]
    every: int = 1


def canonical(array: np.ndarray, eqn: _compat.JaxprEqn, position: int) -> np.ndarray:
    """An operand of a dot, or an array that broadcasts against it, as (batch, row, contracted).

    Dimensions in which all of a kind have size 1 stay so.
    """
    shape = eqn.invars[position].aval.shape
    contract, batch = (dims[position] for dims in eqn.params["dimension_numbers"])
    free = [d for d in range(len(shape)) if d not in contract and d not in batch]
    full = list(array.shape)
    for dims in (batch, free, contract):
        if any(array.shape[d] > 1 for d in dims):
            for d in dims:
                full[d] = shape[d]
    array = np.broadcast_to(array, full).transpose(*batch, *free, *contract)
    sizes = [int(np.prod([full[d] for d in dims], dtype=np.int64)) for dims in (batch, free, contract)]
    return array.reshape(sizes)


def observe(
    program: Program, products: Sequence[_compat.JaxprEqn], weights: set[tuple[int, int]], batches: Sequence[Any]
) -> dict[tuple[int, int], Seen]:
    """Runs the float program on samples and keeps what the products read: (id of the product, operand) -> values.

    Args:
      program: before quantization.
      products: its dots that are of interest.
      weights: operands of them that are constant, which are left out.
      batches: flat inputs of the program's shapes.
    """
    wanted = {id(eqn) for eqn in products}
    found: dict[tuple[int, int], Seen] = {}

    def rule(eqn: _compat.JaxprEqn, values: list[Any]) -> None:
        if id(eqn) in wanted:
            alone = any((id(eqn), k) in weights for k in (0, 1))
            for k in (0, 1):
                if (id(eqn), k) not in weights:
                    array = canonical(np.asarray(values[k]), eqn, k)
                    seen = found.setdefault((id(eqn), k), Seen([], [], _every(array, alone, len(batches))))
                    # Of one sample alone, every other row stands for a second one.
                    for part in [array] if len(batches) > 1 else [array[:, ::2], array[:, 1::2]]:
                        seen.parts.append(part[:, :: seen.every])
                        seen.peaks.append(np.max(np.abs(part), axis=1, keepdims=True, initial=0.0))

    bar = ProgressBar("migrate: samples", len(batches))
    for number, batch in enumerate(batches):
        replay.evaluate(program.jaxpr, [*program.weights.values(), *batch], rule, keep_source=False)
        bar.update(number + 1)
    bar.close()
    return found


def _every(array: np.ndarray, alone: bool, count: int) -> int:
    """Which rows of an operand are kept: each so many-th. `alone`: the other operand is a weight."""
    rows = max(_ROWS // count, 1) if alone else max(_ELEMENTS // (count * array[:, :1].size), 1)
    return -(-array.shape[1] // rows)
