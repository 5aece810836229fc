"""Regions grow as documented, nothing is computed otherwise than before, and what stays float is listed."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

from qcompiler import ops
from qcompiler.ir import _compat, classes, identity, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.tracing import trace
from qcompiler.passes import partition as partition_module
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify

WEIGHTS = {
    "w": normal(8, 8),
    "v": normal(8, 8, seed=1),
    "b": normal(8, seed=2),
    "s": np.abs(normal(8, seed=3)) + np.float32(0.5),
    "k": normal(3, 3, 3, 8, seed=4),
    "d": normal(1, 1, 8, 8, seed=5),
}
X = normal(4, 8, seed=6)
IMAGE = normal(2, 6, 6, 3, seed=7)


def _prepare(fun, *inputs, weights=WEIGHTS):
    avals = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs)
    return fold_norms(simplify(trace(fun, weights, avals)))


def _partition(fun, *inputs, weights=WEIGHTS):
    """The partitioned program, checked for what holds of every program."""
    before = _prepare(fun, *inputs, weights=weights)
    after = partition(before)
    _compat.check_types(after.jaxpr)
    for a, b in zip(before.evaluate(inputs), after.evaluate(inputs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    ids = [e.params["id"] for e in _regions(after)]
    assert len(set(ids)) == len(ids) and len(set(after.ids.values())) == len(after.ids)
    _check_census(before)
    return after


def _check_census(program):
    """Every equation that computes from inputs is in a region, or outside: an island, or on no real numbers."""
    planner = partition_module._Planner(program)
    regions, islands = planner.run()
    constants = Constants(program)
    inside = collections.Counter(id(e) for r in regions for e in r.members)
    listed = {id(e) for e, _ in islands}
    tables = {id(e) for r in regions if r.kind == "table" for e in r.members}
    for eqn in replay.live_equations(program.jaxpr):
        if eqn.outvars[0] in constants:
            continue
        assert inside[id(eqn)] or id(eqn) in planner.outside
        # Only a table computes again what others compute too.
        assert inside[id(eqn)] <= 1 or id(eqn) in tables
        assert id(eqn) not in listed or id(eqn) in planner.outside


def _regions(program):
    return [e for e in program.eqns if e.primitive is ops.region_p]


def _kinds(program):
    return [e.params["kind"] for e in _regions(program)]


def _body(eqn):
    return [e.primitive.name for e in _compat.open_jaxpr(eqn.params["body"]).eqns]


def _islands(program):
    return [i["primitive"] for i in program.notes["islands"]]


def _conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


# Kinds


@pytest.mark.parametrize(
    ("fun", "x", "kind", "body", "roles"),
    [
        (
            lambda p, x: jax.nn.relu(_conv(x, p["k"]) + p["b"]),
            IMAGE,
            "conv",
            ["conv_general_dilated", "add", "max"],
            ("activation", "weight", "bias"),
        ),
        (lambda p, x: x @ p["w"] + p["b"], X, "dot", ["dot_general", "add"], ("activation", "weight", "bias")),
        (lambda p, x: p["w"] @ x.T, X.T.copy().T, "dot", ["dot_general"], ("weight", "activation")),
        (lambda p, x: jnp.mean(x, axis=1), X, "reduce", ["reduce_sum", "div"], ("reduced",)),
        (lambda p, x: jnp.clip(x * p["s"] - 1.0, -1.0, 2.0), X, "linear", None, ("term", "constant")),
        (lambda p, x: jax.nn.relu6(x), X, "linear", None, ("term",)),
        (lambda p, x: x + x[::-1], X, "linear", ["add"], None),
        (lambda p, x: jnp.tanh(x), X, "table", ["tanh"], ("index",)),
        (lambda p, x: x.reshape(2, 16).T, X, "view", ["reshape", "transpose"], ("value",)),
        (lambda p, x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID"), X, "view", None, ("value",)),
        (lambda p, x: jnp.max(x, axis=0), X, "view", ["reduce_max"], ("value",)),
    ],
    ids=["conv", "dot", "left", "mean", "affine_clamp", "relu6", "join", "table", "shape", "max_pool", "max"],
)
def test_each_kind(fun, x, kind, body, roles):
    program = _partition(fun, x)
    last = _regions(program)[-1]
    assert last.params["kind"] == kind and not _islands(program)
    assert body is None or _body(last) == body
    assert roles is None or last.params["roles"] == roles


def test_products_of_activations_have_two_activations():
    program = _partition(lambda p, x: x @ (x @ p["w"]).T, X)
    assert [e.params["roles"] for e in _regions(program) if e.params["kind"] == "dot"] == [
        ("activation", "weight"),
        ("activation", "activation"),
    ]


def test_one_value_in_two_places_of_a_product_is_one_operand():
    program = _partition(lambda p, x: x @ x, normal(4, 4))
    assert [e.params["roles"] for e in _regions(program)] == [("activation",)]


def test_a_clamp_that_coincides_with_affine_steps_stays_linear():
    program = _partition(lambda p, x: -jnp.clip(2.0 * jax.nn.relu(1.0 - x) + 0.5, 1.0, 3.0) / 4.0, X)
    assert _kinds(program) == ["linear"]


# Joins


def test_a_residual_join_takes_one_product():
    def fun(p, x):
        return jax.nn.relu(x @ p["w"] + p["b"] + x @ p["v"])

    program = _partition(fun, X)
    assert _kinds(program) == ["dot", "dot"]
    assert sum("term" in e.params["roles"] for e in _regions(program)) == 1
    assert _body(_regions(program)[1])[-2:] == ["add", "max"]


def test_a_basic_block_is_two_regions():
    def fun(p, x):
        y = jax.nn.relu(_conv(x, p["d"]) * p["s"] + p["b"])
        return jax.nn.relu(x + _conv(y, p["d"]))

    program = _partition(fun, normal(2, 4, 4, 8))
    assert _kinds(program) == ["conv", "conv"]
    assert sorted(_regions(program)[1].params["roles"]) == ["activation", "term", "weight"]


def test_clamps_are_not_summed_under_a_join():
    program = _partition(lambda p, x: jax.nn.relu(x @ p["w"]) + jnp.clip(x @ p["v"], -1.0, 1.0), X)
    assert sorted(_kinds(program)) == ["dot", "dot", "linear"]
    join = next(e for e in _regions(program) if e.params["kind"] == "linear")
    assert _body(join) == ["add"] and join.params["roles"] == ("term", "term")


def test_three_terms_join_in_one_region():
    program = _partition(lambda p, x: (x @ p["w"]) * 2.0 - (x[::-1] - x * p["s"]), X)
    assert collections.Counter(_kinds(program)) == {"dot": 1, "view": 1}


def test_a_value_that_is_read_twice_or_is_a_result_is_a_boundary():
    def fun(p, x):
        y = x @ p["w"] + p["b"]
        z = jax.nn.relu(y)
        return y, z @ p["v"], z * p["s"]

    program = _partition(fun, X)
    assert _kinds(program) == ["dot", "linear", "dot", "linear"]


def test_a_product_read_by_another_product_is_a_boundary():
    assert _kinds(_partition(lambda p, x: (x @ p["w"]) @ p["v"], X)) == ["dot", "dot"]


# Tables


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: x * jax.nn.sigmoid(x),
        jax.nn.silu,
        jax.nn.hard_swish,
        lambda x: jax.nn.gelu(x, approximate=True),
        lambda x: jax.nn.gelu(x, approximate=False),
        jax.nn.softplus,
        jax.nn.elu,
        jax.nn.mish,
        lambda x: x**3 - 2.0 / (1.0 + x * x),
        lambda x: jnp.where(x > 0.3, jnp.exp(-x), x - 1.0),
        lambda x: jnp.where(jnp.isnan(x) | (x > 1.0), 0.0, x * x),
    ],
)
@pytest.mark.parametrize("behind", [False, True], ids=["of_input", "of_product"])
def test_a_function_of_one_value_is_one_table(fun, behind):
    program = _partition((lambda p, x: fun(x @ p["w"] + p["b"])) if behind else (lambda p, x: fun(x)), X)
    assert not _islands(program)
    assert _kinds(program) == (["dot"] if behind else []) + ["table"]
    assert _regions(program)[-1].params["roles"] == ("index",)


def test_a_sum_of_one_value_with_itself_is_finer_than_a_table():
    assert _kinds(_partition(lambda p, x: x + x, X)) == ["linear"]
    assert _kinds(_partition(lambda p, x: 2.0 * x - jax.nn.relu(x), X)) == ["linear", "linear"]


@pytest.mark.parametrize(
    "fun", [jax.nn.relu, jax.nn.relu6, jax.nn.hard_sigmoid, lambda x: 1.0 - jnp.clip(-2.0 * x, -1.0, 3.0)]
)
def test_scalar_affine_steps_and_clamps_need_no_table(fun):
    assert _kinds(_partition(lambda p, x: fun(x), X)) == ["linear"]
    assert _kinds(_partition(lambda p, x: fun(x @ p["w"]), X)) == ["dot"]


def test_arrays_per_channel_are_no_tables():
    program = _partition(lambda p, x: jnp.tanh(x * p["s"] + p["b"]), X)
    assert _kinds(program) == ["linear", "table"]
    program = _partition(lambda p, x: jnp.maximum(x, p["s"]), X)
    assert _kinds(program) == ["linear"] and not _islands(program)


@pytest.mark.parametrize(
    "fun",
    [
        lambda p, x: jax.nn.leaky_relu(x),
        lambda p, x: jnp.where(x >= 0, x, p["s"] * x),
        lambda p, x: jnp.maximum(x, p["s"] * x) - 1.0,
        lambda p, x: -jnp.abs(2.0 * x + p["b"]),
        lambda p, x: jnp.where((x > -1.0) & (x < p["s"]), x, jnp.clip(0.5 * x, -2.0, 2.0)),
    ],
    ids=["leaky_relu", "prelu", "maximum", "abs", "two_comparisons"],
)
def test_pieces_of_lines_join_the_product_before_them(fun):
    program = _partition(lambda p, x: fun(p, x @ p["w"]), X)
    assert _kinds(program) == ["dot"] and not _islands(program)


def test_many_choices_in_one_function_of_one_value_are_a_table():
    def fun(p, x):
        for k in range(4):
            x = jnp.abs(x) - 1.0 / (k + 2)
        return x

    assert _kinds(_partition(fun, X)) == ["table"]


def test_choices_of_several_values_join():
    program = _partition(lambda p, x: jax.nn.relu(jnp.maximum(x @ p["w"], x @ p["v"])), X)
    assert _kinds(program) == ["dot", "dot"] and "term" in _regions(program)[-1].params["roles"]
    program = _partition(lambda p, x, y: jnp.where(y > x, x @ p["w"], 0.0), X, X)
    assert _kinds(program) == ["dot"] and not _islands(program)


def test_what_a_product_reads_is_stored_also_where_a_sum_of_the_region_reads_it():
    def fun(p, x):
        y = x + jax.nn.relu(x @ p["w"])
        return y @ p["v"] + y

    program = _partition(fun, X)
    assert _kinds(program) == ["dot", "linear", "dot"]
    assert _regions(program)[-1].params["roles"] == ("activation", "weight", "term")


def test_a_choice_under_a_sum_is_a_boundary():
    assert _kinds(_partition(lambda p, x: jnp.abs(x @ p["w"]) + x, X)) == ["dot", "linear"]


def test_products_of_two_activations():
    program = _partition(lambda p, x: jax.nn.relu(x * (x @ p["w"]) * p["s"] + x), X)
    assert _kinds(program) == ["dot", "product"] and not _islands(program)
    assert _regions(program)[-1].params["roles"] == ("factor", "factor", "constant", "term")
    gate = _partition(lambda p, x: x * jax.nn.sigmoid(x.mean(axis=0, keepdims=True) @ p["w"]), X)
    assert _kinds(gate) == ["reduce", "view", "dot", "table", "product"]


def test_a_product_of_two_functions_of_one_value_is_a_table_also_under_a_sum():
    assert _kinds(_partition(lambda p, x: x[::-1] + x * jnp.tanh(x), X)) == ["view", "table", "linear"]


def test_sums_of_shapes_that_broadcast_join():
    program = _partition(lambda p, x, y: x - y, X, X[:, :1].copy())
    assert _kinds(program) == ["linear"] and not _islands(program)
    # A statistic that meets its own row is no sum of stored values.
    program = _partition(lambda p, x: x - x.mean(axis=1, keepdims=True), X)
    assert _kinds(program) == ["wide"] and not _islands(program)


@pytest.mark.parametrize(
    ("fun", "kind"),
    [
        (lambda x: jnp.concatenate([x, x[:, :3]], axis=1), "concat"),
        (lambda x: jnp.stack([x, -x]), "concat"),
        (lambda x: jnp.pad(x, 1), "view"),
        (lambda x: lax.pad(x, -jnp.inf, [(1, 0, 0), (-1, 0, 2)]), "view"),
        (lambda x: jnp.pad(x, 1, constant_values=2.0), "concat"),
        (lambda x: x[:, jnp.array([3, 0, 0])], "view"),
        (lambda x: jnp.tile(x, (2, 1)), "view"),
        (lambda x: jnp.argmax(x, axis=1), "view"),
        (lambda x: jnp.cumsum(x, axis=1), "reduce"),
        (lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2), (1, 1), "SAME") / 4.0, "reduce"),
        (lambda x: x > 0.5, "linear"),
        (lambda x: x[:, :4] >= x[:, 4:], "linear"),
    ],
    ids="concatenate stack pad mask_and_crop pad_two gather tile argmax cumsum average_pool greater compare".split(),
)
def test_more_kinds(fun, kind):
    program = _partition(lambda p, x: fun(x), X)
    assert _kinds(program)[-1] == kind and not _islands(program)


def test_split_needs_no_primitive_of_its_own():
    program = _partition(lambda p, x: (lambda a, b: a * jax.nn.sigmoid(b))(*jnp.split(x @ p["w"], 2, axis=1)), X)
    assert _kinds(program) == ["dot", "view", "view", "table", "product"]


def test_integers_that_become_real_enter_as_they_are():
    bytes_ = np.arange(32, dtype=np.uint8).reshape(4, 8)
    program = _partition(lambda p, x: (x.astype(jnp.float32) / 255.0 - 0.5) @ p["w"], bytes_)
    assert _kinds(program) == ["linear", "dot"] and _regions(program)[0].params["roles"] == ("integer",)


def test_a_cone_computes_again_what_two_tables_share():
    def fun(p, x):
        shared = jnp.exp(x @ p["w"])
        return jnp.sin(shared), shared * shared

    program = _partition(fun, X)
    assert _kinds(program) == ["dot", "table", "table"]
    assert [_body(e)[0] for e in _regions(program)[1:]] == ["exp", "exp"]


def test_a_comparison_that_others_read_too():
    """Each region compares for itself; the truth values are a result of their own."""

    def fun(p, x):
        y = x @ p["w"]
        positive = y > 0
        return jnp.where(positive, y, 0.1 * y), positive, jnp.where(positive, x, y)

    program = _partition(fun, X)
    assert _kinds(program) == ["dot", "linear", "linear", "linear"] and not _islands(program)


def test_a_spread_number_that_a_table_and_an_island_read():
    def fun(p, x):
        return jnp.where(x > 0, jnp.exp(x), 0.5 * jnp.ones_like(x)), jnp.nextafter(x.T, 0.5 * jnp.ones_like(x).T)

    program = _partition(fun, X)
    assert "table" in _kinds(program)


# Islands


def test_islands_are_listed_with_reason_and_line():
    def fun(p, x):
        y = lax.igamma(jnp.exp(x), jnp.exp(x @ p["w"]))
        with jax.named_scope("gate"):
            z = jnp.nextafter(y, x @ p["v"])
        return z @ p["w"]

    program = _partition(fun, X)
    first = fun.__code__.co_firstlineno
    gamma, gate = program.notes["islands"]
    assert (gamma["primitive"], gamma["module_path"]) == ("igamma", "") and "no integer rule" in gamma["reason"]
    assert (gate["primitive"], gate["module_path"]) == ("nextafter", "gate") and "no integer rule" in gate["reason"]
    assert f"test_partition.py:{first + 1} " in gamma["source"] and f"test_partition.py:{first + 3} " in gate["source"]
    assert [e.primitive.name for e in program.eqns if e.primitive is not ops.region_p] == ["igamma", "nextafter"]
    assert program.notes["total_macs"] == 3 * 4 * 8 * 8


def test_islands_and_regions_of_one_primitive_have_ids_of_their_own():
    """The table took `nextafter#0`; the island must not get that id, or both would share one range."""

    def fun(p, x):
        return jnp.nextafter(jnp.nextafter(jnp.exp(x @ p["w"]), 1.0), x @ p["v"]) @ p["w"]

    program = _partition(fun, X)
    assert [e.params["id"] for e in _regions(program) if e.params["kind"] == "table"] == ["nextafter#0"]
    assert [program.ids[e.outvars[0]] for e in program.eqns if e.primitive.name == "nextafter"] == ["nextafter#1"]


@pytest.mark.parametrize(
    ("fun", "inputs", "reason"),
    [
        (lambda p, x: _conv(IMAGE, x), (WEIGHTS["k"],), "of a constant"),
        (lambda p, x: lax.bitcast_convert_type(x, jnp.int32), (X,), "computes no real number"),
        (lambda p, x: lax.igamma(jnp.exp(x), x[::-1]), (X,), "no integer rule"),
    ],
    ids=["image", "bits", "igamma"],
)
def test_other_things_are_islands(fun, inputs, reason):
    program = _partition(fun, *inputs)
    assert any(reason in i["reason"] for i in program.notes["islands"])
    assert not set(_kinds(program)) - {"view", "linear", "table"}


def test_multiply_adds_of_loops_and_branches_count():
    def fun(p, x):
        y = lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, None, length=3000)[0]
        return lax.cond(y[0, 0] > 0, lambda: y @ p["w"], lambda: y), y @ p["v"]

    program, product = _partition(fun, X), 4 * 8 * 8
    macs = {e.primitive.name: classes.multiply_adds(e) for e in program.eqns if e.primitive.name in ("scan", "cond")}
    assert macs == {"scan": 3000 * product, "cond": product}
    assert program.notes["total_macs"] == 3002 * product


def test_integer_programs_pass_untouched():
    def fun(p, i):
        return jnp.where(i > 2, i * 3, -i) + jnp.sum(i), jnp.dot(i, i)

    x = np.arange(5, dtype=np.int32)
    before = _prepare(fun, x)
    after = _partition(fun, x)
    assert not _regions(after) and not _islands(after)
    assert [e.primitive.name for e in after.eqns] == [e.primitive.name for e in before.eqns]


def test_results_that_are_inputs_constants_or_the_same_twice():
    def fun(p, x):
        y = x @ p["w"]
        return x, p["b"], y, y, 1.0

    assert _kinds(_partition(fun, X)) == ["dot"]


# Types, ids, lines


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_casts_between_floats_are_part_of_a_linear_region(dtype):
    def fun(p, x):
        y = jnp.dot(x.astype(dtype), p["w"].astype(dtype)).astype(jnp.float32)
        return jax.nn.relu(y * p["s"] + p["b"])

    program = _partition(fun, X)
    assert _kinds(program) == ["linear", "dot"]


def _model(p, x):
    with jax.named_scope("stem"):
        y = jax.nn.relu(_conv(x, p["k"]) * p["s"] + p["b"])
    for k in range(2):
        with jax.named_scope(f"block{k}"):
            y = jax.nn.silu(y + _conv(y, p["d"]))
    return jnp.mean(y, axis=(1, 2)) @ p["w"] * jnp.exp(jnp.max(y))


def test_ids_do_not_depend_on_the_batch_size():
    one, four = (_partition(_model, normal(n, 6, 6, 3)) for n in (1, 4))
    assert list(one.ids.values()) == list(four.ids.values())
    assert [(e.params["id"], e.params["kind"], e.params["roles"]) for e in _regions(one)] == [
        (e.params["id"], e.params["kind"], e.params["roles"]) for e in _regions(four)
    ]
    assert [e.params["id"] for e in _regions(one)][:3] == [
        "stem/conv_general_dilated#0",
        "block0/conv_general_dilated#0",
        "block0/mul#0",
    ]


def test_bodies_keep_the_lines_and_paths_of_their_equations():
    program = _partition(_model, IMAGE)
    region = _regions(program)[0]
    eqns = _compat.open_jaxpr(region.params["body"]).eqns
    assert [identity.source_of(e).partition(" ")[2] for e in eqns] == ["(_conv)", "(_model)", "(_model)"]
    assert {identity.module_path(e) for e in eqns} == {"stem"}


def test_partition_works_on_a_program_that_was_not_simplified():
    before = trace(_model, WEIGHTS, (jax.ShapeDtypeStruct(IMAGE.shape, IMAGE.dtype),))
    after = partition(before)
    for a, b in zip(before.evaluate([IMAGE]), after.evaluate([IMAGE]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert "conv" in _kinds(after)
