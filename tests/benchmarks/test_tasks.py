"""The benchmark of the tasks that are no classification, on tiny untrained networks."""

import json

import pytest
from flax import nnx

from benchmarks import tasks
from qcompiler.models import detector, lstm, procedural, trained


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run(name, model, size, *arguments)`: runs the command; gives its rows."""

    def run(name, model, size, *more):
        settings = trained.Training(name, size=size)
        monkeypatch.setattr(trained, "settings_of", lambda name: settings)
        monkeypatch.setattr(trained, "trained", lambda settings, seed: (model, {}))
        path = tmp_path / "figures.json"
        arguments = ["--models", name, "--examples", "32", "--calibration", "16", "--json", str(path)]
        assert tasks.main([*arguments, *more]) == 0
        return json.loads(path.read_text())["rows"]

    return run


@pytest.mark.slow
def test_perplexity(run, capsys):
    (row,) = run("lstm", lstm.RecurrentLM(16, rngs=nnx.Rngs(0)), 16)
    assert row["islands"] == 0 and row["sqnr_db"] > 20
    # Untrained, every byte is about as likely as any other.
    assert row["float"] == pytest.approx(256, rel=0.2)
    assert row["lost"] == pytest.approx(100 * (row["int8"] / row["float"] - 1)) and abs(row["lost"]) < 5
    assert 0 < row["margin"] < 5
    assert f"{row['float']:.3f}" in capsys.readouterr().out


@pytest.mark.slow
def test_mean_average_precision(run):
    model = detector.Detector(len(procedural.CLASSES), rngs=nnx.Rngs(0))
    model.eval()
    first, second, mean = run("detector", model, 32, "--seeds", "0", "1")
    assert [row["seed"] for row in (first, second, mean)] == [0, 1, "mean"]
    assert first["islands"] == 0 and first["unit"] == "points"
    assert first["lost"] == pytest.approx(first["float"] - first["int8"])
    assert mean["lost"] == pytest.approx((first["lost"] + second["lost"]) / 2)


@pytest.mark.parametrize("option", ["--examples", "--calibration"])
def test_uneven_batches_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        tasks.main([option, "17"])
    assert "multiples" in capsys.readouterr().err
