"""The surface, end to end, on models so small that what comes out can be reasoned about."""

import inspect
import os
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import qcompiler as qc
from qcompiler.debug.report import sqnr_db

#: 8 bits over ±4 sigma of a Gaussian give 6.02 * 8 + 10.8 - 20 log10(8) = 41 dB per rounded tensor; 8 such tensors on
#: the way to a result (operands and weights of four products), each adding noise of the same size, leave 41 - 9 = 32.
FEW_LAYERS_DB = 30.0


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(5, 8, seed=1)
PARAMS = {"enc": {"w": normal(8, 16, seed=2), "b": normal(16, seed=3)}, "out": {"w": normal(16, 4, seed=4)}}


def mlp(params, x):
    with jax.named_scope("enc"):
        h = jax.nn.relu(x @ params["enc"]["w"] + params["enc"]["b"])
    with jax.named_scope("out"):
        return h @ params["out"]["w"]


def db(reference, value):
    return sqnr_db([reference], [value])


def same(a, b):
    """Bit for bit, structure and dtypes included."""
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [x.dtype for x in map(jnp.asarray, left)] == [x.dtype for x in map(jnp.asarray, right)]
    return all(np.array_equal(x, y) for x, y in zip(left, right, strict=True))


def check(qmodel, *args, least=FEW_LAYERS_DB, **kwargs):
    """Integers, simulation and float have one structure; real results agree, others are equal."""
    exact, out = qmodel.float(*args, **kwargs), qmodel(*args, **kwargs)
    simulated = qmodel.simulate(*args, **kwargs)
    assert jax.tree.structure(exact) == jax.tree.structure(out) == jax.tree.structure(simulated)
    for f, q, s in zip(*map(jax.tree.leaves, (exact, out, simulated)), strict=True):
        assert (q.shape, q.dtype) == (f.shape, f.dtype) == (s.shape, s.dtype)
        if not jnp.issubdtype(f.dtype, jnp.floating):
            assert np.array_equal(f, q) and np.array_equal(f, s)
            continue
        assert db(f, q) >= least
        assert db(f, s) >= least
    return out


def source_ids(qmodel):
    """Ids of the regions, in order."""
    return [e.params["id"] for e in qmodel._quantized.program.eqns if "body" in e.params]


def codes_of(qmodel):
    """(name, codes) of each weight that is stored as integers; 4 bits two to a byte, in any order."""
    named = {n: re.fullmatch(r"(.*):int\d+sn?(\[[\d,]*\])?([@:].*)?", n) for n in qmodel.params}
    found = [(match[1], qmodel.params[n]) for n, match in named.items() if match]
    nibbles = lambda w: np.stack([w & 15, w >> 4]).astype(np.int8)
    signed = lambda w: np.where(nibbles(w) > 7, nibbles(w) - 16, nibbles(w)) if w.dtype == np.uint8 else w
    return [(name, signed(np.asarray(w))) for name, w in found if w.dtype in (np.int8, np.uint8)]


def largest_code(qmodel, weight):
    return max(np.abs(np.asarray(w, np.int32)).max() for name, w in codes_of(qmodel) if name == weight)


@pytest.fixture(scope="module")
def qmlp():
    return qc.quantize(mlp, [X], params=PARAMS)


# What can be quantized


def test_a_function_with_a_pytree_of_weights(qmlp):
    check(qmlp, X)
    np.testing.assert_array_equal(qmlp.float(X), jax.jit(lambda x: mlp(jax.tree.map(jnp.asarray, PARAMS), x))(X))
    assert source_ids(qmlp) == ["enc/dot_general#0", "out/dot_general#0"]


def test_a_function_that_closes_over_its_weights(qmlp):
    closed = qc.quantize(lambda x: mlp(PARAMS, x), [X])
    assert same(closed(X), qmlp(X))
    assert closed.report.weight_bytes == qmlp.report.weight_bytes
    assert closed.report.float_weight_bytes == qmlp.report.float_weight_bytes == 4 * (8 * 16 + 16 + 16 * 4)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.features(x))

    def features(self, x):
        return jnp.mean(jax.nn.relu(self.norm(self.conv(x))), axis=(1, 2))


