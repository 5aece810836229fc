"""A file per pass, what changed, and numbers; nothing where nobody asked."""

import json

import jax
import numpy as np
import pytest

import qcompiler as qc
from qcompiler.debug.dumps import Dumper, write_text
from qcompiler.ir.tracing import trace
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
WEIGHTS = {"w": np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)}


def _program():
    return trace(lambda p, x: jax.nn.relu(x @ p["w"]) * 1.0, WEIGHTS, (jax.ShapeDtypeStruct(X.shape, X.dtype),))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("QCOMPILER_DUMP_TO", raising=False)
    monkeypatch.delenv("QCOMPILER_PRINT_AFTER", raising=False)


def test_one_file_per_pass(tmp_path):
    dumper = Dumper(tmp_path / "made" / "here")
    program = _program()
    dumper.after("trace", program, seconds=0.5)
    simple = simplify(program)
    dumper.after("simplify", simple, sqnr_db=float("inf"))
    dumper.after("partition", partition(simple))
    names = sorted(p.name for p in dumper.folder.iterdir())
    assert names == [
        "00-trace.txt",
        "01-simplify.diff",
        "01-simplify.txt",
        "02-partition.diff",
        "02-partition.txt",
        "summary.json",
    ]
    assert (dumper.folder / "01-simplify.txt").read_text() == simple.text()
    diff = (dumper.folder / "01-simplify.diff").read_text()
    assert diff.startswith("--- before\n+++ simplify\n") and "\n-" in diff and " mul " in diff
    summary = json.loads((dumper.folder / "summary.json").read_text())
    assert [s["pass"] for s in summary] == ["trace", "simplify", "partition"]
    assert summary[0]["seconds"] == 0.5 and summary[1]["sqnr_db"] == "inf"
    assert summary[1]["ops"] == {"dot_general": 1, "max": 1} and summary[2]["equations"] == 1


def test_nothing_is_written_or_printed_unasked(capsys):
    dumper = Dumper()
    assert not dumper.active and dumper.folder is None
    dumper.after("trace", _program())
    assert capsys.readouterr() == ("", "")


def test_the_environment_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_DUMP_TO", str(tmp_path / "env"))
    Dumper().after("trace", _program())
    assert (tmp_path / "env" / "00-trace.txt").exists()
    Dumper(tmp_path / "argument").after("trace", _program())
    assert (tmp_path / "argument" / "00-trace.txt").exists()


@pytest.mark.parametrize(
    ("asked", "printed"),
    [("simplify", ["simplify"]), ("trace,simplify", ["trace", "simplify"]), ("all", ["trace", "simplify"])],
)
def test_the_environment_says_what_to_print(monkeypatch, capsys, asked, printed):
    monkeypatch.setenv("QCOMPILER_PRINT_AFTER", asked)
    dumper = Dumper()
    program = _program()
    dumper.after("trace", program)
    dumper.after("simplify", simplify(program))
    out, err = capsys.readouterr()
    assert out == "" and [line[8:] for line in err.splitlines() if line.startswith("# after ")] == printed


def test_a_whole_compilation_dumps_every_pass(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QCOMPILER_PRINT_AFTER", "fuse")
    qc.quantize(lambda p, x: jax.nn.relu(x @ p["w"]), [X], params=WEIGHTS, dump=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    expected = ["trace", "simplify", "fold_norms", "equalize", "partition", "observe"]
    expected += ["assign_precision", "insert_qdq", "fuse"]
    assert [s["pass"] for s in summary] == [*expected, "fold_zero_points", "lower"]
    assert all("seconds" in s for s in summary)
    # The simulation of one layer in int8: some 40 dB.
    assert 30 < next(s["sqnr_db"] for s in summary if s["pass"] == "insert_qdq") < 100
    assert capsys.readouterr().err.startswith("# after fuse\nprogram fuse\n")


def test_write_text_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    write_text(path, "new")
    assert path.read_text() == "new"
