"""`Sensitivity`: a table of losses per layer and candidate, what it predicts, and the tiers it gives."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler import tiers
from qcompiler.candidates import Candidate
from qcompiler.errors import QuantizationError, RecipeError
from qcompiler.losses import sqnr_db

MODES = ("one_quantized", "one_float")


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer with one candidate.

    Attributes:
      layer: id of the region.
      module_path: in the parameter tree; empty at the top.
      primitive: of its product.
      macs: multiply-adds in one call.
      weights: elements of its weight; 0 where activations meet each other.
      candidate: name.
      one_quantized: metric -> loss with this layer alone quantized; more is worse.
      one_float: metric -> loss of the whole network so quantized, less that with this layer alone left real.
    """

    layer: str
    module_path: str
    primitive: str
    macs: int
    weights: int
    candidate: str
    one_quantized: Mapping[str, float] = dataclasses.field(default_factory=dict)
    one_float: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Losses of all layers; all of them grow with harm, and add.

    Attributes:
      rows: in program order, candidates in theirs.
      candidates: by name.
      metrics: names, the first one being that which is meant where none is named.
      samples: how many were used.
    """

    rows: tuple[Row, ...]
    candidates: Mapping[str, Candidate]
    metrics: tuple[str, ...]
    samples: int
    _probe: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def layers(self) -> tuple[str, ...]:
        """Ids in program order."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    def table(self, metric: str | None = None, mode: str = "one_quantized") -> dict[str, dict[str, float]]:
        """Layer id -> candidate -> loss, additive.

        Raises:
          RecipeError: it was not measured.
        """
        metric = self._metric(metric)
        if mode not in MODES:
            raise RecipeError(f"unknown mode={mode!r}; known: {', '.join(MODES)}")
        found: dict[str, dict[str, float]] = {}
        for row in self.rows:
            if metric not in getattr(row, mode):
                raise RecipeError(f"{metric} was not measured in the mode {mode}")
            found.setdefault(row.layer, {})[row.candidate] = getattr(row, mode)[metric]
        return found

    def predict(self, config: Mapping[str, str] | str, metric: str | None = None) -> float:
        """The loss of a configuration: errors of layers are taken to be independent, so that their powers add.

        True while they are small: noise beyond the signal's power saturates, and this sum does not.

        Args:
          config: layer id -> name of a candidate, other layers staying real; or one name, for all.
          metric: the first one, unless named.

        Raises:
          RecipeError: a layer, a candidate or the metric is unknown.
        """
        table = self.table(metric)
        return sum(table[layer][candidate] for layer, candidate in self._config(config).items())

    def measure(self, config: Mapping[str, str] | str, metric: str | None = None) -> float:
        """The loss that `predict` predicts, measured: the program run so, on the same samples.

        A metric of derivatives is measured as what it approximates: `fisher_kl_nats` as `kl_nats`.

        Raises:
          RecipeError: a layer, a candidate or the metric is unknown; there is nothing to run, as this was read from a
            file, or the metric is a loss against labels (`fisher_loss`).
        """
        metric, config = self._metric(metric), self._config(config)
        if self._probe is None:
            raise RecipeError("a sensitivity that was read from a file has no program to measure: analyze it again")
        if metric.endswith("_loss"):
            raise RecipeError(f"{metric} speaks of a loss of one's own; pass it as a metric to have it measured")
        return self._probe.measure(config, metric)

    def tiers(
        self,
        share: Sequence[float] = (0.25, 0.5),
        *,
        metric: str | None = None,
        candidate: str | None = None,
        criticality: Mapping[str, float] | None = None,
    ) -> dict[str, tuple[str, ...]]:
        """Layers by sensitivity, the most sensitive first: `high`, `medium` and `low`.

        Args:
          share: of the layers that are high and medium.
          metric: the first one, unless named.
          candidate: by whose losses layers are compared; the first one, unless named.
          criticality: glob on a layer's id or module path -> factor on its losses; the first that matches.

        Raises:
          RecipeError: shares that are none, a glob without layers, an unknown metric or candidate.
        """
        candidate = next(iter(self.candidates)) if candidate is None else candidate
        self._config(candidate)
        losses = {layer: of_layer[candidate] for layer, of_layer in self.table(metric).items()}
        return tiers.split(losses, share, criticality or {})

    def __str__(self) -> str:
        mode = next(m for m in MODES if self.metrics[0] in getattr(self.rows[0], m))
        rows = sorted(self.rows, key=lambda row: -getattr(row, mode)[self.metrics[0]])
        width = max(len(row.layer) for row in rows)
        kinds = max(9, *(len(name) for name in self.candidates))
        columns = [(m, name) for m in MODES for name in self.metrics if name in getattr(rows[0], m)]
        heads = [name if m == "one_quantized" else f"{name} back" for m, name in columns]
        with_sqnr = "nsr" in rows[0].one_quantized
        lines = [
            f"{'layer':<{width}} {'multiply-adds':>14} {'weights':>11} {'candidate':<{kinds}}"
            + ("  SQNR dB" if with_sqnr else "")
            + "".join(f" {head:>16}" for head in heads)
        ]
        for row in rows:
            line = f"{row.layer:<{width}} {row.macs:>14,} {row.weights:>11,} {row.candidate:<{kinds}}"
            line += f" {sqnr_db(row.one_quantized['nsr']):>8.1f}" if with_sqnr else ""
            lines.append(line + "".join(f" {getattr(row, m)[name]:>16.3e}" for m, name in columns))
        return "\n".join(lines)

    def to_json(self) -> str:
        """As text that `from_json` reads; metrics of functions by name."""
        # JSON has no infinity.
        losses = lambda found: {name: x if abs(x) < float("inf") else str(x) for name, x in found.items()}
        rows = [
            {**dataclasses.asdict(row), **{mode: losses(getattr(row, mode)) for mode in MODES}} for row in self.rows
        ]
        content = {
            "metrics": list(self.metrics),
            "samples": self.samples,
            "candidates": {name: c.to_json() for name, c in self.candidates.items()},
            "rows": rows,
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """What `to_json` wrote; it predicts, but has no program to measure.

        Raises:
          RecipeError: the text is something else.
        """
        try:
            content = json.loads(text)
            given = content["candidates"]
            candidates = {name: Candidate.from_json(c, f"candidate {name}") for name, c in given.items()}
            losses = lambda found: {name: float(x) for name, x in found.items()}
            rows = tuple(Row(**{**row, **{m: losses(row[m]) for m in MODES}}) for row in content["rows"])
            return cls(rows, candidates, tuple(content["metrics"]), content["samples"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"this is no sensitivity that to_json wrote: {error!r}") from error

    def plot(self, path: str | os.PathLike[str], metric: str | None = None, mode: str = "one_quantized") -> None:
        """Draws the losses, a row of points per layer in program order, into a file of the type that its name says.

        Raises:
          QuantizationError: matplotlib is not installed.
          RecipeError: the metric was not measured.
        """
        metric, table = self._metric(metric), self.table(metric, mode)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise QuantizationError("plots need matplotlib: pip install 'qcompiler[peers]'") from error
        figure = Figure(figsize=(9, 1.5 + 0.2 * len(table)))
        panel = figure.add_subplot()
        for candidate in self.candidates:
            panel.plot([losses[candidate] for losses in table.values()], range(len(table)), "o", label=candidate)
        if all(loss > 0 for losses in table.values() for loss in losses.values()):
            panel.set_xscale("log")
        panel.set_yticks(range(len(table)), list(table), fontsize=7)
        panel.invert_yaxis()
        panel.set_xlabel(f"{metric}, {mode.replace('_', ' ')}")
        panel.grid(axis="x", alpha=0.3)
        panel.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=150)

    def _metric(self, metric: str | None) -> str:
        if metric is not None and metric not in self.metrics:
            raise RecipeError(f"the metric {metric!r} was not measured; there are {', '.join(self.metrics)}")
        return self.metrics[0] if metric is None else metric

    def _config(self, config: Mapping[str, str] | str) -> dict[str, str]:
        """A configuration, checked."""
        layers = self.layers
        config = dict.fromkeys(layers, config) if isinstance(config, str) else dict(config)
        for layer, candidate in config.items():
            if layer not in layers:
                raise RecipeError(f"no layer is called {layer!r}; there are {', '.join(layers)}")
            if candidate not in self.candidates:
                raise RecipeError(f"no candidate is called {candidate!r}; there are {', '.join(self.candidates)}")
        return config
