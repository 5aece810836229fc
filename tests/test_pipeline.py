"""The pass manager catches what a pass breaks, and the whole pipeline leaves integers only."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import qcompiler as qc
from qcompiler import ops, pipeline
from qcompiler.backends import lax_int
from qcompiler.debug.dumps import Dumper
from qcompiler.debug.report import sqnr_db
from qcompiler.errors import RecipeError, VerificationError
from qcompiler.flax_adapter import source_of
from qcompiler.ir import _compat, serialize
from qcompiler.ir.program import rewrite
from qcompiler.ir.tracing import trace
from qcompiler.models.resnet import BasicBlock, BottleneckBlock, ResNet
from qcompiler.passes.observe import collect
from qcompiler.recipe import Recipe


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


WEIGHTS = {
    "w": _normal(8, 8),
    "v": _normal(8, 4, seed=1),
    "b": _normal(8, seed=2),
    "s": np.abs(_normal(8)) + np.float32(0.5),
}
X = _normal(16, 8, seed=3)


def _model(p, x):
    return jax.nn.silu((x @ p["w"]) * p["s"] + p["b"]) @ p["v"]


def _program(fun=_model, weights=WEIGHTS, x=X):
    return trace(fun, weights, (jax.ShapeDtypeStruct(x.shape, x.dtype),))


def _manager(tmp_path, verify="probe", probe=(X,), program=None):
    manager = pipeline.PassManager(verify, list(probe), Dumper(tmp_path))
    manager.start(program or _program(), 0.0)
    return manager


def _scaled(factor):
    """A pass that multiplies the first dot's result."""

    def rule(builder, eqn, values):
        return [factor * _compat.bind(eqn, values)[0]] if eqn.primitive.name == "dot_general" else None

    return lambda program: rewrite(program, rule, stage="broken")


# Verification


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("simplify", np.float32(1 + 2**-10)),
        ("fold_norms", np.float32(1.001)),
        ("equalize", np.float32(-1)),
        ("partition", np.float32(1 + 2**-20)),
    ],
)
def test_a_pass_that_changes_the_function_is_caught(tmp_path, name, factor):
    manager = _manager(tmp_path)
    with pytest.raises(VerificationError, match=rf"pass {name} changed the function: -?\d+\.\d dB .* dB are required"):
        manager.run(name, _program(), _scaled(factor))
    assert [r.name for r in manager.records] == ["trace"]


@pytest.mark.parametrize("name", ["simplify", "insert_qdq"])
def test_a_pass_that_makes_nan_is_caught(tmp_path, name):
    with pytest.raises(VerificationError, match=f"pass {name} makes NaN in result 0"):
        _manager(tmp_path).run(name, _program(), _scaled(np.float32(np.nan)))


def test_results_that_were_not_finite_before_are_compared_where_they_are(tmp_path):
    fun = lambda p, x: (jnp.where(x > 0, (x @ p["w"]) * p["s"] - p["b"], -jnp.inf), jnp.log(-jnp.abs(x)))
    program = _program(fun)
    manager = _manager(tmp_path, program=program)
    folded = manager.run("fold_norms", manager.run("simplify", program))
    assert manager.records[-1].name == "fold_norms" and "mul" not in [e.primitive.name for e in folded.eqns]
    with pytest.raises(VerificationError, match="changed the function"):
        manager.run(
            "fold_norms",
            program,
            lambda p: rewrite(p, lambda b, e, v: [-v[2]] if e.primitive.name == "select_n" else None, stage="s"),
        )


def test_results_of_zeros_agree(tmp_path):
    program = _program(lambda p, x: jnp.zeros_like(x) * p["s"])
    manager = _manager(tmp_path, program=program)
    pipeline.float_passes(manager, program, Recipe())
    assert len(manager.records) == 6


