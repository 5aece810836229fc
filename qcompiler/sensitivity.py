"""How much each layer loses by each way of storing its operands: `Sensitivity`, and `analyze`, which measures it.

    sensitivity = qc.trace(model, x).calibrate(batches).sensitivity(candidates=("int4", "int8"), metric="nsr")
    print(sensitivity)                                  # a table, the worst first
    sensitivity.predict({"conv1/conv_general_dilated#0": "int4"})       # losses add
    sensitivity.measure("int4")                         # the same program run so

All layers and candidates run in one compiled program, whose quantizers are switched by numbers (`switchable`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler import candidates as named_candidates
from qcompiler.candidates import Candidate
from qcompiler.curvature import OF, Curvature, Loss
from qcompiler.debug.progress import ProgressBar
from qcompiler.errors import CalibrationError, RecipeError
from qcompiler.ir import Program
from qcompiler.losses import OUTPUT_LOSSES, Losses, Metric
from qcompiler.recipe import Recipe
from qcompiler.samples import Samples
from qcompiler.sensitivity_table import MODES, Row, Sensitivity
from qcompiler.switchable import Switchable

CURVATURES = tuple(f"{kind}_{of}" for kind in ("fisher", "hessian") for of in (*OF, "loss"))
#: What a metric by that name is measured as: a prediction is compared with the loss it predicts.
MEASURED_AS = {name: name.partition("_")[2] for name in CURVATURES}
#: Configurations that one call of the compiled program runs at most; between calls there is progress to see.
_ROWS = 8
#: Samples of the calibration that are used, unless asked otherwise: whole batches, one at least.
_SAMPLES = 32
#: Random signs meet each other in z^T H z off the diagonal, so that its estimate varies more than that of squares.
_DRAWS = {"fisher": 8, "hessian": 32}


def analyze(
    program: Program,
    samples: Samples,
    recipe: Recipe,
    *,
    candidates: Mapping[str, Candidate] | Sequence[str] = ("int4", "int8"),
    metric: str | Metric | Sequence[str | Metric] = ("nsr", "mse"),
    mode: str = "one_quantized",
    loss: Loss | None = None,
    batches: int | None = None,
    draws: int | None = None,
    seed: int = 0,
) -> Sensitivity:
    """The losses of every layer with every candidate.

    Args:
      program: partitioned and calibrated.
      samples: of which the batches of the program's shapes are used.
      recipe: whose range estimators activations get.
      candidates: by name, or names of `candidates.NAMED`.
      metric: `nsr`, `mse`, `kl_nats` (see `losses`), `fisher_kl_nats`, `fisher_mse`, `hessian_kl_nats`, `hessian_mse`
        (see `curvature`), `fisher_loss`, `hessian_loss` of `loss`, functions `f(outputs_float, outputs_quantized,
        batch) -> scalar`, known by their `__name__`; one or several.
      mode: `one_quantized`: one layer is quantized, all others real; `one_float`: all are quantized but one, and the
        loss is what that recovers; the two orders disagree; `both`. Derivatives know the first alone.
      loss: `loss(outputs, batch) -> scalar`, for the metrics that end in `_loss`.
      batches: how many batches to use at most; None: those of 32 samples.
      draws: per batch, of random labels and projections for Fisher losses, 8 unless asked otherwise, and of probes for
        Hessian ones, 32.
      seed: of these.

    Raises:
      RecipeError: a candidate, metric or mode is unknown, or a metric does not fit the model.
      CalibrationError: no sample has the program's shapes, or calibration has not seen what a layer reads.
      QuantizationError: no layer has a product.
    """
    chosen = named_candidates.named(candidates)
    wanted = [metric] if isinstance(metric, str) or callable(metric) else list(metric)
    names, metrics = _metrics(wanted, loss)
    if mode not in (*MODES, "both"):
        raise RecipeError(f"unknown mode={mode!r}; known: {', '.join((*MODES, 'both'))}")
    if any(n is not None and n < 1 for n in (draws, batches)):
        raise RecipeError(f"draws and batches are at least 1, got {draws} and {batches}")
    probe = Probe(Switchable(program, recipe, chosen), samples, names, metrics, batches)
    orders = MODES if mode == "both" else (mode,)
    found: dict[str, Any] = {"one_quantized": {}, "one_float": {}}
    if probe.has_losses:
        found |= {order: probe.one_by_one(order) for order in orders}
    curved: dict[str, np.ndarray] = {}
    for name in (n for n in names if n in CURVATURES):
        kind, _, of = name.partition("_")
        target = loss if of == "loss" and loss is not None else of
        curved[name] = probe.curvature(kind, target, draws or _DRAWS[kind], seed)
    rows = []
    for k, layer in enumerate(probe.network.layers):
        for c, candidate in enumerate(chosen):
            by_order = {order: dict(found[order].get((k, c), {})) for order in MODES}
            by_order["one_quantized"] |= {name: float(scores[k, c]) for name, scores in curved.items()}
            order_of = lambda losses: {n: losses[n] for n in (_name_of(m) for m in wanted) if n in losses}
            fields = {order: order_of(losses) for order, losses in by_order.items()}
            rows.append(
                Row(layer.id, layer.module_path, layer.primitive, layer.macs, layer.weights, candidate, **fields)
            )
    return Sensitivity(tuple(rows), chosen, tuple(_name_of(m) for m in wanted), probe.samples, _probe=probe)


def _name_of(metric: str | Metric) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def _metrics(wanted: Sequence[Any], loss: Loss | None) -> tuple[list[str], dict[str, Metric]]:
    """Names of our metrics, and the user's by name."""
    known = (*OUTPUT_LOSSES, *CURVATURES)
    names = [m for m in wanted if isinstance(m, str)]
    if unknown := [n for n in names if n not in known]:
        raise RecipeError(f"unknown metric {unknown[0]!r}; known: {', '.join(known)}, or pass a function")
    if not wanted:
        raise RecipeError(f"there is no metric; known: {', '.join(known)}")
    if loss is None and (lacking := [n for n in names if n.endswith("_loss")]):
        raise RecipeError(f"the metric {lacking[0]} is of loss=, which is missing")
    metrics = {_name_of(m): m for m in wanted if not isinstance(m, str)}
    if wrong := [n for n, m in metrics.items() if not callable(m) or n in known]:
        raise RecipeError(f"a metric is one of {', '.join(known)}, or a function of another name; got {wrong[0]!r}")
    return names, metrics


