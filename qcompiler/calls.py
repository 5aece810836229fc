"""What a model is called with: one calibration item or call, checked against what was traced."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler.errors import CalibrationError, QuantizationError, RecipeError, SignatureError
from qcompiler.flax_adapter import Source
from qcompiler.ir import Program, tracing


class call:
    """One calibration item, spelled out: `qc.call(x, mask=m)` is what the model is called with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


def as_call(item: Any, parameters: Sequence[str]) -> call:
    """A calibration item as a call: a tuple is positional, a dict of parameter names keywords, all else one input."""
    if isinstance(item, call):
        return item
    if isinstance(item, tuple) and not hasattr(item, "_fields"):
        return call(*item)
    if isinstance(item, dict) and item and all(key in parameters for key in item):
        return call(**item)
    return call(item)


def batches_of(items: Iterable[Any], source: Source) -> Iterator[call]:
    """Calibration items as calls, lazily.

    Raises:
      CalibrationError: `items` is no iterable of batches.
    """
    if isinstance(items, Mapping | str | bytes | call) or hasattr(items, "dtype"):
        raise CalibrationError(
            f"calibration batches must be an iterable of batches, got one {type(items).__name__}: pass a list of it"
        )
    try:
        iterator = iter(items)
    except TypeError:
        raise CalibrationError(
            f"calibration batches must be an iterable of batches, got a {type(items).__name__}"
        ) from None
    return (as_call(item, source.parameters) for item in iterator)


def first_of(batches: Iterator[call]) -> tuple[int, call]:
    """Number and call of the first batch that has elements: what the model is traced and verified on.

    Raises:
      CalibrationError: there is none.
    """
    number = -1
    for number, item in enumerate(batches):
        if not is_empty(item):
            return number, item
    if number < 0:
        raise CalibrationError("there are no calibration batches: the iterable is empty (or was read before)")
    raise CalibrationError(f"all {number + 1} calibration batches are empty: their arrays have no elements")


def is_empty(item: call) -> bool:
    """Whether a call has arrays, and none with elements; numbers beside them do not count."""
    shapes = [np.shape(x) for x in jax.tree_util.tree_leaves((item.args, item.kwargs))]
    return any(shapes) and all(0 in shape for shape in shapes if shape)


def flatten(item: call, program: Program, what: str) -> list[Any]:
    """Flat inputs, with the structure, dtypes and ranks of the traced ones.

    Raises:
      CalibrationError, SignatureError: they differ; calibration or a call.
    """
    error = CalibrationError if what.startswith("calibration") else SignatureError
    leaves, tree = jax.tree_util.tree_flatten((item.args, item.kwargs))
    if tree != program.signature.in_tree:
        raise error(
            f"{what} has another structure than was traced: {_describe_tree(tree)} against "
            f"{_describe_tree(program.signature.in_tree)}"
        )
    for name, leaf, aval in zip(program.signature.input_names, leaves, program.input_avals, strict=True):
        given = tracing.abstract(leaf)
        if given.dtype != aval.dtype:
            raise error(f"{what}: input {name} has dtype {given.dtype}, {aval.dtype} was traced; convert it first")
        if len(given.shape) != len(aval.shape):
            raise error(f"{what}: input {name} has shape {given.shape}, rank {len(aval.shape)} {aval.shape} was traced")
    return leaves


def _describe_tree(tree: Any) -> str:
    args, kwargs = jax.tree_util.tree_unflatten(tree, ["*"] * tree.num_leaves)
    parts = [str(a) for a in args] + [f"{k}={v}" for k, v in kwargs.items()]
    return f"({', '.join(parts)})".replace("'*'", "*")


def check_data(flat: Sequence[Any], program: Program, number: int) -> None:
    """Raises `CalibrationError` if an input of calibration batch `number` holds NaN or infinity, or is no array.

    Negative infinity may be a mask; the passes that know what reads an input refuse it where it is none.
    """
    for name, leaf in zip(program.signature.input_names, flat, strict=True):
        if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise CalibrationError(
                f"calibration batch {number}: input {name} is a {type(leaf).__name__} without values; calibrate on "
                "arrays, outside of jit"
            )
        if jax.dtypes.issubdtype(tracing.abstract(leaf).dtype, jax.dtypes.prng_key):
            continue
        array = np.asarray(leaf)
        if not jax.dtypes.issubdtype(array.dtype, np.floating):
            continue
        array = array.astype(np.float32)
        if np.isnan(array).any() or np.isposinf(array).any():
            bad = "NaN" if np.isnan(array).any() else "infinity"
            raise CalibrationError(f"calibration batch {number}: input {name} holds {bad}; remove such samples")


def retrace(source: Source, item: call, error: type[QuantizationError], what: str) -> Program:
    """The program at other shapes; what the user was warned of at the first ones is not said again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="qcompiler dropped")
        try:
            return source.trace(item.args, item.kwargs)
        except (TypeError, ValueError) as cause:
            shapes = [tracing.abstract(x).shape for x in jax.tree_util.tree_leaves((item.args, item.kwargs))]
            raise error(
                f"{what}: the model fails on inputs of shapes {shapes} at {tracing.user_line(cause)}: {cause}"
            ) from cause


def check_choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raises `RecipeError` unless an option has one of its known values."""
    if value not in known:
        raise RecipeError(f"unknown {name}={value!r}; known: {', '.join(map(repr, known))}")