def test_an_ill_typed_program_is_caught(tmp_path):
    good = _program()
    other = _program(x=_normal(16, 8).astype(np.float16), weights={k: w.astype(np.float16) for k, w in WEIGHTS.items()})

    def swap(program):
        eqns = list(_compat.open_jaxpr(program.jaxpr).eqns)
        eqns[1] = eqns[1].replace(primitive=_compat.open_jaxpr(other.jaxpr).eqns[0].primitive)
        return program.replace(
            jaxpr=program.jaxpr.replace(eqns=eqns)
            if not hasattr(program.jaxpr, "jaxpr")
            else program.jaxpr.replace(jaxpr=program.jaxpr.jaxpr.replace(eqns=eqns))
        )

    for verify in ("probe", "types"):
        with pytest.raises(VerificationError, match="pass simplify made an ill-typed program"):
            _manager(tmp_path, verify).run("simplify", good, swap)


def test_pairs_that_are_left_are_caught(tmp_path):
    with pytest.raises(VerificationError, match="pass fuse left 3 removable QDQ pairs"):
        _manager(tmp_path).run("fuse", _program(), lambda p: p.note("pairs_after", 3))


def test_a_pass_that_fails_leaves_a_reproducer_that_replays(tmp_path):
    program = _program()

    def fails(before):
        raise ZeroDivisionError("oh")

    with pytest.raises(VerificationError, match="pass simplify failed: ZeroDivisionError: oh; reproducer: ") as caught:
        _manager(tmp_path).run("simplify", program, fails)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    path, name = re.search(r"serialize\.load\('(.*)'\), then pass '(.*)'", str(caught.value)).groups()
    assert path == str(tmp_path / "before-simplify.qcprogram") and name == "simplify"
    loaded = serialize.load(path)
    np.testing.assert_array_equal(loaded.evaluate([X])[0], program.evaluate([X])[0])
    again = pipeline.PASSES[name](loaded, Recipe())
    assert again.text() == pipeline.PASSES[name](program, Recipe()).text()


