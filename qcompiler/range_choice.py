"""How ranges of activations are chosen where one estimator for all is not enough: by output error, or by tier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qcompiler import tiers
from qcompiler.errors import RecipeError
from qcompiler.numerics import ranges


@dataclasses.dataclass(frozen=True)
class OutputError:
    """Each range is the candidate that leaves the least squared error in the results of the layers that read it.

    Attributes:
      batches: calibration batches that are looked at, at most. Each costs a few dozen runs of every layer.

    Raises:
      RecipeError: `batches` is less than 1.
    """

    batches: int = 2

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise RecipeError(f"ranges need at least one batch to be chosen by, got batches={self.batches}")


@dataclasses.dataclass(frozen=True)
class Tiers:
    """An estimator per tier of sensitivity: careful where a layer matters, plain where it does not.

    A layer's sensitivity is the variance of the loss's gradient there times how critical the user says that it is.

    Attributes:
      high, medium, low: estimators of the three tiers.
      shares: of the layers, most sensitive first, that are high and medium; the rest is low.
      criticality: glob on a layer's id or module path -> weight of its sensitivity; the first that matches, 1 if none
        does.
      batches: calibration batches from which gradients are taken, at most.

    Raises:
      RecipeError: shares that are no shares, a weight that is not positive, or an unknown estimator.
    """

    high: str | ranges.Estimator = dataclasses.field(default_factory=lambda: ranges.Percentile(99.99))
    medium: str | ranges.Estimator = "entropy"
    low: str | ranges.Estimator = "minmax"
    shares: tuple[float, float] = (0.25, 0.5)
    criticality: Mapping[str, float] = dataclasses.field(default_factory=dict)
    batches: int = 2

    def __post_init__(self) -> None:
        tiers.check(self.shares, self.criticality)
        for name in tiers.TIERS:
            object.__setattr__(self, name, estimator(getattr(self, name)))
        if self.batches < 1:
            raise RecipeError(f"gradients need at least one batch, got batches={self.batches}")


#: Choices that have a name.
NAMED = {"output_error": OutputError, "tiers": Tiers}


def estimator(which: Any) -> ranges.Estimator:
    """The estimator of a name, or itself.

    Raises:
      RecipeError: there is none of that name.
    """
    if isinstance(which, ranges.Estimator):
        return which
    try:
        return ranges.by_name(which)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def named(which: Any) -> OutputError | Tiers | None:
    """The choice of a name, or itself; None stays None.

    Raises:
      RecipeError: there is none of that name.
    """
    if which is None or isinstance(which, OutputError | Tiers):
        return which
    if not isinstance(which, str) or which not in NAMED:
        known = ", ".join(map(repr, sorted(NAMED)))
        raise RecipeError(f"unknown choice of ranges {which!r}; known: {known}, or pass an OutputError or Tiers")
    return NAMED[which]()
