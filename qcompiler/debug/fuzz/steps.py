"""The steps of random programs: functions of values, of the step's own weights and of its options, written in JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "leaky_relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "mish": jax.nn.mish,
    "abs": jnp.abs,
    "square": jnp.square,
}

#: Of one value, once it is about one in size; each may be a table, or part of general arithmetic.
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "log": lambda x: jnp.log(jnp.abs(x) + 0.1),
    "log1p": lambda x: jnp.log1p(jnp.abs(x)),
    "sin": jnp.sin,
    "cos": jnp.cos,
    "erf": jax.lax.erf,
    "sqrt": lambda x: jnp.sqrt(jnp.abs(x)),
    "rsqrt": lambda x: jax.lax.rsqrt(jnp.abs(x) + 0.1),
    "cbrt": jnp.cbrt,
    "reciprocal": lambda x: 1 / (jnp.abs(x) + 0.1),
    "floor": jnp.floor,
    "sign": jnp.sign,
    "cube": lambda x: x**3,
    "atan": jnp.arctan,
    "asinh": jnp.arcsinh,
}

_LAYOUTS = {
    (3, "last"): ("NWC", "WIO", "NWC"),
    (4, "last"): ("NHWC", "HWIO", "NHWC"),
    (5, "last"): ("NDHWC", "DHWIO", "NDHWC"),
    (3, "first"): ("NCW", "OIW", "NCW"),
    (4, "first"): ("NCHW", "OIHW", "NCHW"),
    (5, "first"): ("NCDHW", "OIDHW", "NCDHW"),
}


def _conv(x: Any, held: Any, layout: str = "last", **options: Any) -> Any:
    """A convolution of any rank; options are those of `lax.conv_general_dilated`."""
    y = jax.lax.conv_general_dilated(x, held["kernel"], dimension_numbers=_LAYOUTS[x.ndim, layout], **options)
    if "bias" not in held:
        return y
    return y + (held["bias"].reshape(-1, *(1,) * (x.ndim - 2)) if layout == "first" else held["bias"])


def _dot(x: Any, held: Any) -> Any:
    y = x @ held["kernel"]
    return y + held["bias"] if "bias" in held else y


def _sum(*operands: Any) -> Any:
    """Of two or more values, from the left."""
    *values, _ = operands
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _pool(x: Any, held: Any, window: int, stride: int, padding: str, largest: bool = True) -> Any:
    dims, strides = (1, *(window,) * (x.ndim - 2), 1), (1, *(stride,) * (x.ndim - 2), 1)
    if largest:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, dims, strides, padding)
    return jax.lax.reduce_window(x, jnp.inf, jax.lax.min, dims, strides, padding)


def _add_mean(x: Any, held: Any, axes: Sequence[int]) -> Any:
    return x + jnp.broadcast_to(jnp.mean(x, axes, keepdims=True), x.shape)


def _average_pool(x: Any, held: Any, window: int, stride: int, padding: str) -> Any:
    dims, strides = (1, *(window,) * (x.ndim - 2), 1), (1, *(stride,) * (x.ndim - 2), 1)
    sums = jax.lax.reduce_window(x, np.float32(0), jax.lax.add, dims, strides, padding)
    return sums / np.float32(window ** (x.ndim - 2))


def _squeeze_excite(x: Any, held: Any) -> Any:
    """A gate per channel, from the means of the channels."""
    means = jnp.mean(x, tuple(range(1, x.ndim - 1)), keepdims=True)
    return x * jax.nn.sigmoid(means @ held["kernel"])


def _piecewise(x: Any, held: Any, turn: float, below: Sequence[float], above: Sequence[float]) -> Any:
    """Two straight lines: (factor, offset) on either side of a number."""
    return jnp.where(x > turn, x * above[0] + above[1], x * below[0] + below[1])


def _resize(x: Any, held: Any, method: str, factor: int) -> Any:
    shape = (x.shape[0], *(factor * n for n in x.shape[1:-1]), x.shape[-1])
    return jax.image.resize(x, shape, method)


def _split(x: Any, held: Any, swap: bool) -> Any:
    """The halves of the last dimension, multiplied, or in the other order."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([second, first], axis=-1) if swap else first * jax.nn.sigmoid(second)


def _norm(x: Any, held: Any, centred: bool) -> Any:
    """A layer norm, or an RMS norm, over the last dimension."""
    x = x - jnp.mean(x, -1, keepdims=True) if centred else x
    y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + held["epsilon"])
    return y * held["scale"] + held["shift"]


def _masked_softmax(x: Any, held: Any, mask: float) -> Any:
    """Over the last dimension, of what lies before the diagonal."""
    rows, columns = (np.arange(n)[:, None] if k == 0 else np.arange(n) for k, n in enumerate(x.shape[-2:]))
    return jax.nn.softmax(jnp.where(columns <= rows, x, np.float32(mask)), -1)


