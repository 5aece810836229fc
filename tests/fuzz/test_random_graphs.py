"""Random programs: their integers are the reference's, and every region within one step of its simulation.

A failure prints the program and the command that makes it again; `python -m qcompiler.debug.fuzz` runs many more.
"""

import collections
import json

import numpy as np
import pytest

from qcompiler.debug import fuzz

#: Programs that CI runs.
PROGRAMS = 500


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_programs(tmp_path, capfd):
    """In two processes, as the command runs them."""
    state = tmp_path / "state.json"
    arguments = ["--count", str(PROGRAMS), "--jobs", "2", "--resume", str(state), "--save", str(tmp_path)]
    failed = fuzz.main(arguments)
    printed = capfd.readouterr()
    assert failed == 0, printed.err
    chunks = json.loads(state.read_text())["chunks"].values()
    total = sum(map(collections.Counter, chunks), collections.Counter())
    assert total["programs"] == PROGRAMS
    assert total["refused"] <= PROGRAMS // 20
    assert total["regions"] > 3 * PROGRAMS
    # Floats of the simulation and integers round apart only at ties, or where float32 has too few bits.
    assert total["off_by_one"] <= total["elements"] // 200


def test_cases_are_reproducible():
    one, two = (fuzz.random_case(7, 6) for _ in range(2))
    assert str(one) == str(two)
    assert len(one.steps) == 6
    for a, b in zip(one.inputs, two.inputs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", range(8))
def test_numpy_computes_what_jax_does(seed):
    """The generator's values, from which sizes and calibration come, are the program's."""
    case = fuzz.random_case(seed, 4)
    values = fuzz.values_of(case)
    for k, expected in zip(case.results, case(case.weights, *case.inputs), strict=True):
        assert values[k].shape == expected.shape
        # Rounding of float32 in sums of up to some hundred elements of mixed sign.
        np.testing.assert_allclose(values[k], expected, rtol=1e-3, atol=1e-4 * max(np.abs(v).max() for v in values))


@pytest.mark.parametrize("seed", [140, 105, 113, 23])
def test_random_program(seed):
    """A handful that runs with every commit; the second pass of the checks included."""
    found = fuzz.run_case(fuzz.random_case(seed, 4, thorough=True))
    assert found is None or found.regions > 0
