"""How weights are rounded to their codes: the methods a `Recipe` can name, and their options.

`nearest` needs no data. The others look at calibration samples layer by layer, or block by block, each fed by the
already rounded ones before it, and never choose what is worse than nearest on those samples.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from qcompiler.errors import RecipeError
from qcompiler.ir.program import Program
from qcompiler.samples import Samples


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What the methods that read samples have in common.

    Attributes:
      samples: calibration samples that are read, at most: elements of the inputs' leading dimension. They come in
        batches of the size that the model was traced with.
      rows: of each layer, at most so many positions (samples times places in the image or the sequence) are kept, drawn
        evenly. A row is one element of each result channel; with `K` inputs per result, some multiple of K is wanted.
      seed: of what is drawn.
      checkpoint: folder where finished layers are kept, so that an interrupted run goes on behind them and ends with
        the same result. Other programs, samples and options have files of their own there.

    Raises:
      RecipeError: an option is out of its range.
    """

    samples: int = 1024
    rows: int = 1 << 14
    seed: int = 0
    checkpoint: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "rows"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")

    def of(self, samples: Samples, program: Program) -> list[list[np.ndarray]]:
        """The batches that are read, of the program's own shapes."""
        batches = samples.at(program.input_avals)
        leading = {a.shape[0] if a.shape else None for a in program.input_avals}
        (length,) = leading if len(leading) == 1 and None not in leading else (1,)
        return batches[: max(1, self.samples // max(1, length))]


@dataclasses.dataclass(frozen=True)
class SequentialMSE(Rounding):
    """The scale of each weight (of each channel or group) that leaves the layer's output the least error.

    Codes are the nearest ones at that scale. Candidates are the fractions i / candidates of the scale that covers the
    largest weight (AIMET's sequential MSE).

    Attributes:
      candidates: how many scales are tried.
    """

    candidates: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "candidates", self.candidates >= 2, "at least 2")


@dataclasses.dataclass(frozen=True)
class GPTQ(Rounding):
    """One input channel after the other is rounded, and the rest makes up for its error (Frantar et al. 2022).

    Attributes:
      damping: of the mean diagonal of the Hessian, added to it.
      act_order: inputs with the largest second moment first.
      block: inputs between two updates of all that follow.
      scales: how the scales are chosen before; None: they cover the largest weight.
    """

    damping: float = 0.01
    act_order: bool = True
    block: int = 128
    scales: SequentialMSE | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "damping", self.damping > 0, "positive")
        _check(self, "block", self.block >= 1, "at least 1")
        _check_scales(self.scales)


@dataclasses.dataclass(frozen=True)
class AdaRound(Rounding):
    """Each weight goes up or down, as gradient descent on the layer's output error learns (Nagel et al. 2020).

    Attributes:
      iterations: steps of Adam per layer.
      batch: rows per step.
      learning_rate: of Adam.
      regularization: weight of the term that drives each rounding to 0 or 1, beside the output error in units of that
        of nearest rounding: so it needs no adjusting to the scale of activations.
      beta: first and last exponent of that term; large ones leave the middle free.
      warm_start: share of the iterations without that term.
      scales: how the scales are chosen before; None: they cover the largest weight.
      unit: `layer`: each layer on its own; `block`: then those of a residual or transformer block, or of whatever else
        lies between two points where the program holds a single activation, once more together, for the block's result
        (BRECQ, Li et al. 2021). A step sees a whole batch of the block's inputs, so this takes longer.
      block_layers: layers in a block, at most; longer ones are cut.
    """

    iterations: int = 500
    batch: int = 512
    learning_rate: float = 0.1
    regularization: float = 3.0
    beta: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2
    scales: SequentialMSE | None = None
    unit: str = "layer"
    block_layers: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "unit", self.unit in ("layer", "block"), "'layer' or 'block'")
        for name in ("iterations", "batch", "block_layers"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "regularization"):
            _check(self, name, getattr(self, name) > 0, "positive")
        object.__setattr__(self, "beta", tuple(self.beta))
        _check(self, "warm_start", 0 <= self.warm_start < 1, "at least 0 and less than 1")
        _check_scales(self.scales)


#: Methods that have a name.
NAMED = {"adaround": AdaRound, "gptq": GPTQ, "seq_mse": SequentialMSE}


def named(which: Any) -> Rounding | None:
    """The method of a name, or the method itself; None for nearest rounding.

    Raises:
      RecipeError: there is no such method.
    """
    if which is None or isinstance(which, SequentialMSE | GPTQ | AdaRound):
        return which
    if which == "nearest":
        return None
    if not isinstance(which, str) or which not in NAMED:
        known = ", ".join(map(repr, sorted(["nearest", *NAMED])))
        raise RecipeError(f"unknown rounding {which!r}; known: {known}, or pass qc.AdaRound(...), qc.GPTQ(...) or so")
    return NAMED[which]()


def scales_of(method: Rounding | None) -> SequentialMSE | None:
    """How a method chooses the scales of weights; None: they cover the largest weight."""
    if method is None or isinstance(method, SequentialMSE):
        return method
    scales = getattr(method, "scales", None)
    if scales is None or scales.checkpoint is not None:
        return scales
    return dataclasses.replace(scales, checkpoint=method.checkpoint)


def _check(method: Rounding, name: str, fine: bool, wanted: str) -> None:
    if not fine:
        raise RecipeError(f"{name} of {type(method).__name__} is {wanted}, got {getattr(method, name)!r}")


def _check_scales(scales: Any) -> None:
    if scales is not None and not isinstance(scales, SequentialMSE):
        raise RecipeError(f"scales is a qc.SequentialMSE or None, got {scales!r}")
