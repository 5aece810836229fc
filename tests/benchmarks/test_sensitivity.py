"""The benchmark of sensitivity on an untrained network."""

import pytest

from benchmarks import sensitivity


@pytest.mark.slow
def test_figures_of_a_model():
    calibrated = sensitivity.calibrated_model("resnet18", batch=2, size=32)
    figures = sensitivity.measure(calibrated, ["int4", "int8"], ["nsr"])
    assert figures["layers"] == 21 and figures["seconds"] > 0
    predicted, measured = figures["configs"]["int8"]
    # Errors of an untrained net's layers are correlated: within 4 dB.
    assert abs(predicted - measured) < 4 and measured > figures["configs"]["sensitive half finer"][1]
