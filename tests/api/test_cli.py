"""The command line, and the dumps that it and the environment variables ask for."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import qcompiler as qc
from qcompiler import cli
from qcompiler.ir import serialize

PASSES = [
    "trace",
    "simplify",
    "fold_norms",
    "equalize",
    "partition",
    "observe",
    "assign_precision",
    "insert_qdq",
    "fuse",
    "fold_zero_points",
    "lower",
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, PARAMS = normal(4, 8, seed=1), {"w": normal(8, 16, seed=2), "v": normal(16, 4, seed=3)}


def mlp(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]


def check_folder(folder):
    """Files of one compilation, in order: a text for every pass, a difference for every pass but the first."""
    texts = sorted(p.name for p in folder.glob("*.txt"))
    assert texts == [f"{k:02d}-{name}.txt" for k, name in enumerate(PASSES)]
    diffs = [t.replace(".txt", ".diff") for t in texts[1:]]
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["pass"] for row in summary] == PASSES
    assert all(row["seconds"] >= 0 and row["equations"] == sum(row["ops"].values()) for row in summary)
    assert sorted(os.listdir(folder)) == sorted([*texts, *diffs, "summary.json"])
    return summary


def test_dump_to_a_folder(tmp_path):
    folder = tmp_path / "deep" / "dumps"
    qmodel = qc.quantize(mlp, [X], params=PARAMS, dump=folder)
    summary = check_folder(folder)
    assert qmodel.report.dump == str(folder) and str(folder) in str(qmodel.report)
    by_name = {row["pass"]: row for row in summary}
    assert float(by_name["simplify"]["sqnr_db"]) == np.inf and 30 < by_name["insert_qdq"]["sqnr_db"] < 60
    assert by_name["partition"]["ops"] == {"qc_region": 2}
    trace = (folder / "00-trace.txt").read_text()
    assert "program trace" in trace and "dot_general#1" in trace and os.path.basename(__file__) in trace
    lowered = (folder / "10-lower.txt").read_text()
    assert "mulhi" in lowered and "qc_region" not in lowered
    diff = (folder / "04-partition.diff").read_text()
    assert diff.startswith("--- before\n+++ partition\n") and "+  %1" in diff and "qc_region" in diff


def test_another_batch_size_leaves_the_dumps_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_DUMP_TO", str(tmp_path))
    x, params = normal(6, 8), {"w": normal(8, 4)}
    qmodel = qc.quantize(lambda p, x: x @ p["w"], [x, x[:3]], params=params)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    qmodel(x[:2])
    qmodel.simulate(x[:2])
    assert "00-trace.txt" in before and "00-simplify.txt" not in before
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_dump_by_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_DUMP_TO", str(tmp_path / "by_env"))
    qmodel = qc.quantize(mlp, [X], params=PARAMS)
    check_folder(tmp_path / "by_env")
    assert qmodel.report.dump == str(tmp_path / "by_env")
    given = qc.quantize(mlp, [X], params=PARAMS, dump=tmp_path / "given")
    check_folder(tmp_path / "given")
    assert given.report.dump == str(tmp_path / "given")


@pytest.mark.parametrize("names", ["fuse", "fuse,lower", "all"])
def test_print_after_a_pass(monkeypatch, capsys, names):
    monkeypatch.delenv("QCOMPILER_DUMP_TO", raising=False)
    monkeypatch.setenv("QCOMPILER_PRINT_AFTER", names)
    qmodel = qc.quantize(mlp, [X], params=PARAMS)
    printed = capsys.readouterr()
    assert re.findall("^# after (.*)$", printed.err, re.MULTILINE) == (PASSES if names == "all" else names.split(","))
    assert qmodel._quantized.programs["fuse"].text() in printed.err
    assert printed.out == "" and qmodel.report.dump is None


def test_nothing_is_written_without_being_asked(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("QCOMPILER_DUMP_TO", "QCOMPILER_PRINT_AFTER"):
        monkeypatch.delenv(name, raising=False)
    qc.quantize(mlp, [X], params=PARAMS)(X[:2])
    assert os.listdir(tmp_path) == [] and capfd.readouterr() == ("", "")


def test_calls_at_other_batch_sizes_do_not_write_into_the_dump(tmp_path):
    qmodel = qc.quantize(mlp, [X, X[:3]], params=PARAMS, dump=tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    qmodel(X[:2])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    check_folder(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved program, and its text."""
    path = tmp_path_factory.mktemp("saved") / "model.qcprogram"
    program = qc.trace(mlp, X, params=PARAMS).calibrate([X]).quantize().program
    serialize.save(program, path)
    return path, program.text()


def test_show_prints_a_saved_program(saved, capsys):
    path, text = saved
    assert cli.main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    # The lines a file keeps are those of the program that was saved.
    assert shown == text
    assert "dot_general#0" in shown and os.path.basename(__file__) in shown


def test_show_as_a_command(saved):
    command = [sys.executable, "-m", "qcompiler", "show", str(saved[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == saved[1]


@pytest.mark.parametrize("content", [None, b"", b"no program"])
def test_show_of_what_is_no_program(tmp_path, content, capsys):
    path = tmp_path / "wrong.qcprogram"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["show", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("qcompiler: ") and str(path) in printed.err


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["show"], ["digits", "--epochs", "many"], ["digits", "--recipe", "sweet"]]
)
def test_wrong_arguments_print_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "usage: qcompiler" in capsys.readouterr().err


@pytest.mark.slow
def test_digits_prints_what_a_buyer_wants_to_see(tmp_path, capsys):
    folder = tmp_path / "dumps"
    # Two epochs are enough to compare the models, not to make them good; the exit status says if accuracy was kept.
    status = cli.main(["digits", "--epochs", "2", "--batch", "8", "--dump", str(folder)])
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert re.search(r"^ +float32, jax\.jit +int8$", shown, re.MULTILINE)
    right = re.search(r"^test images right +(\d+) of 450 +(\d+) of 450$", shown, re.MULTILINE)
    assert int(right[1]) - int(right[2]) <= 1
    for pattern in (
        r"^jax [\d.]+\S* on cpu, \d+ device",
        r"^accuracy +\d+\.\d\d% +\d+\.\d\d%$",
        r"^ms per 8 images +\d+\.\d\d +\d+\.\d\d$",
        r"^int8 is \d+\.\d\d times as fast",
        r"^integer only +yes$",
        r"^multiply-adds +100\.0% in integers$",
        r"^QDQ pairs +\d+ per op before, 0 left$",
        r"^SQNR on the probe +\d+\.\d dB$",
        rf"^dumps +{re.escape(str(folder))}$",
    ):
        assert re.search(pattern, shown, re.MULTILINE), pattern
    floats, integers = re.search(r"^weight bytes +([\d,]+) +([\d,]+)$", shown, re.MULTILINE).groups()
    assert 3.5 < int(floats.replace(",", "")) / int(integers.replace(",", "")) <= 4.0
    check_folder(folder)
