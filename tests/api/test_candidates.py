"""Candidates: what they say, and the rules that give layers one."""

import jax
import numpy as np
import pytest
from draws import normal

import qcompiler as qc
from qcompiler import candidates
from qcompiler.candidates import NAMED
from qcompiler.numerics.types import ACTIVATION, STREAM, WEIGHT

X = normal(256, 96, seed=2)


def test_bits():
    bits = {name: (c.weight_bits, c.activation_bits, c.is_float) for name, c in NAMED.items()}
    assert bits == {
        "int4": (4, 8, False),
        "int4_group32": (4, 8, False),
        "int8": (8, 8, False),
        "int16": (8, 16, False),
        "float16": (16, 16, True),
        "bfloat16": (16, 16, True),
        "float32": (32, 32, True),
    }


def test_rules():
    assert NAMED["int16"].rule("head*") == qc.Rule("head*", weight=WEIGHT, activation=STREAM, granularity="channel")
    assert NAMED["float32"].rule("head*", "dot*") == qc.Rule("head*", "dot*", keep_float="float32")
    assert NAMED["bfloat16"].rule("head*") == qc.Rule("head*", keep_float="bfloat16")
    grouped = qc.Candidate(WEIGHT, ACTIVATION, qc.Granularity(channel_group=4))
    assert grouped.rule("a").granularity == qc.Granularity(channel_group=4)
    for candidate in (qc.Candidate(weight=WEIGHT), qc.Candidate(activation=ACTIVATION)):
        with pytest.raises(qc.RecipeError, match="no rule"):
            candidate.rule("a")


def test_a_rule_quantizes_the_layer_so():
    x, w = (np.random.default_rng(k).normal(size=(4, 4)).astype(np.float32) for k in range(2))
    recipe = qc.Recipe(rules=(NAMED["int4"].rule("*"),))
    types = qc.trace(lambda w, x: x @ w, x, params=w, recipe=recipe).calibrate([x]).quantize().program.notes["types"]
    (found,) = types.values()
    assert sorted(t.bits for t in found) == [4, 8]


def test_groups_lose_less_where_an_outlier_stretches_a_channel():
    """One of 96 weights of each channel is ten deviations large: in groups of 32 it coarsens a third of them.

    The steps of the other groups are a quarter as large, as their largest weights are, and their errors a sixteenth in
    power: 3/8 of the noise is left, and half of it is asked for. A weight of 24 inputs has one group, and loses the
    same.
    """
    params = {"a": normal(96, 24), "b": normal(24, 8, seed=1)}
    params["a"][5] = 10 * np.sign(params["a"][5])
    stage = qc.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], X, params=params).calibrate([X])
    first, last = "dot_general#0", "dot_general#1"
    losses = stage.sensitivity(candidates=("int4", "int4_group32")).table()
    assert losses[first]["int4_group32"] <= losses[first]["int4"] / 2
    assert losses[last]["int4_group32"] == losses[last]["int4"]
    precision = qc.Precision(("int4", "int4_group32", "int8"), weight_bits=4, repair_steps=1)
    chosen = stage.quantize(qc.Recipe(precision=precision))
    assert chosen.precision.config[first] == "int4_group32"
    grouped = [t.contracted for t in chosen.programs["assign_precision"].notes["types"][first] if t and t.contracted]
    assert grouped == [(0,)] and chosen.report.islands == ()


def test_names():
    assert candidates.named("int8") == {"int8": NAMED["int8"]}
    assert list(candidates.named(("int8", "int4"))) == ["int8", "int4"]
    mine = {"mine": qc.Candidate(WEIGHT)}
    assert candidates.named(mine) == mine


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"weight": qc.QuantType(16)}, "at most 8"),
        ({"activation": qc.QuantType(8, axis=(1,))}, "axis"),
        ({"granularity": "row"}, "unknown granularity"),
        ({"float_dtype": "float8"}, "unknown float_dtype"),
    ],
)
def test_bad_candidates(fields, message):
    with pytest.raises(qc.RecipeError, match=message):
        qc.Candidate(**fields)