class LinenNet(linen.Module):
    def setup(self):
        self.conv = linen.Conv(8, (3, 3))
        self.norm = linen.BatchNorm()
        self.head = linen.Dense(4)

    def __call__(self, x, train: bool):
        return self.head(self.features(x, train=train))

    def features(self, x, train: bool):
        return jnp.mean(jax.nn.relu(self.norm(self.conv(x), use_running_average=not train)), axis=(1, 2))


IMAGES = normal(2, 6, 6, 3, seed=5)


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="module")
def linen_variables(net):
    """The variables of `LinenNet` with the weights of `net`."""
    state = nnx.to_pure_dict(nnx.state(net))
    stats = {"mean": state["norm"].pop("mean"), "var": state["norm"].pop("var")}
    return {"params": state, "batch_stats": {"norm": stats}}


def test_an_nnx_module_and_its_linen_twin(net, linen_variables):
    ours = qc.quantize(net, [IMAGES])
    check(ours, IMAGES)
    twin = qc.quantize(LinenNet(), [IMAGES], variables=linen_variables, apply_kwargs={"train": False})
    assert source_ids(ours) == source_ids(twin)
    assert source_ids(ours) == ["conv/conv_general_dilated#0", "reduce_sum#0", "head/dot_general#0"]
    assert same(ours(IMAGES), twin(IMAGES))
    np.testing.assert_array_equal(ours.float(IMAGES), jax.jit(net)(IMAGES))
    assert type(net) is Net and type(net.conv) is nnx.Conv, "the user's module was changed"


@pytest.mark.parametrize("by_name", [True, False])
def test_another_method_of_a_module(net, linen_variables, by_name):
    ours = qc.quantize(net, [IMAGES], method="features" if by_name else Net.features)
    method = "features" if by_name else LinenNet.features
    twin = qc.quantize(LinenNet(), [IMAGES], variables=linen_variables, method=method, apply_kwargs={"train": False})
    check(ours, IMAGES)
    assert same(ours(IMAGES), twin(IMAGES))
    assert ours(IMAGES).shape == (2, 8)


def test_apply_kwargs_of_a_function():
    def fun(params, x, *, flip):
        return mlp(params, -x if flip else x)

    flipped = qc.quantize(fun, [X], params=PARAMS, apply_kwargs={"flip": True})
    assert db(flipped(X), mlp(PARAMS, -X)) >= FEW_LAYERS_DB


# Inputs and outputs


def two_inputs(params, x, y):
    return mlp(params, x) - mlp(params, y)


Y = normal(5, 8, seed=6)


@pytest.mark.parametrize(
    ("item", "args", "kwargs"),
    [
        ((X, Y), (X, Y), {}),
        ({"x": X, "y": Y}, (), {"x": X, "y": Y}),
        (qc.call(X, y=Y), (X,), {"y": Y}),
        (qc.call(X, Y), (X, Y), {}),
    ],
    ids=["tuple", "dict", "call", "positional_call"],
)
def test_several_inputs(item, args, kwargs):
    out = check(qc.quantize(two_inputs, [item], params=PARAMS), *args, **kwargs)
    assert db(two_inputs(PARAMS, X, Y), out) >= FEW_LAYERS_DB


def test_a_dict_is_keywords_only_if_its_keys_are_parameters():
    fun = lambda params, batch: mlp(params, batch["image"]) + batch["offset"]
    batch = {"image": X, "offset": normal(5, 4)}
    check(qc.quantize(fun, [batch], params=PARAMS), batch)
    fun = lambda params, x: mlp(params, x["x"])
    qmodel = qc.quantize(fun, [qc.call({"x": X})], params=PARAMS)
    check(qmodel, {"x": X})


def test_lists_and_named_tuples_are_one_input():
    from collections import namedtuple

    Pair = namedtuple("Pair", "left right")
    for pair in (Pair(X, Y), [X, Y]):
        check(qc.quantize(lambda params, pair: two_inputs(params, *pair), [pair], params=PARAMS), pair)


