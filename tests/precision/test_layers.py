"""What a program says about its layers: costs, shared types, and where reals meet integers."""

import dataclasses

import jax
import numpy as np
import pytest
from draws import normal
from mixed import BATCHES, FIRST, HEAD, LAYERS, SECOND, STEM, WEIGHTS, Q, V, calibrated, small, small_net

import qcompiler as qc
from qcompiler import candidates
from qcompiler.candidates import Candidate
from qcompiler.errors import RecipeError
from qcompiler.numerics.types import ACTIVATION, WEIGHT
from qcompiler.passes import observe
from qcompiler.precision import layers

ALL = candidates.named(("int4", "int8", "int16", "bfloat16", "float32"))


def _layers(stage):
    return layers.layers_of(observe.without_observers(stage.program))


def _by_id(found):
    return {layer.id: layer for layer in found}


def test_layers_are_products_with_weights_in_program_order():
    found = _layers(small())
    assert [layer.id for layer in found] == list(LAYERS)
    stem, head = found[0], found[-1]
    assert stem.macs == 8 * 6 * 6 * 8 * 3 * 3 * 2 and head.macs == 8 * 8 * 5
    assert (stem.elements, stem.steps) == (3 * 3 * 2 * 8, 1)
    np.testing.assert_array_equal(stem.array, WEIGHTS["k"])


def test_products_of_activations_are_no_layers():
    stage = calibrated(lambda p, x: (x @ p["w"]) @ x.T, {"w": normal(4, 4)}, [normal(3, 4)])
    assert [layer.id for layer in _layers(stage)] == ["dot_general#0"]


def test_layers_that_read_one_value_or_one_weight_share_a_type():
    groups = layers.groups_of(_layers(small()), ALL)
    assert {g.layers for g in groups} == {(Q, V), (FIRST, SECOND)}
    reading, tied = sorted(groups, key=lambda g: g.layers != (Q, V))
    assert reading.label["int4"] == reading.label["int8"] == ACTIVATION
    assert reading.label["bfloat16"] == reading.label["float32"] != reading.label["int16"] != reading.label["int8"]
    assert tied.label["int8"] == tied.label["int16"] and len(set(tied.label.values())) == 4


def test_views_of_a_value_are_that_value_and_other_values_are_not():
    def views(p, x):
        return x.reshape(-1, 4) @ p["a"], x.T.reshape(-1, 4) @ p["b"], jax.nn.relu(x) @ p["c"]

    stage = calibrated(views, {n: normal(4, 4, seed=k) for k, n in enumerate("abc")}, [normal(8, 4)])
    (group,) = layers.groups_of(_layers(stage), ALL)
    assert group.layers == ("dot_general#0", "dot_general#1")


def test_a_tied_weight_is_paid_for_once():
    found = _by_id(_layers(small()))
    assert found[FIRST].elements == 64 and found[SECOND].elements == 0
    assert layers.static_costs(found[SECOND], ALL["int8"])["weight_bytes"] == 0
    without_first = _by_id(layers.free_layers(_layers(small()), [FIRST]))
    assert without_first[SECOND].elements == 64 and FIRST not in without_first
    assert layers.static_costs(found[SECOND], ALL["int8"])["bit_operations"] == 8 * 8 * found[SECOND].macs


def test_costs_follow_from_shapes():
    stem = _by_id(_layers(small()))[STEM]
    costs = {name: layers.static_costs(stem, candidate) for name, candidate in ALL.items()}
    assert {n: c["weight_bits"] / stem.elements for n, c in costs.items()} == {
        "int4": 4, "int8": 8, "int16": 8, "bfloat16": 16, "float32": 32
    }  # fmt: skip
    assert {n: c["bit_operations"] / stem.macs for n, c in costs.items()} == {
        "int4": 32, "int8": 64, "int16": 128, "bfloat16": 256, "float32": 1024
    }  # fmt: skip
    assert costs["int8"]["weight_bytes"] == stem.elements + 4 * 8
    assert costs["int4"]["weight_bytes"] == stem.elements / 2 + 4 * 8
    assert costs["bfloat16"]["weight_bytes"] == 2 * stem.elements
    groups = dataclasses.replace(ALL["int8"], granularity=qc.Granularity(channel_group=4))
    assert layers.static_costs(stem, groups)["weight_bytes"] == stem.elements + 4 * 2
    tensor = Candidate(WEIGHT, ACTIVATION, "tensor")
    assert layers.static_costs(stem, tensor)["weight_bytes"] == stem.elements + 4


