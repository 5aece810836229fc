"""The benchmark of accuracy against peers, on a tiny untrained network; peers that are installed take part."""

import importlib.util
import json

import numpy as np
import pytest
from flax import nnx

from benchmarks import peers_accuracy, peers_static
from qcompiler.models import procedural

SIZE = 8


class Tiny(nnx.Module):
    """One convolution and a head."""

    def __init__(self):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
        self.head = nnx.Linear(8, 12, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).mean(axis=(1, 2)))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command on the network; gives its rows."""

    def subject(name, calibration, test):
        draw = lambda stream, count: (procedural.examples(stream, 0, count, size=SIZE)[0],)
        return peers_accuracy.Subject(Tiny(), draw("calibration", calibration), draw("test", test))

    monkeypatch.setitem(peers_accuracy.SUBJECTS, "tiny", subject)

    def run(*arguments):
        path = tmp_path / "figures.json"
        options = ["--models", "tiny", "--calibration", "16", "--test", "20", "--json", str(path)]
        assert peers_accuracy.main([*options, *arguments]) == 0
        return json.loads(path.read_text())["models"]["tiny"]

    return run


def test_ours_and_absent_peers(run, monkeypatch, capsys):
    _, make_float, methods = peers_static.PEERS["nncf"]
    monkeypatch.setitem(peers_static.PEERS, "nncf", (("no_such_package",), make_float, methods))
    *ours, nncf = run("--peers", "nncf")
    assert [row["contender"] for row in [*ours, nncf]] == ["default", "w8a8", "accurate", "nncf"]
    # Two layers of 8-bit operands keep some 33 dB; what the mean over the map takes from the signal is less than half.
    assert all(row["sqnr_db"] > 24 and 0.99 < row["cosine"] <= 1 for row in ours)
    # The export, which comes first, has a need of its own.
    absent = "no_such_package" if importlib.util.find_spec("onnx") else "onnx"
    assert f"needs {absent}" in nncf["error"] and ".[peers,aimet]" in nncf["error"]
    assert f"needs {absent}" in capsys.readouterr().out


# qwix 0.1.8 calls what flax has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_qwix_takes_part(run):
    pytest.importorskip("qwix")
    rows = [row for row in run("--variants", "w8a8", "--peers", "qwix") if row["contender"] == "qwix"]
    assert {row["method"] for row in rows} == {
        f"{method}{attention}" for method in ("absmax", "minmax") for attention in ("", ", attention in float")
    }
    # Ranges are means over the images: what exceeds them is clipped.
    assert all(10 < row["sqnr_db"] < 60 for row in rows)


@pytest.mark.slow
def test_onnxruntime_takes_part(run):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    rows = [row for row in run("--variants", "w8a8", "--peers", "onnxruntime") if row["contender"] == "onnxruntime"]
    by_method = {row["method"]: row for row in rows}
    assert set(by_method) == set(peers_static.PEERS["onnxruntime"][2])
    # As ours above.
    assert by_method["MinMax, affine, products"]["sqnr_db"] > 24


def test_a_worker_that_dies_is_a_message(tmp_path):
    """There is nothing in its folder, or the package is absent."""
    found = peers_accuracy.peer_results("onnxruntime", tmp_path, np.zeros((1, 12), np.float32))
    (message,) = found.values()
    assert isinstance(message, str) and message


def test_the_best_of_a_contender_stands_for_it():
    rows = [
        {"contender": "a", "method": "x", "sqnr_db": 30.0},
        {"contender": "a", "method": "y", "sqnr_db": 31.0},
        {"contender": "a", "method": "z", "error": "broke"},
        {"contender": "b", "method": "", "error": "absent"},
    ]
    assert [(row["contender"], row["method"]) for row in peers_accuracy.best(rows)] == [("a", "y"), ("b", "")]


def test_uneven_calibration_is_refused(capsys):
    with pytest.raises(SystemExit):
        peers_accuracy.main(["--calibration", "17"])
    assert "batches of 16" in capsys.readouterr().err
