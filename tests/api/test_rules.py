"""Rules by path, primitive and shape, and what they and `Recipe.encodings` give: types, ranges, encodings."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input import PARAMS, X, normal, quantize, refused

import qcompiler as qc
from qcompiler.debug.report import sqnr_db
from qcompiler.numerics import ranges

FOUR = qc.QuantType(4, symmetric=True)


def types_of(qmodel):
    found = qmodel._quantized.program.notes["types"]
    return {region: [t.bits for t in chosen if t is not None] for region, chosen in found.items()}


def stored(qmodel):
    """Scales and zero points by name, after `insert_qdq`."""
    return qmodel._quantized.programs["insert_qdq"].weights


@pytest.mark.parametrize(
    "rule",
    [
        {"shape": "8x16"},
        {"shape": "*x16"},
        {"shape": re.compile(r"8x\d+")},
        {"path": re.compile("first|third")},
        {"path": "f*"},
        {"path": "first", "primitive": re.compile("dot_.*"), "shape": "8x*"},
    ],
    ids=str,
)
def test_patterns_choose_the_first_layer(rule):
    qmodel = quantize(recipe=qc.Recipe(rules=(qc.Rule(weight=FOUR, **rule),)))
    assert [bits[1] for bits in types_of(qmodel).values()] == [4, 8]
    decided, rest = qmodel.report.rules
    assert decided.layers == ("first/dot_general#0",) and rest == qc.debug.report.RuleRecord(
        None, ("second/dot_general#0",)
    )
    assert "first/dot_general#0" in str(qmodel.report) and repr(qc.Rule(weight=FOUR, **rule)) == decided.rule


def test_a_regular_expression_matches_the_whole_text():
    with refused(qc.RecipeError, "re.compile('irs')", "matches no layer"):
        quantize(recipe=qc.Recipe(rules=(qc.Rule(path=re.compile("irs"), weight=FOUR),)))


def test_the_first_rule_that_matches_decides_and_the_report_says_which():
    rules = (qc.Rule(shape="8x16", weight=FOUR), qc.Rule(primitive="dot*", weight=qc.QuantType(6, symmetric=True)))
    qmodel = quantize(recipe=qc.Recipe(rules=rules))
    assert [bits[1] for bits in types_of(qmodel).values()] == [4, 6]
    assert [r.layers for r in qmodel.report.rules] == [("first/dot_general#0",), ("second/dot_general#0",), ()]


def test_a_shape_that_no_weight_has():
    with refused(qc.RecipeError, "shape='3x3*'", "matches no layer"):
        quantize(recipe=qc.Recipe(rules=(qc.Rule(shape="3x3*", keep_float=True),)))
    with refused(qc.RecipeError, "shape of a rule is a glob", "3"):
        qc.Rule(shape=3)
    with pytest.raises(ValueError, match="depends on the shape"):
        qc.Rule(shape="3x*").matches("first/dot_general#0")


def test_a_shape_holds_at_every_batch_size():
    qmodel = quantize(recipe=qc.Recipe(rules=(qc.Rule(shape="8x16", weight=FOUR),)))
    np.testing.assert_array_equal(qmodel(X[:2]), qmodel(X)[:2])


def test_a_fixed_range_of_what_a_layer_reads():
    rule = qc.Rule(path="first", activation_range=(-4, 2))
    qmodel = quantize(recipe=qc.Recipe(rules=(rule,)))
    np.testing.assert_allclose(stored(qmodel)["input:x:int8/scale"] * 255, 6.0, rtol=1e-6)
    assert stored(qmodel)["input:x:int8/zero_point"] == -128 + 170
    assert rule == qc.Rule(path="first", activation_range=qc.FixedRange(-4.0, 2.0))
    others = quantize()
    name = "first/dot_general#0:int8/scale"
    np.testing.assert_array_equal(stored(qmodel)[name].shape, stored(others)[name].shape)


def test_another_estimator_for_a_layer():
    spiked = np.concatenate([X, np.full((1, 8), 40.0, np.float32)])
    scales = [
        stored(quantize(batches=[spiked], recipe=qc.Recipe(rules=rules)))["input:x:int8/scale"]
        for rules in (
            (qc.Rule(path="first", activation=qc.QuantType(8), activation_range="minmax"),),
            (qc.Rule(path="first", activation=qc.QuantType(8), activation_range=ranges.Percentile(80.0)),),
        )
    ]
    assert scales[1] < 0.5 * scales[0]


def test_a_range_helps_where_calibration_saw_outliers_that_do_not_come():
    """A sample of another kind among the calibration data stretches min and max; the rule knows better."""
    spiked = np.concatenate([X, np.full((1, 8), 400.0, np.float32)])
    fun, params = lambda p, x: x @ p["w"], {"w": PARAMS["w"]}
    minmax = qc.Recipe(activation_range="minmax", activation_sqnr=None)
    known = qc.Rule(activation_range=(float(X.min()), float(X.max())))
    sqnr = [
        sqnr_db([fun(params, X)], [qc.quantize(fun, [spiked], params=params, recipe=recipe)(X)])
        for recipe in (minmax, dataclasses.replace(minmax, rules=(known,)))
    ]
    # 400 / 255 is more than a standard deviation; the true range, of about 5, gives steps of a fiftieth.
    assert sqnr[1] > sqnr[0] + 20


def test_ranges_of_weights():
    recipe = qc.Recipe(rules=(qc.Rule(path="first", weight_range=(-2.54, 2.54)),))
    scale = next(w for n, w in stored(quantize(recipe=recipe)).items() if n.startswith("w:") and n.endswith("/scale"))
    np.testing.assert_allclose(scale, np.full((1, 16), 0.02), rtol=1e-6)


def test_an_estimator_of_weights_helps_where_each_channel_has_an_outlier():
    weights = normal(1024, 16)
    weights[0] = 6.0
    x = normal(64, 1024, seed=5)
    x[:, 0] *= np.float32(0.01)
    fun = lambda p, x: x @ p["w"]
    low = {"weight": qc.QuantType(4, symmetric=True, narrow_range=True)}
    sqnr = {}
    for estimator in (None, "mse", "percentile"):
        rules = (qc.Rule(weight_range=estimator),) if estimator else ()
        qmodel = qc.quantize(fun, [x], params={"w": weights}, recipe=qc.Recipe(**low, rules=rules))
        sqnr[estimator] = sqnr_db([x @ weights], [qmodel(x)])
    # Steps of 6 / 7, or of 3 / 7 where half of the outlier is given up, whose input is next to zero: 6 dB.
    assert sqnr["mse"] > sqnr[None] + 4
    # In 99.99 % of 1,024 weights are all of them: nothing is cut, so nothing changes.
    assert abs(sqnr["percentile"] - sqnr[None]) < 0.5


def test_an_encoding_by_rule():
    encoding = qc.Encoding(qc.QuantType(16, symmetric=True), np.float32(1e-3), np.int32(0))
    qmodel = quantize(recipe=qc.Recipe(rules=(qc.Rule(path="second", activation_range=encoding),)))
    assert types_of(qmodel)["second/dot_general#0"][:2] == [16, 8]
    assert stored(qmodel)["first/dot_general#0:int16s/scale"] == np.float32(1e-3)


def test_two_rules_that_give_one_value_two_ranges():
    rules = (qc.Rule(path="a", activation_range=(-1, 1)), qc.Rule(path="b", activation_range=(-2, 2)))
    with refused(qc.RecipeError, "input:x in int8", "two ranges", "stored once"):
        qc.quantize(
            lambda p, x: (_scoped("a", x, p["w"]), _scoped("b", x, p["v"])),
            [X],
            params={"w": PARAMS["w"], "v": PARAMS["w"] * 2},
            recipe=qc.Recipe(rules=rules),
        )


def _scoped(name, x, w):
    with jax.named_scope(name):
        return x @ w


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: qc.Rule(activation_range=(1, 2)), ("low <= 0",)),
        (lambda: qc.Rule(activation_range=(-1, float("nan"))), ("low <= 0",)),
        (lambda: qc.Rule(activation_range=(-1, 1, 2)), ("(low, high)",)),
        (lambda: qc.Rule(activation_range="guess"), ("unknown range estimator 'guess'",)),
        (lambda: qc.Rule(keep_float=True, weight_range=(-1, 1)), ("float", "weight_range", "drop one")),
        (
            lambda: qc.Rule(activation=FOUR, activation_range=qc.Encoding(qc.QuantType(8), np.float32(1), np.int32(0))),
            ("int4s", "int8", "drop one"),
        ),
        (lambda: qc.Recipe(encodings={"x": 3}), ("encoding of 'x'", "got 3")),
        (lambda: qc.Recipe(encodings={3: FOUR}), ("by name", "got 3")),
        (lambda: qc.Recipe(encodings=[FOUR]), ("map names",)),
        (lambda: qc.Recipe(supergroups=("Conv",)), ("Supergroup", "'Conv'")),
        (lambda: qc.Supergroup("Conv"), ("at least two",)),
        (
            lambda: qc.Recipe(encodings={"x": qc.Encoding(FOUR, np.float32(np.nan), np.int32(0))}),
            ("encoding of 'x'", "scales that are no numbers"),
        ),
        (
            lambda: qc.Recipe(encodings={"x": qc.Encoding(qc.QuantType(4), np.float32(1), np.int32(9))}),
            ("encoding of 'x'", "zero points that int4 cannot hold", "-8 to 7"),
        ),
        (
            lambda: qc.Recipe(encodings={"x": qc.Encoding(FOUR, np.float32(1), np.int32(1))}),
            ("int4s cannot hold", "not 0"),
        ),
    ],
)
def test_ranges_and_encodings_that_cannot_be(make, parts):
    with refused(qc.RecipeError, *parts):
        make()


def test_given_scales_whose_product_is_no_float32_number():
    tiny = lambda **options: qc.Encoding(qc.QuantType(8, **options), np.float32(2.0**-80), np.int32(0))
    with refused(qc.QuantizationError, "first/dot_general#0", "multiply to less than any float32 number"):
        quantize(recipe=qc.Recipe(encodings={"w": tiny(symmetric=True), "input:x": tiny()}))


def test_types_by_name():
    recipe = qc.Recipe(encodings={"w": FOUR, "first/*": qc.QuantType(16, symmetric=True)})
    assert list(types_of(quantize(recipe=recipe)).values()) == [[8, 4, 32], [16, 8]]


def test_encodings_of_results_and_of_what_islands_read():
    def fun(p, x):
        with jax.named_scope("first"):
            h = x @ p["w"]
        return jnp.linalg.cholesky(h.T @ h + 9.0 * jnp.eye(16, dtype=jnp.float32))

    recipe = qc.Recipe(encodings={"first/dot_general#0": qc.QuantType(8)})
    with pytest.warns(UserWarning, match="float"):
        qmodel = qc.quantize(fun, [X], params={"w": PARAMS["w"]}, recipe=recipe)
    assert "first/dot_general#0:int8/scale" in stored(qmodel)
    assert not any(n.startswith("first/dot_general#0:int16") for n in stored(qmodel))
    result = quantize(recipe=qc.Recipe(encodings={"second/dot_general#0": qc.QuantType(8)}))
    assert result.output_encodings[0].type == qc.QuantType(8)
    # The whole of an input that an island reads, alone.
    with pytest.warns(UserWarning, match="float"):
        island = qc.quantize(
            lambda p, x: jnp.linalg.cholesky(x @ p["w"] + 0.0),
            [np.eye(4, dtype=np.float32) * 4],
            params={"w": np.eye(4, dtype=np.float32)},
            recipe=qc.Recipe(encodings={"dot_general#0": qc.QuantType(10, symmetric=True)}),
        )
    assert "dot_general#0:int10s/scale" in stored(island)


def test_a_value_in_two_types_has_two_encodings():
    fun = lambda p, x: jax.nn.relu(x @ p["w"]) + jnp.tanh(jax.nn.relu(x @ p["w"]) @ p["v"])
    params = {"w": normal(8, 8), "v": normal(8, 8, seed=1)}
    wide, narrow = (
        qc.Encoding(qc.QuantType(16, symmetric=True), np.float32(1e-3), np.int32(0)),
        qc.Encoding(qc.QuantType(8), np.float32(0.1), np.int32(-128)),
    )
    both = {"dot_general#0": wide, "dot_general#0@int8": narrow}
    found = stored(qc.quantize(fun, [X], params=params, recipe=qc.Recipe(encodings=both)))
    assert found["dot_general#0:int8/scale"] == np.float32(0.1)
    assert found["dot_general#0:int16s/scale"] == np.float32(1e-3)
    # One encoding is for whoever reads the value.
    one = stored(qc.quantize(fun, [X], params=params, recipe=qc.Recipe(encodings={"dot_general#0": narrow})))
    assert "dot_general#0:int16s/scale" not in one and one["dot_general#0:int8/scale"] == np.float32(0.1)
