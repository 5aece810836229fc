"""A defect is caught, made small, saved, and found again; nothing of it is random but the seeds."""

import json

import numpy as np
import pytest

from qcompiler.backends.lax_int import rounding
from qcompiler.backends.lax_int.values import Int
from qcompiler.debug import fuzz
from qcompiler.errors import SerializationError


@pytest.fixture
def sums_off_by_one(monkeypatch):
    """Sums of several terms are one step too large, where they are not at the end of their type."""
    right = rounding.quantize_real

    def wrong(context, real, scale, zero, qtype, label):
        q = right(context, real, scale, zero, qtype, label)
        if len(real.terms) < 2:
            return q
        return Int(np.minimum(q.x, qtype.qmax - 1).astype(q.x.dtype) + q.x.dtype.type(1), q.low, q.high)

    monkeypatch.setattr(rounding, "quantize_real", wrong)


def residual(recipe="litert"):
    """conv, relu and a residual sum between other steps."""
    rng = np.random.default_rng(3)
    steps = [
        fuzz.Step("channel_affine", (0,), {}),
        fuzz.Step(
            "conv",
            (1,),
            {
                "layout": "last",
                "window_strides": (1, 1),
                "padding": "SAME",
                "lhs_dilation": (1, 1),
                "rhs_dilation": (1, 1),
                "feature_group_count": 1,
            },
        ),
        fuzz.Step("act", (2,), {"name": "tanh"}),
        fuzz.Step("add", (3, 1, 0), {}),
        fuzz.Step("mean", (4,), {"axes": (1, 2)}),
        fuzz.Step("flip", (3,), {"axis": 2}),
    ]
    weights = {
        "0": {"scale": rng.normal(size=4).astype(np.float32), "shift": rng.normal(size=4).astype(np.float32)},
        "1": {"kernel": rng.normal(size=(3, 3, 4, 4)).astype(np.float32)},
    }
    inputs = [rng.normal(size=(2, 5, 4, 4)).astype(np.float32)]
    return fuzz.Case("by hand", recipe, steps, weights, inputs, [5, 6])


def test_the_program_is_right_without_the_defect():
    assert fuzz.run_case(residual()).regions >= 4


def test_a_defect_is_shrunk_saved_and_replayed(sums_off_by_one, tmp_path, capsys, monkeypatch):
    case = residual()
    with pytest.raises(fuzz.CheckFailed) as caught:
        fuzz.run_case(case)
    small, failure = fuzz.shrink(case, caught.value)
    assert failure.promise == caught.value.promise
    assert len(small.steps) <= 2 and len(small.results) == 1
    assert "add" in {step.name for step in small.steps}
    assert sum(x.size for x in small.inputs) < case.inputs[0].size
    assert small.recipe == "default"
    path = fuzz.save(small, tmp_path / "small", failure.promise)
    again, promise = fuzz.load(path)
    assert promise == failure.promise and str(again) == str(small)
    assert fuzz.main(["--replay", str(path)]) == 1
    assert "as it was saved" in capsys.readouterr().err
    monkeypatch.undo()
    assert fuzz.main(["--replay", str(path)]) == 0
    assert f"passed; it was saved for: {promise}" in capsys.readouterr().out


def test_few_tries_keep_the_program(sums_off_by_one):
    case = residual()
    with pytest.raises(fuzz.CheckFailed) as caught:
        fuzz.run_case(case)
    kept, failure = fuzz.shrink(case, caught.value, tries=0)
    assert kept is case and failure is caught.value


def test_saved_programs_are_whole(tmp_path):
    case = fuzz.random_case(11, 6)
    again, _ = fuzz.load(fuzz.save(case, tmp_path / "case.json"))
    assert again.steps == case.steps and again.results == case.results and again.recipe == case.recipe
    for a, b in zip(again.inputs, case.inputs, strict=True):
        fuzz.assert_same([a], [b], "inputs")
    assert again.weights.keys() == case.weights.keys()
    for k, held in case.weights.items():
        fuzz.assert_same(list(again.weights[k].values()), list(held.values()), "weights")


def test_files_that_are_no_programs(tmp_path):
    with pytest.raises(SerializationError, match="is no program of the fuzzer"):
        fuzz.load(tmp_path / "absent.json")
    path = fuzz.save(fuzz.random_case(1, 1), tmp_path / "case")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": "another"}))
    with pytest.raises(SerializationError, match="'another'"):
        fuzz.load(path)
    content["steps"][0]["name"] = "unheard-of"
    path.write_text(json.dumps(content))
    with pytest.raises(SerializationError, match="unheard-of"):
        fuzz.load(path)