def _recurrent(x: Any, held: Any) -> Any:
    """A loop over dimension 1 that carries as many values as one of its rows has."""

    def step(state: Any) -> Any:
        t, h = state
        row = jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)
        return t + 1, jnp.tanh(row * held["scale"] + 0.5 * h)

    return jax.lax.while_loop(lambda state: state[0] < x.shape[1], step, (0, jnp.zeros_like(x[:, 0])))[1]


def _branch(x: Any, held: Any, limit: float) -> Any:
    """What a branch that is always taken makes of it; the other has nothing to calibrate."""
    return jax.lax.cond(jnp.max(x) > limit, lambda x: jnp.tanh(x) * x, jnp.zeros_like, x)


#: step(*values, weights, **options)
STEPS: dict[str, Callable[..., Any]] = {
    "conv": _conv,
    "conv_1d": _conv,
    "dot": _dot,
    "left_dot": lambda x, held: jnp.einsum("ij,bjk->bik", held["kernel"], x),
    # A product per position, and one over two dimensions.
    "dot_each": lambda x, held: jnp.einsum("btd,tde->bte", x, held["kernel"]),
    "dot_all": lambda x, held: jnp.einsum("btd,tde->be", x, held["kernel"]),
    "attend": lambda x, y, held: jnp.einsum("bik,bjk->bij", x, y),
    "act": lambda x, held, name: ACTIVATIONS[name](x),
    "clip": lambda x, held, low, high: jnp.clip(x, low, high),
    "channel_affine": lambda x, held: x * held["scale"] + held["shift"],
    "affine": lambda x, held, scale, shift: x * scale + shift,
    "neg": lambda x, held: -x,
    "add": _sum,
    "sub": lambda x, y, held: x - y,
    "add_mean": _add_mean,
    "pool": _pool,
    "mean": lambda x, held, axes: jnp.mean(x, axes),
    "sum": lambda x, held, axes: jnp.sum(x, axes),
    "max": lambda x, held, axes: jnp.max(x, axes),
    "reshape": lambda x, held, shape: x.reshape(x.shape[0], *shape),
    "transpose": lambda x, held, order: x.transpose(order),
    "flip": lambda x, held, axis: jnp.flip(x, axis),
    "slice": lambda x, held, axis, start, stride: jax.lax.slice_in_dim(x, start, x.shape[axis], stride, axis),
    "mul": lambda x, y, held: x * y,
    "gate": lambda x, y, held: x * jax.nn.sigmoid(y),
    "squeeze_excite": _squeeze_excite,
    "sub_mean": lambda x, held, axes: x - jnp.mean(x, axes, keepdims=True),
    "maximum": lambda x, y, held: jnp.maximum(x, y),
    "minimum": lambda x, y, held: jnp.minimum(x, y),
    "prelu": lambda x, held: jnp.where(x > 0, x, held["slope"] * x),
    "piecewise": _piecewise,
    "where": lambda x, y, z, held: jnp.where(x > y, x, z),
    "channel_clip": lambda x, held: jnp.clip(x, held["low"], held["high"]),
    "concat": lambda x, y, held, axis: jnp.concatenate([x, y], axis),
    "stack": lambda x, y, held: jnp.max(jnp.stack([x, y], axis=1), axis=1),
    "pad": lambda x, held, config, number: jax.lax.pad(x, np.float32(number), config),
    "split": _split,
    "average_pool": _average_pool,
    "cumsum": lambda x, held, axis: jnp.cumsum(x, axis),
    "resize": _resize,
    "cummax": lambda x, held, axis: jax.lax.cummax(x, axis),
    "softmax": lambda x, held, axis: jax.nn.softmax(x * held["scale"], axis),
    "log_softmax": lambda x, held: jax.nn.log_softmax(x * held["scale"], -1),
    "masked_softmax": _masked_softmax,
    "norm": _norm,
    "unit": lambda x, held, axis: x / (jnp.sqrt(jnp.sum(x * x, axis, keepdims=True)) + held["epsilon"]),
    "function": lambda x, held, name: FUNCTIONS[name](x * held["scale"]),
    "divide": lambda x, y, held: x / (jnp.abs(y) + held["epsilon"]),
    "hypot": lambda x, y, held: jnp.sqrt(x * x + y * y),
    # Not where the sign of a zero decides between pi and -pi.
    "atan2": lambda x, y, held: jnp.arctan2(x, jnp.abs(y) + held["epsilon"]),
    "logaddexp": lambda x, y, held: jnp.logaddexp(x * held["scale"], y * held["scale"]),
    "sort": lambda x, held, axis: jnp.sort(x, axis),
    "largest": lambda x, held, count: jax.lax.top_k(x, count)[0],
    "one_hot": lambda x, held: jax.nn.one_hot(jnp.argmax(x, -1), x.shape[-1], dtype=x.dtype) * x,
    "take": lambda x, held, axis, places: jnp.take(x, np.asarray(places), axis),
    "update": lambda x, y, held, start: jax.lax.dynamic_update_slice(x, y, (start,) * x.ndim),
    "recurrent": _recurrent,
    "branch": _branch,
}
