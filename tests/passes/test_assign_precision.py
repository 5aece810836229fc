"""Every operand gets the type of its role, or of the first rule that matches its layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

from qcompiler import ops
from qcompiler.errors import RecipeError
from qcompiler.numerics.types import ACTIVATION, BIAS, INDEX, STREAM, WEIGHT, QuantType
from qcompiler.recipe import LITERT, Granularity, Recipe, Rule

WEIGHTS = {"k": normal(3, 3, 2, 8), "w": normal(8, 8), "v": normal(8, 4), "b": normal(8, seed=1)}
IMAGE = normal(2, 6, 6, 2, seed=2)


def _model(p, x):
    with jax.named_scope("stem"):
        y = lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jax.nn.relu(y + p["b"])
    with jax.named_scope("block/mlp"):
        y = y + jax.nn.silu(y @ p["w"])
    with jax.named_scope("head"):
        return jnp.mean(y * p["b"], axis=(1, 2)) @ p["v"]


def _types(passes, recipe=None, fun=_model, weights=WEIGHTS, x=IMAGE):
    return passes(fun, weights, [x], recipe, until="assign_precision")["assign_precision"]


def _roles(program):
    """(region id, role) -> type."""
    return {
        (e.params["id"], role): qtype
        for e in program.eqns
        if e.primitive is ops.region_p and e.params["id"] in program.notes["types"]
        for role, qtype in zip(e.params["roles"], program.notes["types"][e.params["id"]], strict=True)
    }


def _channel(axis):
    return QuantType(8, symmetric=True, narrow_range=True, axis=axis)


def test_types_by_role(passes):
    program = _types(passes)
    roles = _roles(program)
    conv, dot, head = "stem/conv_general_dilated#0", "block/mlp/dot_general#0", "head/dot_general#0"
    assert roles[conv, "activation"] == ACTIVATION and roles[conv, "bias"] == BIAS
    assert roles[conv, "weight"] == _channel((3,)) and roles[dot, "weight"] == roles[head, "weight"] == _channel((1,))
    assert roles["block/mlp/mul#0", "index"] == INDEX
    assert {t for (_, role), t in roles.items() if role in ("term", "reduced")} == {STREAM}
    assert {t for (_, role), t in roles.items() if role == "constant"} == {None}
    assert {role for _, role in roles} == {"activation", "weight", "bias", "index", "term", "reduced", "constant"}
    assert program.notes["output_types"] == [STREAM] and program.notes["island_type"] == STREAM
    assert program.notes["float_regions"] == [] and program.stage == "assign_precision"


def test_views_have_no_type_of_their_own(passes):
    program = _types(passes, fun=lambda p, x: x.reshape(-1, 2).T)
    assert set(_roles(program).values()) == {None}


def test_weights_per_tensor(passes):
    roles = _roles(_types(passes, Recipe(granularity="tensor")))
    assert {t for (_, role), t in roles.items() if role == "weight"} == {WEIGHT}


def test_channel_axes_follow_the_weight(passes):
    weights = {"w": normal(2, 8, 4), "l": normal(8, 4)}

    def fun(p, x):
        return jnp.einsum("bij,bjk->bik", x, p["w"]), p["l"] @ x[0].T[:4]

    program = _types(passes, fun=fun, weights=weights, x=normal(2, 3, 8))
    assert [t.axis for (_, role), t in sorted(_roles(program).items()) if role == "weight"] == [(0, 2), (0,)]


def test_the_first_matching_rule_decides(passes):
    int4, int6 = QuantType(4, symmetric=True), QuantType(6, symmetric=True)
    rules = (
        Rule(path="block/*", primitive="dot_*", weight=int4),
        Rule(primitive="dot_general", weight=int6, activation=QuantType(7)),
        Rule(path="stem", activation=QuantType(5)),
    )
    roles = _roles(_types(passes, Recipe(rules=rules)))
    assert roles["block/mlp/dot_general#0", "weight"] == QuantType(4, symmetric=True, axis=(1,))
    assert roles["block/mlp/dot_general#0", "activation"] == ACTIVATION
    assert roles["head/dot_general#0", "weight"] == QuantType(6, symmetric=True, axis=(1,))
    assert roles["head/dot_general#0", "activation"] == QuantType(7)
    assert roles["stem/conv_general_dilated#0", "activation"] == QuantType(5)
    assert roles["stem/conv_general_dilated#0", "weight"] == _channel((3,))


def test_a_rule_keeps_a_layer_in_float_and_lists_it(passes):
    found = passes(
        _model, WEIGHTS, [IMAGE], Recipe(rules=(Rule(path="head", primitive="dot_general", keep_float=True),))
    )
    program = found["assign_precision"]
    assert (
        program.notes["float_regions"] == ["head/dot_general#0"] and "head/dot_general#0" not in program.notes["types"]
    )
    (island,) = program.notes["islands"]
    assert (island["primitive"], island["module_path"], island["macs"]) == ("dot_general", "head", 2 * 8 * 4)
    assert "_model" in island["source"] and "recipe" in island["reason"]
    # Nothing lowers a region in float: after fuse its equations stand for themselves.
    regions = [e.params["id"] for e in found["fuse"].eqns if e.primitive is ops.region_p]
    assert "head/dot_general#0" not in regions and "dot_general" in [e.primitive.name for e in found["fuse"].eqns]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(path="steam"), "matches no layer; layers are stem/conv_general_dilated#0"),
        (Rule(path="head*", keep_float=True), "never decides: .* match all of head/mul#0"),
    ],
)
def test_rules_that_make_no_sense(passes, rule, message):
    with pytest.raises(RecipeError, match=message):
        _types(passes, Recipe(rules=(Rule(path="head", activation=STREAM), rule)))


def test_groups_of_channels(passes):
    """So many along the last channel dimension of the result; a rule may have its own granularity."""
    weights = {"w": normal(2, 8, 4), "h": normal(8, 2, 6), "l": normal(8, 4), "c": normal(3, 3, 8, 8)}

    def fun(p, x):
        y = lax.conv_general_dilated(
            x[..., None, :], p["c"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        with jax.named_scope("heads"):
            heads = jnp.einsum("bik,khd->bihd", x, p["h"])
        return jnp.einsum("bij,bjk->bik", x, p["w"]), heads, p["l"] @ x[0].T[:4], y

    recipe = Recipe(granularity=Granularity(4), rules=(Rule(path="heads", granularity="tensor"),))
    roles = _roles(_types(passes, recipe, fun=fun, weights=weights, x=normal(2, 3, 8)))
    found = {key: (t.axis, t.block_size) for key, t in roles.items() if key[1] == "weight"}
    assert found == {
        ("conv_general_dilated#0", "weight"): ((3,), (4,)),
        ("heads/dot_general#0", "weight"): ((), ()),
        ("dot_general#0", "weight"): ((0, 2), (1, 4)),
        ("dot_general#1", "weight"): ((0,), (4,)),
    }
    every = Recipe(granularity=Granularity(4))
    roles = _roles(_types(passes, every, fun=fun, weights=weights, x=normal(2, 3, 8)))
    assert roles["heads/dot_general#0", "weight"].block_size == (1, 4)


def test_results_that_are_no_numbers_of_the_program_have_no_type(passes):
    program = _types(passes, fun=lambda p, x: (x @ p["w"], p["b"], jnp.argmax(x), x), x=normal(3, 8))
    assert program.notes["output_types"] == [STREAM, None, None, STREAM]


# Factors that 8 bits hold badly


def _attention(p, q, k, v):
    scores = jnp.einsum("bqd,bkd->bqk", q, k) / np.float32(np.sqrt(32))
    return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), v)


QKV = tuple(normal(2, 256, 32, seed=s) for s in (4, 5, 6))


def _activations(passes, recipe, fun, *inputs):
    """Bits of the activations of each product."""
    program = passes(fun, WEIGHTS, [inputs], recipe, until="assign_precision")["assign_precision"]
    types = program.notes["types"]
    products = [e for e in program.eqns if e.primitive is ops.region_p and e.params["kind"] == "dot"]
    return [
        [t.bits for t, role in zip(types[e.params["id"]], e.params["roles"], strict=True) if role == "activation"]
        for e in products
    ]


def test_probabilities_get_16_bits_and_gaussian_factors_8(passes):
    assert _activations(passes, Recipe(), _attention, *QKV) == [[8, 8], [16, 8]]


@pytest.mark.parametrize("recipe", [LITERT, Recipe(activation_sqnr=None, pair_sqnr=None)])
def test_no_factor_is_widened_without_a_limit(passes, recipe):
    assert _activations(passes, recipe, _attention, *QKV) == [[8, 8], [8, 8]]


def test_the_limit_is_the_recipes(passes):
    """Gaussian data in 8 bits keeps about 40 dB."""
    x = normal(256, 8, seed=8)
    assert _activations(passes, Recipe(), lambda p, x: x @ p["w"], x) == [[8]]
    assert _activations(passes, Recipe(activation_sqnr=50.0), lambda p, x: x @ p["w"], x) == [[16]]


def test_a_rule_for_a_layer_is_not_widened(passes):
    recipe = Recipe(rules=(Rule(primitive="dot_general", activation=ACTIVATION),))
    assert _activations(passes, recipe, _attention, *QKV) == [[8, 8], [8, 8]]
