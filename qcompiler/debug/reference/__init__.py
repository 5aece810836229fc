"""An independent NumPy interpreter of fused programs: the integers that a backend must give, from the written contract.

    reference.evaluate(program, inputs)                # a program after fuse or fold_zero_points, in NumPy int64
    reference.region(eqn, operands)                    # one region of it
    reference.simulate(eqn, operands)                  # its body instead, in float32: what the integers must be near

It shares no arithmetic with the backends: nothing of `numerics.fixed_point`, of `backends` or of `jax.lax` is used. The
contract it is written from stands in `numerics.fixed_point` (entry, exit, rescale) and in `quantize_real` of
`backends/lax_int/rounding.py` (sums of scaled integers, and the bounds that decide their guard bits). There are two
exceptions: a table is defined as the float function at every code, JAX evaluating it op by op, and a region of general
arithmetic is compared with float64, which it must be within one step of.
"""

from qcompiler.debug.reference.contract import dequantize as dequantize
from qcompiler.debug.reference.contract import quantize as quantize
from qcompiler.debug.reference.contract import rescale as rescale
from qcompiler.debug.reference.floats import evaluate_floats as evaluate_floats
from qcompiler.debug.reference.floats import simulate as simulate
from qcompiler.debug.reference.programs import equation as equation
from qcompiler.debug.reference.programs import evaluate as evaluate
from qcompiler.debug.reference.programs import input_codes as input_codes
from qcompiler.debug.reference.regions import region as region
from qcompiler.debug.reference.regions import requantize as requantize