def test_a_reproducer_without_a_dump_folder_goes_to_a_temporary_one(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("QCOMPILER_DUMP_TO", raising=False)
    manager = pipeline.PassManager("types")
    with pytest.raises(VerificationError, match=re.escape(str(tmp_path))):
        manager.run("simplify", _program(), lambda p: 1 / 0)


def test_errors_about_the_model_pass_through(tmp_path):
    def refuses(program):
        raise RecipeError("no")

    with pytest.raises(RecipeError, match=r"^no$"):
        _manager(tmp_path).run("simplify", _program(), refuses)
    assert not list(tmp_path.glob("before-*"))


def test_types_only_and_off(tmp_path):
    changed = _scaled(np.float32(2))
    for verify in ("types", "off"):
        manager = _manager(tmp_path, verify)
        assert manager.reference == []
        manager.run("simplify", _program(), changed)


def test_unknown_names():
    with pytest.raises(RecipeError, match=r"unknown pass 'simplfy'; known: simplify, fold_norms"):
        pipeline.PassManager().run("simplfy", _program())
    with pytest.raises(RecipeError, match=r"unknown verify='yes'; known: probe, types, off"):
        pipeline.PassManager("yes")


def test_what_a_pass_did_is_recorded(tmp_path):
    manager = _manager(tmp_path)
    program = pipeline.float_passes(manager, _program(), Recipe(equalize=True))
    wanted = ["trace", *(name for name in pipeline.FLOAT_PASSES if name != "rotate")]
    wanted.insert(wanted.index("equalize") + 1, "absorb_bias")
    assert [r.name for r in manager.records] == wanted
    changed = {r.name: r.changed for r in manager.records}
    assert changed["partition"] == "3 regions, 0 islands" and changed["equalize"] == "0 links"
    assert changed["observe"] == "4 values observed" and all(r.seconds >= 0 for r in manager.records)
    assert program.stage == "observe"


# Integers


def _integers(tmp_path, fun=_model, weights=WEIGHTS, x=X):
    manager = _manager(tmp_path, probe=(x,), program=_program(fun, weights, x))
    program = collect(pipeline.float_passes(manager, _program(fun, weights, x), Recipe()), [[x]])
    return manager, program


def test_integers_are_checked_region_by_region(tmp_path):
    manager, program = _integers(tmp_path)
    found = pipeline.integer_passes(manager, program, Recipe())
    assert list(found) == list(pipeline.INTEGER_PASSES)
    # Two int8 layers of Gaussian numbers.
    assert 30 < manager.sqnr < 60


@pytest.mark.parametrize(("steps", "caught"), [(1, False), (2, True), (-3, True)])
def test_a_region_that_is_off_is_named(tmp_path, monkeypatch, steps, caught):
    manager, program = _integers(tmp_path)
    true = lax_int.lower_region

    def off(eqn, values, held, weight, watch):
        results = true(eqn, values, held, weight, watch)
        if eqn.params["kind"] != "table":
            return results
        low, high = (np.iinfo(results[0].dtype).min, np.iinfo(results[0].dtype).max)
        return [jnp.clip(results[0].astype(jnp.int32) + steps, low, high).astype(results[0].dtype)]

    monkeypatch.setattr(lax_int, "lower_region", off)
    if not caught:
        pipeline.integer_passes(manager, program, Recipe())
        return
    message = rf"region mul#\d+: the integers are {abs(steps)} steps away from the simulation; reproducer: "
    with pytest.raises(VerificationError, match=message) as error:
        pipeline.integer_passes(manager, program, Recipe())
    path = re.search(r"serialize\.load\('(.*)'\)", str(error.value)).group(1)
    assert serialize.load(path).stage == "fold_zero_points"


def test_folding_that_changes_integers_is_named(tmp_path, monkeypatch):
    manager, program = _integers(tmp_path)
    true = lax_int.lower_region

    def off(eqn, values, held, weight, watch):
        products = (e for e in _compat.open_jaxpr(eqn.params["body"]).eqns if e.primitive.name == "dot_general")
        unfolded = any(e.invars[0].aval.dtype == np.int32 for e in products)
        return true(eqn, values, held, weight, lambda acc: watch(acc ^ np.int32(1) if unfolded else acc))

    monkeypatch.setattr(lax_int, "lower_region", off)
    with pytest.raises(VerificationError, match=r"dot_general#\d+: folding its zero points changed its integers"):
        pipeline.integer_passes(manager, program, Recipe())


def test_passes_are_usable_alone():
    program = _program()
    for name in ("simplify", "fold_norms", "equalize", "partition", "observe"):
        program = pipeline.PASSES[name](program, Recipe())
        assert program.stage == name
    program = collect(program, [[X]])
    for name in (*pipeline.INTEGER_PASSES, "lower"):
        program = pipeline.PASSES[name](program, Recipe())
        assert program.stage == name
    # Two int8 layers of Gaussian numbers.
    assert sqnr_db([_model(WEIGHTS, X)], program(X)) > 30


def test_half_precision_models_pass_verification():
    for dtype in (jnp.bfloat16, jnp.float16):
        weights = {k: w.astype(dtype) for k, w in WEIGHTS.items()}
        x = X.astype(dtype)
        fun = lambda p, x: jax.nn.relu((x @ p["w"] - p["b"]) * p["s"]) + jax.nn.silu(x @ p["w"]).astype(x.dtype)
        model = qc.quantize(fun, [x], params=weights)
        assert model(x).dtype == dtype and model.report.integer_only
        # int8 operands; bfloat16 results have some 50 dB themselves.
        reference = fun({k: w.astype(np.float32) for k, w in weights.items()}, x.astype(np.float32))
        assert sqnr_db([reference], [model(x)]) > 30


# The whole


def _resnet(block):
    model = ResNet(block, (1, 1), width=8, classes=10, channels=1, stem="small", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for variable in (module.mean, module.var, module.scale, module.bias):
                variable[...] = jnp.asarray(rng.uniform(0.2, 1.5, variable.shape), jnp.float32)
    model.eval()
    return model


IMAGES = _normal(4, 8, 8, 1)


@pytest.mark.parametrize(("block", "convs"), [(BasicBlock, 6), (BottleneckBlock, 9)], ids=["basic", "bottleneck"])
def test_census_of_a_small_resnet(block, convs):
    model = _resnet(block)
    stages = source_of(model, None, None, None, None).trace((IMAGES,), {})
    assert sum(e.primitive.name == "conv_general_dilated" for e in stages.eqns) == convs
    compiled = qc.quantize(model, [IMAGES], verify="types")
    report = compiled.report
    assert report.integer_only and report.integer_mac_share == 1.0 and report.qdq_pairs_after == 0
    assert report.qdq_pairs_before > 3 * convs
    folded = compiled._quantized.program
    regions = collections.Counter(e.params["kind"] for e in folded.eqns if e.primitive is ops.region_p)
    assert regions == {"conv": convs, "dot": 1, "reduce": 1}
    program = compiled.program
    products = [e for e in program.eqns if e.primitive.name in ("conv_general_dilated", "dot_general")]
    # One product per layer, whichever form it takes.
    assert len(products) == convs + 1
    for eqn in products:
        assert [v.aval.dtype for v in eqn.invars] == [np.int8] * 2 and eqn.outvars[0].aval.dtype == np.int32
    isfloat = lambda v: jnp.issubdtype(v.aval.dtype, np.floating)
    touching = [e for e in program.eqns if any(map(isfloat, [*e.invars, *e.outvars]))]
    first = [k for k, e in enumerate(program.eqns) if e in touching and e.outvars[0] not in program.outvars]
    # Entry: scale, round, guards for NaN and range, cast. Exit: cast, multiply. All before or after every integer op.
    last_entry = max(
        k
        for k in first
        if program.eqns[k].primitive.name != "convert_element_type" or not isfloat(program.eqns[k].outvars[0])
    )
    first_product = next(k for k, e in enumerate(program.eqns) if e in products)
    assert last_entry < first_product and len(touching) <= 12
    assert {e.primitive.name for e in program.eqns}.isdisjoint({"logistic", "exp", "rsqrt", "floor", "pow", "sqrt"})


def test_integer_input_and_output_compile_without_floats():
    compiled = qc.quantize(_resnet(BasicBlock), [IMAGES], io="int")
    codes = np.random.default_rng(0).integers(-128, 128, IMAGES.shape).astype(np.int8)
    assert compiled(codes).dtype == np.int16
    text = jax.jit(lambda x: compiled.program(x)).lower(codes).compile().as_text()
    assert "s8[" in text and "s32[" in text
    assert not re.findall(r"\b(?:f16|f32|f64|bf16|f8\w*)\[", text)


def test_environment_reaches_a_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QCOMPILER_PRINT_AFTER", "fold_norms,lower")
    monkeypatch.setenv("QCOMPILER_DUMP_TO", str(tmp_path / "dumps"))
    model = qc.quantize(_model, [X], params=WEIGHTS)
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("# after ")]
    assert printed == ["# after fold_norms", "# after lower"]
    assert model.report.dump == str(tmp_path / "dumps")
    assert (tmp_path / "dumps" / "summary.json").exists() and len(list((tmp_path / "dumps").glob("*.txt"))) == 11


def test_one_accumulator_too_many_bits_is_caught_by_its_proof():
    """A contraction so long that int32 could overflow names its op; verification need not find an input that does."""
    weights = {"w": np.full((140_000, 2), 1.0, np.float32)}
    x = np.linspace(-1, 1, 140_000, dtype=np.float32)[None]
    with pytest.raises(qc.OverflowProofError, match="dot_general"):
        qc.quantize(lambda p, x: lax.dot(x, p["w"]), [x], params=weights, verify="types")