@pytest.mark.parametrize("name", ["int4", "int8", "bfloat16", "float32"])
def test_weight_bytes_are_those_of_the_compiled_program(name):
    """But for scales, multipliers, shifts and biases of the integers, which are all that it has besides."""
    config = qc.precision.Assignment(ALL, {layer: qc.precision.Choice(name) for layer in LAYERS})
    quantized = small().quantize(qc.Recipe(precision=config))
    arrays = quantized.program.weights.values()
    held = sum(a.nbytes for a in arrays if a.dtype == np.uint8 or (a.ndim >= 2 and min(a.shape[-2:]) > 1))
    assert held == sum(layer.code_bytes(ALL[name]) for layer in _layers(small()))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_groups_along_the_input_cost_a_step_each(symmetric):
    """96 inputs in groups of 32; the program holds the steps (and zero points) as int8, the codes packed."""
    weight = dataclasses.replace(candidates.NAMED["int4_group32"].weight, symmetric=symmetric, narrow_range=symmetric)
    grouped = dataclasses.replace(candidates.NAMED["int4_group32"], weight=weight)
    stage = calibrated(lambda p, x: x @ p["w"], {"w": normal(96, 8)}, [normal(4, 96)])
    (layer,) = _layers(stage)
    steps = 3 * 8 * (1 if symmetric else 2)
    assert layer.code_bytes(grouped) == 96 * 8 // 2 and layer.scale_bytes(grouped) == 4 * 8 + steps
    chosen = qc.precision.Assignment({"grouped": grouped}, {layer.id: qc.precision.Choice("grouped")})
    arrays = stage.quantize(qc.Recipe(precision=chosen)).program.weights.values()
    assert sum(a.nbytes for a in arrays if a.dtype == np.uint8) == layer.code_bytes(grouped)
    assert sum(a.nbytes for a in arrays if a.dtype == np.int8) == steps


def test_a_layer_in_a_loop_costs_every_step():
    def loop(p, x):
        return jax.lax.scan(lambda h, row: (jax.nn.relu(h @ p["w"] + row), h @ p["v"]), x[0], x)

    weights = {"w": normal(4, 4, scale=0.3), "v": normal(4, 4, seed=1)}
    stage = calibrated(loop, weights, [normal(300, 2, 4)])
    found = _layers(stage)
    assert len(found) == 2 and all(layer.steps == 300 and layer.macs == 300 * 2 * 4 * 4 for layer in found)
    assert [g.layers for g in layers.groups_of(found, ALL)] == [tuple(layer.id for layer in found)]


def test_reals_and_integers_meet_at_edges():
    """`second` alone reads what `first` makes; the stem's result is converted once for its two readers."""
    found = _layers(small())
    edges = layers.conversions_of(found, ALL, lambda n: {"latency_ms": float(n)})
    assert {(e.first, e.second) for e in edges} == {(STEM, Q), (FIRST, SECOND)}
    edge = next(e for e in edges if e.second == Q)
    pair = lambda a, b: edge.cost.get((edge.label[a], edge.label[b]), {}).get("latency_ms", 0.0)
    assert pair("int8", "float32") == pair("bfloat16", "int4") == 8 * 6 * 6 * 8
    assert pair("int8", "int16") == pair("bfloat16", "float32") == 0.0
    layer = _by_id(found)
    # The model's input is quantized for the stem; the sum and the mean read what is no layer's own.
    assert layers.entering(found, layer[STEM]) == 8 * 6 * 6 * 2
    assert layers.entering(found, layer[HEAD]) == 8 * 8 + 8 * 5
    only_integers = {n: c for n, c in ALL.items() if not c.is_float}
    assert layers.conversions_of(found, only_integers, lambda n: {}) == []


def test_nothing_to_choose_for_is_an_error():
    with pytest.raises(RecipeError, match="no product of the program meets a weight"):
        layers.free_layers([], [])
    with pytest.raises(RecipeError, match="rules decide all of them"):
        layers.free_layers(_layers(calibrated(small_net, WEIGHTS, BATCHES[:1])), LAYERS)
