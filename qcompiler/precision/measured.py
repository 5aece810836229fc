"""Measured losses that are kept in a file, so that a search that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from qcompiler import json_files
from qcompiler.errors import RecipeError
from qcompiler.precision.knapsack import Problem

#: The first entry of a file.
FORMAT = "qcompiler measurements 1"


class Measured:
    """`measure`, with what it said before: in this process, and in the file if there is one.

    Args:
      measure: configuration {layer id: candidate name} -> loss.
      problem: whose layers they are. Its losses tell networks and calibrations apart, so that a file serves those that
        it was written for, under any budget.
      path: of the file, made when something is measured; None to keep nothing.

    Raises:
      RecipeError: the file is of another network, other calibration data, or no such file at all.
    """

    def __init__(
        self,
        measure: Callable[[Mapping[str, str]], float],
        problem: Problem,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self._measure, self._layers = measure, tuple(problem.losses)
        self._path = None if path is None else Path(path)
        self._key = hashlib.sha256(json.dumps(problem.losses).encode()).hexdigest()
        self._known: dict[str, float] = {}
        if self._path is not None and self._path.exists():
            self._known = self._read(self._path)

    def __call__(self, config: Mapping[str, str]) -> float:
        """The loss of a configuration; infinite where it is no number, so that every other is better."""
        name = ",".join(config[layer] for layer in self._layers)
        if name not in self._known:
            loss = float(self._measure(config))
            self._known[name] = math.inf if math.isnan(loss) else loss
            if self._path is not None:
                # Written anew after each: it is small beside what a measurement takes. JSON has no infinity.
                losses = {n: x if math.isfinite(x) else None for n, x in self._known.items()}
                json_files.write(self._path, {"format": FORMAT, "key": self._key, "losses": losses})
        return self._known[name]

    def _read(self, path: Path) -> dict[str, float]:
        content = json_files.read(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise RecipeError(f"{path} is no checkpoint of a search: it says no format {FORMAT!r}")
        if content.get("key") != self._key:
            raise RecipeError(
                f"the checkpoint {path} is of another network, other candidates or other calibration data: delete it, "
                "or name another file"
            )
        losses = content.get("losses")
        if not isinstance(losses, dict) or not all(x is None or isinstance(x, int | float) for x in losses.values()):
            raise RecipeError(f"the checkpoint {path} is damaged: it has no losses; delete it to search anew")
        return {name: math.inf if x is None else float(x) for name, x in losses.items()}
