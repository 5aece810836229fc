"""`Target`: what the integers will run on, as far as the compiler must know."""

from __future__ import annotations

import dataclasses
from typing import Any

from qcompiler.errors import RecipeError


@dataclasses.dataclass(frozen=True)
class Target:
    """Attributes:

    name: for messages.
    backend: the backend that lowers for it.
    """

    name: str
    backend: str = "lax_int"


TARGETS = {"xla": Target("xla")}
BACKENDS = ("auto", "lax_int")


def named(target: Any, backend: str = "auto") -> Target:
    """The target of a name (or the target itself), with the backend that was asked for.

    Raises:
      RecipeError: no target or backend of that name.
    """
    if target is None:
        target = TARGETS["xla"]
    if not isinstance(target, Target):
        if not isinstance(target, str) or target not in TARGETS:
            raise RecipeError(f"unknown target {target!r}; known: {', '.join(sorted(TARGETS))}, or pass a qc.Target")
        target = TARGETS[target]
    if backend not in BACKENDS:
        raise RecipeError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if backend != "auto":
        target = dataclasses.replace(target, backend=backend)
    if target.backend not in BACKENDS[1:]:
        raise RecipeError(f"target {target.name!r} names the unknown backend {target.backend!r}")
    return target
