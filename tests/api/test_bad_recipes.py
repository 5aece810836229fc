"""Options, recipes and rules that are unknown, contradict each other, or decide nothing."""

import pytest
from bad_input import PARAMS, X, mlp, quantize, refused

import qcompiler as qc
from qcompiler.pipeline import PASSES, PassManager

# Options


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"recipe": "sweet"}, ("unknown recipe 'sweet'", "default, int16x8, litert, per_tensor")),
        ({"recipe": ["sweet"]}, ("unknown recipe",)),
        ({"target": "abacus"}, ("unknown target 'abacus'", "xla")),
        ({"target": 3}, ("unknown target 3",)),
        ({"target": qc.Target("abacus", backend="beads")}, ("abacus", "unknown backend 'beads'")),
        ({"backend": "beads"}, ("unknown backend 'beads'", "lax_int")),
        ({"io": "complex"}, ("unknown io='complex'", "'float', 'int'")),
        ({"verify": "hard"}, ("unknown verify='hard'", "probe, types, off")),
        ({"weights": "heavy"}, ("unknown weights='heavy'", "'constant', 'argument'")),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_unknown_options(options, parts):
    with refused(qc.RecipeError, *parts):
        quantize(**options)


def test_unknown_options_of_stages():
    with refused(qc.RecipeError, "unknown recipe"):
        qc.trace(mlp, X, params=PARAMS, recipe="sweet")
    calibrated = qc.trace(mlp, X, params=PARAMS).calibrate([X])
    with refused(qc.RecipeError, "unknown recipe"):
        calibrated.quantize("sweet")
    for options in ({"io": "complex"}, {"weights": "heavy"}):
        with refused(qc.RecipeError, "unknown"):
            calibrated.quantize().compile(**options)


def test_unknown_passes():
    with refused(qc.RecipeError, "unknown pass 'polish'", *PASSES):
        PassManager().run("polish", qc.trace(mlp, X, params=PARAMS).program)


def test_impossible_recipes():
    with refused(qc.RecipeError, "unknown range estimator 'guess'", "'mse'"):
        qc.Recipe(activation_range="guess")
    with refused(qc.RecipeError, "index type int16 has 16 bits", "at most 12"):
        qc.Recipe(index=qc.QuantType(16))
    with refused(qc.RecipeError, "channel_group", "at least 1", "got 0"):
        qc.Granularity(channel_group=0)
    with refused(qc.QuantizationError, "block_size", "per dimension of axis (0, 1)", "got (4,)"):
        qc.QuantType(8, axis=(0, 1), block_size=(4,))
    with refused(qc.QuantizationError, "2 to 16 bits", "got 1"):
        qc.QuantType(1)


@pytest.mark.parametrize("make", [qc.Recipe, qc.Rule])
def test_types_without_integers(make):
    with refused(qc.RecipeError, "weight type", "int16s has 16 bits", "at most 8"):
        make(weight=qc.QuantType(16, symmetric=True))
    with refused(qc.RecipeError, "activation type", "int32 has 32 bits", "at most 16"):
        make(activation=qc.QuantType(32))
    with refused(qc.RecipeError, "weight type", "axis=(1,)", "per layer from `granularity`"):
        make(weight=qc.QuantType(8, axis=(1,)))
    with refused(qc.RecipeError, "unknown granularity 'column'", "'channel', 'tensor'", "qc.Granularity"):
        make(granularity="column")


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        (qc.Rule(path="third*", keep_float=True), ("third*", "matches no layer", "first/dot_general#0")),
        (qc.Rule(primitive="conv*"), ("conv*", "matches no layer", "second/dot_general#0")),
    ],
    ids=["path", "primitive"],
)
def test_rules_that_cannot_be_followed(rule, parts):
    with refused(qc.RecipeError, *parts):
        quantize(recipe=qc.Recipe(rules=(rule,)))
