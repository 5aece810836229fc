"""Programs come back from files as they were: ids, text, bits; and a bad file is an error with a name."""

import dataclasses
import enum
import json
import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qcompiler import ops
from qcompiler.errors import SerializationError
from qcompiler.ir import _compat, identity, serialize
from qcompiler.ir.program import Program
from qcompiler.ir.tracing import trace
from qcompiler.numerics.ranges import RangeStats
from qcompiler.numerics.types import WEIGHT, QuantType
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify

PASSES = {"trace": lambda p: p, "simplify": simplify, "fold_norms": fold_norms, "partition": partition}


def _normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(dtype)


def mlp(w, x):
    for name in ("first", "second"):
        with jax.named_scope(name):
            x = jax.nn.relu(x @ w[name]["kernel"] + w[name]["bias"])
    with jax.named_scope("head"):
        return jax.nn.softmax(x @ w["head"])


def conv_bn(w, x):
    with jax.named_scope("conv"):
        y = lax.conv_general_dilated(x, w["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    with jax.named_scope("bn"):
        y = (y - w["mean"]) * (w["scale"] * lax.rsqrt(w["var"] + np.float32(1e-5))) + w["shift"]
    y = lax.reduce_window(jax.nn.relu(y), -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    return jnp.mean(y, axis=(1, 2))


def dictionary(w, batch, *, mask):
    table = w["embed"][batch["tokens"]]
    return {"out": [jnp.where(mask[:, None], table, -np.inf), None], "sum": (jnp.sum(table), batch["more"][0] * 2)}


def loops(w, x):
    def layer(carry, weight):
        with jax.named_scope("inner"):
            return jax.nn.silu(carry @ weight) + w["bias"], jnp.sum(carry)

    y, sums = lax.scan(layer, x, w["stack"])
    y = lax.cond(sums[0] > 0, lambda v: v * 2.0, lambda v: jnp.sin(v) - w["bias"], y)
    count, y = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 0.5), (0, y))
    return y, sums, count


def half(w, x):
    return jnp.tanh(x @ w["kernel"]) * jnp.bfloat16(0.1)


def _mlp():
    layers = {
        n: {"kernel": _normal(4, 4, seed=k), "bias": _normal(4, seed=k + 5)} for k, n in enumerate(("first", "second"))
    }
    return mlp, layers | {"head": _normal(4, 3)}, (_normal(2, 4),), {}


def _conv_bn():
    names = ("mean", "scale", "shift")
    weights = {"conv": _normal(3, 3, 2, 4), "var": np.ones(4, np.float32)}
    return conv_bn, weights | {n: _normal(4, seed=k) for k, n in enumerate(names)}, (_normal(2, 6, 6, 2),), {}


def _dictionary():
    batch = {"tokens": np.array([1, 0, 3], np.int32), "more": [_normal(2)]}
    return dictionary, {"embed": _normal(4, 5)}, (batch,), {"mask": np.array([True, False, True])}


def _loops():
    return loops, {"stack": _normal(3, 4, 4), "bias": _normal(4)}, (_normal(2, 4),), {}


def _half():
    return half, {"kernel": _normal(4, 3, dtype=jnp.bfloat16)}, (_normal(2, 4, dtype=jnp.bfloat16),), {}


def _traced(make) -> tuple[Program, list]:
    fun, weights, args, kwargs = make()
    return trace(fun, weights, args, kwargs, parameter_names=("x",)), jax.tree_util.tree_leaves((args, kwargs))


def _through_file(program: Program, path: Path) -> Program:
    serialize.save(program, path)
    return serialize.load(path)


def _ids(program: Program) -> list[str]:
    return [program.ids[v] for e in program.eqns for v in e.outvars]


def _bits(arrays) -> list:
    return [(np.asarray(a).dtype, np.asarray(a).shape, np.asarray(a).tobytes()) for a in arrays]


def _assert_same(found: Program, wanted: Program, inputs: list) -> None:
    assert _ids(found) == _ids(wanted)
    assert found.text() == wanted.text()
    assert [identity.module_path(e) for e in found.eqns] == [identity.module_path(e) for e in wanted.eqns]
    assert [identity.call_tags(e) for e in found.eqns] == [identity.call_tags(e) for e in wanted.eqns]
    assert [identity.source_of(e) for e in found.eqns] == [identity.source_of(e) for e in wanted.eqns]
    assert found.signature == wanted.signature
    assert found.stage == wanted.stage and found.notes == wanted.notes and found.stats == wanted.stats
    assert list(found.weights) == list(wanted.weights)
    assert _bits(found.weights.values()) == _bits(wanted.weights.values())
    assert _bits(found.evaluate(inputs)) == _bits(wanted.evaluate(inputs))
    assert _bits(found(*inputs)) == _bits(wanted(*inputs))
    _compat.check_types(found.jaxpr)


@pytest.mark.parametrize("make", [_mlp, _conv_bn, _dictionary, _loops, _half], ids=lambda f: f.__name__.strip("_"))
def test_every_stage_comes_back_as_it_was(make, tmp_path):
    program, inputs = _traced(make)
    for stage, run in PASSES.items():
        program = run(program)
        assert program.stage == stage
        loaded = _through_file(program, tmp_path / "a.zip")
        _assert_same(loaded, program, inputs)
        serialize.save(loaded, tmp_path / "b.zip")
        assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_pass_works_on_a_loaded_program_as_on_the_original(tmp_path):
    program, inputs = _traced(_conv_bn)
    again = _through_file(program, tmp_path / "p.zip")
    for run in (simplify, fold_norms, partition):
        program, again = run(program), run(again)
    _assert_same(again, program, inputs)


def test_partitioned_programs_hold_regions_with_bodies(tmp_path):
    program, _ = _traced(_conv_bn)
    program = partition(fold_norms(simplify(program)))
    loaded = _through_file(program, tmp_path / "p.zip")
    for found, wanted in zip(loaded.eqns, program.eqns, strict=True):
        assert found.primitive is wanted.primitive
        if wanted.primitive is ops.region_p:
            inner, outer = (_compat.open_jaxpr(e.params["body"]).eqns for e in (found, wanted))
            assert [identity.source_of(e) for e in inner] == [identity.source_of(e) for e in outer]
            assert [identity.module_path(e) for e in inner] == [identity.module_path(e) for e in outer]
    assert any(e.primitive is ops.region_p for e in program.eqns)


def test_our_primitives_carry_their_types(tmp_path):
    def fun(w, x):
        q = ops.quantize(ops.observe(x, "here"), w["s"], w["z"], QuantType(4))
        y = ops.requantize(q, w["s"], w["z"], w["s"], w["z"], QuantType(4), QuantType(16, symmetric=True))
        return ops.dequantize(y, w["s"], w["z"], QuantType(16, symmetric=True)), ops.fake_quantize(
            x, w["s"], w["z"], WEIGHT
        )

    weights = {"s": np.float32(0.25), "z": np.int32(1)}
    program = trace(fun, weights, (_normal(3),))
    _assert_same(_through_file(program, tmp_path / "p.zip"), program, [_normal(3)])


def test_primitives_with_rare_parameters(tmp_path):
    def fun(w, x, i):
        return [
            x.at[i].add(1.0, mode="drop"),
            jnp.take(x, i, axis=0, mode="clip"),
            lax.dot(x, x, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32),
            jnp.round(x),
            lax.exp(x, accuracy=lax.AccuracyMode.HIGHEST),
            lax.pad(x, np.float32(-np.inf), ((1, 0, 2), (0, 1, 0))),
            *lax.split(x, (1, 2), axis=1),
            lax.mulhi(i, i),
            lax.sort((x, -x), dimension=0, num_keys=1),
            lax.clamp(np.float32(-0.0), x, np.float32(np.inf)),
            jnp.argmax(x, axis=1),
            lax.bitcast_convert_type(x, jnp.int32),
            lax.reduce_precision(x, 5, 10),
            x.astype(jnp.float8_e4m3fn),
            jnp.full((2,), jnp.nan),
            jnp.cumsum(x, axis=0),
        ]

    inputs = [_normal(3, 3), np.array([0, 2], np.int32)]
    program = trace(fun, {}, tuple(inputs))
    _assert_same(_through_file(program, tmp_path / "p.zip"), program, inputs)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4", "bool_", "int8", "float16"]
)
def test_weights_of_every_dtype(dtype, tmp_path):
    weight = np.asarray(jnp.asarray([0, 1, 1, 0, 1]).astype(getattr(jnp, dtype)))
    weights = {"whole": weight, "scalar": weight[1], "none": weight[:0]}
    program = trace(lambda w, x: [w["whole"], w["scalar"], w["none"], x], weights, (_normal(2),))
    loaded = _through_file(program, tmp_path / "p.zip")
    assert _bits(loaded.weights.values()) == _bits(program.weights.values())
    _assert_same(loaded, program, [_normal(2)])


