"""What activations are on average, from the norms in front of them: no samples are needed.

    product -> mean m, deviation d per channel (a norm's beta and gamma) -> max 0, min 6 -> E[clip(N(m, d), 0, 6)]

A norm says how its channels are distributed, and they are taken to be normal (Nagel et al. 2019, "Data-free
quantization through weight equalization and bias correction", section 4.2.1 and appendix C).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.ir import _compat
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.passes import _regions


def clipped_mean(mean: Any, deviation: Any, low: Any = -np.inf, high: Any = np.inf) -> np.ndarray:
    """E[clip(x, low, high)] of normal x, float64; the arguments broadcast, and a deviation may be zero.

    With a = (low - mean) / deviation, b = (high - mean) / deviation, density phi and distribution Phi it is
    deviation (phi(a) - phi(b)) + mean (Phi(b) - Phi(a)) + low Phi(a) + high (1 - Phi(b)).
    """
    from scipy.special import ndtr

    mean, deviation, low, high = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (mean, deviation, low, high)))
    spread = np.where(deviation > 0, deviation, 1.0)
    a, b = (low - mean) / spread, (high - mean) / spread
    density = lambda x: np.exp(-0.5 * np.square(x)) / np.sqrt(2 * np.pi)
    # An end that is not there is never reached.
    ends = np.where(np.isfinite(low), low, 0.0) * ndtr(a) + np.where(np.isfinite(high), high, 0.0) * ndtr(-b)
    found = spread * (density(a) - density(b)) + mean * (ndtr(b) - ndtr(a)) + ends
    return np.where(deviation > 0, found, np.clip(mean, low, high))


def means_of(program: Program) -> dict[Any, np.ndarray]:
    """Variable -> its mean per channel, which broadcasts against it, where a norm says it.

    Those are results of regions that do no more, behind a product with a norm in `notes["norms"]`, than to add its bias
    and to clip.

    Args:
      program: partitioned, in float.
    """
    norms, constants = program.notes.get("norms", {}), Constants(program)
    found = {}
    for eqn in program.eqns:
        if _regions.is_region(eqn) and eqn.params["id"] in norms:
            bounds = _bounds(eqn, constants)
            if bounds is not None:
                norm = norms[eqn.params["id"]]
                mean = clipped_mean(norm["mean"], norm["deviation"], *bounds)
                shape = eqn.outvars[0].aval.shape
                if np.broadcast_shapes(mean.shape, shape) == shape:
                    found[eqn.outvars[0]] = mean
    return found


def _bounds(eqn: _compat.JaxprEqn, constants: Constants) -> tuple[Any, Any] | None:
    """What a region clips its product and bias to; None where it does something else."""
    body, anchor = _compat.open_jaxpr(eqn.params["body"]), _regions.anchor_of(eqn)
    if anchor is None or len(eqn.outvars) != 1:
        return None
    held = {v: constants.value(atom) for v, atom in zip(body.invars, eqn.invars, strict=True) if atom in constants}
    known = lambda v: isinstance(v, _compat.Literal) or v in held
    value = lambda v: np.asarray(v.val if isinstance(v, _compat.Literal) else held[v]).astype(np.float64)
    low, high = np.float64(-np.inf), np.float64(np.inf)
    current = anchor.outvars[0]
    for inner in body.eqns:
        name = inner.primitive.name
        if inner is anchor:
            continue
        if name == "broadcast_in_dim" and all(map(known, inner.invars)):
            array = value(inner.invars[0])
            shape = [1] * inner.outvars[0].aval.ndim
            for n, d in zip(array.shape, inner.params["broadcast_dimensions"], strict=True):
                shape[d] = n
            held[inner.outvars[0]] = array.reshape(shape)
            continue
        others = [v for v in inner.invars if v is not current]
        if len(others) != len(inner.invars) - 1 or not all(map(known, others)):
            return None
        # The norm's mean has the bias in it, which is what stands right behind the product.
        if name == "max":
            low, high = np.maximum(low, value(others[0])), np.maximum(high, value(others[0]))
        elif name == "min":
            low, high = np.minimum(low, value(others[0])), np.minimum(high, value(others[0]))
        elif name == "clamp" and inner.invars[1] is current:
            ends = [value(v) for v in others]
            low, high = (np.minimum(np.maximum(x, ends[0]), ends[1]) for x in (low, high))
        elif name != "add" or current is not anchor.outvars[0]:
            return None
        current = inner.outvars[0]
    return (low, high) if current is body.outvars[0] else None
