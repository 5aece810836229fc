"""The speed benchmark on a tiny model. Times are never asserted, only that they are there."""

import contextlib
import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import contenders, models, speed
from qcompiler.debug.report import sqnr_db
from qcompiler.models.statistics import smooth_images

SIZE = 16


class TinyNet(nnx.Module):
    """A stem with a padded max pool, a depthwise residual branch behind a clipped activation, a head."""

    def __init__(self, *, shifted=False, rngs):
        self.shifted = shifted
        self.stem = nnx.Conv(3, 32, (3, 3), strides=(2, 2), padding=1, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.depthwise = nnx.Conv(32, 32, (3, 3), padding=1, feature_group_count=32, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu6(self.norm(self.stem(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return self.head(jax.numpy.mean(jax.nn.relu(x + self._depthwise(x)), axis=(1, 2)))

    def _depthwise(self, x):
        if not self.shifted:
            return self.depthwise(x)
        kernel = self.depthwise.kernel.get_value()
        padded = jax.numpy.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = x.shape[1:3]
        shifts = [padded[:, i : i + height, j : j + width] * kernel[i, j, 0] for i in range(3) for j in range(3)]
        return sum(shifts[1:], shifts[0]) + self.depthwise.bias.get_value()


@pytest.fixture(scope="module")
def tiny():
    models.MODELS["tiny"] = models.Model(TinyNet, size=SIZE, shifted={"shifted": True})
    yield "tiny"
    del models.MODELS["tiny"]


@pytest.fixture(scope="module")
def subject(tiny):
    """A subject without integers, for contenders that need none."""
    model, shifted = models.build(tiny, SIZE)
    images = np.asarray(smooth_images(jax.random.key(1), (4, SIZE, SIZE, 3)))
    with contextlib.ExitStack() as resources:
        yield contenders.Subject(model, shifted, images, None, resources)


def test_every_contender_says_what_it_is_and_float_leads():
    assert next(iter(contenders.CONTENDERS)) == "float"
    assert all(c.does for c in contenders.CONTENDERS.values())


def test_an_absent_package_is_a_message_that_says_what_to_install(subject, monkeypatch, capsys):
    absent = dataclasses.replace(contenders.CONTENDERS["qwix"], needs=("no_such_package",))
    monkeypatch.setitem(contenders.CONTENDERS, "qwix", absent)
    prepared, skipped = speed.prepare(subject, ["qwix"])
    assert list(prepared) == ["float"]
    assert list(skipped) == ["qwix"]
    assert "no_such_package" in skipped["qwix"] and ".[peers]" in skipped["qwix"]
    assert f"skipped qwix: {skipped['qwix']}" in capsys.readouterr().out


def test_a_model_without_the_variant_is_skipped(subject):
    _, skipped = speed.prepare(dataclasses.replace(subject, shifted=None), ["float-shifted"])
    assert "shifted" in skipped["float-shifted"]


def test_float_contenders_compute_the_same_function(subject):
    prepared, _ = speed.prepare(subject, ["float-arguments", "float-folded", "float-shifted"])
    x = subject.calibration[:2]
    results = {name: at(x).result() for name, at in prepared.items()}
    for name, result in results.items():
        # Other orders of the same float32 sums: 2**-24 each.
        assert sqnr_db([results["float"]], [result]) > 100, name


@pytest.mark.parametrize("name", ["onnxruntime-float", "openvino-float"])
def test_exported_models_compute_the_same_function(subject, name):
    for package in contenders.CONTENDERS[name].needs:
        pytest.importorskip(package)
    prepared, skipped = speed.prepare(subject, [name])
    assert not skipped
    x = subject.calibration[:3]
    call = prepared[name](x)
    # Other orders of the same float32 sums.
    assert sqnr_db([np.asarray(subject.reference(x))], [call.result()]) > 100
    assert call.seconds() > 0


def test_a_worker_that_cannot_build_its_model_is_a_message(subject):
    pytest.importorskip("onnxruntime")
    (subject.onnx / "broken").mkdir()
    (subject.onnx / "broken" / "model.onnx").write_bytes(b"no model")
    np.save(subject.onnx / "broken" / "calibration.npy", subject.calibration)
    broken = dataclasses.replace(subject)
    broken.__dict__["onnx"] = subject.onnx / "broken"
    _, skipped = speed.prepare(broken, ["onnxruntime-float"])
    assert skipped["onnxruntime-float"]


def test_a_wrong_export_is_no_peer(subject, monkeypatch):
    pytest.importorskip("onnxruntime")
    other = dataclasses.replace(subject)
    other.__dict__["onnx"] = subject.onnx
    other.__dict__["reference"] = lambda x: subject.reference(x) + 1
    _, skipped = speed.prepare(other, ["onnxruntime-float"])
    assert "another one" in skipped["onnxruntime-float"]


@pytest.mark.slow
def test_the_command_writes_table_and_json(tiny, tmp_path, capsys):
    path = tmp_path / "figures.json"
    names = ["float-folded", "int8"]
    arguments = ["--model", tiny, "--batches", "1", "3", "--rounds", "2", "--calibration", "4", "--json", str(path)]
    assert speed.main([*arguments, "--contenders", *names]) == 0
    figures = json.loads(path.read_text())
    assert figures["model"] == tiny and figures["size"] == SIZE and figures["islands"] == 0
    assert figures["qdq_pairs_before"] > figures["qdq_pairs_after"] == 0
    assert 0.25 <= figures["weight_ratio"] < 0.5
    assert set(figures["calibration"]) == {"seconds", "float_seconds", "times_float"}
    assert set(figures["batches"]) == {"1", "3"}
    for rows in figures["batches"].values():
        assert set(rows) == {"float", *names}
        assert rows["float"]["sqnr_db"] is None and rows["float"]["times_float"] == 1.0
        # One layer deep in 8 bits: far above noise, and no float result in disguise.
        assert 25 < rows["int8"]["sqnr_db"] < 70
        for row in rows.values():
            assert 0 < row["min_ms"] <= row["median_ms"] and math.isfinite(row["times_float"])
    table = capsys.readouterr().out
    assert all(name in table for name in names) and "QDQ pairs" in table


def test_plot_draws_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    row = {"median_ms": 2.0, "min_ms": 1.5, "times_float": 1.0, "sqnr_db": None}
    rows = {"float": row, "int8": {**row, "median_ms": 1.0, "times_float": 2.0, "sqnr_db": 40.0}}
    plot.draw({"model": "tiny", "size": SIZE, "batches": {"1": rows, "8": rows}}, tmp_path / "figures.svg")
    assert "tiny" in (tmp_path / "figures.svg").read_text()
