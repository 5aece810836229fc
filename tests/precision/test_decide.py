"""A recipe's `precision`, from calibration to integers."""

import dataclasses

import numpy as np
import pytest
from draws import normal
from mixed import BATCHES, FIRST, LAYERS, SECOND, STEM, WEIGHTS, Q, V, small, small_net

import qcompiler as qc
from qcompiler.errors import RecipeError
from qcompiler.passes import observe
from qcompiler.precision import decide, knapsack

NARROW = ("int4", "int8")


def _quantize(precision, weights=WEIGHTS, **fields):
    recipe = qc.Recipe(precision=precision, **fields)
    if weights is WEIGHTS:
        return small().quantize(recipe).compile()
    return qc.quantize(small_net, BATCHES, params=weights, recipe=recipe, verify="types")


def _weight_bits(qmodel):
    """Layer -> bits of its weight in the program that was compiled."""
    notes = qmodel._quantized.programs["assign_precision"].notes["types"]
    return {layer: next(t.bits for t in notes[layer] if t is not None and t.narrow_range) for layer in LAYERS}


def _nsr(qmodel, weights=WEIGHTS):
    x = normal(32, 6, 6, 2, seed=99)
    reference, found = (np.asarray(f(x), np.float64) for f in (qmodel.float, qmodel))
    return np.sum((reference - found) ** 2) / np.sum(reference**2)


@pytest.fixture(scope="module")
def sensitivity():
    return small().sensitivity(candidates=NARROW, metric="nsr")


@pytest.mark.parametrize("bits", [5.5, 6, 7])
def test_the_result_is_within_five_percent_of_the_best_of_all(sensitivity, bits):
    """Every allowed configuration is run."""
    precision = qc.Precision(NARROW, weight_bits=bits)
    program = observe.without_observers(small().program)
    allowed = knapsack.enumerate_configs(decide.problem_of(program, precision, sensitivity.table()))
    best = min(map(sensitivity.measure, allowed))
    found = decide.decide(program, precision, sensitivity)
    assert len(allowed) > 8 and found.config in allowed
    assert found.measured_loss == sensitivity.measure(found.config) <= 1.05 * best
    assert found.totals["weight_bits"] <= bits


def test_a_planted_bad_layer_gets_the_bits():
    """A channel that is a hundredth as large in front of `v` and a hundred times as large in it changes little of the
    function, but four bits of `v` hold nothing else: choosing beats four bits for all by more than 5 dB."""
    weights = {**WEIGHTS, "k": WEIGHTS["k"].copy(), "v": WEIGHTS["v"].copy()}
    weights["k"][..., 0] /= 100
    weights["v"][0] *= 100
    uniform = _quantize(qc.Precision(("int4",), policy="uniform"), weights)
    chosen = _quantize(qc.Precision(NARROW, weight_bits=5), weights)
    bits = _weight_bits(chosen)
    assert bits[V] == 8 and min(bits.values()) == 4
    assert 10 * np.log10(_nsr(uniform, weights) / _nsr(chosen, weights)) > 5
    assert "most sensitive" in chosen.precision.layers[V].reason


def test_a_budget_for_everything_changes_nothing():
    """All layers in 8 bits are what the recipe without `precision` gives, bit for bit."""
    chosen = _quantize(qc.Precision(NARROW, weight_bits=8))
    plain = _quantize(None, activation_sqnr=None)
    assert set(chosen.precision.config.values()) == {"int8"} and plain.precision is None
    np.testing.assert_array_equal(chosen(BATCHES[0]), plain(BATCHES[0]))


def test_other_batch_sizes_have_the_same_types():
    chosen = _quantize(qc.Precision(NARROW, weight_bits=6))
    assert set(chosen.precision.config.values()) == set(NARROW)
    np.testing.assert_array_equal(chosen(BATCHES[0][:3]), chosen(BATCHES[0])[:3])
    np.testing.assert_array_equal(chosen.simulate(BATCHES[0][:3]), chosen.simulate(BATCHES[0])[:3])


def test_the_compiled_types_are_the_chosen_ones_and_groups_hold():
    chosen = _quantize(qc.Precision(("int4", "int8", "int16"), weight_bits=6, bit_operations=5e6))
    config = chosen.precision.config
    bits = {"int4": 4, "int8": 8, "int16": 8}
    assert _weight_bits(chosen) == {layer: bits[c] for layer, c in config.items()}
    assert (config[Q] == "int16") == (config[V] == "int16")
    assert (config[FIRST] == "int4") == (config[SECOND] == "int4")
    assert chosen.precision.totals["bit_operations"] <= 5e6