def test_statistics_and_notes(tmp_path):
    program, inputs = _traced(_mlp)
    stats = {"a": RangeStats.of(_normal(50)), "nothing": RangeStats.empty()}
    notes = {
        "floats": [1.5, np.inf, -np.inf, True, None, "text", -7],
        "tuple": (1, ("b",), []),
        "keys": {1: "int", ("a", 2): {"$like": 0}, "s": QuantType(8, axis=(1,))},
        "types": (np.dtype(np.int8), jnp.dtype(jnp.bfloat16)),
        "scalar": np.float32(0.1),
    }
    program = program.replace(stats=stats, notes=notes)
    loaded = _through_file(program, tmp_path / "p.zip")
    _assert_same(loaded, program, inputs)
    assert type(loaded.notes["scalar"]) is np.float32 and type(loaded.notes["tuple"][2]) is list
    array = _through_file(program.note("array", _normal(2, 3).T), tmp_path / "p.zip").notes["array"]
    np.testing.assert_array_equal(array, _normal(2, 3).T)
    assert np.isnan(_through_file(program.note("nan", np.nan), tmp_path / "p.zip").notes["nan"])


def test_registered_classes_only(tmp_path):
    class Colour(enum.Enum):
        RED = 1

    @dataclasses.dataclass(frozen=True)
    class Plan:
        colour: Colour

    program, inputs = _traced(_mlp)
    program = program.note("plan", Plan(Colour.RED))
    with pytest.raises(SerializationError, match=r"notes\['plan'\] is a Plan, which is not registered"):
        serialize.save(program, tmp_path / "p.zip")
    try:
        serialize.register_classes(Plan, Colour)
        _assert_same(_through_file(program, tmp_path / "p.zip"), program, inputs)
    finally:
        del serialize._CLASSES["Plan"], serialize._CLASSES["Colour"]
    with pytest.raises(SerializationError, match="the class 'Plan' is unknown here"):
        serialize.load(tmp_path / "p.zip")


