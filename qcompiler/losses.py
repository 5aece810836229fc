"""What outputs lose by quantization: losses that need no labels, or one of the user's, all traceable.

| name | loss | unit |
|---|---|---|
| `nsr` | E[(y - y_q)^2] / E[y^2], whose -10 log10 is the SQNR in dB | none |
| `mse` | E[(y - y_q)^2] over all real outputs together | that of the outputs, squared |
| `kl_nats` | KL(softmax(y), softmax(y_q)) over the last axis, the mean over rows and outputs | nats |

All are powers of noise or quadratic in it, so that those of layers whose errors are independent add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler.calls import call
from qcompiler.errors import RecipeError
from qcompiler.ir import Program, classes

OUTPUT_LOSSES = ("nsr", "mse", "kl_nats")
#: `metric(outputs_float, outputs_quantized, batch) -> scalar`, more being worse: outputs as the model gives them, the
#: batch a `qc.call` of traced arrays.
Metric = Callable[[Any, Any, call], Any]


class Losses:
    """The losses of a program's outputs.

    Args:
      program: whose outputs they are.
      names: of `OUTPUT_LOSSES`.
      metrics: the user's, by name.

    Raises:
      RecipeError: the program has no outputs that a loss could speak of.
    """

    def __init__(self, program: Program, names: Sequence[str], metrics: Mapping[str, Metric]) -> None:
        self.names, self.metrics, self._signature = tuple(names), dict(metrics), program.signature
        self._reals = [k for k, v in enumerate(program.outvars) if classes.is_float(v)]
        self._logits = logits_of(program)
        if not self._reals and not self.metrics:
            raise RecipeError("the model has no real outputs to compare: pass a metric of your own")
        if "kl_nats" in self.names and not self._logits:
            raise RecipeError("kl_nats compares rows of logits, and no output has rows of several numbers: use mse")

    def measure(self, reference: Sequence[Any], outputs: Sequence[Any], inputs: Sequence[Any]) -> dict[str, Any]:
        """Means over one batch, float32 scalars; `finish` makes losses of their means over batches. Traceable."""
        real = [(reference[k].astype(jnp.float32), outputs[k].astype(jnp.float32)) for k in self._reals]
        count = max(1, sum(y.size for y, _ in real))
        found = {
            "mse": sum((jnp.sum(jnp.square(_error(y, q))) for y, q in real), jnp.float32(0)) / np.float32(count),
            "power": sum((jnp.sum(jnp.square(_finite(y))) for y, _ in real), jnp.float32(0)) / np.float32(count),
        }
        if "kl_nats" in self.names:
            terms = [mean_kl(reference[k], outputs[k]) for k in self._logits]
            found["kl_nats"] = sum(terms, jnp.float32(0)) / np.float32(len(terms))
        for name, metric in self.metrics.items():
            real_tree, tree = (jax.tree.unflatten(self._signature.out_tree, list(ys)) for ys in (reference, outputs))
            args, kwargs = jax.tree.unflatten(self._signature.in_tree, list(inputs))
            value = jnp.asarray(metric(real_tree, tree, call(*args, **kwargs)))
            if value.shape:
                raise RecipeError(f"the metric {name} gives an array of shape {value.shape}, not a number")
            found[name] = value.astype(jnp.float32)
        return found

    def finish(self, means: Mapping[str, float]) -> dict[str, float]:
        """Losses by name from means over batches; what is no number is infinitely bad."""
        bad = lambda x: math.inf if math.isnan(x) else float(x)
        found = {name: bad(means[name]) for name in (*self.names, *self.metrics) if name != "nsr"}
        if "nsr" in self.names:
            mse, power = bad(means["mse"]), means["power"]
            found["nsr"] = mse / power if power else math.inf if mse else 0.0
        return {name: found[name] for name in (*self.names, *self.metrics)}


def logits_of(program: Program) -> list[int]:
    """The outputs that are rows of several real numbers; along the only axis of a vector there are samples."""
    is_rows = lambda aval: aval.ndim > 1 and aval.shape[-1] > 1 and aval.size
    return [k for k, v in enumerate(program.outvars) if classes.is_float(v) and is_rows(v.aval)]


def mean_kl(reference: Any, logits: Any) -> Any:
    """KL(softmax(reference), softmax(logits)) in nats over the last axis, the mean over all others."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (reference, logits))
    # What has no probability, behind a mask say, adds nothing.
    terms = jnp.where(jnp.isneginf(p), np.float32(0), jnp.exp(p) * (p - q))
    return jnp.mean(jnp.sum(terms, axis=-1))


def _finite(x: Any) -> Any:
    """Numbers of which a mask's infinities are none."""
    return jnp.where(jnp.isfinite(x), x, np.float32(0))


def _error(y: Any, q: Any) -> Any:
    """y - q where y is finite."""
    return jnp.where(jnp.isfinite(y), y - q, np.float32(0))


def sqnr_db(nsr: float) -> float:
    """Signal over noise in dB, of noise over signal as a ratio of powers; inf without noise."""
    return math.inf if nsr <= 0 else -10 * math.log10(nsr) if math.isfinite(nsr) else -math.inf
