"""The accuracy benchmark on a tiny network: its figures, and that an interrupt loses nothing."""

import json
import sys

import numpy as np
import pytest
from flax import nnx

from benchmarks import accuracy
from qcompiler.models import MLP, cache, procedural, trained

SIZE = 8


class Flat(nnx.Module):
    """A perceptron on the pixels."""

    def __init__(self, seed):
        self.mlp = MLP((SIZE * SIZE * 3, 32, len(procedural.CLASSES)), rngs=nnx.Rngs(seed))

    def __call__(self, x):
        return self.mlp(x.reshape(x.shape[0], -1))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command on an untrained perceptron and 8-pixel images; gives its status and figures."""
    settings = trained.Training("flat", size=SIZE)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setitem(trained.MODELS, "flat", (Flat, ()))
    monkeypatch.setattr(trained, "Training", lambda name: settings)
    monkeypatch.setattr(trained, "trained", lambda settings, seed: (Flat(seed), {}))
    # Hashing the whole compiler takes seconds; that it is all there is another test's.
    monkeypatch.setattr(accuracy, "compiler_modules", lambda: [])
    monkeypatch.setattr(accuracy, "_BATCH", 64)

    def run(*arguments):
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["accuracy", "--models", "flat", "--json", str(path), *arguments])
        status = accuracy.main()
        return status, json.loads(path.read_text())["rows"]

    return run


def test_figures(run, capsys):
    status, (row,) = run("--images", "200", "--calibration", "16")
    assert status == 0
    assert (row["model"], row["seed"], row["recipe"], row["images"]) == ("flat", 0, "default", 200)
    assert row["lost"] == pytest.approx(row["float"] - row["int8"]) and 0 <= row["margin"] < 10
    # Two layers of 8-bit operands: each rounding of a Gaussian keeps about 39 dB.
    assert row["sqnr_db"] > 28
    assert row["islands"] == 0 and 0.25 < row["weight_ratio"] < 0.3
    assert f"{row['float']:.2f}" in capsys.readouterr().out
    images, labels = procedural.examples("test", 0, 200, size=SIZE)
    right = np.argmax(np.asarray(Flat(0)(images)), -1) == labels
    assert row["float"] == pytest.approx(100 * right.mean())


def test_the_mean_over_trainings(run, capsys):
    _, rows = run("--images", "100", "--calibration", "16", "--seeds", "0", "1")
    assert [row["seed"] for row in rows] == [0, 1, "mean"]
    for key in ("float", "int8", "lost", "sqnr_db"):
        assert rows[2][key] == pytest.approx((rows[0][key] + rows[1][key]) / 2)
    assert rows[2]["margin"] <= (rows[0]["margin"] + rows[1]["margin"]) / 2 + 1e-9
    assert "mean" in capsys.readouterr().out


def test_every_variant_has_logits_of_its_own(run):
    _, (default, w4a8) = run("--images", "100", "--calibration", "16", "--recipes", "default", "w4a8")
    assert (default["recipe"], w4a8["recipe"]) == ("default", "w4a8")
    # Four bits less of the weights are 24 dB less of them.
    assert w4a8["sqnr_db"] < default["sqnr_db"] - 6


def test_an_interrupt_loses_nothing(run, monkeypatch):
    whole = run("--images", "300", "--calibration", "16")[1]
    for path in cache.cache_folder().iterdir():
        path.unlink()
    examples, asked = procedural.examples, []

    def interrupted(stream, start, count, **options):
        asked.append((stream, start))
        if asked[-1] == ("test", 128) and asked.count(("test", 128)) == 1:
            raise KeyboardInterrupt
        return examples(stream, start, count, **options)

    monkeypatch.setattr(procedural, "examples", interrupted)
    status, (row,) = run("--images", "300", "--calibration", "16")
    assert status == 130 and row["images"] == 128
    status, rows = run("--images", "300", "--calibration", "16")
    assert status == 0
    assert asked.count(("test", 0)) == 1
    timeless = lambda rows: [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]
    assert timeless(rows) == timeless(whole)
    # Fewer images of the same run need nothing new.
    known = len(asked)
    assert run("--images", "100", "--calibration", "16")[1][0]["images"] == 100
    assert len(asked) == known


def test_the_integers_key_on_every_module_of_the_compiler():
    names = {module.__name__ for module in accuracy.compiler_modules()}
    assert {"qcompiler.passes.fuse", "qcompiler.recipe", "qcompiler.numerics.ranges"} <= names
    assert any(name.startswith("qcompiler.backends.lax_int.") for name in names)
    assert not any("__main__" in name for name in names)


def test_too_few_images_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accuracy", "--images", "1"])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert "at least 2 test images" in capsys.readouterr().err