def test_custom_rules_in_bodies_come_back_inlined(tmp_path):
    def fun(w, x):
        return lax.scan(lambda c, _: (jax.nn.relu(c) - 1.0, None), x, None, length=2)[0]

    program = trace(fun, {}, (_normal(4),))
    loaded = _through_file(program, tmp_path / "p.zip")
    assert _bits(loaded.evaluate([_normal(4)])) == _bits(program.evaluate([_normal(4)]))
    assert _ids(loaded) == _ids(program)


def test_unknown_sources_do_not_name_the_caller_of_load(tmp_path):
    serialize.save(trace(lambda w, x: x + 1.0, {}, (_normal(2),)), tmp_path / "p.zip")
    _edit(tmp_path / "p.zip", lambda doc: doc["body"]["equations"][0].update(source=None))
    (eqn,) = serialize.load(tmp_path / "p.zip").eqns
    assert identity.source_of(eqn) == "unknown source"


def _edit(path: Path, change) -> None:
    """Rewrites the document inside a file."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    document = json.loads(held["program.json"])
    change(document)
    held["program.json"] = json.dumps(document).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)


@pytest.fixture
def saved(tmp_path) -> Path:
    serialize.save(_traced(_mlp)[0], tmp_path / "p.zip")
    return tmp_path / "p.zip"


def test_truncated_and_corrupt_files(saved):
    data = saved.read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:cut])
        with pytest.raises(SerializationError, match="damaged or no program"):
            serialize.load(saved)
    spot = data.index(b"NUMPY") + 130
    saved.write_bytes(data[:spot] + bytes([data[spot] ^ 255]) + data[spot + 1 :])
    with pytest.raises(SerializationError, match="damaged or no program"):
        serialize.load(saved)
    saved.write_bytes(b"no zip at all")
    with pytest.raises(SerializationError, match="damaged or no program"):
        serialize.load(saved)


def _equation(doc, primitive):
    return next(e for e in doc["body"]["equations"] if e["primitive"] == primitive)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=99), "it has format 99; this version reads 1"),
        (lambda d: _equation(d, "max").update(primitive="os.system"), "the primitive 'os.system' is unknown here"),
        (lambda d: _equation(d, "dot_general")["params"].update(speed=3), "'dot_general' rejects .*written by jax 0"),
        (lambda d: _equation(d, "dot_general")["params"].pop("precision"), "'dot_general' rejects .*this is jax 0"),
        (lambda d: _equation(d, "max").update(operands=[0]), "max"),
        (lambda d: _equation(d, "max").update(operands=[10**6, 0]), "damaged"),
        (lambda d: _equation(d, "max").update(types=[["int8", [1]]]), "max came back with other types"),
        (lambda d: d["body"].pop("results"), "damaged"),
        (lambda d: d["body"].update(args=[]), "weights are not the arguments"),
        (lambda d: d["signature"].update(input_names=[]), "the signature is not"),
        (lambda d: d["notes"].update(x={"$class": "Popen", "fields": {}}), "the class 'Popen' is unknown here"),
        (lambda d: d["notes"].update(x={"$pickle": ""}), r"\$pickle is no kind of value"),
        (lambda d: d["notes"].update(x={"$class": "QuantType", "fields": {"bits": 8}}), "QuantType has the fields"),
        (lambda d: d["notes"].update(x={"$dtype": "object"}), "the dtype 'object' is unknown here"),
        (lambda d: d.update(sources=[["f", -(10**9), "g"]] * len(d["sources"])), "source lines is damaged"),
    ],
)
def test_documents_that_do_not_fit(saved, change, message):
    _edit(saved, change)
    with pytest.raises(SerializationError, match=message):
        serialize.load(saved)


def test_messages_name_both_versions(saved):
    _edit(saved, lambda d: d.update(jax="0.0.1"))
    assert len(serialize.load(saved).eqns) > 5
    _edit(saved, lambda d: _equation(d, "max")["params"].update(speed=3))
    with pytest.raises(
        SerializationError, match=rf"'max' .*'speed'.*written by jax 0.0.1, this is jax {jax.__version__}"
    ):
        serialize.load(saved)


def test_no_pickles(saved, tmp_path):
    with zipfile.ZipFile(saved) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    np.save(tmp_path / "evil.npy", np.array([print], object), allow_pickle=True)
    held["arrays/0.npy"] = (tmp_path / "evil.npy").read_bytes()
    with zipfile.ZipFile(saved, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    with pytest.raises(SerializationError, match="allow_pickle"):
        serialize.load(saved)
    program, _ = _traced(_mlp)
    with pytest.raises(SerializationError, match="dtype object"):
        serialize.save(program.note("x", np.array([print], object)), tmp_path / "p.zip")


def test_what_cannot_be_written_leaves_the_old_file(saved, tmp_path, monkeypatch):
    before = saved.read_bytes()
    program, _ = _traced(_mlp)
    with pytest.raises(SerializationError, match="function"):
        serialize.save(program.note("f", print), saved)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        serialize.save(program.note("x", 1), saved)
    monkeypatch.undo()
    monkeypatch.setattr(np.lib.format, "write_array", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        serialize.save(program.note("x", 1), saved)
    assert saved.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [saved.name]


def test_keys_nodes_and_primitives_that_no_file_can_hold(tmp_path):
    path = tmp_path / "p.zip"
    keyed = trace(lambda w, x: x + jax.random.normal(w, x.shape), jax.random.key(0), (_normal(2),))
    with pytest.raises(SerializationError, match="PRNG key"):
        serialize.save(keyed, path)

    from collections import OrderedDict

    node = trace(lambda w, x: OrderedDict(a=x + 1.0), {}, (_normal(2),))
    with pytest.raises(SerializationError, match="OrderedDict; only dict, list, tuple and None"):
        serialize.save(node, path)

    secret = _compat.Primitive("secret")
    secret.def_abstract_eval(lambda x: x)
    with pytest.raises(SerializationError, match=r"secret in here at .*test_serialize.*cannot name this primitive"):
        serialize.save(trace(lambda w, x: jax.named_scope("here")(secret.bind)(x), {}, (_normal(2),)), path)
    assert not path.exists()


def test_missing_files_are_the_systems_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        serialize.load(tmp_path / "none.zip")
    with pytest.raises(FileNotFoundError):
        serialize.save(_traced(_mlp)[0], tmp_path / "none" / "p.zip")
