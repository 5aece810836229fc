"""GPTQ (Frantar et al. 2022, "Accurate post-training quantization for generative pre-trained transformers").

Rounding input i of a weight costs its output `(w_i - q_i)^2 / [H^-1]_ii` once the inputs that are still free have made
up for it as well as they can, with the Hessian `H = X^T X` of the squared error (eq. 2). With the Cholesky factor `U`
of `H^-1 = U^T U` (section 3.3, step 3) that is, input after input:

    q_i = round(w_i);  e = (w_i - q_i) / U_ii;  w_j -= e U_ij  for j > i
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from qcompiler.numerics import fixed_point
from qcompiler.numerics.types import QuantType
from qcompiler.rounding import GPTQ


def compensated_codes(
    x: Any, weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, qtype: QuantType, options: GPTQ
) -> np.ndarray:
    """The codes that GPTQ finds.

    Args:
      x: [groups, rows, depth]; what the weight is multiplied with.
      weight: [groups, depth, features].
      scale, zero: of each element, of that shape; they stay as they are, in whichever order inputs are rounded.
      qtype: of the codes.
      options: of the method.

    Returns:
      int64 [groups, depth, features].
    """
    hessian = np.asarray(jnp.matmul(jnp.swapaxes(x, 1, 2), x, preferred_element_type=np.float32), np.float64)
    factor, order = _factor(hessian, options)
    w = np.take_along_axis(weight.astype(np.float64), order[..., None], axis=1)
    scale, zero = (np.take_along_axis(a, order[..., None], axis=1) for a in (scale, zero))
    codes = np.empty(w.shape, np.int64)
    depth = w.shape[1]
    for start in range(0, depth, options.block):
        stop = min(start + options.block, depth)
        errors = np.empty((w.shape[0], stop - start, w.shape[2]))
        for i in range(start, stop):
            row = slice(i, i + 1)
            codes[:, row] = fixed_point.quantize_number(w[:, row], scale[:, row], zero[:, row], qtype)
            reals = (codes[:, row] - zero[:, row]) * scale[:, row].astype(np.float64)
            errors[:, i - start : i - start + 1] = (w[:, row] - reals) / factor[:, i, i][:, None, None]
            # Within the block at once; what follows it waits for the block's end, which is one product then.
            w[:, i + 1 : stop] -= factor[:, i, i + 1 : stop, None] * errors[:, i - start, None, :]
        w[:, stop:] -= np.swapaxes(factor[:, start:stop, stop:], 1, 2) @ errors
    back = np.argsort(order, axis=1)
    return np.take_along_axis(codes, back[..., None], axis=1)


def _factor(hessian: np.ndarray, options: GPTQ) -> tuple[np.ndarray, np.ndarray]:
    """The upper Cholesky factor of each group's damped inverse Hessian, and the order of its inputs."""
    import scipy.linalg

    diagonal = np.diagonal(hessian, axis1=1, axis2=2)
    order = np.broadcast_to(np.arange(hessian.shape[1]), diagonal.shape)
    if options.act_order:
        order = np.argsort(-diagonal, axis=1, kind="stable")
    sorted_ = np.take_along_axis(np.take_along_axis(hessian, order[:, :, None], axis=1), order[:, None, :], axis=2)
    mean = diagonal.mean(axis=1)
    # Inputs that are always zero cost nothing, whatever they are rounded to.
    damped = sorted_ + np.where(mean > 0, options.damping * mean, 1.0)[:, None, None] * np.eye(hessian.shape[1])
    factors = [scipy.linalg.cholesky(scipy.linalg.inv(h), lower=False) for h in damped]
    return np.stack(factors) if factors else np.empty_like(hessian), order
