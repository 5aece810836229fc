"""The recipes that benchmarks compare, by name: a new one is a line in `VARIANTS`."""

from __future__ import annotations

import dataclasses

import qcompiler as qc
from qcompiler import recipe as recipes

_INT4 = qc.QuantType(4, symmetric=True, narrow_range=True)

#: Name -> recipe. Those that the compiler itself has a name for come first, `default` before all.
VARIANTS: dict[str, qc.Recipe] = {
    **recipes.NAMED,
    # Operands of products in 8 bits and never more, whatever calibration finds: the bits that the peers have.
    "w8a8": qc.Recipe(activation_sqnr=None, pair_sqnr=None),
    "w8a8_accurate": dataclasses.replace(recipes.NAMED["accurate"], activation_sqnr=None, pair_sqnr=None),
    # One scale per weight, and the ranges of its channels left as they are.
    "unequalized": qc.Recipe(granularity="tensor", equalize=False),
    # One scale per weight, channels equalized, and the mean errors that are left taken out of the biases.
    "per_tensor_corrected": qc.Recipe(granularity="tensor", equalize=True, bias_correction="empirical"),
    # Scales per channel of the weights, and channels left as they are: activations have one scale all the same.
    "unequalized_per_channel": qc.Recipe(equalize=False),
    # The same with channels equalized everywhere, where `default` does so only if they are far apart.
    "equalized": qc.Recipe(equalize=True),
    # Weights in 4 bits per channel, rounded to nearest.
    "w4a8": qc.Recipe(weight=_INT4),
    "w4a8_adaround": qc.Recipe(weight=_INT4, rounding="adaround"),
    # The same with a scale per 32 weights of a channel.
    "w4a8_group32": qc.Recipe(weight=_INT4, granularity="group32"),
    "w4a8_group32_gptq": qc.Recipe(weight=_INT4, granularity="group32", rounding="gptq"),
    # With all that `accurate` does besides.
    "w4a8_group32_gptq_accurate": dataclasses.replace(
        recipes.NAMED["accurate"], weight=_INT4, granularity="group32", rounding="gptq"
    ),
}
