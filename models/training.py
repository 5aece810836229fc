"""A small training loop: AdamW on a one-cycle schedule, one jitted step; cross-entropy if no loss is given."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qcompiler.debug.progress import ProgressBar
from qcompiler.models import cache

#: Inputs, and what the loss compares with: an array or a tuple of arrays.
Batch = tuple[np.ndarray, Any]
#: Model, inputs and targets -> the scalar to minimize.
Loss = Callable[[Any, jax.Array, Any], jax.Array]


def cross_entropy(model: nnx.Module, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean, in nats, over labels `int32[...]`; the model's logits are `float32[..., classes]`."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(inputs), labels))


def train(
    model: nnx.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int,
    batch_size: int = 64,
    seed: int = 0,
    **options: Any,
) -> list[float]:
    """Trains a classifier on a set of images, in place, and leaves it in evaluation mode.

    Args:
      model: maps `float32[batch_size, ...]` images to `float32[batch_size, classes]` logits.
      images: `float32[n, ...]`, with `n >= batch_size`; each epoch's last, incomplete batch is dropped.
      labels: `int[n]`.
      epochs: passes over the data.
      batch_size: images in a step.
      seed: orders the batches and seeds `augment`.
      **options: those of `train_on_batches`.

    Returns:
      The mean loss of each epoch.

    Raises:
      ValueError: if there are fewer images than `batch_size`, or not as many labels as images.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    if len(images) < batch_size:
        raise ValueError(f"{len(images)} images do not fill one batch of {batch_size}")
    steps = len(images) // batch_size
    draw = np.random.default_rng(seed)
    orders = [draw.permutation(len(images))[: steps * batch_size].reshape(steps, batch_size) for _ in range(epochs)]
    labels = labels.astype(np.int32)
    batches = lambda epoch: ((images[rows], labels[rows]) for rows in orders[epoch])
    return train_on_batches(model, batches, epochs=epochs, steps=steps, seed=seed, **options)


def train_on_batches(
    model: nnx.Module,
    batches: Callable[[int], Iterable[Batch]],
    *,
    epochs: int,
    steps: int,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-4,
    loss: Loss = cross_entropy,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    seed: int = 0,
    label: str = "training",
    checkpoint: Path | None = None,
) -> list[float]:
    """Trains a model in place and leaves it in evaluation mode.

    On KeyboardInterrupt the exception passes through, and the model holds the weights of the last whole step.

    Args:
      model: what `loss` takes; for cross-entropy it maps inputs to logits.
      batches: epoch -> its `steps` batches: inputs and targets, of the same shapes every time.
      epochs: how many; what an epoch is matters to progress and checkpoints only.
      steps: of an epoch.
      learning_rate: the peak of the one-cycle schedule.
      weight_decay: decoupled, on arrays of rank 2 and more (neither biases nor norms).
      loss: traced into the step, with the model in training mode.
      augment: `(key, inputs) -> inputs` of the same shape and dtype, traced into the step.
      seed: of `augment`.
      label: shown before the progress bar.
      checkpoint: a file written after every epoch; where it exists, training goes on from there, to the same result as
        without a break.

    Returns:
      The mean loss of each epoch.

    Raises:
      CacheError: the checkpoint is damaged or of another model.
    """
    schedule = optax.cosine_onecycle_schedule(epochs * steps, learning_rate, pct_start=0.25)
    decayed = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
    transform = optax.adamw(schedule, weight_decay=weight_decay, mask=decayed)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key, inputs, targets):
        if augment is not None:
            inputs = augment(key, inputs)
        value, grads = nnx.value_and_grad(loss)(model, inputs, targets)
        # Adam's bias correction in optax raises a float to an integer power, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)
        return value

    keys = jax.random.split(jax.random.key(seed), epochs * steps)
    both = nnx.Dict(model=model, optimizer=optimizer)
    history: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        arrays, notes = cache.load(checkpoint)
        cache.restore(both, arrays, checkpoint)
        history = notes["history"]
    progress = ProgressBar(label, epochs)
    model.train()
    try:
        for epoch in range(len(history), epochs):
            losses = [
                step(model, optimizer, keys[epoch * steps + i], inputs, targets)
                for i, (inputs, targets) in enumerate(batches(epoch))
            ]
            history.append(float(np.mean(losses)))
            if checkpoint is not None:
                cache.save(checkpoint, cache.arrays_of(both), {"history": history})
            progress.update(epoch + 1, f"loss {history[-1]:.4f}")
    finally:
        model.eval()
        progress.close()
    return history


def accuracy(predict: Callable[[jax.Array], jax.Array], images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose largest logit is their label's, from 0 to 1.

    Args:
      predict: maps `float32[n, ...]` images to `[n, classes]` logits; called once with all the images.
      images: `float32[n, ...]`.
      labels: `int[n]`.
    """
    predicted = np.argmax(np.asarray(predict(images)), axis=-1)
    return float(np.mean(predicted == labels))
