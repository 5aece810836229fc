"""Which values of a program depend on weights alone, and what they are."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from qcompiler.ir import _compat
from qcompiler.ir.program import Program

#: Magnitudes from here on stand for infinity, as `finfo.max` does, bfloat16's too: a factor would take them there.
HUGE = 2.0**120


class Constants:
    """Values known before any input: weights, literals, and what is computed from them. Computed when asked for."""

    def __init__(self, program: Program) -> None:
        self._known: dict[Any, Any] = dict(zip(program.invars, program.weights.values(), strict=False))
        self._producer = program.producer
        self._constant = set(self._known)
        for eqn in program.eqns:
            if self._foldable(eqn):
                self._constant.update(eqn.outvars)

    def _foldable(self, eqn: _compat.JaxprEqn) -> bool:
        if _draws(eqn) or _compat.has_side_effects(eqn):
            return False
        return all(isinstance(v, _compat.Literal) or v in self._constant for v in eqn.invars)

    def __contains__(self, atom: Any) -> bool:
        return isinstance(atom, _compat.Literal) or atom in self._constant

    def value(self, atom: Any) -> Any:
        """The array (NumPy) behind a literal or a constant variable."""
        if isinstance(atom, _compat.Literal):
            return np.asarray(atom.val, atom.aval.dtype)
        if atom not in self._known:
            eqn = self._producer[atom]
            with jax.ensure_compile_time_eval():
                results = _compat.bind(eqn, [jax.numpy.asarray(self.value(v)) for v in eqn.invars])
            self._known.update(zip(eqn.outvars, (_to_host(r) for r in results), strict=True))
        return self._known[atom]

    def uniform(self, atom: Any) -> np.ndarray | None:
        """The one number that fills a constant, as a 0-d array; None if it holds several (or is no constant)."""
        if atom not in self or jax.dtypes.issubdtype(atom.aval.dtype, jax.dtypes.prng_key):
            return None
        if not atom.aval.shape:
            return np.asarray(self.value(atom))
        eqn = None if isinstance(atom, _compat.Literal) else self._producer.get(atom)
        if eqn is not None and eqn.primitive.name in ("broadcast_in_dim", "reshape", "convert_element_type"):
            inner = self.uniform(eqn.invars[0])
            if inner is not None or np.prod(eqn.invars[0].aval.shape) > 1:
                return inner if inner is None else inner.astype(atom.aval.dtype)
        if int(np.prod(atom.aval.shape)) == 1:
            return np.asarray(self.value(atom)).reshape(())
        return None


def _draws(eqn: _compat.JaxprEqn) -> bool:
    """Whether the equation, or one in its bodies, draws random bits."""
    bodies = (inner for sub in _compat.sub_jaxprs(eqn) for inner in _compat.open_jaxpr(sub).eqns)
    return eqn.primitive.name in _compat.RANDOM or any(map(_draws, bodies))


def _to_host(value: Any) -> Any:
    return value if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) else np.asarray(value)
