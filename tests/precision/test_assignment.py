"""The file: it comes back as it was, can be edited, and says what is wrong with it."""

import json

import numpy as np
import pytest
from mixed import BATCHES, HEAD, LAYERS, STEM, WEIGHTS, small, small_net

import qcompiler as qc
from qcompiler import candidates
from qcompiler.errors import RecipeError
from qcompiler.precision import Assignment, Choice, load


@pytest.fixture(scope="module")
def chosen():
    precision = qc.Precision(("int4", "int8", "bfloat16"), weight_bits=6, repair_steps=2)
    return small().quantize(qc.Recipe(precision=precision))


def _edited(chosen, path, edit):
    chosen.precision.save(path)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return path


def test_what_was_saved_is_loaded(chosen, tmp_path):
    path = tmp_path / "precision.json"
    chosen.precision.save(path)
    assert load(path) == chosen.precision
    row = json.loads(path.read_text())["layers"][STEM]
    assert row.keys() == {"type", "losses", "costs", "reason"} and row["losses"].keys() == {"int4", "int8", "bfloat16"}


def test_the_file_gives_the_same_integers(chosen, tmp_path):
    path = tmp_path / "precision.json"
    chosen.precision.save(path)
    again = qc.quantize(small_net, BATCHES, params=WEIGHTS, recipe=qc.Recipe(precision=path), verify="types")
    assert again.precision == chosen.precision
    np.testing.assert_array_equal(again(BATCHES[0]), chosen.compile()(BATCHES[0]))


def test_an_edited_type_is_obeyed(chosen, tmp_path):
    other = {"int4": "int8", "int8": "int4"}[chosen.precision.config[HEAD]]
    path = _edited(chosen, tmp_path / "p.json", lambda data: data["layers"][HEAD].update(type=other))
    again = small().quantize(qc.Recipe(precision=str(path)))
    assert again.precision.config == {**chosen.precision.config, HEAD: other}
    types = again.programs["assign_precision"].notes["types"][HEAD]
    assert {"int4": 4, "int8": 8}[other] in [t.bits for t in types if t is not None and t.narrow_range]


def test_a_file_can_be_written_by_hand(tmp_path):
    """A layer may be a name alone; what is left out gets the recipe's types, what is in float is an island."""
    path = tmp_path / "p.json"
    text = {"format": "qcompiler precision 1", "candidates": {"real": {}}, "layers": {HEAD: "real"}}
    path.write_text(json.dumps(text))
    quantized = small().quantize(qc.Recipe(precision=path))
    (island,) = quantized.report.islands
    assert island.module_path == "head" and quantized.precision.policy == "by hand"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["layers"].update({"stam/conv_general_dilated#0": "int8"}), f"no layer; nearest: '{STEM}'"),
        (lambda d: d["layers"][HEAD].update(type="int44"), "'int44', which is no candidate; nearest: 'int4'"),
        (lambda d: d["layers"][HEAD].pop("type"), f"no type for layer {HEAD}"),
        (lambda d: d["layers"][HEAD].update(typ="int4"), "unknown key 'typ'; nearest: 'type'"),
        (lambda d: d.update(format="other"), "says no format"),
        (lambda d: d.update(layer={}), "unknown key 'layer'; nearest: 'layers'"),
        (lambda d: d.pop("layers"), "has no 'layers'"),
        (
            lambda d: d["candidates"]["int4"]["weight"].update(bit=3),
            "weight of candidate int4: unknown key 'bit'; nearest: 'bits'",
        ),
        (lambda d: d["candidates"]["int4"]["weight"].update(bits=9), "at most 8 there"),
    ],
)
def test_files_that_make_no_sense(chosen, tmp_path, edit, message):
    path = _edited(chosen, tmp_path / "p.json", edit)
    with pytest.raises(RecipeError, match=message):
        small().quantize(qc.Recipe(precision=path))


def test_files_that_are_none(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RecipeError, match=r"bad\.json is no JSON"):
        load(tmp_path / "bad.json")


def test_the_table_has_a_row_per_layer(chosen):
    lines = str(chosen.precision).splitlines()
    rows = lines[-len(LAYERS) :]
    assert [row.split()[0] for row in rows] == list(LAYERS)
    assert [row.split()[1] for row in rows] == list(chosen.precision.config.values())
    assert lines[0].startswith("precision") and any("6 bits" in x or "of 6" in x for x in lines)


def test_granularity_is_carried():
    named = {"grouped": candidates.Candidate(candidates.NAMED["int4"].weight, qc.QuantType(8), qc.Granularity(4))}
    assignment = Assignment(named, {HEAD: Choice("grouped")})
    assert Assignment.from_json(json.loads(json.dumps(assignment.to_json()))) == assignment
    assert assignment.rules()[HEAD].granularity == qc.Granularity(4)


def test_recipe_files_hold_what_is_to_be_chosen_and_what_was(chosen, tmp_path):
    path = tmp_path / "recipe.json"
    for precision in (qc.Precision(("int4", "bfloat16"), weight_bytes=4096, metric="kl_nats"), chosen.precision):
        recipe = qc.Recipe(precision=precision)
        recipe.save(path)
        assert qc.Recipe.load(path) == recipe
