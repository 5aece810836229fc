"""State: inputs of a call whose next values are results of it, such as the cache of a decoder.

    logits, cache = step(params, tokens, cache, position)        state={"cache": 1}

What is state goes in and comes out as codes, in one encoding, so that nothing is rounded again from call to call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler.errors import RecipeError, SignatureError
from qcompiler.ir import Program, classes

#: In `Program.notes`: (input, result) pairs of positions, and after `fuse` the encoding of each pair.
STATE, STATE_CODES = "state", "state_codes"


def noted(program: Program, state: Mapping[str, Any], parameters: Sequence[str]) -> Program:
    """The traced program with its state noted.

    Args:
      program: traced.
      state: name of a parameter -> place of its next value in the result, an index or key; None: the whole result.
      parameters: names of the positional parameters, in order.

    Raises:
      RecipeError: there is no such parameter or place, or they differ in structure, shape or dtype.
    """
    out_tree = program.signature.out_tree
    results = jax.tree_util.tree_unflatten(out_tree, range(out_tree.num_leaves))
    given, pairs = _positions(program, parameters), []
    for name, place in state.items():
        if name not in given:
            raise RecipeError(f"state names the parameter {name!r}; the call has {', '.join(given)}")
        try:
            result = results if place is None else results[place]
        except (KeyError, IndexError, TypeError):
            raise RecipeError(f"state {name!r}: the result has no part {place!r}") from None
        if not _alike(given[name], result):
            raise RecipeError(f"state {name!r} and part {place!r} of the result differ in structure")
        for k, j in zip(jax.tree.leaves(given[name]), jax.tree.leaves(result), strict=True):
            avals = program.input_vars[k].aval, program.outvars[j].aval
            if (avals[0].shape, avals[0].dtype) != (avals[1].shape, avals[1].dtype):
                raise RecipeError(
                    f"state {program.signature.input_names[k]} is {avals[0].str_short()}, its next value "
                    f"{avals[1].str_short()}"
                )
            if classes.is_float(program.input_vars[k]):
                pairs.append([k, j])
    return program.note(STATE, pairs)


def _alike(a: Any, b: Any) -> bool:
    """Whether two trees have one structure."""
    structure: Any = jax.tree.structure(a)
    return structure == jax.tree.structure(b)


def _positions(program: Program, parameters: Sequence[str]) -> dict[str, Any]:
    """Name of a parameter -> a tree like its value, of the positions of flat inputs."""
    in_tree = program.signature.in_tree
    args, kwargs = jax.tree_util.tree_unflatten(in_tree, range(in_tree.num_leaves))
    return {**dict(zip(parameters, args, strict=False)), **kwargs}


def pairs_of(program: Program) -> list[tuple[int, int]]:
    """Positions of real inputs that are state, and of the results that are their next values."""
    return [(k, j) for k, j in program.notes.get(STATE, ())]


def coded(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """Flat inputs as a program after `fuse` reads them: what is state as codes."""
    out = list(inputs)
    for (k, _), encoding in zip(pairs_of(program), program.notes.get(STATE_CODES, ()), strict=False):
        if encoding is not None:
            out[k] = encoding.quantize(np.asarray(inputs[k]))
    return out


def decoded(program: Program, results: Sequence[Any]) -> list[np.ndarray]:
    """Flat results of a program after `fuse` as reals."""
    out = [np.asarray(y) for y in results]
    for (_, j), encoding in zip(pairs_of(program), program.notes.get(STATE_CODES, ()), strict=False):
        if encoding is not None:
            out[j] = encoding.dequantize(out[j])
    return out


def initial(program: Program, state: Mapping[str, Any], parameters: Sequence[str], values: Mapping[str, Any]) -> Any:
    """Name of each state -> its codes.

    Args:
      program: after `fuse`.
      state, parameters: see `noted`.
      values: name -> the state in float; zeros of the program's shapes for others.

    Raises:
      SignatureError: no such state, or another structure.
    """
    if unknown := set(values) - set(state):
        raise SignatureError(f"there is no state {', '.join(sorted(unknown))}; state is {', '.join(state) or 'none'}")
    codes = {k: e for (k, _), e in zip(pairs_of(program), program.notes.get(STATE_CODES, ()), strict=True)}

    def code(k: int, value: Any) -> np.ndarray:
        encoding = codes.get(k)
        return np.asarray(value) if encoding is None else encoding.quantize(np.asarray(value))

    found, positions, avals = {}, _positions(program, parameters), program.input_avals
    dtypes = [np.float32 if k in codes else a.dtype for k, a in enumerate(avals)]
    for name in state:
        value = (
            values[name]
            if name in values
            else jax.tree.map(lambda k: np.zeros(avals[k].shape, dtypes[k]), positions[name])
        )
        if not _alike(value, positions[name]):
            raise SignatureError(f"state {name} has another structure than was calibrated")
        found[name] = jax.tree.map(code, positions[name], value)
    return found