def test_rules_of_the_user_win():
    rule = qc.Rule(path="stem", weight=qc.QuantType(6, symmetric=True, narrow_range=True))
    chosen = _quantize(qc.Precision(NARROW, weight_bits=4), rules=(rule,))
    assert STEM not in chosen.precision.config and _weight_bits(chosen)[STEM] == 6
    assert {b for layer, b in _weight_bits(chosen).items() if layer != STEM} == {4}


def test_the_most_sensitive_fifth_in_int16():
    chosen = _quantize(qc.Precision(policy="top20_int16"))
    table = small().sensitivity(candidates=("int8",), metric="nsr").table()
    order = sorted(table, key=lambda layer: -table[layer]["int8"])
    # A fifth of six layers, rounded up; what reads the same value is raised with it.
    raised = set(order[:2]) | ({Q, V} if {Q, V} & set(order[:2]) else set())
    assert {layer for layer, c in chosen.precision.config.items() if c == "int16"} == raised
    assert chosen.precision.measurements == 1
    assert _nsr(chosen) < _nsr(_quantize(qc.Precision(("int8",), policy="uniform")))


def test_half_precision_is_chosen_where_its_bits_are_allowed():
    with pytest.warns(UserWarning, match="in float"):
        chosen = _quantize(qc.Precision(("int8", "bfloat16", "float32"), weight_bits=16))
    counts = list(chosen.precision.config.values())
    assert chosen.precision.totals["weight_bits"] <= 16 and {"bfloat16", "float32"} & set(counts)
    reasons = {i.reason for i in chosen.report.islands}
    assert len(chosen.report.islands) == sum(c != "int8" for c in counts) and all(
        "recipe keeps it" in r for r in reasons
    )


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, "best"), (0.01, "fastest")])
def test_the_weighting_moves_between_the_best_and_the_fastest(sensitivity, alpha, expected):
    program = observe.without_observers(small().program)
    precision = qc.Precision(NARROW, accuracy_weight=alpha, speed="bit_operations", repair_steps=1)
    found = decide.decide(program, precision, sensitivity)
    problem = decide.problem_of(program, precision, sensitivity.table())
    if expected == "best":
        assert found.predicted_loss == min(map(problem.loss, knapsack.enumerate_configs(problem)))
    else:
        assert set(found.config.values()) == {"int4"}


def test_repair_stops_where_it_is_told(sensitivity):
    program = observe.without_observers(small().program)
    precision = qc.Precision(NARROW, weight_bits=6)
    losses = [
        decide.decide(program, dataclasses.replace(precision, repair_steps=n), sensitivity).measured_loss
        for n in (1, 8, 64)
    ]
    assert losses == sorted(losses, reverse=True)


def test_a_budget_out_of_reach_names_what_is_in_reach():
    with pytest.raises(RecipeError, match=r"keeps to weight_bits <= 3; the smallest reachable is 4: raise"):
        _quantize(qc.Precision(NARROW, weight_bits=3))


def test_the_report_shows_the_table():
    chosen = _quantize(qc.Precision(NARROW, weight_bits=6))
    text = str(chosen.report)
    assert str(chosen.precision) in text and "weight_bits" in text and "measured, the best of" in text
    assert all(layer in text for layer in LAYERS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "greedy"}, "unknown policy 'greedy'; known: budget, top20_int16, uniform"),
        ({}, "needs one: give weight_bits, weight_bytes, bit_operations, latency_ms or accuracy_weight"),
        ({"weight_bits": 0}, "weight_bits is a number above 0"),
        ({"accuracy_weight": 70}, "accuracy_weight is above 0 and at most 1, got 70"),
        ({"accuracy_weight": 0.7, "speed": "joules"}, "unknown speed='joules'"),
        ({"weight_bits": 5, "repair_steps": 0}, "repair_steps is at least 1"),
        ({"weight_bits": 5, "candidates": ("int5",)}, "unknown candidate 'int5'"),
        ({"policy": "top20_int16", "candidates": ("int4", "int8")}, "there is no int16"),
    ],
)
def test_precisions_that_make_no_sense(fields, message):
    with pytest.raises(RecipeError, match=message):
        qc.Precision(**fields)


def test_a_recipe_takes_nothing_else():
    with pytest.raises(RecipeError, match=r"precision is a qc\.Precision, a qc\.precision\.Assignment or the path"):
        qc.Recipe(precision=5)
