"""Candidates: what they say, and the rules that give layers one."""

import numpy as np
import pytest

import qcompiler as qc
from qcompiler import candidates
from qcompiler.candidates import NAMED
from qcompiler.numerics.types import ACTIVATION, STREAM, WEIGHT


def test_bits():
    bits = {name: (c.weight_bits, c.activation_bits, c.is_float) for name, c in NAMED.items()}
    assert bits == {
        "int4": (4, 8, False),
        "int8": (8, 8, False),
        "int16": (8, 16, False),
        "float16": (16, 16, True),
        "bfloat16": (16, 16, True),
        "float32": (32, 32, True),
    }


def test_rules():
    assert NAMED["int16"].rule("head*") == qc.Rule("head*", weight=WEIGHT, activation=STREAM, granularity="channel")
    assert NAMED["float32"].rule("head*", "dot*") == qc.Rule("head*", "dot*", keep_float=True)
    grouped = qc.Candidate(WEIGHT, ACTIVATION, qc.Granularity(channel_group=4))
    assert grouped.rule("a").granularity == qc.Granularity(channel_group=4)
    for candidate in (NAMED["bfloat16"], qc.Candidate(weight=WEIGHT), qc.Candidate(activation=ACTIVATION)):
        with pytest.raises(qc.RecipeError, match="no rule"):
            candidate.rule("a")


def test_a_rule_quantizes_the_layer_so():
    x, w = (np.random.default_rng(k).normal(size=(4, 4)).astype(np.float32) for k in range(2))
    recipe = qc.Recipe(rules=(NAMED["int4"].rule("*"),))
    types = qc.trace(lambda w, x: x @ w, x, params=w, recipe=recipe).calibrate([x]).quantize().program.notes["types"]
    (found,) = types.values()
    assert sorted(t.bits for t in found) == [4, 8]


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
