"""MobileNetV2: the published sizes, both flavours, the plan for small images, and its integers."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qcompiler.debug.fuzz import check, compile_stages
from qcompiler.models import (
    InvertedResidual,
    LinenMobileNetV2,
    MobileNetV2,
    calibrate_batch_norm,
    linen_mobilenet_v2,
    linen_variables,
    mobilenet_v2,
    smooth_images,
)


def parameter_count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# The paper rounds to 3.4 and 6.9 million (1.4 with a head of 1792); torchvision's and timm's counts to the unit.
@pytest.mark.parametrize(("width", "count"), [(1.0, 3_504_872), (0.5, 1_968_680), (1.4, 6_108_776)])
def test_parameter_counts_are_the_published_ones(width, count):
    model = nnx.eval_shape(lambda: mobilenet_v2(width, rngs=nnx.Rngs(0)))
    assert parameter_count(nnx.state(model, nnx.Param)) == count
    twin = linen_mobilenet_v2(width)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    logits, variables = jax.eval_shape(lambda key, x: twin.init_with_output(key, x), jax.random.key(0), x)
    assert logits.shape == (1, 1000)
    assert parameter_count(variables["params"]) == count


@pytest.mark.parametrize(("plan", "size", "maps"), [("imagenet", 224, 7), ("small", 32, 4), ("small", 64, 8)])
def test_maps_shrink_as_planned(plan, size, maps):
    model = nnx.eval_shape(lambda: MobileNetV2(plan=plan, rngs=nnx.Rngs(0)))
    model.eval()
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)

    def last_maps(model, x):
        x = model.conv_stem(x)
        for block in model.blocks:
            x = block(x)
        return x

    assert nnx.eval_shape(last_maps, model, x).shape == (2, maps, maps, 320)
    assert nnx.eval_shape(lambda m, x: m(x), model, x).shape == (2, 1000)


def test_depthwise_layers_are_flax_s_grouped_convolutions():
    block = nnx.eval_shape(lambda: InvertedResidual(8, 16, rngs=nnx.Rngs(0)))
    assert type(block.conv_depthwise) is nnx.Conv
    assert block.conv_depthwise.feature_group_count == 48
    assert block.conv_depthwise.conv_general_dilated is jax.lax.conv_general_dilated


@pytest.mark.slow
def test_both_flavours_compute_the_same():
    model = MobileNetV2(0.25, 7, channels=2, plan="small", depthwise="shifted", rngs=nnx.Rngs(0))
    twin = LinenMobileNetV2(0.25, 7, plan="small", depthwise="shifted")
    x = smooth_images(jax.random.key(7), (2, 17, 17, 2))
    calibrate_batch_norm(model, jax.random.key(1), 17, channels=2)
    variables = linen_variables(model)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert shapes(variables) == shapes(jax.eval_shape(twin.init, jax.random.key(0), x))

    # Compiled without optimization, in a third of the time.
    options = {"xla_backend_optimization_level": 0}
    both = jax.jit(lambda variables, x: (model(x), twin.apply(variables, x)), compiler_options=options)
    ours, theirs = both(variables, x)
    assert ours.shape == (2, 7) and np.ptp(ours) > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "tiny"}, "plan must be one of imagenet, small"),
        ({"width": 0}, "width must be positive"),
        ({"depthwise": "im2col"}, "depthwise must be one of"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MobileNetV2(**options, rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(LinenMobileNetV2(**options).init, jax.random.key(0), x)


@pytest.mark.slow
def test_integers_have_no_island_and_are_the_reference_s():
    model = calibrate_batch_norm(MobileNetV2(0.25, 10, plan="small", rngs=nnx.Rngs(0)), jax.random.key(0), 16)
    graphdef, weights = nnx.split(model)
    images = np.asarray(smooth_images(jax.random.key(1), (2, 16, 16, 3)))
    stages = compile_stages(lambda weights, x: nnx.merge(graphdef, weights)(x), weights, [images])
    # Raises if there is an island, if any region's bits differ from the reference, or if any is further than one step
    # from its simulation.
    findings = check(stages, [images])
    kinds = collections.Counter(name.partition("#")[0] for name in findings.worst)
    assert kinds == {"conv_general_dilated": 52, "reduce_sum": 1, "dot_general": 1}
