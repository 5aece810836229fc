"""Passes that decide by trying on calibration data: what they are given, what they decided, and where they stand.

A decision is taken once, on the samples kept from calibration. At other batch sizes the model is traced again and the
same decision applied, so decisions speak of weights by name and of values by id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from qcompiler.debug.progress import ProgressBar
from qcompiler.errors import CalibrationError
from qcompiler.ir import Program
from qcompiler.passes import choose_ranges
from qcompiler.recipe import Recipe
from qcompiler.samples import Samples


@dataclasses.dataclass(frozen=True)
class Data:
    """What passes that decide by data are given, and what they decided.

    Attributes:
      samples: of the calibration.
      decisions: name of a pass -> what it decided.
    """

    samples: Samples = dataclasses.field(default_factory=Samples)
    decisions: dict[str, Any] = dataclasses.field(default_factory=dict)

    def branch(self) -> Data:
        """The same so far; later decisions are its own."""
        return Data(self.samples, dict(self.decisions))

    def decided(self, name: str, decide: Callable[[Samples], Any]) -> Any:
        """The decision of a pass: the one that stands, or else `decide(samples)`."""
        if name not in self.decisions:
            self.decisions[name] = decide(self.samples)
        return self.decisions[name]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a decision can look at, beside the program before its pass.

    Attributes:
      recipe: the user's.
      calibrated: the float program of regions with observers and stats.
      batches: calibration batches of the program's shapes, flat inputs each.
    """

    recipe: Recipe
    calibrated: Program
    batches: list[list[Any]]


@dataclasses.dataclass(frozen=True)
class DataPass:
    """A pass in two halves.

    Attributes:
      name: of the pass.
      behind: the pass that it follows.
      wanted: whether a recipe asks for it.
      decide: on the program before the pass.
      apply: the program with the decision.
    """

    name: str
    behind: str
    wanted: Callable[[Recipe], bool]
    decide: Callable[[Program, Setting], Any]
    apply: Callable[[Program, Any], Program]

    def on(self, recipe: Recipe, data: Data, calibrated: Program) -> Callable[[Program], Program]:
        """The pass as a function of the program."""

        def run(program: Program) -> Program:
            def decide(samples: Samples) -> Any:
                return self.decide(program, Setting(recipe, calibrated, self.batches(samples, program)))

            return self.apply(program, data.decided(self.name, decide))

        return run

    def batches(self, samples: Samples, program: Program) -> list[list[Any]]:
        """The samples in batches of a program's shapes.

        Raises:
          CalibrationError: none was kept that has them.
        """
        batches = samples.at(program.input_avals)
        if not batches:
            shapes = [a.shape for a in program.input_avals]
            raise CalibrationError(
                f"pass {self.name} looks at calibration data, and no batch of the shapes {shapes} was kept: calibrate "
                "on batches of one shape"
            )
        return batches


def _ranges(program: Program, setting: Setting) -> choose_ranges.Ranges:
    recipe = setting.recipe
    batches = setting.batches[: recipe.range_choice.batches]
    with contextlib.closing(ProgressBar("choose_ranges")) as bar:
        count = itertools.count(1)
        return choose_ranges.by_output_error(program, batches, recipe.estimator_for, lambda: bar.update(next(count)))


#: In the order in which they run.
DATA_PASSES = (
    DataPass(
        "choose_ranges",
        behind="assign_precision",
        wanted=lambda recipe: recipe.ranges is not None,
        decide=_ranges,
        apply=choose_ranges.choose_ranges,
    ),
)
