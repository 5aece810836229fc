"""Losses of all layers and candidates at once from derivatives of the float model, where the error of storage is small.

- Fisher: 1/2 sum_i F_ii d_i^2, F_ii = E[g_i^2], d what storing changes each element of a weight or an activation by
  (FIT, Zandonati et al. 2022, arXiv:2210.08502, equation 12, with the errors themselves in place of their mean power).
- Hessian: 1/2 mean(Tr H) ||Q(W) - W||^2, half of HAWQ-V2's Omega (Dong et al. 2019, arXiv:1911.03852, equation 8), the
  traces by Hutchinson's estimator E[z^T H z], z of random signs. Weights only.

The loss whose derivatives they are needs no labels. `kl_nats`: the divergence from the model's own outputs; it has no
gradient there, but its second derivative is that of the likelihood of labels that the model itself draws. `mse`: the
squared distance to the model's own outputs; there it is the gradient of outputs projected on random signs. In both the
scores of samples are independent and have no mean, so that squares of gradients over a batch estimate sums of squares.
Of a loss of the user's, g is the gradient over one batch, and E its mean over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler.calls import call
from qcompiler.errors import QuantizationError, RecipeError
from qcompiler.ir import classes
from qcompiler.losses import logits_of, mean_kl
from qcompiler.switchable import Switchable, Ways, stored

#: `loss(outputs, batch) -> scalar`, outputs as the model gives them, the batch a `qc.call` of traced arrays.
Loss = Callable[[Any, call], Any]
OF = ("kl_nats", "mse")


class Curvature:
    """Fisher and Hessian losses of a program.

    Args:
      network: the program and the candidates.
      of: `kl_nats` or `mse`, or the user's loss.
      seed: of labels, projections and probes.

    Raises:
      RecipeError: `kl_nats` of a program without logits, or `mse` of one without real outputs.
    """

    def __init__(self, network: Switchable, of: str | Loss, seed: int = 0) -> None:
        self.network, self.of, self._key = network, of, jax.random.key(seed)
        self._reals = [k for k, v in enumerate(network.program.outvars) if classes.is_float(v)]
        self._logits = logits_of(network.program)
        if of == "kl_nats" and not self._logits:
            raise RecipeError("kl_nats is of rows of logits, and no output has rows of several numbers: use mse")
        if of == "mse" and not self._reals:
            raise RecipeError("the model has no real outputs: pass a loss of your own")
        self._shifts = {k: np.zeros(w.shape, w.dtype) for k, w in network.layer_weights.items()}

    def fisher(self, batches: Sequence[Sequence[Any]], draws: int) -> Iterator[np.ndarray]:
        """One estimate of `float64[layers, candidates]` after another, to be averaged; `draws` for each batch."""
        estimate = jax.jit(self._fisher)
        yield from self._estimates(estimate, batches, 1 if callable(self.of) else draws)

    def hessian(self, batches: Sequence[Sequence[Any]], draws: int) -> Iterator[np.ndarray]:
        """The same of Hutchinson's estimator."""
        yield from self._estimates(jax.jit(self._hessian), batches, draws)

    def _estimates(
        self, estimate: Callable[..., Any], batches: Sequence[Sequence[Any]], draws: int
    ) -> Iterator[np.ndarray]:
        arguments = jax.tree.map(jnp.asarray, (self.network.tables(), self.network.layer_weights))
        for number, batch in enumerate(batches):
            for draw in range(draws):
                key = jax.random.fold_in(jax.random.fold_in(self._key, number), draw)
                try:
                    found = estimate(*arguments, list(batch), key)
                except ValueError as error:
                    if "Reverse-mode" not in str(error):
                        raise
                    raise QuantizationError(
                        f"there are no gradients through a while loop of unknown length: {error}; use nsr, mse or "
                        "kl_nats, which need none"
                    ) from error
                yield np.asarray(found, np.float64)

    def _run(
        self,
        weights: Mapping[str, Any],
        inputs: Sequence[Any],
        shifts: Mapping[str, Any],
        scores: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Flat outputs of the float program with shifted weights, and taps on activations where there are scores."""
        network = self.network

        def hook(layer: str, values: list[Any]) -> list[Any]:
            out = list(values)
            if layer in shifts:
                k = network.weight_operand[layer]
                out[k] = values[k] + shifts[layer]
            if scores is not None:
                for k, ways in network.activation_ways[layer].items():
                    out[k] = _tap(ways)(out[k], scores[layer])
            return out

        return network.evaluate(weights, inputs, hook)

    def _user_loss(self, loss: Loss, outputs: Sequence[Any], inputs: Sequence[Any]) -> Any:
        signature = self.network.program.signature
        args, kwargs = jax.tree.unflatten(signature.in_tree, list(inputs))
        value = loss(jax.tree.unflatten(signature.out_tree, list(outputs)), call(*args, **kwargs))
        return jnp.asarray(value).astype(jnp.float32)

    def _score(self, outputs: Sequence[Any], inputs: Sequence[Any], key: Any) -> Any:
        """A number, the squares of whose derivatives are half the second derivatives of the loss, on average."""
        if callable(self.of):
            return np.float32(np.sqrt(0.5)) * self._user_loss(self.of, outputs, inputs)
        total = jnp.float32(0)
        if self.of == "mse":
            size = sum(outputs[k].size for k in self._reals)
            for k in self._reals:
                signs = jax.random.rademacher(jax.random.fold_in(key, k), outputs[k].shape, jnp.float32)
                finite = jnp.where(jnp.isfinite(outputs[k]), outputs[k], jnp.zeros_like(outputs[k]))
                total += jnp.sum(signs * finite.astype(jnp.float32))
            return total * np.float32(1 / np.sqrt(size))
        for k in self._logits:
            likelihoods = jax.nn.log_softmax(outputs[k].astype(jnp.float32), axis=-1)
            labels = jax.random.categorical(jax.random.fold_in(key, k), jax.lax.stop_gradient(likelihoods), axis=-1)
            chosen = jnp.take_along_axis(likelihoods, labels[..., None], axis=-1)
            total += jnp.sum(chosen) * np.float32(np.sqrt(0.5 / (chosen.size * len(self._logits))))
        return total

    def _loss(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> Any:
        """The loss against the model's own outputs, which are held fixed."""
        if callable(self.of):
            return self._user_loss(self.of, outputs, inputs)
        held = jax.lax.stop_gradient(list(outputs))
        if self.of == "kl_nats":
            terms = [mean_kl(held[k], outputs[k]) for k in self._logits]
            return sum(terms, jnp.float32(0)) / np.float32(len(terms))
        size = sum(outputs[k].size for k in self._reals)
        squares = [jnp.sum(jnp.square((outputs[k] - held[k]).astype(jnp.float32))) for k in self._reals]
        return sum(squares, jnp.float32(0)) / np.float32(size)

    def _fisher(
        self, tables: Mapping[str, Any], layer_weights: Mapping[str, Any], inputs: Sequence[Any], key: Any
    ) -> Any:
        """float32[layers, candidates] of one batch and one draw: one pass back gives all layers."""
        count = len(self.network.candidates)
        scores = {layer.id: jnp.zeros(count, jnp.float32) for layer in self.network.layers}

        def score(shifts: Mapping[str, Any], scores: Mapping[str, Any]) -> Any:
            return self._score(self._run(tables["weights"], inputs, shifts, scores), inputs, key)

        by_weight, by_activation = jax.grad(score, argnums=(0, 1))(self._zeros(), scores)
        rows = []
        for layer in self.network.layers:
            row = by_activation[layer.id]
            if layer.id in by_weight:
                row += _weighted(by_weight[layer.id], layer_weights[layer.id], tables["weight_ways"][layer.id])
            rows.append(row)
        return jnp.stack(rows)

    def _hessian(
        self, tables: Mapping[str, Any], layer_weights: Mapping[str, Any], inputs: Sequence[Any], key: Any
    ) -> Any:
        """float32[layers, candidates] of one batch and one probe of all weights at once."""
        zeros = self._zeros()
        gradient = jax.grad(lambda shifts: self._loss(self._run(tables["weights"], inputs, shifts), inputs))
        probe = {
            layer: jax.random.rademacher(jax.random.fold_in(key, k), x.shape, x.dtype)
            for k, (layer, x) in enumerate(zeros.items())
        }
        _, product = jax.jvp(gradient, (zeros,), (probe,))
        rows = []
        for layer in self.network.layers:
            if layer.id not in zeros:
                rows.append(jnp.zeros(len(self.network.candidates), jnp.float32))
                continue
            z, hz = (x[layer.id].astype(jnp.float32) for x in (probe, product))
            mean_trace = jnp.vdot(z, hz) / np.float32(max(1, z.size))
            ones = jnp.ones(z.shape, jnp.float32)
            power = _weighted(ones, layer_weights[layer.id], tables["weight_ways"][layer.id])
            rows.append(np.float32(0.5) * mean_trace * power)
        return jnp.stack(rows)

    def _zeros(self) -> dict[str, Any]:
        return {layer: jnp.zeros(x.shape, x.dtype) for layer, x in self._shifts.items()}


def _weighted(gradient: Any, x: Any, ways: Ways) -> Any:
    """float32[candidates]: sum of gradient^2 * (stored(x) - x)^2, for each way of storing `x` but the first."""
    square = jnp.square(gradient.astype(jnp.float32))
    error = lambda row: (stored(x, ways, row) - x).astype(jnp.float32)
    return jnp.stack([jnp.sum(square * jnp.square(error(row))) for row in range(1, len(ways.kinds))])


def _tap(ways: Ways) -> Callable[[Any, Any], Any]:
    """The identity of its first argument; the derivative by its second is `_weighted` by the gradient that comes back.

    So scores of activations add up on the way back, through loops, too, and no activation is kept for them.
    """

    @jax.custom_vjp
    def tap(x: Any, scores: Any) -> Any:
        del scores
        return x

    def forward(x: Any, scores: Any) -> tuple[Any, Any]:
        del scores
        return x, x

    def backward(x: Any, gradient: Any) -> tuple[Any, Any]:
        return gradient, _weighted(gradient, x, ways)

    tap.defvjp(forward, backward)
    return tap
