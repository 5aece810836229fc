"""`Samples`: calibration batches that are kept, for passes that look at data more than once.

Calibration itself streams, over any number of batches. What decides by trying (a rounding, a bias, the scales between
two layers) needs the data again, and gets the first batches, as many as fit `KEPT_BYTES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

#: Bytes of calibration inputs that are kept, at most.
KEPT_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Batches of flat inputs.

    Attributes:
      batches: one sequence of arrays per batch, one array per flat input of the program.
    """

    batches: tuple[Sequence[Any], ...] = ()

    def at(self, avals: Sequence[Any]) -> list[list[np.ndarray]]:
        """The samples in batches of exactly these shapes.

        Where every input's leading dimension is the batch (all are of one length, in the program and in each batch),
        samples are taken out of their batches and put together anew; what does not fill a last batch is left out.
        Elsewhere the batches that have these shapes are given.

        Args:
          avals: shape and dtype per flat input.
        """
        shapes = [tuple(a.shape) for a in avals]
        lengths = {s[0] if s else None for s in shapes}
        if len(lengths) == 1 and None not in lengths:
            (length,) = lengths
            alike = [
                b for b in self.batches if _one_length(b) and [np.shape(x)[1:] for x in b] == [s[1:] for s in shapes]
            ]
            if len(alike) == len(self.batches) and alike and length:
                whole = [np.concatenate([np.asarray(b[k]) for b in alike]) for k in range(len(shapes))]
                starts = range(0, len(whole[0]) - length + 1, length)
                return [[x[start : start + length] for x in whole] for start in starts]
        return [[np.asarray(x) for x in b] for b in self.batches if [np.shape(x) for x in b] == shapes]


def _one_length(batch: Sequence[Any]) -> bool:
    return len({np.shape(x)[0] if np.ndim(x) else None for x in batch}) == 1


def size_of(batch: Sequence[Any]) -> int:
    """Bytes of a batch; what is no array of numbers counts as nothing."""
    return sum(getattr(x, "nbytes", 0) for x in batch)
