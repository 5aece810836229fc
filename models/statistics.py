"""Realistic BatchNorm statistics for untrained networks.

A freshly initialised ResNet makes a poor benchmark subject: its running statistics are 0 and 1, so activations grow
from block to block, and every channel has the same range. Here each channel gets a scale and a shift of its own, as
training would leave them, and the running statistics are measured.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx, traverse_util


@functools.partial(jax.jit, static_argnums=1)
def smooth_images(key: jax.Array, shape: tuple[int, int, int, int]) -> jax.Array:
    """Random images with energy at every scale and most of it in the coarse ones, as photographs have.

    Args:
      key: a JAX random key.
      shape: `(n, height, width, channels)`.

    Returns:
      `float32[n, height, width, channels]`; each image has mean 0 and deviation 1.
    """
    n, height, width, channels = shape
    images = jnp.zeros(shape, jnp.float32)
    grid = 4
    while True:
        rows, columns = min(grid, height), min(grid, width)
        noise = jax.random.normal(jax.random.fold_in(key, grid), (n, rows, columns, channels))
        # Amplitude falls as 1/sqrt(frequency): rougher than photographs, so that the last stages see variety too.
        images += jax.image.resize(noise, shape, "linear") / jnp.sqrt(jnp.float32(grid))
        if grid >= max(height, width):
            break
        grid *= 4
    images -= jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    return images / jnp.std(images, axis=(1, 2, 3), keepdims=True)


def _generator(key: jax.Array) -> np.random.Generator:
    # NumPy's, for jax would compile a sampler for every channel count.
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def _draw_affine(draw: np.random.Generator, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A scale and a bias for each channel."""
    return 0.35 * np.exp(draw.normal(0, 0.4, channels)), draw.normal(-0.05, 0.2, channels)


def _pool(means: list[np.ndarray], variances: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of batches of equal size together."""
    return np.mean(means, axis=0), np.mean(variances, axis=0) + np.var(means, axis=0)


@nnx.jit
def _measure(model: nnx.Module, images: jax.Array) -> None:
    model(images)


def calibrate_batch_norm(
    model: nnx.Module,
    key: jax.Array,
    image_size: int,
    batches: int = 1,
    *,
    batch_size: int = 4,
    channels: int = 3,
) -> nnx.Module:
    """Gives an untrained network realistic BatchNorm parameters and statistics, in place.

    Scales are drawn log-normally around 0.35 (about 0.1 to 1.2), shifts normally around -0.05 with deviation 0.2; then
    running means and variances are measured on `smooth_images`. The result depends on `key` and the arguments alone.

    Args:
      model: any nnx model that maps `float32[n, image_size, image_size, channels]` images to something.
      key: a JAX random key.
      image_size: height and width of the images.
      batches: how many batches to measure on.
      batch_size: images in each.
      channels: channels of the images.

    Returns:
      `model`, in evaluation mode.

    Raises:
      ValueError: if the model has no BatchNorm with scale and bias, or `batches` is not positive.
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm) and m.use_scale and m.use_bias]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no BatchNorm with scale and bias to calibrate")

    parameter_key, image_key = jax.random.split(key)
    draw = _generator(parameter_key)
    for norm in norms:
        scale, bias = _draw_affine(draw, norm.num_features)
        norm.scale.set_value(jnp.asarray(scale, norm.scale.get_value().dtype))
        norm.bias.set_value(jnp.asarray(bias, norm.bias.get_value().dtype))

    # With momentum 0 the running statistics of a training pass are those of its batch.
    momenta = [norm.momentum for norm in norms]
    model.train()
    try:
        for norm in norms:
            norm.momentum = 0.0
        shape = (batch_size, image_size, image_size, channels)
        means, variances = [], []
        for i in range(batches):
            _measure(model, smooth_images(jax.random.fold_in(image_key, i), shape))
            means.append([np.asarray(norm.mean.get_value()) for norm in norms])
            variances.append([np.asarray(norm.var.get_value()) for norm in norms])
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()

    for i, norm in enumerate(norms):
        mean, var = _pool([m[i] for m in means], [v[i] for v in variances])
        norm.mean.set_value(jnp.asarray(mean))
        norm.var.set_value(jnp.asarray(var))
    return model


