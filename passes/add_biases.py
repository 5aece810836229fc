"""Gives every product with a weight a bias, of zeros where it has none, for `correct_bias` to change.

y = region[conv]{ conv x w; max 0 } x w      ->      y = region[conv]{ conv x w; add b; max 0 } x w b      b = 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from qcompiler import ops
from qcompiler.ir import _compat, contraction, replay
from qcompiler.ir.program import Builder, Program, rewrite
from qcompiler.passes import _regions


def add_biases(program: Program) -> Program:
    """See the module's docstring. Regions keep their ids; those in the bodies of loops stay as they are.

    Args:
      program: partitioned, in float.
    """

    def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if not _regions.is_region(eqn) or "bias" in eqn.params["roles"] or _regions.weight_position(eqn) is None:
            return None
        anchor = _regions.anchor_of(eqn)
        product = anchor.outvars[0].aval
        channels = contraction.weight_dims(anchor, _regions.weight_position(eqn))
        shape = [n if k in channels else 1 for k, n in enumerate(product.shape)]
        bias = builder.weight(f"{eqn.params['id']}:bias/added", np.zeros(shape, product.dtype))

        def body(*args: Any) -> list[Any]:
            *operands, zeros = args

            def inner(e: _compat.JaxprEqn, xs: list[Any]) -> list[Any] | None:
                return [lax.add_p.bind(_compat.bind(e, xs)[0], zeros)] if e is anchor else None

            return replay.evaluate(eqn.params["body"], operands, inner)

        roles = (*eqn.params["roles"], "bias")
        return ops.region(body, *values, bias, id=eqn.params["id"], kind=eqn.params["kind"], roles=roles)

    return rewrite(program, rule, stage="add_biases")
