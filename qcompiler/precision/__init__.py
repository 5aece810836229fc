"""Mixed precision: which type each layer gets under a budget, solved exactly, then run and repaired.

recipe = qc.Recipe(precision=qc.Precision(candidates=("int4", "int8"), weight_bits=5))
qmodel = qc.quantize(model, batches, recipe=recipe)
print(qmodel.precision)                      # layer, type, loss, cost, why
qmodel.precision.save("precision.json")      # edit it, and give it back:
qc.quantize(model, batches, recipe=qc.Recipe(precision="precision.json"))
"""

from __future__ import annotations

import os
from typing import Any

from qcompiler.errors import RecipeError
from qcompiler.precision.assignment import Assignment as Assignment
from qcompiler.precision.assignment import Choice as Choice
from qcompiler.precision.assignment import load as load
from qcompiler.precision.config import POLICIES as POLICIES
from qcompiler.precision.config import Precision as Precision
from qcompiler.precision.knapsack import Conversion as Conversion
from qcompiler.precision.knapsack import Group as Group
from qcompiler.precision.knapsack import Problem as Problem
from qcompiler.precision.knapsack import choose as choose


def named(precision: Any) -> Precision | Assignment:
    """What a recipe's `precision` stands for: itself, or the assignment in the file of that path.

    Raises:
      RecipeError: it is something else, or the file is no assignment.
    """
    if isinstance(precision, Precision | Assignment):
        return precision
    if isinstance(precision, str | os.PathLike):
        return load(os.fspath(precision))
    raise RecipeError(f"precision is a qc.Precision, a qc.precision.Assignment or the path of one, got {precision!r}")