def calibrate_linen_batch_norm(
    module: linen.Module,
    variables: Any,
    key: jax.Array,
    image_size: int,
    batches: int = 1,
    *,
    batch_size: int = 4,
    channels: int = 3,
) -> dict[str, Any]:
    """`calibrate_batch_norm` for a linen module, which is called with `train=True` to measure.

    Args:
      module: maps `float32[n, image_size, image_size, channels]` images to something.
      variables: what `module.init` returned: `{"params": ..., "batch_stats": ...}`.
      key, image_size, batches, batch_size, channels: as for `calibrate_batch_norm`.

    Returns:
      New `variables` with other scales, biases, means and variances.

    Raises:
      ValueError: if the model has no BatchNorm with scale and bias, or `batches` is not positive.
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    params = traverse_util.flatten_dict(variables["params"])
    stats = traverse_util.flatten_dict(variables.get("batch_stats", {}))
    norms = [path[:-1] for path in stats if path[-1] == "mean"]
    norms = [path for path in norms if (*path, "scale") in params and (*path, "bias") in params]
    if not norms:
        raise ValueError(f"{type(module).__name__} has no BatchNorm with scale and bias to calibrate")
    parameter_key, image_key = jax.random.split(key)
    draw = _generator(parameter_key)
    for path in norms:
        scale, bias = _draw_affine(draw, stats[*path, "mean"].size)
        params[*path, "scale"] = jnp.asarray(scale, params[*path, "scale"].dtype)
        params[*path, "bias"] = jnp.asarray(bias, params[*path, "bias"].dtype)
    variables = {**variables, "params": traverse_util.unflatten_dict(params)}

    @jax.jit
    def train(fill: jax.Array, images: jax.Array) -> Any:
        """Statistics after a training step whose running statistics were `fill` everywhere."""
        start = jax.tree.map(lambda s: jnp.full_like(s, fill), variables["batch_stats"])
        return module.apply({**variables, "batch_stats": start}, images, train=True, mutable=["batch_stats"])[1]

    shape = (batch_size, image_size, image_size, channels)
    measured: dict[Any, list[np.ndarray]] = {path: [] for path in stats}
    for i in range(batches):
        images = smooth_images(jax.random.fold_in(image_key, i), shape)
        # A step leaves momentum * old + (1 - momentum) * batch: from 0 and from 1 as old, both unknowns follow.
        zero, one = (
            traverse_util.flatten_dict(jax.device_get(train(jnp.float32(fill), images))["batch_stats"])
            for fill in (0, 1)
        )
        for path, values in measured.items():
            values.append(zero[path] / (1 - (one[path] - zero[path])))
    for path in norms:
        mean, var = _pool(measured[*path, "mean"], measured[*path, "var"])
        stats[*path, "mean"], stats[*path, "var"] = jnp.asarray(mean), jnp.asarray(np.maximum(var, 0))
    return {**variables, "batch_stats": traverse_util.unflatten_dict(stats)}


def realistic(
    model: nnx.Module | linen.Module, key: jax.Array, image_size: int, *, batch_size: int = 4
) -> tuple[Any, dict[str, Any]]:
    """An untrained network of either flavour with realistic statistics in its norms, if it has any.

    Args:
      model: maps `float32[n, image_size, image_size, 3]` images to something; a linen module takes `train`.
      key: a JAX random key, for images and norms, and for a linen module's weights.
      image_size: height and width of the images.
      batch_size: images that are measured on.

    Returns:
      The model, an nnx one in evaluation mode; and what `qc.quantize` needs to be told of a linen one.
    """
    if isinstance(model, linen.Module):
        variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)))
        if "batch_stats" in variables:
            variables = calibrate_linen_batch_norm(model, variables, key, image_size, batch_size=batch_size)
        return model, {"variables": variables, "apply_kwargs": {"train": False}}
    if any(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(model)):
        return calibrate_batch_norm(model, key, image_size, batch_size=batch_size), {}
    model.eval()
    return model, {}
