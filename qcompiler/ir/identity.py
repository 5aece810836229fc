"""Who an equation is: its module path, its structural id, and the user's source line.

The id is `path/primitive#occurrence`, the occurrence counted among the equations of the same path and primitive. It
never depends on variable names or running numbers, so that another batch size of the same model gives the same ids.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import flax
import jax

from qcompiler.ir import _compat

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_CHECKOUT = os.path.dirname(_PACKAGE)
#: Files under these folders are never "the user's line"; `models/` is user code on purpose.
_INTERNAL = tuple(
    folder + os.sep
    for folder in (
        os.path.dirname(os.path.abspath(jax.__file__)),
        os.path.dirname(os.path.abspath(flax.__file__)),
        *(os.path.join(_PACKAGE, name) for name in ("ir", "numerics", "ops", "debug", "passes", "backends")),
        *(os.path.join(_CHECKOUT, name) for name in ("passes", "backends")),
    )
)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z|[0-9]+\Z")
#: Scope of an inlined call, kept as a tag: `#relu`, `#silu`.
TAG = "#"


def is_internal_file(path: str) -> bool:
    """Whether a file belongs to jax, flax or qcompiler itself (but not to its `models`)."""
    if path.startswith("<") or os.path.dirname(path) == _PACKAGE:
        return True
    return path.startswith(_INTERNAL) or f"{os.sep}functools.py" in path or f"{os.sep}contextlib.py" in path


def user_frame(traceback: Any) -> tuple[str, int, str] | None:
    """(file, line, function) of the innermost frame of the user's own code, or None."""
    for frame in _compat.frames(traceback):
        if not is_internal_file(frame[0]):
            return frame
    return None


def user_stacklevel() -> int:
    """The `stacklevel` with which a warning of the caller names the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and is_internal_file(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    return level


def source_of(eqn: _compat.JaxprEqn) -> str:
    """`file.py:line (function)` of the user's code behind an equation, or `unknown source`."""
    frame = user_frame(eqn.source_info.traceback)
    return f"{os.path.relpath(frame[0])}:{frame[1]} ({frame[2]})" if frame else "unknown source"


def clean_scopes(name_stack: Any, root: str | None = None) -> list[str]:
    """Names of a stack that can be part of a parameter path, and call tags.

    `root` is the scope that linen opens for the outermost module; it is no part of the parameter tree. Method suffixes
    (`encoder.decode`) and scopes that are no identifiers (einsum specifications) are dropped.
    """
    names = _compat.scope_names(name_stack)
    if root is not None and names and names[0].partition(".")[0] == root:
        names = names[1:]
    kept = []
    for name in names:
        if name.startswith(TAG):
            kept.append(name)
            continue
        parts = [part.partition(".")[0] for part in name.split("/")]
        kept.extend(part for part in parts if _IDENTIFIER.match(part))
    return kept


def module_path(eqn: _compat.JaxprEqn) -> str:
    """The path of the equation's module in the parameter tree: `stage1/block0/conv1`, or an empty string."""
    return "/".join(n for n in _compat.scope_names(eqn.source_info.name_stack) if not n.startswith(TAG))


def call_tags(eqn: _compat.JaxprEqn) -> tuple[str, ...]:
    """Names of the inlined calls that the equation came from, outermost first: `("silu",)`."""
    names = _compat.scope_names(eqn.source_info.name_stack)
    return tuple(n[len(TAG) :] for n in names if n.startswith(TAG))


def equation_ids(eqns: Sequence[_compat.JaxprEqn]) -> list[str]:
    """The id of each equation; one that carries an `id` parameter (region, observe) keeps that."""
    # A region has the id of an equation inside of it, which the equations outside must not get once more.
    taken = {eqn.params["id"] for eqn in eqns if "id" in eqn.params and "body" in eqn.params}
    seen: Counter[str] = Counter()
    ids = []
    for eqn in eqns:
        if "id" in eqn.params:
            ids.append(eqn.params["id"])
            continue
        path = module_path(eqn)
        base = f"{path}/{eqn.primitive.name}" if path else eqn.primitive.name
        while f"{base}#{seen[base]}" in taken:
            seen[base] += 1
        ids.append(f"{base}#{seen[base]}")
        seen[base] += 1
    return ids


def describe(eqn: _compat.JaxprEqn) -> str:
    """Where an equation is, for messages: primitive, module path and source line."""
    path = module_path(eqn) or "<top level>"
    return f"{eqn.primitive.name} in {path} at {source_of(eqn)}"
