"""The benchmark of equalization on the first blocks of an untrained MobileNetV2."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import equalization
from benchmarks.spread import spread_channels
from qcompiler.debug.report import sqnr_db
from qcompiler.models import layers, mobilenet, procedural, statistics, trained

SIZE = 16


@pytest.fixture(scope="module")
def model():
    model = mobilenet.MobileNetV2(0.25, len(procedural.CLASSES), plan="small", rngs=nnx.Rngs(0))
    model.blocks = nnx.List(list(model.blocks)[:3])
    channels = model.blocks[-1].norm_project.scale[...].size
    model.conv_head = layers.conv(channels, model.norm_head.scale[...].size, 1, rngs=nnx.Rngs(1))
    return statistics.calibrate_batch_norm(model, jax.random.key(0), SIZE)


def _spread_of(model):
    """The largest ratio between the scales of two channels behind a depthwise convolution."""
    scales = [np.abs(np.asarray(b.norm_depthwise.scale[...])) for b in model.blocks]
    return max(s.max() / s.min() for s in scales)


@pytest.mark.parametrize("ratio", [1.0, 1e3])
def test_the_same_function_with_other_channels(model, ratio):
    x = procedural.examples("test", 0, 4, size=SIZE)[0]
    spread = spread_channels(model, ratio)
    # Each channel is scaled and scaled back in float32, 2**-24 each, over a dozen layers.
    assert sqnr_db([np.asarray(model(x))], [np.asarray(spread(x))]) > 80
    assert _spread_of(spread) == pytest.approx(_spread_of(model) * ratio, rel=1) and _spread_of(spread) >= ratio
    assert not any(hasattr(block, "top_depthwise") for block in model.blocks)


@pytest.mark.slow
def test_figures(model, monkeypatch, tmp_path, capsys):
    settings = trained.Training("mobilenet_v2", size=SIZE)
    monkeypatch.setattr(trained, "settings_of", lambda name: settings)
    monkeypatch.setattr(trained, "trained", lambda settings, seed: (model, {}))
    path = tmp_path / "figures.json"
    arguments = ["--ratios", "1000", "--recipes", "unequalized", "default", "--images", "50", "--calibration", "8"]
    assert equalization.main([*arguments, "--json", str(path)]) == 0
    unequalized, default = json.loads(path.read_text())["rows"]
    assert (unequalized["recipe"], default["recipe"]) == ("unequalized", "default")
    # Most channels have less than a step of a scale that all share: they are noise. With scales of their own, the
    # ranges of activations that all share remain.
    assert unequalized["sqnr_db"] < 3 and unequalized["float"] == default["float"]
    assert "unequalized" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--images", "49"], "batches of 50"), (["--ratios", "0.5"], "at least 1")]
)
def test_what_cannot_be_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        equalization.main(arguments)
    assert message in capsys.readouterr().err
