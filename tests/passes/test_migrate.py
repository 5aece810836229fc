"""Channel scales move between operands of products, through what commutes with them or into a product of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from norms import layer_norm, rms

import qcompiler as qc
from qcompiler.debug.report import sqnr_db
from qcompiler.errors import QuantizationError, RecipeError
from qcompiler.ir.constants import Constants
from qcompiler.ir.tracing import trace
from qcompiler.passes import migrate
from qcompiler.passes._migration_places import places
from qcompiler.passes._migration_search import Chosen
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.simplify import simplify

# Scaled weights are rounded to float32 once more, 2**-24 each: some 140 dB, of which cancellation eats a part.
LEAST_DB = 80.0
WIDTH, HEADS, SIZE = 16, 2, 8
#: Half of the rows choose ranges and factors, which the others judge: of a few, clipping is all that would be seen.
X = normal(24, 8, WIDTH, seed=9)
#: Eight bits wherever a product reads, and channels that nothing else moves, so that what outliers cost is seen.
NARROW = {"activation_sqnr": None, "pair_sqnr": None, "equalize": False}


def _outliers(channels, factor=30.0):
    """One, but for every eighth channel."""
    return np.where(np.arange(channels) % 8 == 3, factor, 1.0).astype(np.float32)


def _before(fun, weights, x=X):
    return fold_norms(simplify(trace(fun, weights, (jax.ShapeDtypeStruct(x.shape, x.dtype),))))


def _migrate(fun, weights, x=X, **recipe):
    """The program before and after, and what was decided; the function is the same."""
    before = _before(fun, weights, x)
    decision = migrate.decide(before, [[x]], qc.Recipe(**{**NARROW, **recipe}))
    after = migrate.apply(before, decision)
    assert sqnr_db(before.evaluate([x]), after.evaluate([x])) >= LEAST_DB
    return before, after, decision


def _quantized(fun, weights, x, **recipe):
    traced = qc.trace(fun, x, params=weights, recipe=qc.Recipe(**{**NARROW, **recipe}), verify="types")
    return traced.calibrate([x]).quantize()


def _simulated_sqnr(fun, weights, x, **recipe):
    """In dB, of the program with quantize/dequantize pairs, which the integers agree with to one step."""
    simulated = _quantized(fun, weights, x, **recipe).programs["insert_qdq"]
    return sqnr_db([fun(weights, x)], simulated.evaluate([x]))


def _rotate_halves(x):
    angles = np.arange(x.shape[1])[:, None] * 10.0 ** -np.linspace(0, 1, SIZE // 2)
    cos, sin = (f(np.concatenate([angles, angles], -1)).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    low, high = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-high, low], axis=-1) * sin


def _rotate_neighbours(x):
    angles = np.arange(x.shape[1])[:, None] * 10.0 ** -np.linspace(0, 1, SIZE // 2)
    cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def _attend(query, key, value):
    """Heads of queries share those of keys and values where there are fewer of them."""
    n, s, heads, d = query.shape
    query = query.reshape(n, s, key.shape[2], -1, d)
    scores = jnp.einsum("nskgd,ntkd->nkgst", query, key) * float(d**-0.5)
    return jnp.einsum("nkgst,ntkd->nskgd", jax.nn.softmax(scores, axis=-1), value).reshape(n, s, heads * d)


def _attention(p, x, rotate=lambda y: y):
    heads = lambda name: (x @ p[name]).reshape(*x.shape[:2], -1, SIZE)
    return _attend(rotate(heads("query")), rotate(heads("key")), heads("value")) @ p["output"]


def _gated(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def _attention_weights(kv_heads=HEADS):
    shared = kv_heads * SIZE
    names = {"query": WIDTH, "key": shared, "value": shared, "output": WIDTH}
    return {name: 0.3 * normal(WIDTH, n, seed=k) for k, (name, n) in enumerate(names.items())}


def _norm_model(p, x):
    return rms(x, p["gain"]) @ p["w"]


def _norm_weights():
    spread = _outliers(WIDTH)
    return {"gain": spread * (1 + 0.1 * normal(WIDTH)), "w": normal(WIDTH, 8, seed=1) / spread[:, None]}


def _two_readers(p, x):
    y = layer_norm(x, p["gain"], p["shift"])
    return (y @ p["w"]) * (y @ p["v"])


def _residual(p, x):
    y = layer_norm(x, p["gain"], p["shift"])
    return y + jnp.tanh(y @ p["w"]) @ p["back"]


def _values_apart():
    """Weights of which a few channels of the values are large, and are made small again."""
    weights, spread = _attention_weights(), _outliers(WIDTH)
    return weights | {"value": weights["value"] * spread, "output": weights["output"] / spread[:, None]}


def _queries_apart():
    weights, spread = _attention_weights(), _outliers(WIDTH)
    return weights | {"query": weights["query"] * spread, "key": weights["key"] / spread}


def _up_apart():
    spread = _outliers(32)
    weights = {name: normal(WIDTH, 32, seed=k) for k, name in enumerate(("gate", "up"))}
    return weights | {"up": weights["up"] * spread, "down": normal(32, WIDTH, seed=5) / spread[:, None]}


def _norm_weights_twice():
    shift = {"shift": 0.1 * normal(WIDTH, seed=4) * _outliers(WIDTH)}
    more = {"v": normal(WIDTH, 8, seed=6) / _outliers(WIDTH)[:, None], "back": normal(8, WIDTH, seed=7)}
    return _norm_weights() | shift | more


#: Model, weights with a few channels 30 times too large on one side, the least gain in dB of its SQNR.
HELPED = {
    "norm": (_norm_model, _norm_weights(), 10.0),
    "norm_two_readers": (_two_readers, _norm_weights_twice(), 10.0),
    "norm_and_residual": (_residual, _norm_weights_twice(), 6.0),
    "values": (_attention, _values_apart(), 10.0),
    "queries": (_attention, _queries_apart(), 10.0),
    "gated": (_gated, _up_apart(), 10.0),
}


@pytest.mark.parametrize("name", HELPED)
def test_outlier_channels_cost_less(name):
    """Without: one scale for channels of which some are 30 times as large as the rest, 30 dB for an eighth of them."""
    fun, weights, least = HELPED[name]
    _migrate(fun, weights)
    without, with_ = (_simulated_sqnr(fun, weights, X, migrate=m) for m in (False, True))
    assert with_ >= without + least, (without, with_)


def test_a_flax_attention_too():
    """`nnx.MultiHeadAttention`: heads are dimensions of the weights, and biases stand behind them."""
    layer = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
    spread = _outliers(WIDTH).reshape(HEADS, SIZE)
    layer.value.kernel[...] *= spread
    layer.value.bias[...] = normal(HEADS, SIZE) * spread
    layer.out.kernel[...] /= spread[..., None]
    graph, state = nnx.split(layer)
    fun = lambda p, x: nnx.merge(graph, p)(x)
    _, after, _ = _migrate(fun, state)
    assert len(after.notes["migrated"]) >= 1
    without, with_ = (_simulated_sqnr(fun, state, X, migrate=m) for m in (False, True))
    assert with_ >= without + 10, (without, with_)


def _channels(fun, weights, x=X):
    """Per place the channels of the constants that take its factors up: name of the weight -> labels."""
    program = _before(fun, weights, x)
    named = {id(eqn): eqn for eqn in program.eqns}
    constants = lambda place: [
        (named[key[0]].invars[key[1]], m) for key, m in place.marks.items() if isinstance(key, tuple)
    ]
    return [
        {program.weight_of.get(atom): mark.labels.squeeze() for atom, mark in constants(place)}
        for place in places(program, Constants(program))
    ]


@pytest.mark.parametrize("rotate", [_rotate_halves, _rotate_neighbours])
def test_both_channels_of_a_rotary_pair_share_a_factor(rotate):
    found = _channels(lambda p, x: _attention(p, x, rotate), _attention_weights())
    (labels,) = [c for c in found if "query" in c and "key" in c]
    pairs = np.arange(SIZE // 2)
    head = np.tile(pairs, 2) if rotate is _rotate_halves else np.repeat(pairs, 2)
    expected = np.concatenate([head, head + SIZE // 2])
    for name in ("query", "key"):
        np.testing.assert_array_equal(labels[name], expected)


def test_without_rotation_each_channel_of_a_head_has_its_own():
    (labels,) = [c for c in _channels(_attention, _attention_weights()) if "query" in c]
    np.testing.assert_array_equal(labels["query"], np.arange(WIDTH))
    np.testing.assert_array_equal(labels["key"], np.arange(WIDTH))


def test_query_heads_share_the_factors_of_their_key_and_value_head():
    wide = {"query": normal(WIDTH, 4 * SIZE), "output": normal(4 * SIZE, WIDTH)}
    found = _channels(_attention, _attention_weights(kv_heads=2) | wide)
    shared = np.arange(2 * SIZE).reshape(2, 1, SIZE)
    for narrow, broad in (("key", "query"), ("value", "output")):
        (labels,) = [c for c in found if narrow in c]
        np.testing.assert_array_equal(labels[narrow], shared.ravel())
        np.testing.assert_array_equal(labels[broad], np.broadcast_to(shared, (2, 2, SIZE)).ravel())


def _balanced(weights):
    """Weights of one magnitude, so that neither side has anything to give."""
    return {name: np.sign(w).astype(np.float32) for name, w in weights.items()}


def test_balanced_channels_stay():
    """Inputs and weights of one magnitude per channel: every exponent gives the same factor to all, which is 1."""
    weights = _balanced({"gain": normal(WIDTH), "w": normal(WIDTH, 8), "v": normal(8, WIDTH)})
    x = np.sign(normal(4, 6, WIDTH)).astype(np.float32)
    before, after, decision = _migrate(_norm_model, weights, x)
    assert decision == {} and after.notes["migrated"] == []
    assert before.weights.keys() == after.weights.keys()
    for name, weight in before.weights.items():
        np.testing.assert_array_equal(weight, after.weights[name])


def _apart():
    """Weights of which a few channels between the two products are large."""
    return {"square": normal(WIDTH, WIDTH) * _outliers(WIDTH), "w": normal(WIDTH, 8) / _outliers(WIDTH)[:, None]}


#: Positively homogeneous functions: the factor passes to the weights before them.
PASSED = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "absolute": jnp.abs,
    "the_larger": lambda y: jnp.maximum(y, 0.5 * y),
    "relu6": lambda y: jnp.clip(y, 0, 6 * _outliers(WIDTH)),
    "clamped": lambda y: jax.lax.clamp(0.0, y, 1e3),
    "chosen": lambda y: jnp.where(y > 1.0, y, 0.5 * y),
}
#: What is computed otherwise is multiplied by 1 / s where products with weights read it.
MULTIPLIED = {
    "gelu": lambda y: jax.nn.gelu(y, approximate=False),
    "silu": jax.nn.silu,
    "squared": jnp.square,
    "by_itself": lambda y: y * y,
    "exponentials": lambda y: jnp.exp(0.01 * y),
    # The numbers that stand for infinity have no room for a factor.
    "numbers": jnp.nan_to_num,
    "larger_than_a_scalar": lambda y: jnp.maximum(y, jnp.sum(y) * 1e-3),
}


@pytest.mark.parametrize("name", PASSED | MULTIPLIED)
def test_factors_pass_homogeneous_functions_and_stay_behind_others(name):
    fun = lambda p, x: (PASSED | MULTIPLIED)[name](x @ p["square"]) @ p["w"]
    weights = _apart()
    _, after, decision = _migrate(fun, weights)
    assert len(decision) == 1
    assert [n["inserted"] for n in after.notes["migrated"]] == [name in MULTIPLIED]
    without, with_ = (_simulated_sqnr(fun, weights, X, migrate=m) for m in (False, True))
    # As in `HELPED`, less what the int12 index of a table loses of the channels that are small before it.
    assert with_ >= without + (6 if name in MULTIPLIED else 10), (without, with_)


WEIGHTS_OF_CONSTANTS = {
    "spread_out": lambda p, x: jnp.einsum(
        "bsh,bhk->bsk", jax.nn.gelu(x @ p["square"]), jnp.broadcast_to(p["w"], (*x.shape[:1], WIDTH, 8))
    ),
    "chosen": lambda p, x: jnp.where(x[..., :1] > 0, x @ p["square"], p["row"]) @ p["w"],
}


@pytest.mark.parametrize("name", WEIGHTS_OF_CONSTANTS)
def test_weights_that_are_spread_out_first(name):
    _, _, decision = _migrate(WEIGHTS_OF_CONSTANTS[name], _apart() | {"row": normal(WIDTH, seed=4)})
    assert len(decision) == 1


def test_two_products_may_contract_other_dimensions_of_one_value():
    """Channels and tokens, as a mixer does; each product gets the factors of its own."""
    weights = _apart() | {"t": normal(8, 6, seed=4)}

    def fun(p, x):
        y = jax.nn.gelu(x @ p["square"])
        return y @ p["w"], jnp.einsum("bsh,st->bth", y, p["t"])

    before = _before(fun, weights)
    found = places(before, Constants(before))
    decision = {place.id: Chosen(np.linspace(0.5, 2, place.channels), 0.5, 1.0) for place in found}
    assert [len(chosen.factors) for chosen in decision.values()] == [WIDTH, 8]
    after = migrate.apply(before, decision)
    assert sqnr_db(before.evaluate([X]), after.evaluate([X])) >= LEAST_DB


EMPTY = {
    "no_results": lambda p, x: (jax.nn.gelu(x @ p["square"]) @ p["w"][:, :0], x @ p["w"]),
    "no_rows": lambda p, x: (jax.nn.gelu(x[:0] @ p["square"]) @ p["w"], x @ p["w"]),
}


@pytest.mark.parametrize("name", EMPTY)
def test_products_of_nothing_have_no_place(name):
    before = _before(EMPTY[name], _apart())
    assert migrate.decide(before, [[X]], qc.Recipe(**NARROW)) == {}


def test_what_others_read_is_multiplied_for_products_alone():
    def fun(p, x):
        y = jnp.tanh(x @ p["square"]) * _outliers(WIDTH)
        return y @ p["w"], y

    before, after, decision = _migrate(fun, _apart())
    assert len(decision) == 1
    np.testing.assert_array_equal(before.evaluate([X])[1], after.evaluate([X])[1])


def test_a_product_is_not_added_for_little(monkeypatch):
    """Factors of 1.15 gain 0.6 dB here: behind a norm that would do, elsewhere it is a further product per element."""
    spread = np.where(np.arange(WIDTH) % 8 == 3, 1.15, 1.0).astype(np.float32)
    weights = {
        "square": np.sign(normal(WIDTH, WIDTH)) * spread,
        "w": np.sign(normal(WIDTH, 8, seed=5)) / spread[:, None],
    }
    fun = lambda p, x: jax.nn.silu(x @ p["square"]) @ p["w"]
    assert _migrate(fun, weights)[2] == {}
    monkeypatch.setattr(migrate, "LEAST_GAIN_FOR_COST_DB", migrate.LEAST_GAIN_DB)
    assert len(_migrate(fun, weights)[2]) == 1


NOWHERE = {
    "an_input": lambda p, x: x @ p["w"],
    "elements_of_an_input": lambda p, x: x[:, ::2] @ p["w"],
    "cumulative": lambda p, x: jnp.cumsum(x @ p["square"], axis=-1) @ p["w"],
}


@pytest.mark.parametrize("name", NOWHERE)
def test_nothing_moves_where_nothing_takes_it_up(name):
    weights = _apart()
    before, after, decision = _migrate(NOWHERE[name], weights)
    assert decision == {}
    for key, weight in before.weights.items():
        np.testing.assert_array_equal(weight, after.weights[key])


def test_half_precision_stays():
    weights = {k: jnp.asarray(w, jnp.bfloat16) for k, w in _norm_weights().items()}
    assert _channels(_norm_model, weights, X.astype(jnp.bfloat16)) == []


def test_a_weight_of_two_uses_is_changed_where_it_is_used():
    """The other use of the tied weight reads it as it was."""
    weights = _norm_weights()
    fun = lambda p, x: rms(x, p["gain"]) @ p["w"] + x @ p["w"]
    _, after, decision = _migrate(fun, weights)
    assert decision
    np.testing.assert_array_equal(after.weights["w"], weights["w"])


def test_without_samples_nothing_is_decided():
    before = _before(_norm_model, _norm_weights())
    assert migrate.decide(before, [], qc.Recipe()) == {}


def test_layers_kept_in_float_are_left_alone():
    rules = (qc.Rule(primitive="dot_general", keep_float=True),)
    _, _, decision = _migrate(_norm_model, _norm_weights(), rules=rules)
    assert decision == {}


def test_the_same_factors_at_every_batch_size():
    fun, weights, _ = HELPED["norm_and_residual"]
    _, after, decision = _migrate(fun, weights)
    small = migrate.apply(_before(fun, weights, X[:1]), decision)
    assert small.weights.keys() == after.weights.keys()
    for name, weight in after.weights.items():
        np.testing.assert_array_equal(small.weights[name], weight)


def test_a_model_called_at_another_batch_size_has_the_same_numbers():
    fun, weights, _ = HELPED["queries"]
    model = _quantized(fun, weights, X, migrate=True).compile()
    assert model.report.passes[[p.name for p in model.report.passes].index("migrate")].changed
    np.testing.assert_array_equal(np.asarray(model(X))[:2], np.asarray(model(X[:2])))


def test_a_decision_about_another_program_is_refused():
    decision = _migrate(_norm_model, _norm_weights())[2]
    other = _before(_norm_model, {"gain": normal(4), "w": normal(4, 8)}, normal(2, 3, 4))
    with pytest.raises(QuantizationError, match="other channels"):
        migrate.apply(other, decision)


def test_a_recipe_that_migrates_must_come_before_calibration():
    fun, weights, _ = HELPED["norm"]
    calibrated = qc.trace(fun, X, params=weights, verify="types").calibrate([X])
    with pytest.raises(RecipeError, match=r"differs in migrate .*before calibration"):
        calibrated.quantize(qc.Recipe(migrate=True))
