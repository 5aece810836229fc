"""The benchmark of mixed precision, on a tiny untrained network."""

import json

import pytest
from flax import nnx

from benchmarks import mixed_precision
from qcompiler.models import procedural, resnet, trained


@pytest.mark.slow
def test_both_parts(monkeypatch, tmp_path, capsys):
    model = resnet.ResNet(resnet.BasicBlock, (1,), width=8, classes=len(procedural.CLASSES), rngs=nnx.Rngs(0))
    model.eval()
    monkeypatch.setattr(trained, "settings_of", lambda name: trained.Training(name, size=16))
    monkeypatch.setattr(trained, "trained", lambda settings, seed: (model, {}))
    path = tmp_path / "figures.json"
    arguments = ["--images", "64", "--calibration", "16", "--draws", "1", "--json", str(path)]
    assert mixed_precision.main(arguments) == 0
    figures = json.loads(path.read_text())
    assert 0 <= figures["enumerate"]["over_best"] <= 0.05 and figures["enumerate"]["assignments"] > 4
    rows = figures["average"]
    assert all(row["average_bits"] <= 5 + 1e-9 for row in rows.values())
    assert rows["uniform 5 bits"]["average_bits"] == pytest.approx(5)
    assert rows["chosen"]["measured"] <= rows["solver, not repaired"]["measured"] < rows["magnitude"]["measured"]
    assert rows["chosen"]["measured"] < min(rows["uniform 5 bits"]["measured"], rows["random, mean"]["measured"])
    assert "random, mean" in capsys.readouterr().out
