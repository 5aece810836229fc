"""What kinds of primitives there are, by name. One table, so that passes and backends agree."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import dtypes

from qcompiler.ir import _compat, contraction

#: Result element i depends on element i of the operands only (operands of size one broadcast).
ELEMENTWISE = frozenset(
    "abs add sub mul div max min neg sign pow integer_pow square one_minus_square exp exp2 expm1 log log2 log1p"
    " logistic tanh erf erfc erf_inv sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh sqrt rsqrt cbrt floor"
    " ceil round clamp select_n eq ne lt le gt ge and or not xor is_finite convert_element_type rem stop_gradient copy"
    " copy_p name reduce_precision nextafter lgamma digamma polynomial".split()
)
#: Elementwise, and the same number comes out.
IDENTITY = frozenset("copy copy_p name stop_gradient".split())
#: Elementwise, and monotone saturation by numbers known before: clamps in the quantized domain.
CLAMP = frozenset("max min clamp".split())
#: Linear in the one operand that is no constant.
AFFINE = frozenset("add sub mul div neg".split())
#: Truth values of two real numbers, and of truth values.
COMPARE = frozenset("eq ne lt le gt ge".split())
LOGIC = frozenset("and or not xor".split())
#: The result's elements are elements of operand 0, so that it has the operand's scale and zero point; other operands
#: are indices.
VIEW = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice rev copy reduce_max reduce_min reduce_window_max"
    " reduce_window_min cummax cummin gather dynamic_slice sort".split()
)
#: Elements of operand 0 and of updates (the last operand but indices), which stand at places that indices say.
PLACE = frozenset("dynamic_update_slice scatter scatter-max scatter-min".split())
#: The result's elements are elements of several operands.
MERGE = PLACE | frozenset("concatenate pad".split())
#: Where in its operand a result is found: integers from the order of reals alone.
SEARCH = frozenset("argmax argmin".split())
#: The same of many elements: the places are result 1, and result 0, the elements there, is not read.
ORDER = frozenset("sort top_k".split())
#: One number of many, and sums on the way to it: the statistics of rows.
ADDING = frozenset("reduce_sum cumsum cumlogsumexp".split())
STATISTIC = ADDING | frozenset("reduce_max reduce_min reduce_prod cumprod cummax cummin argmax argmin".split())
#: What regions of general arithmetic compute.
_ARITHMETIC = ELEMENTWISE | VIEW | MERGE | SEARCH | STATISTIC | frozenset("reduce_and reduce_or".split())
WIDE = (
    _ARITHMETIC
    - PLACE
    - frozenset("nextafter lgamma digamma polynomial reduce_window_max reduce_window_min tan sort".split())
)
#: Contracting products, whose cost is counted in multiply-adds.
PRODUCT = frozenset("dot_general conv_general_dilated".split())
#: What stays float, and why.
FLOAT_ONLY = {
    "bitcast_convert_type": "bits that are read as a real number, as random reals are made, have no scale",
    "scatter-mul": "products of several factors at one place that inputs choose have no integer rule",
    "reduce": "a reduction by a function of one's own has no integer rule",
    "ragged_dot_general": "of other dimensions than rows by groups, a product has no integer rule yet",
    **dict.fromkeys(
        "igamma igammac random_gamma_grad bessel_i0e bessel_i1e regularized_incomplete_beta zeta polygamma".split(),
        "primitive has no integer rule: a special function of several values",
    ),
    **dict.fromkeys(
        "cholesky eig eigh lu qr svd triangular_solve tridiagonal_solve schur hessenberg householder_product".split(),
        "a solver, whose intermediate values have no range known beforehand",
    ),
    "fft": "complex numbers have no integer rule",
}


def is_float_cast(eqn: Any) -> bool:
    """Whether an equation changes how many bits hold a real number, and nothing else."""
    return eqn.primitive.name == "convert_element_type" and is_float(eqn.invars[0]) and is_float(eqn.outvars[0])


def is_float(atom: Any) -> bool:
    """Whether a variable or literal holds real numbers (any float dtype)."""
    return dtypes.issubdtype(atom.aval.dtype, np.floating)


def is_integer(atom: Any) -> bool:
    """Whether a variable or literal holds integers or truth values."""
    return dtypes.issubdtype(atom.aval.dtype, np.integer) or atom.aval.dtype == bool


def is_empty(eqn: Any) -> bool:
    """Whether an operand or a result of an equation has no elements."""
    return any(0 in v.aval.shape for v in (*eqn.invars, *eqn.outvars))


def multiply_adds(eqn: Any) -> int:
    """Multiply-adds of a dot or conv, and of those in an equation's bodies: each step of a scan, the largest branch."""
    if eqn.primitive.name in PRODUCT:
        return contraction.depth(eqn) * int(np.prod(eqn.outvars[0].aval.shape))
    bodies = [sum(map(multiply_adds, _compat.open_jaxpr(sub).eqns)) for sub in _compat.sub_jaxprs(eqn)]
    whole = max if eqn.primitive.name == "cond" else sum
    return eqn.params.get("length", 1) * whole(bodies or [0])
