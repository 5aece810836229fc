import builtins
import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qcompiler.models import (
    MLP,
    BasicBlock,
    BottleneckBlock,
    LinenBasicBlock,
    LinenBottleneckBlock,
    LinenMLP,
    LinenResNet,
    ResNet,
    calibrate_batch_norm,
    linen_resnet18,
    linen_resnet50,
    linen_variables,
    resnet18,
    resnet50,
    smooth_images,
)
from qcompiler.models.digits import load_digits
from qcompiler.models.training import ProgressBar, accuracy, train

TWINS = {"basic": (BasicBlock, LinenBasicBlock), "bottleneck": (BottleneckBlock, LinenBottleneckBlock)}


def abstract(build, **options):
    """The model with shapes instead of arrays: counting a ResNet-50's weights needs none of them."""
    return nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0), **options))


def parameter_count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def images(size, channels, n=2):
    return smooth_images(jax.random.key(7), (n, size, size, channels))


@pytest.mark.parametrize(
    ("build", "linen_build", "count"),
    [(resnet18, linen_resnet18, 11_689_512), (resnet50, linen_resnet50, 25_557_032)],
)
def test_parameter_counts_are_the_published_ones(build, linen_build, count):
    assert parameter_count(nnx.state(abstract(build), nnx.Param)) == count

    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    logits, variables = jax.eval_shape(lambda key, x: linen_build().init_with_output(key, x), jax.random.key(0), x)
    assert logits.shape == (1, 1000)
    assert parameter_count(variables["params"]) == count


@pytest.mark.parametrize("build", [resnet18, resnet50])
def test_imagenet_stem_shapes(build):
    model = abstract(build, classes=7)
    model.eval()
    logits = nnx.eval_shape(lambda m, x: m(x), model, jax.ShapeDtypeStruct((3, 224, 224, 3), jnp.float32))
    assert logits.shape == (3, 7)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("kind", "stages", "width", "classes", "channels", "stem", "size"),
    [
        ("basic", (1, 2), 8, 5, 1, "small", 8),
        ("bottleneck", (1, 1, 1), 8, 3, 4, "imagenet", 33),
        ("basic", (1,), 6, 2, 3, "imagenet", 30),
    ],
)
def test_both_flavours_compute_the_same(kind, stages, width, classes, channels, stem, size):
    block, linen_block = TWINS[kind]
    model = ResNet(block, stages, width=width, classes=classes, channels=channels, stem=stem, rngs=nnx.Rngs(0))
    twin = LinenResNet(linen_block, stages, width=width, classes=classes, stem=stem)
    x = images(size, channels)

    fresh = jax.eval_shape(twin.init, jax.random.key(0), x)
    calibrate_batch_norm(model, jax.random.key(1), size, channels=channels)
    variables = linen_variables(model)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert shapes(variables) == shapes(fresh)

    logits = jax.jit(twin.apply)(variables, x)
    assert logits.shape == (2, classes)
    assert np.all(np.isfinite(logits))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), logits, rtol=1e-4, atol=1e-4)


def test_linen_training_mode_updates_statistics():
    model = LinenResNet(LinenBasicBlock, (1,), width=4, classes=3, stem="small")
    x = images(8, 1)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    _, updates = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
    before, after = variables["batch_stats"]["norm_stem"]["mean"], updates["batch_stats"]["norm_stem"]["mean"]
    assert not np.array_equal(before, after)


def test_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="stem must be"):
        ResNet(BasicBlock, (1,), stem="tiny", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="stem must be"):
        jax.eval_shape(LinenResNet(LinenBasicBlock, (1,), stem="tiny").init, jax.random.key(0), images(8, 1))


def test_mlp_flavours_compute_the_same():
    model = MLP((6, 16, 8, 3), rngs=nnx.Rngs(0))
    twin = LinenMLP((16, 8, 3))
    x = jax.random.normal(jax.random.key(0), (5, 6))
    variables = linen_variables(model)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(variables) == shapes(twin.init(jax.random.key(0), x))
    assert model(x).shape == (5, 3)
    np.testing.assert_allclose(twin.apply(variables, x), model(x), rtol=1e-5, atol=1e-6)


def test_mlp_needs_two_sizes():
    with pytest.raises(ValueError, match="input and an output size"):
        MLP((6,), rngs=nnx.Rngs(0))


def test_calibrated_statistics_match_the_data():
    model = ResNet(BottleneckBlock, (2, 1), width=16, classes=4, rngs=nnx.Rngs(0))
    assert calibrate_batch_norm(model, jax.random.key(3), 64, batches=3) is model
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
    assert all(norm.use_running_average and norm.momentum == 0.9 for norm in norms)

    for norm in norms:
        assert np.all(norm.var.get_value() > 1e-6)
        assert len(np.unique(norm.scale.get_value())) > 1

    @nnx.jit
    def activations(model, x):
        stem = model.norm_stem(model.conv_stem(x))
        stages = [jax.nn.relu(stem)]
        for block in model.blocks:
            stages.append(block(stages[-1]))
        return stem, stages, model(x)

    # On images it has not seen, the norm's output has the deviation its scale asks for, give or take.
    stem, stages, logits = jax.tree.map(np.asarray, activations(model, images(64, 3, n=8)))
    ratio = stem.std(axis=(0, 1, 2)) / np.asarray(model.norm_stem.scale.get_value())
    assert np.all((ratio > 0.5) & (ratio < 2))
    for stage in stages:
        assert np.all(np.isfinite(stage))
        assert 0.05 < stage.std() < 20
        assert 0.1 < np.mean(stage == 0) < 0.9
    assert np.all(np.isfinite(logits))
    assert logits.std() > 0.01


