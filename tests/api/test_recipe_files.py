"""Recipes as files: there and back, edited by hand, and refused."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest

import qcompiler as qc
from qcompiler import recipe_files
from qcompiler.numerics import ranges
from qcompiler.recipe import NAMED

RECIPES = {
    **NAMED,
    "everything": qc.Recipe(
        weight=qc.QuantType(4, symmetric=True, narrow_range=True),
        granularity=qc.Granularity(channel_group=4),
        activation_range=ranges.Percentile(99.9),
        index_range="minmax",
        ranges="tiers",
        activation_sqnr=None,
        equalize=True,
        rules=(
            qc.Rule(path=re.compile(r"block_(0|11)/.*"), primitive="dot*", keep_float=True),
            qc.Rule(shape="3x3x*", weight=qc.QuantType(8), activation_range=(-1, 1), weight_range=ranges.MSE(8)),
            qc.Rule(path="head", granularity="tensor"),
        ),
        encodings={"input:x": qc.QuantType(16, symmetric=True), re.compile("a|b"): qc.QuantType(8)},
        supergroups=(qc.Supergroup(("Conv", "Relu")), qc.Supergroup(("Gemm", "Add"), fuse=False)),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_there_and_back(name, tmp_path):
    path = tmp_path / "recipe.json"
    RECIPES[name].save(path)
    assert qc.Recipe.load(path) == RECIPES[name]
    again = tmp_path / "again.json"
    qc.Recipe.load(path).save(again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.json", "recipe.json"]


def test_every_field_is_written(tmp_path):
    qc.Recipe().save(tmp_path / "recipe.json")
    document = json.loads((tmp_path / "recipe.json").read_text())
    assert set(document["recipe"]) == {f.name for f in dataclasses.fields(qc.Recipe)}


@pytest.mark.parametrize(
    "encoding",
    [
        qc.Encoding(qc.QuantType(8), np.float32(0.1), np.int32(-3)),
        qc.Encoding(
            qc.QuantType(4, symmetric=True, axis=(1,)), np.float32([[0.1, 0.2, 1 / 3]]), np.zeros((1, 3), np.int32)
        ),
        qc.Encoding(
            qc.QuantType(8, axis=(0, 1), block_size=(2, 1)),
            np.float32([[0.1, 0.7], [0.1, 0.7]]),
            np.int32([[1, 2], [1, 2]]),
        ),
    ],
    ids=["scalar", "channels", "blocks"],
)
def test_encodings_to_the_last_bit(encoding, tmp_path):
    rule = qc.Rule(path="a", weight_range=encoding)
    qc.Recipe(encodings={"w": encoding}, rules=(rule,)).save(tmp_path / "recipe.json")
    recipe = qc.Recipe.load(tmp_path / "recipe.json")
    for found in (recipe.encodings["w"], recipe.rules[0].weight_range):
        assert found.type == encoding.type
        np.testing.assert_array_equal(found.scale, encoding.scale)
        np.testing.assert_array_equal(found.zero_point, encoding.zero_point)


def test_written_by_hand(tmp_path):
    text = """{"qcompiler": "recipe", "version": 1, "recipe": {
      "weight": {"$QuantType": "int4sn"}, "granularity": "tensor",
      "rules": [{"$Rule": {"path": "head*", "keep_float": true}}]}}"""
    (tmp_path / "recipe.json").write_text(text)
    expected = qc.Recipe(
        weight=qc.QuantType(4, symmetric=True, narrow_range=True),
        granularity="tensor",
        rules=(qc.Rule(path="head*", keep_float=True),),
    )
    assert qc.Recipe.load(tmp_path / "recipe.json") == expected


def recipe(text):
    return f'{{"qcompiler": "recipe", "version": 1, "recipe": {text}}}'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ("is no JSON", "line 1")),
        ("[]", ("is no recipe",)),
        ('{"recipe": {}}', ("is no recipe",)),
        ('{"qcompiler": "recipe", "version": 2, "recipe": {}}', ("version 2", "reads 1")),
        ('{"qcompiler": "recipe", "version": 1, "recipes": {}}', ("'recipes'", "nearest: 'recipe'")),
        ('{"qcompiler": "recipe", "version": 1}', ("an object",)),
        (recipe('{"weigth": null}'), ("recipe: unknown key 'weigth'; nearest: 'weight'",)),
        (recipe('{"rules": [{"$Rule": {"pathh": "a"}}]}'), ("recipe.rules[0]: unknown key 'pathh'; nearest: 'path'",)),
        (recipe('{"rules": [{"$Rool": {}}]}'), ("rules[0]: nothing is called '$Rool'; nearest: '$Rule'",)),
        (recipe('{"rules": [{"$Rule": []}]}'), ("fields of a Rule",)),
        (recipe('{"weight": {"$QuantType": "int4x"}}'), ("recipe.weight", "'int4sn'", "got 'int4x'")),
        (recipe('{"weight": {"$QuantType": "int1"}}'), ("2 to 16 bits",)),
        (recipe('{"weight": {"$QuantType": "int16s"}}'), ("at most 8",)),
        (recipe('{"rules": [{"$Rule": {"path": {"$regex": "("}}}]}'), ("'(' is no regular expression",)),
        (recipe('{"activation_range": {"$MinMax": {"margin": -1}}}'), ("margin must be positive",)),
        (recipe('{"activation_sqnr": NaN}'), ("NaN",)),
        (recipe('{"stream": 1, "stream": 2}'), ("'stream' twice",)),
        (recipe('{"encodings": {"x": {"$array": [1], "dtype": "float64"}}}'), ("float32 (scales)",)),
        (recipe('{"encodings": {"x": {"$array": [1.5], "dtype": "int32"}}}'), ("int32 holds no 1.5",)),
        (recipe('{"encodings": {"x": {"$array": [[1], [1, 2]], "dtype": "int32"}}}'), ("equal lengths",)),
        (recipe('{"encodings": {"$pairs": [1]}}'), ("list of [key, value]",)),
    ],
)
def test_files_that_are_none(text, parts, tmp_path):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(qc.RecipeError) as caught:
        qc.Recipe.load(tmp_path / "recipe.json")
    for part in parts:
        assert part in str(caught.value)


def test_what_a_file_cannot_hold(tmp_path):
    class Own(ranges.MinMax):
        pass

    path = tmp_path / "recipe.json"
    path.write_text("old")
    for recipe_ in (
        qc.Recipe(activation_range=Own()),
        qc.Recipe(rules=(qc.Rule(path=re.compile("a", re.IGNORECASE)),)),
        qc.Recipe(activation_sqnr=float("inf")),
    ):
        with pytest.raises(qc.RecipeError):
            recipe_.save(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["recipe.json"]
    with pytest.raises(TypeError, match="no dataclass"):
        recipe_files.register_classes(int)
    with pytest.raises(FileNotFoundError):
        qc.Recipe.load(tmp_path / "none.json")
