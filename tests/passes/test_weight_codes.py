"""How weights are typed, scaled and stored: groups along what a product sums over, few bits packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qcompiler import ops
from qcompiler.debug import reference
from qcompiler.errors import RecipeError
from qcompiler.ir import _compat
from qcompiler.numerics import packing
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import QuantType
from qcompiler.passes.insert_qdq import weight_scale
from qcompiler.recipe import Granularity, Recipe, Rule

INT4 = QuantType(4, symmetric=True, narrow_range=True)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def conv(x, w, groups=1, names=("NHWC", "HWIO", "NHWC")):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=names, feature_group_count=groups)


def weight_types(program):
    """The types of weights, region by region."""
    regions = [e.params for e in program.eqns if e.primitive is ops.region_p]
    types = program.notes["types"]
    return [t for r in regions for t, role in zip(types[r["id"]], r["roles"], strict=True) if role == "weight"]


#: (function, weight's shape, input's shape, group, name of the type)
SHAPES = {
    "dot": (lambda w, x: x @ w, (48, 6), (2, 48), 32, "int4sn[~0/32,1]"),
    "dot-weight-first": (lambda w, x: w @ x, (6, 48), (48, 3), 32, "int4sn[0,~1/32]"),
    "dot-heads": (lambda w, x: jnp.einsum("bhk,hkd->bd", x, w), (3, 40, 6), (2, 3, 40), 32, "int4sn[~0,~1/32,2]"),
    "dot-short-heads": (lambda w, x: jnp.einsum("bhk,hkd->bd", x, w), (9, 8, 6), (2, 9, 8), 32, "int4sn[~0/4,~1/8,2]"),
    "dot-experts": (lambda w, x: jnp.einsum("ebk,ekd->ebd", x, w), (2, 40, 6), (2, 3, 40), 32, "int4sn[0,~1/32,2]"),
    "dot-one-group": (lambda w, x: x @ w, (32, 6), (2, 32), 32, "int4sn[1]"),
    "conv": (lambda w, x: conv(x, w), (3, 3, 40, 6), (1, 5, 5, 40), 32, "int4sn[~0,~1,~2/32,3]"),
    "conv-taps": (lambda w, x: conv(x, w), (3, 3, 10, 6), (1, 5, 5, 10), 32, "int4sn[~0,~1/3,~2/10,3]"),
    "conv-whole-window": (lambda w, x: conv(x, w), (3, 3, 3, 6), (1, 5, 5, 3), 32, "int4sn[3]"),
    "conv-depthwise": (lambda w, x: conv(x, w, 40), (3, 3, 1, 40), (1, 5, 5, 40), 32, "int4sn[3]"),
    "conv-nchw": (
        lambda w, x: conv(x, w, names=("NCHW", "OIHW", "NCHW")), (6, 40, 3, 3), (1, 40, 5, 5), 32,
        "int4sn[0,~1/32,~2,~3]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_groups_lie_along_what_is_summed(passes, name):
    fun, weight, shape, group, expected = SHAPES[name]
    # Ranges that differ from row to row, so that steps do.
    w = normal(*weight) * np.exp2(normal(*weight[:-1], 1, seed=1))
    recipe = Recipe(weight=INT4, granularity=Granularity(input_group=group))
    found = passes(fun, w, [normal(*shape, seed=2)], recipe)
    (qtype,) = weight_types(found["assign_precision"])
    assert qtype.name == expected
    (pair,) = (e for e in found["insert_qdq"].eqns if e.primitive is ops.fake_quantize_p and e.params["type"] == qtype)
    scale, zero = weight_scale(found["insert_qdq"].weights[found["insert_qdq"].weight_of[pair.invars[0]]], qtype)
    # The simulation multiplies by the scales that `weight_scale` says, and the integers by what is exactly the same.
    (simulated,) = values_of(found["insert_qdq"], [pair.invars[1]])
    np.testing.assert_array_equal(simulated, scale)
    assert not np.any(zero)
    (unpacked,) = (e for e in found["fold_zero_points"].eqns if e.primitive is ops.unpack_p)
    (q8,) = values_of(found["fold_zero_points"], [unpacked.outvars[0]])
    fused = found["fuse"].weights
    channel = next(scale for name, scale in fused.items() if name.endswith(f"{qtype.name}/scale"))
    (fake,) = values_of(found["insert_qdq"], [pair.outvars[0]])
    np.testing.assert_array_equal(q8 * channel, fake)


def values_of(program, wanted):
    """Values that a program computes from its weights alone, op by op."""
    env = dict(zip(program.invars, program.weights.values(), strict=False))
    for eqn in program.eqns:
        if all(isinstance(v, _compat.Literal) or v in env for v in eqn.invars):
            args = [v.val if isinstance(v, _compat.Literal) else env[v] for v in eqn.invars]
            env.update(zip(eqn.outvars, _compat.bind(eqn, args), strict=True))
    return [np.asarray(env[v]) for v in wanted]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_few_bits_are_packed_and_unpacked(passes, bits, granularity, symmetric):
    w = normal(48, 7)
    recipe = Recipe(weight=QuantType(bits, symmetric=symmetric), granularity=granularity)
    found = passes(lambda w, x: x @ w, w, [normal(3, 48, seed=2)], recipe)
    program = found["fold_zero_points"]
    (unpacked,) = (e for e in program.eqns if e.primitive is ops.unpack_p)
    packed = program.weights[program.weight_of[unpacked.invars[0]]]
    assert packed.dtype == np.uint8 and packed.nbytes == packing.packed_size(w.size, bits)
    assert packed.nbytes == pytest.approx(w.size * bits / 8, abs=1)
    assert not any(a.size >= w.size for a in program.weights.values())
    # The same integers by NumPy, which takes the bytes apart bit by bit.
    (by_program,) = values_of(program, unpacked.outvars)
    operands = [program.weights[program.weight_of[v]] for v in unpacked.invars]
    np.testing.assert_array_equal(by_program, reference.equation(unpacked, operands)[0])


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_more_bits_are_stored_a_byte_each(passes, bits):
    recipe = Recipe(weight=QuantType(bits, symmetric=True), granularity="group32")
    program = passes(lambda w, x: x @ w, normal(64, 7), [normal(3, 64, seed=2)], recipe)["fold_zero_points"]
    assert not any(e.primitive is ops.unpack_p for e in program.eqns)
    assert (np.int8, (64, 7)) in [(a.dtype, a.shape) for a in program.weights.values()]


def test_groups_say_nothing_of_eight_bits(passes):
    """Steps of int8 cannot be finer than int8: the program is that of scales per channel."""
    found = [
        passes(lambda w, x: x @ w, normal(64, 7), [normal(3, 64, seed=2)], Recipe(granularity=g))["fold_zero_points"]
        for g in ("channel", "group32")
    ]
    assert found[0].text() == found[1].text()


def test_rules_group_single_layers(passes):
    w = {"a": normal(64, 64), "b": normal(64, 8)}
    fun = lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"]
    rules = (Rule(primitive="dot_general", weight=INT4, granularity="group64"),)
    wide = Recipe(rules=rules)
    types = weight_types(passes(fun, w, [normal(3, 64, seed=2)], wide, until="assign_precision")["assign_precision"])
    assert [t.name for t in types] == ["int4sn[1]", "int4sn[1]"]
    small = Recipe(weight=INT4, granularity=Granularity(channel_group=4, input_group=16))
    types = weight_types(passes(fun, w, [normal(3, 64, seed=2)], small, until="assign_precision")["assign_precision"])
    assert [t.name for t in types] == ["int4sn[~0/16,1/4]"] * 2
    whole = Recipe(weight=INT4, granularity=Granularity(channel_group=None, input_group=16), equalize=False)
    types = weight_types(passes(fun, w, [normal(3, 64, seed=2)], whole, until="assign_precision")["assign_precision"])
    assert [t.name for t in types] == ["int4sn[~0/16]"] * 2


def test_a_weight_of_two_layers_is_packed_once(passes):
    w = normal(64, 64)
    recipe = Recipe(weight=INT4, granularity="group32")
    program = passes(lambda w, x: jax.nn.relu(x @ w) @ w, w, [normal(3, 64, seed=2)], recipe)["fold_zero_points"]
    assert [a.size for a in program.weights.values() if a.dtype == np.uint8] == [64 * 64 // 2]


def test_channels_whose_bias_needs_room_get_coarser_steps(passes):
    """A channel of tiny weights with a large bias: its scale is raised, and its steps are chosen for that."""
    w = {"w": normal(64, 4), "b": np.array([1, 50, -30, 2], np.float32)}
    w["w"][:, 1] *= 1e-9
    fun = lambda w, x: x @ w["w"] + w["b"]
    recipe = Recipe(weight=INT4, granularity="group32")
    x = normal(3, 64, seed=2)
    program = passes(fun, w, [x], recipe)["fold_zero_points"]
    (got,) = reference.evaluate(program, [x])
    np.testing.assert_allclose(got[:, 1], 50, rtol=1e-3)


def test_groups_and_a_given_range_are_a_contradiction(passes):
    recipe = Recipe(weight=INT4, granularity="group32", rules=(Rule(weight_range=(-1, 1)),))
    with pytest.raises(RecipeError, match="give no range, or no input_group"):
        passes(lambda w, x: x @ w, normal(64, 4), [normal(3, 64, seed=2)], recipe, until="assign_precision")


def test_a_given_encoding_goes_before_groups(passes):
    given = Encoding(INT4, np.float32(0.25), np.int32(0))
    recipe = Recipe(weight=INT4, granularity="group32", rules=(Rule(weight_range=given),))
    found = passes(lambda w, x: x @ w, normal(64, 4), [normal(3, 64, seed=2)], recipe)
    (qtype,) = weight_types(found["assign_precision"])
    assert not qtype.contracted
    assert any(np.all(a == np.float32(0.25)) for a in found["insert_qdq"].weights.values())
