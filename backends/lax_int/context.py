"""Where a lowering rule works: the region, and how its arrays become weights of the program."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass
class Context:
    """One region while it is lowered.

    Attributes:
      region: its id.
      weight: `(name, array) -> traced array`, makes an array a weight.
      compacted: address of a linear value -> itself, and what `rows.compact` made of it.
    """

    region: str
    weight: Callable[[str, np.ndarray], Any]
    compacted: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    _taken: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def name(self, suffix: str) -> str:
        """A weight name of this region."""
        return f"{self.region}:{suffix}"

    def label(self, base: str) -> str:
        """A label that no other result of this region has: `base`, then `base.1` and so on."""
        self._taken[base] += 1
        return base if self._taken[base] == 1 else f"{base}.{self._taken[base] - 1}"

    def hold(self, base: str, array: np.ndarray) -> Any:
        """A known array as a weight, under a label of its own."""
        return self.weight(self.name(self.label(base)), array)

    def number(self, value: np.ndarray, name: str, dtype: Any = np.int32) -> Any:
        """Known integers: a number stays a literal, an array becomes a weight."""
        value = np.asarray(value).astype(dtype)
        return value[()] if value.ndim == 0 else self.weight(self.name(name), value)
