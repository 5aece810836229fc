"""Passes that decide by trying on calibration data: what they are given, what they decided, and where they stand.

A decision is taken once, on the samples kept from calibration. At other batch sizes the model is traced again and the
same decision applied, so decisions speak of weights by name and of values by id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from qcompiler import losses, rounding, sensitivity
from qcompiler.debug.progress import ProgressBar
from qcompiler.errors import CalibrationError
from qcompiler.ir import Program, loops
from qcompiler.passes import (
    absorb_bias,
    assign_precision,
    choose_ranges,
    choose_scales,
    correct_bias,
    insert_qdq,
    migrate,
    observe,
    round_weights,
)
from qcompiler.precision import Assignment, decide
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
      samples: of the calibration.
      programs: name of a pass -> the program after it, for those that have run.
    """

    recipe: Recipe
    samples: Samples
    programs: Mapping[str, Program]

    def batches(self, program: Program, name: str) -> list[list[Any]]:
        """The samples in batches of a program's shapes, flat inputs each, for the pass of that name.

        Raises:
          CalibrationError: none was kept that has them.
        """
        batches = self.samples.at(program.input_avals)
        if not batches:
            shapes = [a.shape for a in program.input_avals]
            raise CalibrationError(
                f"pass {name} looks at calibration data, and no batch of the shapes {shapes} was kept: calibrate "
                "on batches of one shape"
            )
        return batches


@dataclasses.dataclass(frozen=True)
class DataPass:
    """A pass in two halves.

    Attributes:
      name: of the pass. One of the pipeline's own passes is replaced where the recipe wants this one.
      wanted: whether a recipe asks for it.
      decide: on the program before the pass.
      apply: the program with the decision, by the recipe.
      behind: the pipeline's pass that it follows; empty where it replaces one.
    """

    name: str
    wanted: Callable[[Recipe], bool]
    decide: Callable[[Program, Setting], Any]
    apply: Callable[[Program, Any, Recipe], Program]
    behind: str = ""

    def on(self, recipe: Recipe, data: Data, programs: Mapping[str, Program]) -> Callable[[Program], Program]:
        """The pass as a function of the program."""

        def run(program: Program) -> Program:
            decision = data.decided(self.name, lambda samples: self.decide(program, Setting(recipe, samples, programs)))
            return self.apply(program, decision, recipe)

        return run


def _ranges(program: Program, setting: Setting) -> choose_ranges.Ranges:
    choice: Any = setting.recipe.range_choice
    return _by_tier(setting, choice, program) if isinstance(choice, Tiers) else _by_error(setting, choice, program)


def _by_error(setting: Setting, choice: OutputError, program: Program) -> choose_ranges.Ranges:
    batches = setting.batches(program, "choose_ranges")[: choice.batches]
    with contextlib.closing(ProgressBar("choose_ranges")) as bar:
        count = itertools.count(1)
        step = lambda: bar.update(next(count))
        return choose_ranges.by_output_error(program, batches, setting.recipe.estimator_for, step)


def _by_tier(setting: Setting, choice: Tiers, program: Program) -> choose_ranges.Ranges:
    """An estimator per layer, by the variance of its gradient and the user's word on how critical it is."""
    metric = "fisher_kl_nats" if losses.logits_of(program) else "fisher_mse"
    recipe, calibrated = setting.recipe, setting.programs["observe"]
    found = sensitivity.analyze(
        calibrated, setting.samples, recipe, candidates=("int8",), metric=metric, batches=choice.batches
    )
    tiers = found.tiers(choice.shares, criticality=choice.criticality)
    estimators = {layer: getattr(choice, tier) for tier, layers in tiers.items() for layer in layers}
    return choose_ranges.by_estimator(program, lambda region, qtype: estimators.get(region))


def _assigned(program: Program, decided: Assignment, recipe: Recipe) -> Program:
    return assign_precision.assign_precision(observe.without_observers(program), recipe, decided.rules())


def _scales(program: Program, setting: Setting) -> choose_scales.Decision:
    options: Any = rounding.scales_of(setting.recipe.rounding_method)
    plain = _inserted(program, setting.recipe, {})
    return choose_scales.decide(program, plain, options.of(setting.samples, plain), options)


def _inserted(program: Program, recipe: Recipe, fractions: Mapping[str, Any]) -> Program:
    return loops.everywhere(lambda part: insert_qdq.insert_qdq(part, recipe.estimator_for, fractions), program)


def _scaled(program: Program, chosen: choose_scales.Decision, recipe: Recipe) -> Program:
    note = {region: {"largest": a, "chosen": b} for region, (a, b) in chosen.errors.items()}
    inserted = _inserted(program, recipe, chosen.fractions)
    return inserted.note("scaled", note).note("left_unscaled", dict(chosen.left))


def _rounded(program: Program, setting: Setting) -> round_weights.Decision:
    options = setting.recipe.rounding_method
    batches = options.of(setting.samples, program)
    return round_weights.decide(setting.programs["assign_precision"], program, batches, options)


def _corrected(program: Program, setting: Setting) -> correct_bias.Decision:
    batches = setting.samples.at(program.input_avals)
    return correct_bias.decide(
        setting.programs["assign_precision"], program, batches, setting.recipe.bias_correction or ""
    )


#: In the order in which they run. Those behind `insert_qdq` leave the program that simulates the integers in float.
DATA_PASSES = (
    DataPass(
        "absorb_bias",
        wanted=lambda recipe: recipe.equalizes == "everywhere",
        decide=lambda program, setting: absorb_bias.decide(program, setting.samples),
        apply=lambda program, decision, recipe: absorb_bias.absorb_bias(program, decision),
        behind="equalize",
    ),
    DataPass(
        "migrate",
        wanted=lambda recipe: recipe.migrates,
        decide=lambda program, setting: migrate.decide(
            program, setting.samples.at(program.input_avals), setting.recipe
        ),
        apply=lambda program, decision, recipe: migrate.apply(program, decision),
        behind="equalize",
    ),
    DataPass(
        "assign_precision",
        wanted=lambda recipe: recipe.precision is not None,
        decide=lambda program, setting: decide.assignment_of(program, setting.recipe, setting.samples),
        apply=_assigned,
    ),
    DataPass(
        "choose_ranges",
        wanted=lambda recipe: recipe.ranges is not None,
        decide=_ranges,
        apply=lambda program, decision, recipe: choose_ranges.choose_ranges(program, decision),
        behind="assign_precision",
    ),
    DataPass(
        "insert_qdq",
        wanted=lambda recipe: rounding.scales_of(recipe.rounding_method) is not None,
        decide=_scales,
        apply=_scaled,
    ),
    DataPass(
        "round_weights",
        wanted=lambda recipe: isinstance(recipe.rounding_method, rounding.AdaRound | rounding.GPTQ),
        decide=_rounded,
        apply=lambda program, decision, recipe: round_weights.apply(program, decision),
        behind="insert_qdq",
    ),
    DataPass(
        "correct_bias",
        wanted=lambda recipe: recipe.bias_correction is not None,
        decide=_corrected,
        apply=lambda program, decision, recipe: correct_bias.apply(program, decision),
        behind="insert_qdq",
    ),
)
