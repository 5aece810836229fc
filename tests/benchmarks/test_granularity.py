"""The benchmark of granularities on small drawn weights."""

import json

import numpy as np
import pytest

from benchmarks import granularity
from qcompiler.numerics.types import QuantType


def test_finer_granularity_has_less_noise(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert granularity.main(["--models", "--size", "256", "--bits", "8", "4", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["weights"]
    for kind in ("normal", "heavy-tailed", "relu of normal"):
        noise = [figures[kind]["4 bits, symmetric"][g]["noise_left"] for g in granularity.GRANULARITIES]
        assert noise[0] == 1 and sorted(noise, reverse=True) == noise
        eight = figures[kind]["8 bits, affine"]
        assert eight["channel"] == eight["group32"]
    relu = figures["relu of normal"]
    assert relu["4 bits, affine"]["tensor"]["sqnr_db"] > relu["4 bits, symmetric"]["tensor"]["sqnr_db"] + 5
    assert "relu of normal" in capsys.readouterr().out


def test_bytes_are_those_stored():
    array = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    layer = granularity.quantized(array, QuantType(4, axis=(0, 1), block_size=(32, 1), contracted=(0,)))
    # Half a byte per weight, a step and a zero point per group, a multiplier and its shift per channel.
    assert layer.bytes == 64 * 16 // 2 + 2 * 2 * 16 + 5 * 16
    assert layer.weights == array.size


def test_unknown_networks_are_refused(capsys):
    with pytest.raises(SystemExit):
        granularity.main(["--models", "lenet"])
    assert "there are" in capsys.readouterr().err
