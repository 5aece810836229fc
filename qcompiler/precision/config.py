"""`Precision`: what a recipe says about choosing types by data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qcompiler import candidates as named_candidates
from qcompiler.candidates import Candidate
from qcompiler.errors import RecipeError

if TYPE_CHECKING:
    from qcompiler.losses import Metric

#: Ways of choosing: under budgets by the solver, by the seeds' simple rule, or one type for all.
POLICIES = ("budget", "top20_int16", "uniform")
#: Resources that can have a budget, with their units.
RESOURCES = {
    "weight_bits": "bits per weight, on average",
    "weight_bytes": "bytes of weights and their scales",
    "bit_operations": "bits of weights times bits of activations times multiply-adds",
    "latency_ms": "ms per call",
}
#: Resources that can stand for speed in a weighting.
SPEEDS = ("latency_ms", "bit_operations")


@dataclasses.dataclass(frozen=True)
class Precision:
    """Which types layers may get, and how they are chosen.

    Attributes:
      candidates: names of `qcompiler.candidates.NAMED`, or a mapping of names to `Candidate`s. Their types are taken as
        they are: activations that 8 bits hold badly get 16 only if a candidate has them.
      weight_bits: budget: bits of a weight on average over the weights of layers that no rule decides, scales
        not counted.
      weight_bytes: budget: bytes of the layers' weights as stored, scales counted.
      bit_operations: budget: bits of a weight times bits of an activation times multiply-adds, of one call at the
        shapes of the first calibration batch.
      latency_ms: budget: ms of the layers of such a call, each measured alone on this machine.
      accuracy_weight: in place of budgets, or beside them, alpha between 0 and 1: minimizes alpha times the loss plus
        1 - alpha times the speed, both as shares of their span between the best and the worst choice; 0.7 in the
        seeds.
      speed: what that speed is: `latency_ms` or `bit_operations`.
      metric: what is lost: `nsr`, `mse`, `kl_nats`, or another of `qcompiler.sensitivity.analyze`,
        a function among them.
      policy: `budget`; `top20_int16`: the most sensitive 20 % of the layers in int16 activations, the rest int8;
        `uniform`: one candidate for all.
      samples: how many batches, of those kept from calibration, losses are measured on; None: those of 32 samples.
      repair_steps: configurations that are run at most, the solver's own counted, in looking for one that measures
        better than it; 1 only measures it.
      checkpoint: file where what was measured is kept, so that an interrupted search goes on behind it and ends with
        the same result; None keeps nothing.

    Raises:
      RecipeError: an unknown name, a number out of range, or a policy that is given no budget.
    """

    candidates: Mapping[str, Candidate] | Sequence[str] = ("int8", "int16")
    weight_bits: float | None = None
    weight_bytes: float | None = None
    bit_operations: float | None = None
    latency_ms: float | None = None
    accuracy_weight: float | None = None
    speed: str = "latency_ms"
    metric: str | Metric = "nsr"
    policy: str = "budget"
    samples: int | None = None
    repair_steps: int = 32
    checkpoint: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", named_candidates.named(self.candidates))
        if self.policy not in POLICIES:
            raise RecipeError(f"unknown policy {self.policy!r}; known: {', '.join(POLICIES)}")
        if self.speed not in SPEEDS:
            raise RecipeError(f"unknown speed={self.speed!r}; known: {', '.join(SPEEDS)}")
        for resource, most in self.budget.items():
            if not most > 0:
                raise RecipeError(f"the budget {resource} is a number above 0 ({RESOURCES[resource]}), got {most!r}")
        if self.accuracy_weight is not None and not 0 < self.accuracy_weight <= 1:
            raise RecipeError(f"accuracy_weight is above 0 and at most 1, got {self.accuracy_weight!r}")
        for name in ("samples", "repair_steps"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise RecipeError(f"{name} is at least 1, got {number!r}")
        if self.policy == "budget" and not self.budget and self.accuracy_weight is None:
            raise RecipeError(f"the policy 'budget' needs one: give {', '.join(RESOURCES)} or accuracy_weight")
        if self.policy == "top20_int16" and (lacking := {"int8", "int16"} - self.by_name.keys()):
            raise RecipeError(
                f"the policy 'top20_int16' needs candidates named int8 and int16; there is no {min(lacking)}"
            )

    @property
    def by_name(self) -> dict[str, Candidate]:
        """The candidates, each with its name."""
        return named_candidates.named(self.candidates)

    @property
    def metric_name(self) -> str:
        """Of the metric, a function's its own."""
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "metric")

    @property
    def budget(self) -> dict[str, float]:
        """Resource -> the most that may be taken of it, as the user says it."""
        return {r: most for r in RESOURCES if (most := getattr(self, r)) is not None}

    @property
    def measures_latency(self) -> bool:
        """Whether layers have to be timed."""
        weighted = self.accuracy_weight is not None and self.speed == "latency_ms"
        return self.latency_ms is not None or weighted