class Probe:
    """A switchable program with the data that it runs on.

    Args:
      network: the program.
      samples: of which the batches of the program's shapes are used.
      names: of the metrics that `measure` shall know, those of derivatives as what they predict.
      metrics: the user's, by name.
      batches: how many to use at most; None: those of `_SAMPLES` samples.

    Attributes:
      samples: how many are used.
    """

    def __init__(
        self,
        network: Switchable,
        samples: Samples,
        names: Sequence[str],
        metrics: Mapping[str, Metric],
        batches: int | None,
    ) -> None:
        self.network = network
        avals = network.program.input_avals
        lengths = [a.shape[0] if a.shape else 1 for a in avals]
        length = max(1, min(lengths, default=1))
        self._batches = samples.at(avals)[: max(1, _SAMPLES // length) if batches is None else batches]
        if not self._batches:
            raise CalibrationError(
                f"no calibration batch has the shapes {[tuple(a.shape) for a in avals]} that the model was traced at"
            )
        self.samples = length * len(self._batches)
        measured = dict.fromkeys(MEASURED_AS.get(n, n) for n in names)
        self.has_losses = any(n in OUTPUT_LOSSES for n in names) or bool(metrics)
        self._losses = Losses(network.program, [n for n in measured if n in OUTPUT_LOSSES], metrics)
        self._arguments: Any = None
        self._references: list[list[Any]] = []
        self._run = jax.jit(self._outputs)
        self._compare = jax.jit(self._losses_of)

    def losses(self, choices: np.ndarray, label: str = "sensitivity") -> list[dict[str, float]]:
        """Losses by name of each configuration, int32[configurations, layers], over all batches."""
        choices = np.asarray(choices, np.int32)
        if self._arguments is None:
            self._arguments = jax.tree.map(jnp.asarray, self.network.tables())
        sums: list[dict[str, float]] = [{} for _ in choices]
        bar = ProgressBar(label, len(choices) * len(self._batches))
        try:
            for number, batch in enumerate(self._batches):
                if number == len(self._references):
                    real = np.zeros((1, len(self.network.layers)), np.int32)
                    self._references.append([y[0] for y in self._some(real, batch)])
                for first in range(0, len(choices), _ROWS):
                    rows = choices[first : first + _ROWS]
                    outputs = self._some(rows, batch)
                    found = jax.device_get(self._compare(self._references[number], outputs, list(batch)))
                    for k in range(len(rows)):
                        for name, values in found.items():
                            sums[first + k][name] = sums[first + k].get(name, 0.0) + float(values[k])
                    bar.update(number * len(choices) + first + len(rows))
        finally:
            bar.close()
        means = ({name: value / len(self._batches) for name, value in row.items()} for row in sums)
        return [self._losses.finish(row) for row in means]

    def _some(self, rows: np.ndarray, batch: Sequence[Any]) -> list[Any]:
        """Outputs of up to `_ROWS` configurations, under a new leading dimension of that length."""
        padded = np.zeros((_ROWS, rows.shape[1]), np.int32)
        padded[: len(rows)] = rows
        return self._run(self._arguments, padded, np.int32(len(rows)), list(batch))

    def _outputs(self, tables: Any, rows: Any, count: Any, inputs: Sequence[Any]) -> list[Any]:
        """`lax.map` over the first `count` rows, a number that is known only when it runs."""
        shapes = jax.eval_shape(self.network.outputs, tables, rows[0], inputs)
        start = [jnp.zeros((_ROWS, *y.shape), y.dtype) for y in shapes]

        def step(k: Any, done: list[Any]) -> list[Any]:
            outputs = self.network.outputs(tables, rows[k], inputs)
            return [lax.dynamic_update_index_in_dim(ys, y, k, 0) for ys, y in zip(done, outputs, strict=True)]

        return lax.fori_loop(0, count, step, start)

    def _losses_of(self, reference: Sequence[Any], outputs: Sequence[Any], inputs: Sequence[Any]) -> dict[str, Any]:
        return lax.map(lambda ys: self._losses.measure(reference, ys, inputs), list(outputs))

    def one_by_one(self, mode: str) -> dict[tuple[int, int], dict[str, float]]:
        """(layer, candidate) -> losses by name, in one of the two orders."""
        layers, candidates = self.network.layers, range(len(self.network.candidates))
        first = {(k, c): self.network.same_as(layer.id, c + 1) for k, layer in enumerate(layers) for c in candidates}
        rows: dict[tuple[int, ...], np.ndarray] = {}
        for (k, c), row in first.items():
            if mode == "one_float":
                rows.setdefault((c,), np.full(len(layers), c + 1))
                rows[k, c] = np.where(np.arange(len(layers)) == k, 0, c + 1)
            elif row:
                rows.setdefault((k, row - 1), np.where(np.arange(len(layers)) == k, row, 0))
        found = dict(zip(rows, self.losses(np.array([*rows.values()]).reshape(-1, len(layers)), mode), strict=True))
        if mode == "one_quantized":
            nothing = {name: 0.0 for name in (*self._losses.names, *self._losses.metrics)}
            return {key: found[key[0], row - 1] if row else nothing for key, row in first.items()}
        less = lambda whole, rest: {name: _recovered(whole[name], rest[name]) for name in whole}
        return {(k, c): less(found[c,], found[k, c]) for k, c in first}

    def curvature(self, kind: str, of: str | Loss, draws: int, seed: int) -> np.ndarray:
        """float64[layers, candidates]; see `curvature`."""
        curvature = Curvature(self.network, of, seed)
        estimates: Iterator[np.ndarray] = getattr(curvature, kind)(self._batches, draws)
        total, count = np.zeros((len(self.network.layers), len(self.network.candidates))), 0
        bar = ProgressBar(kind, draws * len(self._batches))
        try:
            for count, estimate in enumerate(estimates, 1):
                total += estimate
                bar.update(count)
        finally:
            bar.close()
        return total / count

    def measure(self, config: Mapping[str, str], metric: str) -> float:
        """The loss of a configuration; layers that it leaves out stay real."""
        rows = {name: c for c, name in enumerate(self.network.candidates, 1)}
        choices = np.array([[rows[config[layer.id]] if layer.id in config else 0 for layer in self.network.layers]])
        return self.losses(choices, "measure")[0][MEASURED_AS.get(metric, metric)]


def _recovered(whole: float, rest: float) -> float:
    """What a loss falls by; nothing where both are infinite."""
    return 0.0 if math.isinf(whole) and math.isinf(rest) else whole - rest
