"""Every task: its examples fit its loss, and tens of steps lower it."""

import numpy as np
import pytest
from flax import nnx

from qcompiler.models import bound, detector, llama, lstm, tasks, trained, training, vit

TINY = {
    "vit": (tasks.SHAPES, 16, lambda: vit.ViT(16, 4, 32, 1, 2, 64, classes=12, rngs=nnx.Rngs(0))),
    "llama": (tasks.BYTES, 32, lambda: llama.Llama(llama.LlamaConfig(width=32, depth=1, hidden=64, context=32),
                                                   rngs=nnx.Rngs(0))),
    "lstm": (tasks.BYTES, 32, lambda: lstm.RecurrentLM(32, rngs=nnx.Rngs(0))),
    "detector": (tasks.SCENES, 32, lambda: detector.Detector(12, 8, rngs=nnx.Rngs(0))),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TINY))
def test_fifty_steps_lower_the_loss(name):
    task, size, build = TINY[name]
    batches = lambda epoch: (task.examples(32 * (10 * epoch + i), 32, 0, size) for i in range(10))
    history = training.train_on_batches(build(), batches, epochs=5, steps=10, learning_rate=3e-3, loss=task.loss)
    assert np.all(np.isfinite(history)) and history[-1] < 0.98 * history[0]


@pytest.mark.parametrize("name", ["llama", "detector"])
def test_untrained_networks_score_as_guesses_do(name, monkeypatch):
    monkeypatch.setattr(tasks, "_HELD_OUT_SEQUENCES", 16)
    monkeypatch.setattr(tasks, "_HELD_OUT_SCENES", 64)
    task, size, build = TINY[name]
    model = build()
    model.eval()
    score = task.evaluate(nnx.jit(model), 0, size)
    if task.score == "bits_per_byte":
        assert score == pytest.approx(8, abs=0.1)  # logits are small at first
    else:
        assert 0 <= score < 0.05


def test_every_network_has_a_task_and_its_own_place():
    assert trained.names() == ["resnet", "mobilenet_v2", "vit", "llama", "lstm", "detector"]
    scores = [trained._found(name)[2].score for name in trained.names()]
    assert scores == ["accuracy"] * 3 + ["bits_per_byte"] * 2 + ["map50"]
    assert len({trained.settings_of(name).path(0) for name in trained.names()}) == len(trained.names())


def test_sources_decide_where_a_language_model_is_kept(monkeypatch):
    before = [trained.settings_of(name).path(0) for name in ("llama", "resnet")]
    monkeypatch.setattr(tasks.text, "fingerprint", lambda: "another Python's")
    after = [trained.settings_of(name).path(0) for name in ("llama", "resnet")]
    assert after[0] != before[0] and after[1] == before[1]


def test_params_of_a_bound_function_keep_their_nesting():
    params = {"a": np.ones(2, np.float32), "b": [np.zeros(1, np.float32), {"c": np.zeros((2, 2), np.float32)}]}
    held = bound.Bound(params)
    assert len(nnx.to_flat_state(nnx.state(held, nnx.Param))) == 3
    assert isinstance(held.params["b"], list)
    np.testing.assert_array_equal(held.params["b"][1]["c"], params["b"][1]["c"])
