"""A search that is interrupted goes on where it was, and ends with the same result."""

import itertools
import json
import math

import pytest

from qcompiler.errors import RecipeError
from qcompiler.precision import knapsack
from qcompiler.precision.knapsack import Problem
from qcompiler.precision.measured import Measured
from qcompiler.precision.repair import repair

LOSSES = {f"l{k}": {"int4": 1.0 + 0.1 * k, "int8": 0.0} for k in range(6)}
BITS = {layer: {"int4": 4.0, "int8": 8.0} for layer in LOSSES}
PROBLEM = Problem(LOSSES, {"bits": BITS}, {"bits": 36.0})


def _interacting(config):
    low = [c == "int4" for c in config.values()]
    return PROBLEM.loss(config) + sum(2.0 for a, b in itertools.pairwise(low) if a and b)


class _Runs:
    """Measures, and is interrupted once after some measurements."""

    def __init__(self, interrupted_after=None):
        self.seen, self.left = [], interrupted_after

    def __call__(self, config):
        if self.left == 0:
            self.left = None
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.seen.append(tuple(config.values()))
        return _interacting(config)


def _search(runs, path):
    return repair(PROBLEM, knapsack.solve(PROBLEM), Measured(runs, PROBLEM, path), measurements=24)


def test_an_interrupted_search_goes_on(tmp_path):
    whole = _Runs()
    expected = _search(whole, None)
    runs, path = _Runs(interrupted_after=5), tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        _search(runs, path)
    assert len(runs.seen) == 5
    assert _search(runs, path) == expected
    assert runs.seen == whole.seen and expected.loss < expected.first


def test_a_finished_search_measures_nothing_again(tmp_path):
    path = tmp_path / "search.json"
    expected, again = _search(_Runs(), path), _Runs()
    assert _search(again, path) == expected and not again.seen


def test_a_loss_that_is_no_number_loses_to_every_other(tmp_path):
    """Without counting as infinite, NaN would be compared with, found no worse, and kept."""
    path, start = tmp_path / "search.json", knapsack.solve(PROBLEM)
    measure = lambda config: float("nan") if config == start else _interacting(config)
    found = repair(PROBLEM, start, Measured(measure, PROBLEM, path), measurements=24)
    assert found.first == math.inf and math.isfinite(found.loss) and found.config != start
    assert repair(PROBLEM, start, Measured(_interacting, PROBLEM, path), measurements=24) == found


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "search.json"
    _search(_Runs(), path)
    whole = path.read_text()
    other = Problem({**LOSSES, "l0": {"int4": 9.0, "int8": 0.0}}, {"bits": BITS}, {"bits": 36.0})
    with pytest.raises(RecipeError, match="of another network, other candidates or other calibration data"):
        Measured(_interacting, other, path)
    path.write_text("{}")
    with pytest.raises(RecipeError, match="is no checkpoint of a search"):
        Measured(_interacting, PROBLEM, path)
    path.write_text(json.dumps({**json.loads(whole), "losses": {"int4": "much"}}))
    with pytest.raises(RecipeError, match="is damaged: it has no losses"):
        Measured(_interacting, PROBLEM, path)
    path.write_text("{")
    with pytest.raises(RecipeError, match="is no JSON"):
        Measured(_interacting, PROBLEM, path)
