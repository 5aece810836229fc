"""Numbers about a program, and the table that shows them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from islands import solved

import qcompiler as qc
from qcompiler.debug import report
from qcompiler.debug.report import Island, PassRecord, Report
from qcompiler.ir.tracing import trace
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)


def test_an_empty_report_is_all_integers():
    empty = Report()
    assert empty.integer_only and empty.integer_mac_share == 1.0
    text = str(empty)
    assert "integer only         yes" in text and "islands\n" not in text and "SQNR" not in text and "dumps" not in text


def test_the_table():
    island = Island("sort", "", "model.py:3 (f)", "primitive has no integer rule yet", 0.25)
    gate = Island("mul", "block/gate", "model.py:9 (f)", "product of two activations", 0.0)
    full = Report(
        islands=(island, gate),
        integer_mac_share=0.75,
        qdq_pairs_before=9,
        weight_bytes=1234,
        float_weight_bytes=5678,
        sqnr_db=40.25,
        passes=(PassRecord("trace", 0.5, "3 equations"), PassRecord("fuse", 1.25, "9 pairs per op before, 0 left")),
        dump="here",
    )
    assert not full.integer_only
    text = str(full)
    for part in (
        "integer only         no",
        "islands              2",
        "75.0% in integers",
        "9 per op before, 0 left",
        "5,678 bytes before, 1,234 after",
        "40.2 dB",
    ):
        assert part in text
    lines = text.splitlines()
    assert lines[-2].split() == "sort <top level> model.py:3 (f) (25.0%) primitive has no integer rule yet".split()
    assert "block/gate" in lines[-1] and any(line.split() == ["dumps", "here"] for line in lines)
    assert [line.split()[0] for line in lines if " s  " in line] == ["trace", "fuse"]


def test_nothing_is_claimed_before_types_are_assigned():
    undecided = Report(integer_mac_share=None)
    assert undecided.integer_only is None
    text = str(undecided)
    assert "undecided" in text and "yes" not in text and "%" not in text and "QDQ" not in text


def test_stages_report_what_is_decided():
    traced = qc.trace(lambda p, x: solved(x @ p["w"]), X, params={"w": W})
    calibrated = traced.calibrate([X])
    for stage in (traced, calibrated):
        assert stage.report.integer_only is None and "undecided" in str(stage.report)
    assert [i.primitive for i in calibrated.report.islands] == ["triangular_solve"]
    quantized = calibrated.quantize()
    assert quantized.report.integer_only is False and quantized.report.integer_mac_share == 1.0
    assert "integer only         no" in str(quantized.report)


def test_islands_with_their_share_of_the_work():
    def fun(p, x):
        image = jnp.ones((1, x.shape[1], 1, 1))
        return solved(x) @ p["w"], jax.lax.conv(image, x[:, :, None, None], (1, 1), "VALID")

    program = partition(simplify(trace(fun, {"w": W}, (jax.ShapeDtypeStruct(X.shape, X.dtype),))))
    shares = {i.primitive: i.mac_share for i in report.islands_of(program)}
    assert shares["conv_general_dilated"] == pytest.approx(1 / (1 + W.shape[1])) and shares["triangular_solve"] == 0


def test_a_program_without_work_or_islands():
    program = trace(lambda p, x: x, {}, (jax.ShapeDtypeStruct(X.shape, X.dtype),))
    assert report.islands_of(program) == () and report.count_ops(program) == (0, 0)


def test_counting_ops():
    program = trace(lambda p, x: (x.astype(jnp.int32) + 1, x * 2.0), {}, (jax.ShapeDtypeStruct(X.shape, X.dtype),))
    assert report.count_ops(program) == (2, 1)


def test_bytes():
    arrays = [np.zeros((3, 5), np.int8), np.zeros(7, np.int32), np.zeros((), np.float32), jnp.zeros((2, 0))]
    assert report.weight_bytes(arrays) == 15 + 28 + 4


def test_sqnr():
    ones = np.ones(100)
    assert report.sqnr_db([ones], [ones]) == float("inf")
    assert report.sqnr_db([ones], [ones * 1.1]) == pytest.approx(20.0)
    assert report.sqnr_db([ones, ones], [ones, ones * 1.1]) == pytest.approx(20.0 + 10 * np.log10(2))
    assert report.sqnr_db([0 * ones], [ones]) == float("-inf") and report.sqnr_db([0 * ones], [0 * ones]) == float(
        "inf"
    )
    with pytest.raises(ValueError):
        report.sqnr_db([ones], [])