def test_calibration_is_deterministic_in_the_key():
    def state(key):
        model = ResNet(BasicBlock, (1,), width=4, classes=2, channels=1, stem="small", rngs=nnx.Rngs(0))
        return jax.tree.leaves(nnx.state(calibrate_batch_norm(model, jax.random.key(key), 8, channels=1)))

    assert all(np.array_equal(a, b) for a, b in zip(state(0), state(0), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(state(0), state(1), strict=True))


def test_calibration_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="MLP has no BatchNorm"):
        calibrate_batch_norm(MLP((2, 2), rngs=nnx.Rngs(0)), jax.random.key(0), 8)
    model = ResNet(BasicBlock, (1,), width=4, stem="small", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least 1"):
        calibrate_batch_norm(model, jax.random.key(0), 8, batches=0)


@pytest.mark.slow
def test_resnet50_calibrates_at_full_size():
    model = calibrate_batch_norm(resnet50(rngs=nnx.Rngs(0)), jax.random.key(0), 224)
    logits = nnx.jit(lambda m, x: m(x))(model, images(224, 3))
    assert np.all(np.isfinite(logits))
    assert 0.05 < np.std(logits) < 50


def test_smooth_images_are_normalised_and_smooth():
    x = np.asarray(images(64, 3))
    np.testing.assert_allclose(x.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(1, 2, 3)), 1, atol=1e-5)
    neighbours = np.mean(x[:, 1:] * x[:, :-1])
    assert neighbours > 0.5


def test_digits_split_is_disjoint_stratified_and_fixed():
    data = load_digits()
    train_rows, calibration_rows, test_rows = (
        set(split.indices.tolist()) for split in (data.train, data.calibration, data.test)
    )
    assert len(train_rows) == len(data.train) == 1347
    assert len(calibration_rows) == len(data.calibration) == 50
    assert len(test_rows) == len(data.test) == 450
    assert not train_rows & test_rows
    assert calibration_rows <= train_rows
    assert np.bincount(data.calibration.labels).tolist() == [5] * 10
    assert np.bincount(data.test.labels).min() >= 43

    assert data.train.images.shape == (1347, 8, 8, 1)
    assert data.train.images.dtype == np.float32
    assert data.train.images.min() == 0
    assert data.train.images.max() == 1
    again = load_digits()
    np.testing.assert_array_equal(data.test.indices, again.test.indices)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    real_import = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.split(".")[0] == "sklearn":
            raise ImportError("No module named 'sklearn'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match=r"qcompiler\[examples\]"):
        load_digits()


def blobs(n=64):
    labels = np.arange(n) % 2
    noise = np.random.default_rng(0).normal(size=(n, 4))
    return (noise + 3 * labels[:, None]).astype(np.float32), labels


def test_training_learns_and_is_deterministic():
    def run():
        model = MLP((4, 8, 2), rngs=nnx.Rngs(0))
        losses = train(model, *blobs(), epochs=5, batch_size=16, learning_rate=0.03)
        return losses, model

    losses, model = run()
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert accuracy(model, *blobs()) > 0.95
    assert run()[0] == losses


def test_training_leaves_evaluation_mode_and_last_step_on_interrupt():
    model = ResNet(BasicBlock, (1,), width=4, classes=2, channels=1, stem="small", rngs=nnx.Rngs(0))

    def interrupt(key, images):
        raise KeyboardInterrupt

    x = np.zeros((8, 8, 8, 1), np.float32)
    before = jax.tree.leaves(nnx.state(model, nnx.Param))
    with pytest.raises(KeyboardInterrupt):
        train(model, x, np.zeros(8, np.int32), epochs=1, batch_size=4, augment=interrupt)
    after = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.norm_stem.use_running_average


def test_training_refuses_mismatched_data():
    model = MLP((4, 2), rngs=nnx.Rngs(0))
    x, labels = blobs()
    with pytest.raises(ValueError, match="labels"):
        train(model, x, labels[:-1], epochs=1)
    with pytest.raises(ValueError, match="one batch of 128"):
        train(model, x, labels, epochs=1, batch_size=128)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_on_terminals_only(monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    progress = ProgressBar("training", 4)
    progress.update(1, "loss 1.0")
    progress.close()
    written = stream.getvalue()
    if terminal:
        assert "training [######" in written
        assert written.endswith("loss 1.0\n")
    else:
        assert written == ""


@pytest.mark.slow
def test_digits_resnet_reaches_its_accuracy(trained_digits):
    model, data = trained_digits
    assert model.norm_stem.use_running_average
    assert accuracy(model, data.test.images, data.test.labels) >= 0.98