def test_nested_outputs():
    def fun(params, x):
        y = mlp(params, x)
        return {"y": y, "more": [(y, None), jax.nn.relu(y)], "sum": jnp.sum(y, axis=-1)}

    out = check(qc.quantize(fun, [X], params=PARAMS), X)
    assert set(out) == {"y", "more", "sum"} and out["more"][0][1] is None
    assert np.array_equal(out["y"], out["more"][0][0])


def test_integers_pass_through():
    def fun(params, x, ids):
        return mlp(params, x) + params["table"][ids], ids + 1, ids

    ids = np.arange(5, dtype=np.int32)
    qmodel = qc.quantize(fun, [(X, ids)], params={**PARAMS, "table": normal(5, 4)}, strict=True)
    check(qmodel, X, ids)
    assert qmodel.params["table:int8sn[0]"].dtype == np.int8


def test_results_that_are_inputs_weights_or_numbers():
    def fun(params, x):
        return mlp(params, x), x, params["enc"]["b"], jnp.ones(3), 2.0

    out = check(qc.quantize(fun, [X], params=PARAMS), X)
    assert same(out[1:], (X, PARAMS["enc"]["b"], np.ones(3, np.float32), jnp.asarray(2.0)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_goes_in_and_out_as_it_is(dtype):
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), PARAMS)
    qmodel = qc.quantize(mlp, [jnp.asarray(X, dtype)], params=params)
    # bfloat16 results have 8 bits themselves: 6.02 * 8 + 4.8 dB at best for each of a few roundings.
    assert check(qmodel, jnp.asarray(X, dtype)).dtype == dtype


# Shared and tied


