"""`Assignment`: which type each layer got, and why; a readable file that can be edited and fed back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any

from qcompiler import json_files
from qcompiler.candidates import Candidate
from qcompiler.errors import RecipeError
from qcompiler.names import nearest
from qcompiler.rules import Rule

#: The first entry of a file.
FORMAT = "qcompiler precision 1"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one layer got.

    Attributes:
      candidate: name of its candidate.
      losses: candidate -> predicted loss if this layer alone has it; empty where nobody measured.
      costs: resource -> what the layer takes of it; of `weight_bits`, what it adds to the average.
      reason: in words.
    """

    candidate: str
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    costs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The precision of a whole program.

    Attributes:
      candidates: by name.
      layers: layer id -> choice, in program order. A layer that is not in it gets the recipe's types.
      policy, metric: how it was chosen, and what losses are.
      budget: resource -> the most of it, as the user said it.
      totals: resource -> what all layers take of it; `weight_bits` per weight.
      predicted_loss: sum of the layers' losses.
      measured_loss: of the configuration as a whole.
      measurements: how many configurations were run.
      noise: median relative deviation of a measured latency from its median; None where none was measured.
    """

    candidates: Mapping[str, Candidate]
    layers: Mapping[str, Choice]
    policy: str = "by hand"
    metric: str = ""
    budget: Mapping[str, float] = dataclasses.field(default_factory=dict)
    totals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    predicted_loss: float | None = None
    measured_loss: float | None = None
    measurements: int = 0
    noise: float | None = None

    def __post_init__(self) -> None:
        for layer, choice in self.layers.items():
            if choice.candidate not in self.candidates:
                near = nearest(choice.candidate, self.candidates)
                raise RecipeError(f"layer {layer} is to be {choice.candidate!r}, which is no candidate{near}")

    @property
    def config(self) -> dict[str, str]:
        """Layer id -> name of its candidate."""
        return {layer: choice.candidate for layer, choice in self.layers.items()}

    def rules(self) -> dict[str, Rule]:
        """Layer id -> the recipe rule that says its types."""
        return {layer: self.candidates[choice.candidate].rule("*") for layer, choice in self.layers.items()}

    def check(self, layers: Collection[str]) -> None:
        """Raises `RecipeError` for a layer that a program does not have.

        Args:
          layers: ids of the program's layers.
        """
        for layer in self.layers:
            if layer not in layers:
                raise RecipeError(f"precision is given for {layer!r}, which is no layer{nearest(layer, layers)}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the assignment as JSON: edit a layer's `type`, and give the file to `qc.Recipe(precision=path)`.

        Raises:
          RecipeError: a number is NaN or infinite.
          OSError: the file cannot be written; what it held before stays.
        """
        json_files.write(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The content of a file: what `from_json` reads."""
        return {
            "format": FORMAT,
            "policy": self.policy,
            "metric": self.metric,
            "budget": dict(self.budget),
            "totals": dict(self.totals),
            "predicted_loss": self.predicted_loss,
            "measured_loss": self.measured_loss,
            "measurements": self.measurements,
            "noise": self.noise,
            "candidates": {name: c.to_json() for name, c in self.candidates.items()},
            "layers": {
                layer: {
                    "type": choice.candidate,
                    "losses": dict(choice.losses),
                    "costs": dict(choice.costs),
                    "reason": choice.reason,
                }
                for layer, choice in self.layers.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Assignment:
        """The assignment that a file holds; of a layer, only `type` is needed.

        Raises:
          RecipeError: another format, an unknown key or an unknown candidate.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise RecipeError(f"no precision file: it says no format {FORMAT!r}")
        fields = {k: v for k, v in data.items() if k != "format"}
        json_files.check_keys(fields, [f.name for f in dataclasses.fields(cls)], "the precision file")
        if lacking := {"candidates", "layers"} - fields.keys():
            raise RecipeError(f"the precision file has no {min(lacking)!r}")
        given = fields.pop("candidates")
        candidates = {name: Candidate.from_json(c, f"candidate {name}") for name, c in given.items()}
        layers = {}
        for layer, row in fields.pop("layers").items():
            row = {"type": row} if isinstance(row, str) else dict(row)
            json_files.check_keys(row, ("type", "losses", "costs", "reason"), f"layer {layer}")
            if "type" not in row:
                raise RecipeError(f"the precision file says no type for layer {layer}")
            layers[layer] = Choice(row.pop("type"), **row)
        return cls(candidates, layers, **fields)

    def __str__(self) -> str:
        """A table: one layer a row, then what all of them take and lose."""
        resources = list(dict.fromkeys(r for c in self.layers.values() for r in c.costs))
        rows = [("layer", "type", "loss", *resources, "why")]
        for layer, choice in self.layers.items():
            loss = choice.losses.get(choice.candidate)
            costs = (f"{choice.costs[r]:.4g}" if r in choice.costs else "" for r in resources)
            rows.append((layer, choice.candidate, "" if loss is None else f"{loss:.3g}", *costs, choice.reason))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        table = ["  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*self._headline(), *table])

    def _headline(self) -> list[str]:
        counts: dict[str, int] = {}
        for choice in self.layers.values():
            counts[choice.candidate] = counts.get(choice.candidate, 0) + 1
        lines = [f"precision            {self.policy}: {', '.join(f'{n} {c}' for c, n in counts.items())}"]
        for resource, total in self.totals.items():
            most = f" of {self.budget[resource]:.6g}" if resource in self.budget else ""
            noise = f" (each measured to ±{self.noise:.0%})" if resource == "latency_ms" and self.noise else ""
            lines.append(f"{resource:<20} {total:.6g}{most}{noise}")
        if self.predicted_loss is not None:
            lines.append(f"{self.metric:<20} {self.predicted_loss:.4g} predicted")
        if self.measured_loss is not None:
            lines.append(
                f"{'':<20} {self.measured_loss:.4g} measured, the best of {self.measurements} configurations run"
            )
        return lines


def load(path: str | os.PathLike[str]) -> Assignment:
    """The assignment that a file holds; see `Assignment.save`.

    Raises:
      RecipeError: no such file, no JSON, or nothing that `Assignment.from_json` takes.
    """
    try:
        data = json_files.read(path)
    except OSError as error:
        raise RecipeError(f"the precision file {path} cannot be read: {error.strerror}") from error
    try:
        return Assignment.from_json(data)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
