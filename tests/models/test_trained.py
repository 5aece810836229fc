"""Training on the procedural pictures: the cache, interrupts, and what is refused. Tiny networks, a few steps."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from qcompiler.models import MLP, cache, detector, llama, lstm, procedural, tasks, trained, training
from qcompiler.models.mobilenet import InvertedResidual

SIZE = 8


class Flat(nnx.Module):
    """A perceptron on the pixels."""

    def __init__(self, seed):
        self.mlp = MLP((SIZE * SIZE * 3, 32, len(procedural.CLASSES)), rngs=nnx.Rngs(seed))

    def __call__(self, x):
        return self.mlp(x.reshape(len(x), -1))


def flat(seed):
    return Flat(seed)


@pytest.fixture
def settings(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setitem(trained.MODELS, "flat", (flat, ()))
    monkeypatch.setattr(tasks, "_HELD_OUT_IMAGES", 64)
    return trained.Training("flat", epochs=3, steps=8, batch_size=32, learning_rate=3e-3, size=SIZE)


def test_trained_once_then_loaded(settings, monkeypatch, tmp_path):
    model, notes = trained.trained(settings, 1)
    assert notes["history"][-1] < notes["history"][0]
    assert 0 <= notes["accuracy"] <= 1 and notes["seconds"] > 0 and notes["jax"] == jax.__version__
    assert [p.name for p in tmp_path.iterdir()] == [settings.path(1).name]

    monkeypatch.setattr(training, "train_on_batches", lambda *a, **k: pytest.fail("trained twice"))
    again, same_notes = trained.trained(settings, 1)
    assert same_notes == notes
    for name, array in cache.arrays_of(model).items():
        np.testing.assert_array_equal(array, cache.arrays_of(again)[name])

    settings.path(1).write_bytes(b"PK")
    with pytest.raises(cache.CacheError, match="delete it"):
        trained.trained(settings, 1)


def tiny_lstm(seed):
    return lstm.RecurrentLM(8, rngs=nnx.Rngs(seed))


def tiny_llama(seed):
    return llama.Llama(llama.LlamaConfig(width=16, depth=1, hidden=16), rngs=nnx.Rngs(seed))


def tiny_detector(seed):
    return detector.Detector(len(procedural.CLASSES), 8, rngs=nnx.Rngs(seed))


TINY = {"lstm": tiny_lstm, "llama": tiny_llama, "detector": tiny_detector}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_kind_is_trained_and_scored(name, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    networks = trained.DETECTORS if name == "detector" else trained.LANGUAGE_MODELS
    monkeypatch.setitem(networks, name, (TINY[name], ()))
    monkeypatch.setattr(tasks, "_HELD_OUT_SEQUENCES", 16)
    monkeypatch.setattr(tasks, "_HELD_OUT_SCENES", 16)
    _, notes = trained.trained(trained.Training(name, epochs=1, steps=2, batch_size=4, size=32), 0)
    assert np.isfinite(notes["map50" if name == "detector" else "bits_per_byte"])


def test_an_interrupted_training_goes_on_to_the_same_weights(settings, monkeypatch):
    whole = cache.arrays_of(trained.trained(settings, 0)[0])
    settings.path(0).unlink()

    examples, calls = procedural.examples, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == settings.steps + 4:
            raise KeyboardInterrupt
        return examples(*args, **kwargs)

    monkeypatch.setattr(procedural, "examples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained.trained(settings, 0)
    checkpoint = settings.path(0).with_suffix(".partial.npz")
    assert checkpoint.exists() and not settings.path(0).exists()
    model, notes = trained.trained(settings, 0)
    assert len(notes["history"]) == settings.epochs and not checkpoint.exists()
    # 12 calls before the interrupt, 16 for the two epochs that were not whole, one for the accuracy.
    assert len(calls) == settings.steps + 4 + 2 * settings.steps + 1
    for name, array in cache.arrays_of(model).items():
        np.testing.assert_array_equal(array, whole[name])


def test_everything_that_decides_the_weights_is_in_the_name(settings, monkeypatch):
    variants = [
        settings,
        *(trained.Training("flat", **{name: 7}) for name in ("epochs", "steps", "batch_size", "size")),
    ]
    variants += [trained.Training("resnet"), trained.Training("mobilenet_v2")]
    paths = {s.path(seed) for s in variants for seed in (0, 1)}
    assert len(paths) == 2 * len(variants)
    before = trained.Training("resnet").path(0)
    monkeypatch.setattr(cache.inspect, "getsource", lambda _: "changed = True")
    assert trained.Training("resnet").path(0) != before


def test_networks_are_given_with_the_convolutions_that_the_compiler_reads(monkeypatch):
    build = lambda seed: InvertedResidual(8, 8, depthwise="shifted", rngs=nnx.Rngs(seed))
    monkeypatch.setattr(trained, "_train", lambda model, *rest: {"accuracy": 0.0})
    monkeypatch.setattr(trained.Training, "path", lambda self, seed: Path("none.npz"))
    monkeypatch.setitem(trained.MODELS, "mobilenet_v2", (build, ()))
    model, _ = trained.trained("mobilenet_v2")
    assert model.conv_depthwise.conv_general_dilated is jax.lax.conv_general_dilated


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="model must be one of resnet, mobilenet_v2, vit, llama, lstm, detector, got"):
        trained.trained("alexnet")
