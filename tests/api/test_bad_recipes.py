"""Options, recipes and rules that are unknown, contradict each other, or decide nothing."""

import jax.numpy as jnp
import pytest
from bad_input import PARAMS, X, mlp, quantize, refused
from islands import solved

import qcompiler as qc
from qcompiler.pipeline import PASSES, PassManager

# Options


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"recipe": "sweet"}, ("unknown recipe 'sweet'", "accurate, default, int16x8, litert, per_tensor")),
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
    with refused(qc.RecipeError, "unknown granularity 'column'", "'channel', 'group128'", "qc.Granularity"):
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


FOUR = qc.QuantType(4, symmetric=True)


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        ((qc.Rule(path="first", weight=FOUR), qc.Rule(path="first", keep_float=True)), ("never decides", "first/dot")),
        ((qc.Rule(weight=FOUR), qc.Rule(path="first")), ("never decides", "before them")),
        (
            (qc.Rule(path="first"), qc.Rule(path="second"), qc.Rule(primitive="dot*", keep_float=True)),
            ("never decides", "second/dot_general#0"),
        ),
        ((qc.Rule(path="first"), qc.Rule(path="third", keep_float=True)), ("third", "matches no layer")),
        ((qc.Rule(primitive="tanh", weight=FOUR),), ("type to the weight of layers that have none", "tanh#0")),
        ((qc.Rule(primitive="tanh", activation=FOUR),), ("type to the activation of layers that have none",)),
        (
            (qc.Rule(primitive="triangular_solve", weight=FOUR),),
            ("matches only what stays float anyway", "triangular_solve#0"),
        ),
    ],
    ids=["same", "star_first", "covered", "keep_nothing", "no_weight", "no_activation", "island"],
)
def test_rules_that_decide_nothing(rules, parts):
    fun = lambda params, x: jnp.tanh(mlp(params, solved(x)))
    with refused(qc.RecipeError, *parts):
        quantize(fun, recipe=qc.Recipe(rules=rules))


def test_rules_that_shield_or_repeat_what_is_so_are_fine():
    fun = lambda params, x: jnp.tanh(mlp(params, solved(x)))
    shielded = (
        qc.Rule(path="first"),
        qc.Rule(primitive="dot*", weight=FOUR),
        qc.Rule(primitive="triangular_solve", keep_float=True),
    )
    recipe = qc.Recipe(rules=shielded)
    types = qc.trace(fun, X, params=PARAMS, recipe=recipe).calibrate([X]).quantize().program.notes["types"]
    weight_bits = {region: [t.bits for t in chosen if t is not None and t.axis] for region, chosen in types.items()}
    assert weight_bits["first/dot_general#0"] == [8] and weight_bits["second/dot_general#0"] == [4]


def test_a_rule_cannot_keep_float_and_give_a_type():
    for types in ({"weight": FOUR}, {"activation": qc.QuantType(8)}):
        with refused(qc.RecipeError, "'head*'", "float", *types, "drop one"):
            qc.Rule(path="head*", keep_float=True, **types)


@pytest.mark.parametrize(
    "make",
    [
        lambda: qc.Recipe(weight=None),
        lambda: qc.Recipe(activation="int8"),
        lambda: qc.Recipe(stream=qc.QuantType(32, symmetric=True)),
        lambda: qc.Recipe(output=qc.QuantType(32, symmetric=True)),
        lambda: qc.Recipe(weight=qc.QuantType(8, symmetric=True, axis=(0,))),
        lambda: qc.Recipe(activation=qc.QuantType(8, axis=(1,))),
        lambda: qc.Recipe(rules=("first",)),
        lambda: qc.Rule(weight="int4"),
        lambda: qc.Rule(weight=qc.QuantType(4, symmetric=True, axis=(0,))),
        lambda: qc.Rule(path=None),
        lambda: qc.Rule(primitive=3),
    ],
)
def test_recipes_of_the_wrong_kind(make):
    with refused(qc.RecipeError):
        make()


@pytest.mark.parametrize("arguments", [{"bits": 8.0}, {"bits": "8"}, {"axis": (-1,)}, {"axis": 1}], ids=str)
def test_types_of_the_wrong_kind(arguments):
    with refused(qc.QuantizationError, repr(next(iter(arguments.values())))):
        qc.QuantType(**arguments)
