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

from qcompiler import losses, sensitivity
from qcompiler.debug.progress import ProgressBar
from qcompiler.errors import CalibrationError
from qcompiler.ir import Program
from qcompiler.passes import choose_ranges
from qcompiler.range_choice import OutputError, Tiers
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
      samples: of the calibration.
      batches: the same in batches of the program's shapes, flat inputs each.
    """

    recipe: Recipe
    calibrated: Program
    samples: Samples
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
                return self.decide(program, Setting(recipe, calibrated, samples, self.batches(samples, program)))

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
    choice = setting.recipe.range_choice
    return _by_tier(program, setting, choice) if isinstance(choice, Tiers) else _by_error(program, setting, choice)


def _by_error(program: Program, setting: Setting, choice: OutputError) -> choose_ranges.Ranges:
    with contextlib.closing(ProgressBar("choose_ranges")) as bar:
        count = itertools.count(1)
        step = lambda: bar.update(next(count))
        return choose_ranges.by_output_error(
            program, setting.batches[: choice.batches], setting.recipe.estimator_for, step
        )


def _by_tier(program: Program, setting: Setting, choice: Tiers) -> choose_ranges.Ranges:
    """An estimator per layer, by the variance of its gradient and the user's word on how critical it is."""
    metric = "fisher_kl_nats" if losses.logits_of(program) else "fisher_mse"
    found = sensitivity.analyze(
        setting.calibrated, setting.samples, setting.recipe, candidates=("int8",), metric=metric, batches=choice.batches
    )
    tiers = found.tiers(choice.shares, criticality=choice.criticality)
    estimators = {layer: getattr(choice, tier) for tier, layers in tiers.items() for layer in layers}
    return choose_ranges.by_estimator(program, lambda region, qtype: estimators.get(region))


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