class Shared(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        for _ in range(2):
            x = jax.nn.relu(self.down(jax.nn.relu(self.up(x))))
        return x


class LinenShared(linen.Module):
    @linen.compact
    def __call__(self, x):
        up, down = linen.Dense(16, name="up"), linen.Dense(8, name="down")
        for _ in range(2):
            x = jax.nn.relu(down(jax.nn.relu(up(x))))
        return x


def test_a_module_called_twice_keeps_its_path_and_its_one_weight():
    model = Shared(nnx.Rngs(1))
    ours = qc.quantize(model, [X])
    variables = {"params": nnx.to_pure_dict(nnx.state(model))}
    twin = qc.quantize(LinenShared(), [X], variables=variables)
    ids = [f"{name}/dot_general#{k}" for k in range(2) for name in ("up", "down")]
    assert source_ids(ours) == source_ids(twin) == ids
    check(ours, X)
    assert same(ours(X), twin(X))
    assert [name for name, _ in codes_of(ours)] == ["up/kernel", "down/kernel"]


def test_a_weight_tied_between_two_layers():
    fun = lambda params, x: jax.nn.relu(x @ params["t"]) @ params["t"].T
    qmodel = qc.quantize(fun, [X], params={"t": normal(8, 16)})
    check(qmodel, X)
    # Scales follow output channels, which are other axes of it in the two layers: two sets of codes, one float weight.
    assert sorted(w.shape for _, w in codes_of(qmodel)) in ([(8, 16), (8, 16)], [(8, 16), (16, 8)])


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (1, 1), rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(x + self.conv2(jax.nn.relu(self.conv1(x))))


class Tower(nnx.Module):
    """Modules in a list, in a dict, shared under two names, and the same part inside two others."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.heads = nnx.Dict({"a": nnx.Linear(8, 4, rngs=rngs), "b": nnx.Linear(8, 4, rngs=rngs)})

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        x = jnp.max(x, axis=(1, 2))
        return {name: head(x) for name, head in self.heads.items()}


def test_module_paths_are_those_of_the_parameter_tree():
    model, x = Tower(nnx.Rngs(0)), normal(2, 4, 4, 8)
    qmodel = qc.quantize(model, [x])
    check(qmodel, x)
    layers = [f"blocks/{k}/conv{c}/conv_general_dilated#0" for k in (0, 1) for c in (1, 2)]
    layers += [f"heads/{name}/dot_general#0" for name in "ab"]
    assert [i for i in source_ids(qmodel) if "conv" in i or "dot" in i] == layers
    assert {name for name, _ in codes_of(qmodel)} == {f"{layer.rpartition('/')[0]}/kernel" for layer in layers}


class Part(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return jnp.tanh(self.inner(x))


def test_a_part_shared_between_modules_has_one_path():
    class Both(nnx.Module):
        def __init__(self, rngs):
            inner = nnx.Linear(8, 8, rngs=rngs)
            self.first, self.second = Part(inner), Part(inner)

        def __call__(self, x):
            return self.second(self.first(x))

    ids = source_ids(qc.quantize(Both(nnx.Rngs(0)), [X]))
    assert ids == ["first/inner/dot_general#0", "first/tanh#0", "first/inner/dot_general#1", "second/tanh#0"]


def test_linen_modules_in_lists_and_inside_each_other():
    class Inner(linen.Module):
        @linen.compact
        def __call__(self, x):
            return jax.nn.relu(linen.Dense(8, name="dense")(x))

    class Outer(linen.Module):
        def setup(self):
            self.parts = [Inner(), Inner()]
            self.heads = {"a": linen.Dense(4)}

        def __call__(self, x):
            for part in self.parts:
                x = part(x)
            return self.heads["a"](x)

    variables = Outer().init(jax.random.key(0), X)
    qmodel = qc.quantize(Outer(), [X], variables=variables)
    check(qmodel, X)
    assert source_ids(qmodel) == [f"{p}/dot_general#0" for p in ("parts_0/dense", "parts_1/dense", "heads_a")]
    assert {"parts_0", "parts_1", "heads_a"} == set(variables["params"])


# Batch sizes and transformations


def test_calibration_batches_of_different_sizes():
    batches = [normal(n, 8, seed=n) for n in (4, 1, 6)]
    mixed = qc.quantize(mlp, iter(batches), params=PARAMS)
    whole = qc.quantize(mlp, [np.concatenate(batches)], params=PARAMS)
    # Histograms count the same values, however they were cut; a float product rounds by its number of rows.
    assert db(whole(X), mixed(X)) > 60
    assert mixed.report.passes[6].name == "calibrate" and mixed.report.passes[6].changed == "3 batches"


@pytest.mark.parametrize("size", [1, 3, 7])
def test_any_batch_size_gives_the_same_integers(qmlp, size):
    x = normal(7, 8, seed=7)
    whole = qmlp(x)
    assert same(np.concatenate([qmlp(x[k : k + size]) for k in range(0, 7, size)]), np.asarray(whole))


def test_ids_do_not_depend_on_the_batch_size(qmlp):
    other = qc.quantize(mlp, [normal(2, 8)], params=PARAMS)
    assert source_ids(other) == source_ids(qmlp)
    qmlp(X[:2])
    lowered = [p for key, p in qmlp._programs.items() if key != qmlp._key(qmlp.program.input_avals)]
    assert lowered
    for program in lowered:
        assert all(program.weights[n] is w for n, w in qmlp.params.items()), "another batch size copies the weights"


def test_transformations_give_the_same_integers(qmlp):
    x = normal(7, 8, seed=8)
    whole = qmlp(x)
    assert same(jax.jit(qmlp)(x), whole)
    assert same(jax.vmap(qmlp)(x[:, None])[:, 0], whole)
    assert same(jax.jit(jax.vmap(qmlp))(x[:, None])[:, 0], whole)
    assert same(jax.vmap(qmlp, in_axes=1)(x[:, None]), whole[None])
    assert same(jax.lax.map(lambda row: qmlp(row[None])[0], x), whole)
    assert same(jax.jit(lambda v: jax.lax.scan(lambda c, row: (c, qmlp(row[None])[0]), 0, v)[1])(x), whole)


def test_a_conv_net_is_the_same_at_every_batch_size(net):
    qmodel = qc.quantize(net, [IMAGES])
    x = normal(3, 6, 6, 3, seed=9)
    whole = qmodel(x)
    assert same(np.concatenate([qmodel(x[:1]), qmodel(x[1:])]), np.asarray(whole))
    assert same(jax.jit(jax.vmap(qmodel))(x[:, None])[:, 0], whole)
    assert same(jax.jit(qmodel)(x), whole)


def test_the_simulation_is_differentiable():
    # Ranges that clip nothing: clipped values have no derivative.
    qmlp = qc.quantize(mlp, [2 * X], params=PARAMS, recipe=qc.Recipe(activation_range="minmax"))
    gradient = jax.grad(lambda x: jnp.sum(qmlp.simulate(x) ** 2))(X)
    exact = jax.grad(lambda x: jnp.sum(qmlp.float(x) ** 2))(X)
    assert np.isfinite(gradient).all() and np.any(gradient)
    # Straight through: the derivative of the float function but for flipped ReLUs near zero.
    cosine = np.sum(gradient * exact) / np.linalg.norm(gradient) / np.linalg.norm(exact)
    assert cosine > 0.95
    assert jax.jit(jax.vmap(qmlp.simulate))(X[:, None]).shape == (5, 1, 4)


def test_the_simulation_is_what_the_integers_compute(qmlp):
    step = np.asarray(qmlp.params["out/dot_general#0:int16s/scale"])
    # One step per region, and the second region's inputs differ by at most a step of the first one's.
    x = normal(50, 8, seed=10)
    assert np.mean(np.abs(qmlp(x) - qmlp.simulate(x)) <= step) > 0.9
    assert db(qmlp.simulate(x), qmlp(x)) > 50


# How weights reach XLA, and integer inputs and outputs


def test_constant_weights_and_arguments_give_the_same_integers(qmlp):
    argument = qc.quantize(mlp, [X], params=PARAMS, weights="argument")
    constant = qc.quantize(mlp, [X], params=PARAMS, weights="constant")
    for x in (X, X[:2]):
        assert same(argument(x), constant(x)) and same(argument(x), qmlp(x))
        assert same(jax.jit(argument)(x), constant(x))


@pytest.fixture(scope="module")
def int_io():
    return qc.quantize(mlp, [X], params=PARAMS, io="int")


def test_integers_in_and_out(qmlp, int_io):
    scale, zero = (np.asarray(qmlp.params[f"input:x:int8/{name}"]) for name in ("scale", "zero_point"))
    codes = np.clip(np.rint(X * (np.float32(1) / scale)) + zero, -128, 127).astype(np.int8)
    out = int_io(codes)
    assert out.dtype == np.int16
    assert same(np.asarray(out) * qmlp.params["out/dot_general#0:int16s/scale"], np.asarray(qmlp(X)))
    assert same(int_io(codes[:2]), out[:2])
    assert same(jax.jit(jax.vmap(int_io))(codes[:, None])[:, 0], out)


def test_there_is_no_float_in_the_program_of_integers(int_io):
    codes = jnp.zeros((5, 8), jnp.int8)
    lowered = jax.jit(int_io).lower(codes)
    for text in (lowered.as_text(), lowered.compile().as_text(), str(jax.make_jaxpr(int_io)(codes))):
        assert not re.search(r"\b(b?f(16|32|64))\[|[x<](b?f(16|32|64))>", text)
    int_io.check_integer_only()
    assert int_io.report.float_ops == 0
    assert all(np.issubdtype(w.dtype, np.integer) for w in int_io.params.values())


def test_integers_in_and_out_of_a_model_with_islands():
    with pytest.warns(UserWarning, match="nextafter"):
        qmodel = qc.quantize(lambda p, x: jnp.nextafter(mlp(p, x), mlp(p, -x)), [X], params=PARAMS, io="int")
    assert qmodel(jnp.zeros((5, 8), jnp.int8)).dtype == jnp.float32


# Stages


def test_the_stages_give_what_quantize_gives(qmlp):
    traced = qc.trace(mlp, X, params=PARAMS)
    calibrated = traced.calibrate([X])
    quantized = calibrated.quantize()
    qmodel = quantized.compile()
    assert same(qmodel(X), qmlp(X))
    assert [p.name for p in qmodel.report.passes] == [p.name for p in qmlp.report.passes]
    for stage in (traced, calibrated, quantized):
        assert isinstance(stage.program, qc.Program) and isinstance(stage.report, qc.Report)
        assert "dot_general" in str(stage) and type(stage).__name__ in repr(stage)
        assert os.path.basename(__file__) in str(stage)
    assert isinstance(qmodel.program, qc.Program) and isinstance(qmodel.report, qc.Report)
    assert "100% of multiply-adds in integers" in repr(qmodel)
    assert set(calibrated.program.stats) == {"input:x", "enc/dot_general#0", "out/dot_general#0"}
    np.testing.assert_allclose(calibrated.program(X)[0], mlp(PARAMS, X), rtol=1e-5)


def test_a_stage_can_be_left_in_several_ways(qmlp):
    calibrated = qc.trace(mlp, jax.ShapeDtypeStruct((2, 8), jnp.float32), params=PARAMS, verify="probe").calibrate([X])
    first = calibrated.quantize()
    compiled = first.compile()
    second = calibrated.quantize("litert").compile()
    assert same(compiled(X), qmlp(X))
    assert db(compiled(X), second(X)) < 60
    passes = [p.name for p in compiled.report.passes]
    assert len(set(passes)) == len(passes) and passes == [p.name for p in second.report.passes]
    assert compiled.report.sqnr_db == first.report.sqnr_db != second.report.sqnr_db
    integers = first.compile(io="int")
    assert integers.report.float_ops == 0 < compiled.report.float_ops
    assert [p.name for p in integers.report.passes] == passes


def test_a_recipe_that_equalizes_must_come_before_calibration():
    calibrated = qc.trace(mlp, X, params=PARAMS).calibrate([X])
    with pytest.raises(qc.RecipeError, match=r"differs in equalize .*qc\.trace instead"):
        calibrated.quantize("per_tensor")


# The report


def test_the_report_of_a_model_in_integers(qmlp):
    report = qmlp.report
    assert report.islands == () and report.integer_only is True
    assert report.integer_mac_share == 1.0
    # One per activation operand of each op: product, bias add, clamp; product.
    assert report.qdq_pairs_before == 4 and report.qdq_pairs_after == 0
    assert report.integer_ops > report.float_ops > 0
    assert report.weight_bytes == sum(w.nbytes for w in qmlp.params.values())
    assert report.sqnr_db >= FEW_LAYERS_DB
    assert [p.name for p in report.passes] == [
        "trace",
        "simplify",
        "fold_norms",
        "equalize",
        "partition",
        "observe",
        "calibrate",
        "assign_precision",
        "insert_qdq",
        "fuse",
        "fold_zero_points",
        "lower",
    ]
    assert all(p.seconds >= 0 and p.changed for p in report.passes)
    assert report.dump is None
    text = str(report)
    for line in ("integer only         yes", "QDQ pairs            4 per op before, 0 left", "SQNR", "fuse "):
        assert line in text


def _line_of(mark):
    lines, start = inspect.getsourcelines(inspect.getmodule(mlp))
    return next(k for k, text in enumerate(lines, start or 1) if text.rstrip().endswith(f"# {mark}"))


def with_islands(params, x):
    with jax.named_scope("tail"):
        y = jax.lax.igamma(1.0 + jnp.abs(mlp(params, -x)), jnp.abs(mlp(params, x)))  # the gamma
    z = jnp.nextafter(y, mlp(params, -x))  # the neighbour
    return z @ params["last"]


ISLAND_PARAMS = {**PARAMS, "last": normal(4, 4, seed=11)}


def test_islands_work_and_are_listed_with_the_users_line():
    with pytest.warns(UserWarning) as caught:
        qmodel = qc.quantize(with_islands, [X], params=ISLAND_PARAMS)
    (warning,) = caught
    assert "leaves 2 operations in float (igamma, nextafter; 0.0% of multiply-adds)" in str(warning.message)
    assert os.path.basename(warning.filename) == os.path.basename(__file__), "the warning is not at the user's line"
    check(qmodel, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(qmodel, np.concatenate([X, X]))
    report = qmodel.report
    assert not report.integer_only and report.integer_mac_share == 1.0
    name = os.path.basename(__file__)
    for island, (primitive, path, mark) in zip(
        report.islands, [("igamma", "tail", "the gamma"), ("nextafter", "", "the neighbour")], strict=True
    ):
        assert (island.primitive, island.module_path, island.mac_share) == (primitive, path, 0.0)
        assert f"{name}:{_line_of(mark)} (with_islands)" in island.source
        assert island.reason
        assert island.source in str(report) and island.reason in str(report)


def test_the_same_integers_with_islands_under_transformations():
    with pytest.warns(UserWarning, match="leaves 2"):
        qmodel = qc.quantize(with_islands, [X], params=ISLAND_PARAMS)
    whole = qmodel(X)
    assert same(jax.jit(qmodel)(X), whole)
    assert same(jax.jit(jax.vmap(qmodel))(X[:, None])[:, 0], whole)


def test_strict_mode_refuses_islands():
    with pytest.raises(qc.IslandError) as caught:
        qc.quantize(with_islands, [X], params=ISLAND_PARAMS, strict=True)
    text, name = str(caught.value), os.path.basename(__file__)
    assert "2 operations would stay float" in text
    assert f"igamma in tail at {os.path.relpath(__file__)}:{_line_of('the gamma')} (with_islands)" in text
    assert (
        f"nextafter in <top level> at {os.path.relpath(__file__)}:{_line_of('the neighbour')}" in text and name in text
    )
    with pytest.raises(qc.IslandError):
        qc.trace(with_islands, X, params=ISLAND_PARAMS).calibrate([X]).quantize(strict=True)
    qc.quantize(mlp, [X], params=PARAMS, strict=True)


# Recipes


@pytest.mark.parametrize(
    ("recipe", "least"),
    [
        ("default", FEW_LAYERS_DB),
        ("accurate", FEW_LAYERS_DB),
        # All in 8 bits, the result too, ranges that spend steps on outliers.
        ("litert", 25.0),
        # Columns of one Gaussian matrix have nearly one range, so that one scale for all costs little.
        ("per_tensor", FEW_LAYERS_DB),
        (None, FEW_LAYERS_DB),
        (qc.Recipe(activation_range="minmax"), 28.0),
    ],
)
def test_recipes(recipe, least):
    qmodel = qc.quantize(mlp, [X], params=PARAMS, recipe=recipe)
    check(qmodel, X, least=least)
    per_channel = recipe != "per_tensor"
    assert any(n.startswith("enc/w:int8sn[1]") for n in qmodel.params) == per_channel
    stores = {w.dtype for w in qmodel.program.input_avals}
    assert stores == {np.dtype(np.float32)}


def test_the_litert_recipe_has_8_bit_results():
    qmodel = qc.quantize(mlp, [X], params=PARAMS, recipe="litert", io="int")
    assert qmodel(jnp.zeros((1, 8), jnp.int8)).dtype == jnp.int8


def test_a_rule_for_weights_by_path():
    rule = qc.Rule(path="out*", weight=qc.QuantType(4, symmetric=True, narrow_range=True))
    qmodel = qc.quantize(mlp, [X], params=PARAMS, recipe=qc.Recipe(rules=(rule,)))
    assert largest_code(qmodel, "out/w") == 7
    assert largest_code(qmodel, "enc/w") == 127
    # 4 bits less are 24 dB less, of the 41 that 8 bits give.
    level = db(qmodel.float(X), qmodel(X))
    assert 15 < level < 30


def test_a_rule_for_activations_by_primitive():
    rule = qc.Rule(path="enc", primitive="dot_*", activation=qc.QuantType(5))
    coarse = qc.quantize(mlp, [X], params=PARAMS, recipe=qc.Recipe(rules=(rule,)))
    # 3 bits less are 18 dB less.
    assert 17 < db(coarse.float(X), coarse(X)) < 32
    assert any(n.startswith("input:x:int5/") for n in coarse.params)
    seven = qc.quantize(mlp, [X], params=PARAMS, recipe=qc.Recipe(activation=qc.QuantType(7)))
    check(seven, X, least=FEW_LAYERS_DB - 6)


def test_the_first_rule_that_matches_decides():
    four, six = (qc.QuantType(bits, symmetric=True, narrow_range=True) for bits in (4, 6))
    rules = (qc.Rule(path="enc", weight=four), qc.Rule(weight=six))
    qmodel = qc.quantize(mlp, [X], params=PARAMS, recipe=qc.Recipe(rules=rules))
    assert largest_code(qmodel, "enc/w") == 7
    assert largest_code(qmodel, "out/w") == 31


@pytest.mark.parametrize(("path", "share"), [("enc", 2 / 3), ("out", 1 / 3), ("*", 1.0)])
def test_a_layer_kept_in_float_is_an_island(path, share):
    recipe = qc.Recipe(rules=(qc.Rule(path=path, keep_float=True),))
    with pytest.warns(UserWarning, match=f"{share:.1%} of multiply-adds"):
        qmodel = qc.quantize(mlp, [X], params=PARAMS, recipe=recipe)
    check(qmodel, X)
    assert same(jax.jit(qmodel)(X[:2]), qmodel(X)[:2]) or path == "*"
    assert qmodel.report.integer_mac_share == pytest.approx(1 - share)
    kept = [i for i in qmodel.report.islands if i.primitive == "dot_general"]
    assert [i.module_path for i in kept] == (["enc", "out"] if path == "*" else [path])
    assert all("recipe" in i.reason and os.path.basename(__file__) in i.source for i in kept)
    weight = {"enc": "enc/w", "out": "out/w"}.get(path, "enc/w")
    assert qmodel.params[weight].dtype == np.float32
    with pytest.raises(qc.IslandError, match="dot_general"):
        qc.quantize(mlp, [X], params=PARAMS, recipe=recipe, strict=True)


@pytest.mark.filterwarnings("ignore:qcompiler leaves")
def test_strict_mode_can_allow_some():
    recipe = qc.Recipe(rules=(qc.Rule(path="enc", keep_float=True),))
    strictly = lambda strict: qc.quantize(mlp, [X], params=PARAMS, recipe=recipe, strict=strict, verify="types")
    for allowed in (["enc"], ("e*", "nothing"), ["dot_general"]):
        assert {i.module_path for i in strictly(allowed).report.islands} == {"enc"}
    for allowed in ([], ["out", "tanh"]):
        with pytest.raises(qc.IslandError, match="dot_general in enc"):
            strictly(allowed)
    with pytest.raises(qc.RecipeError, match="strict is True, False, or a list of globs"):
        strictly("enc")


def test_everything_in_float_is_the_float_function():
    recipe = qc.Recipe(rules=(qc.Rule(keep_float=True),))
    with pytest.warns(UserWarning, match=r"100\.0%"):
        qmodel = qc.quantize(mlp, [X], params=PARAMS, recipe=recipe)
    np.testing.assert_allclose(qmodel(X), qmodel.float(X), rtol=1e-5, atol=1e-5)


def test_verification_can_be_lowered(qmlp):
    for verify in ("types", "off"):
        qmodel = qc.quantize(mlp, [X], params=PARAMS, verify=verify)
        assert same(qmodel(X), qmlp(X))
        assert qmodel.report.sqnr_db is None and "SQNR" not in str(qmodel.report)


def test_integer_io_says_how_values_are_encoded():
    weights = {"w": np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)}
    x = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
    real = qc.quantize(lambda p, x: jax.nn.relu(x @ p["w"]), [x], params=weights)
    codes = qc.quantize(lambda p, x: jax.nn.relu(x @ p["w"]), [x], params=weights, io="int")
    (output,) = codes.output_encodings
    entry = codes.input_encodings["x"]
    assert entry.type.bits == 8 and output.type.bits == 16
    np.testing.assert_array_equal(output.dequantize(codes(entry.quantize(x))), real(x))
    # Half a step, where nothing is clipped; the default range estimator clips a few.
    error = np.abs(entry.dequantize(entry.quantize(x)) - x)
    assert np.median(error) <= 0.51 * entry.scale


def test_programs_print_as_jax_prints_them(qmlp):
    quantized = qmlp._quantized
    for program in (*quantized.programs.values(), qmlp.program):
        assert "lambda" in str(program.jaxpr)
