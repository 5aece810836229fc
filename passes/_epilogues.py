"""What a region does, element by element, to the result of its product: the part that can be evaluated on rows alone.

    y = conv x w; z = y + b; r = max (z + term) 0; t = reshape r      ->      r(y) with sides b and term

Rounding is judged behind it: an error that ReLU removes does not count (Nagel et al. 2020, section 3.4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from qcompiler.ir import _compat, classes


@dataclasses.dataclass(frozen=True, eq=False)
class Epilogue:
    """The equations behind a product, as far as they are elementwise and come to one value.

    Attributes:
      product: the product's result in the body.
      eqns: in order.
      result: what they come to; the product's result if there are none.
      sides: what else they read: variables of the body that do not depend on the product.
    """

    product: Any
    eqns: tuple[_compat.JaxprEqn, ...]
    result: Any
    sides: tuple[Any, ...]

    @classmethod
    def of(cls, body: Any, anchor: _compat.JaxprEqn) -> Epilogue:
        """The epilogue of a product in a region's body."""
        inner = _compat.open_jaxpr(body)
        behind, eqns = {anchor.outvars[0]}, []
        shape = anchor.outvars[0].aval.shape
        for eqn in inner.eqns:
            if not any(isinstance(v, _compat.Var) and v in behind for v in eqn.invars):
                continue
            if eqn.primitive.name not in classes.ELEMENTWISE or eqn.outvars[0].aval.shape != shape:
                break
            behind.add(eqn.outvars[0])
            eqns.append(eqn)
        while not _comes_to_one(inner, anchor, eqns):
            eqns.pop()
        computed = {anchor.outvars[0], *(e.outvars[0] for e in eqns)}
        read = (v for e in eqns for v in e.invars if isinstance(v, _compat.Var) and v not in computed)
        result = eqns[-1].outvars[0] if eqns else anchor.outvars[0]
        return cls(anchor.outvars[0], tuple(eqns), result, tuple(dict.fromkeys(read)))

    def __call__(self, product: Any, sides: Sequence[Any]) -> Any:
        """The result for rows of the product and of the sides, which broadcast against them or are numbers."""
        env = {self.product: product}
        for var, side in zip(self.sides, sides, strict=True):
            env[var] = jnp.broadcast_to(side, product.shape) if jnp.ndim(side) else side
        for eqn in self.eqns:
            values = [v.val if isinstance(v, _compat.Literal) else env[v] for v in eqn.invars]
            env[eqn.outvars[0]] = _compat.bind(eqn, values)[0]
        return env[self.result]


def _comes_to_one(body: Any, anchor: _compat.JaxprEqn, eqns: Sequence[_compat.JaxprEqn]) -> bool:
    """Whether of the product and of what some equations compute, nothing but the last is read elsewhere."""
    *inside, _ = [anchor.outvars[0], *(e.outvars[0] for e in eqns)]
    own = {id(e) for e in eqns}
    read = {v for e in body.eqns if id(e) not in own for v in e.invars if isinstance(v, _compat.Var)}
    read.update(v for v in body.outvars if isinstance(v, _compat.Var))
    return not any(v in read for v in inside)
