"""Tiers: the order that losses and criticality give, and where it is cut."""

import math

import pytest

from qcompiler import tiers
from qcompiler.errors import RecipeError

LOSSES = {"a/dot#0": 1.0, "a/dot#1": 4.0, "b/dot#0": 2.0, "b/dot#1": 3.0}


def test_the_most_sensitive_first():
    found = tiers.split(LOSSES, (0.25, 0.5), {})
    assert found == {"high": ("a/dot#1",), "medium": ("b/dot#1", "b/dot#0"), "low": ("a/dot#0",)}


@pytest.mark.parametrize(
    ("glob", "meant"), [("b", {"b/dot#0", "b/dot#1"}), ("?/dot#0", {"a/dot#0", "b/dot#0"})], ids=["path", "id"]
)
def test_criticality_is_of_module_paths_and_ids(glob, meant):
    """The first glob that matches a layer decides."""
    found = tiers.split(LOSSES, (0.5, 0.0), {glob: 100.0, "*": 1.0})
    assert set(found["high"]) == meant
    assert tiers.split(LOSSES, (0.5, 0.0), {"*": 1.0, glob: 100.0}) == tiers.split(LOSSES, (0.5, 0.0), {})


def test_a_loss_that_is_no_number_is_the_worst():
    found = tiers.split({**LOSSES, "a/dot#0": math.nan}, (0.25, 0.0), {})
    assert found["high"] == ("a/dot#0",)


@pytest.mark.parametrize("shares", [(0.8, 0.4), (-0.1, 0.5), (math.nan, 0.5), (1.0,)])
def test_shares_that_are_none(shares):
    with pytest.raises(RecipeError, match="shares are those"):
        tiers.split(LOSSES, shares, {})


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_criticality_that_is_none(weight):
    with pytest.raises(RecipeError, match="a positive weight per glob"):
        tiers.check((0.25, 0.5), {"*": weight})


def test_a_glob_of_nothing():
    with pytest.raises(RecipeError, match=r"criticality of 'c' is of no layer; there are a/dot#0, "):
        tiers.split(LOSSES, (0.25, 0.5), {"c": 2.0})
