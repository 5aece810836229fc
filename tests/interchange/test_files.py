"""What a file of encodings may hold, in both formats, and how it is refused."""

import json
import re

import jax
import numpy as np
import pytest
from draws import normal

import qcompiler as qc
from qcompiler.interchange import aimet, layout, qnn
from qcompiler.numerics.encoding import Encoding

ENTRY = {"name": "t", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 120}


def of_aimet(**changes):
    entry = {key: value for key, value in {**ENTRY, **changes}.items() if value is not None}
    return aimet.parse({"version": "2.0.0", "encodings": [entry]}, "FILE")[0]["t"]


def of_qnn(entry, section="param_encodings"):
    return qnn.parse({section: {"t": entry}}, "FILE")[0]["t"]


def refused_file(path, text, *parts):
    path.write_text(text)
    with pytest.raises(qc.RecipeError) as caught:
        qc.interchange.load(path)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ("is no JSON", "line 1")),
        ("[]", ("holds no encodings", "activation_encodings")),
        ('{"encodings": [], "version": "3.0.0"}', ("version '3.0.0'", "2.0.0")),
        ('{"encodings": []}', ("version None",)),
        ('{"version": "2.0.0", "encodings": 3}', ("list of objects",)),
        ('{"version": "2.0.0", "encodings": [], "encoding": []}', ("unknown key 'encoding'", "'encodings'")),
        ('{"version": "2.0.0", "encodings": [{"name": "t", "y_scale": NaN, "output_dtype": "int8"}]}', ("NaN",)),
        (
            '{"version": "2.0.0", "encodings": [{"name": "t", "y_scale": 1e999, "output_dtype": "int8"}]}',
            ("t: y_scale",),
        ),
        ('{"param_encodings": {"t": [], "t": []}}', ("'t' twice",)),
        ('{"param_encodings": {"t": []}}', ("t has a list",)),
        ('{"param_encodings": {"t": [{"bitwidth": 8}]}, "activation_encodings": {"t": [{"bitwidth": 8}]}}', ("two",)),
        ('{"supergroups": [{"op_list": "Conv"}]}', ("op_list is a list",)),
        ('{"supergroups": [{"op_list": ["Conv"]}]}', ("at least two",)),
    ],
)
def test_files_that_are_none(tmp_path, text, parts):
    refused_file(tmp_path / "file.json", text, *parts)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"y_scale": 0.0}, "t: y_scale is from .* got .*0.0"),
        ({"y_scale": -1.0}, "t: y_scale"),
        ({"y_scale": "0.5"}, "t: y_scale is a number"),
        ({"y_scale": [[1.0], [1.0, 2.0]]}, "t: y_scale is a number, or numbers in lists of equal lengths"),
        ({"y_scale": None}, "t has no y_scale"),
        ({"y_zero_point": 256}, "t: y_zero_point is a whole number from 0 to 255, got 256"),
        ({"y_zero_point": -1}, "from 0 to 255, got -1"),
        ({"y_zero_point": 0.5}, "y_zero_point is a whole number"),
        ({"y_zero_point": [1, 2]}, r"y_zero_point has the shape \(2,\)"),
        ({"output_dtype": "float16"}, "keep the layer in float by a qc.Rule"),
        ({"output_dtype": "int7"}, "output_dtype"),
        ({"output_dtype": None}, "output_dtype"),
        ({"y_scale": [1.0, 2.0], "y_zero_point": None}, "needs an axis"),
        ({"y_scale": [[1.0, 2.0]], "y_zero_point": None, "axis": 0}, "and blocks"),
        ({"y_scale": [1.0, 2.0], "y_zero_point": None, "axis": 1, "block_size": 2}, "need an axis of y_scale"),
        ({"y_scales": 1.0}, "unknown key 'y_scales'; nearest: 'y_scale'"),
        ({"bits": 12}, "bits is a whole number from 2 to 8"),
    ],
)
def test_entries_of_aimet_that_cannot_be(changes, match):
    with pytest.raises(qc.RecipeError, match=f"FILE: .*{match}"):
        of_aimet(**changes)


def test_entries_of_aimet():
    affine = of_aimet()
    assert affine.type == qc.QuantType(8) and affine.scale == 0.5 and affine.zero_point == -8
    assert of_aimet(output_dtype="int8", y_zero_point=None).type == qc.QuantType(8, symmetric=True)
    assert of_aimet(output_dtype="int8", y_zero_point=-3).zero_point == -3
    odd = of_aimet(output_dtype="uint16", bits=12, y_zero_point=2048)
    assert odd.type == qc.QuantType(12) and odd.zero_point == 0
    blocks = of_aimet(output_dtype="int4", y_scale=[[1.0, 2.0], [3.0, 4.0]], y_zero_point=None, axis=-1, block_size=3)
    assert blocks.type.axis == (0, 1) and blocks.type.block_size == (1, 3)
    np.testing.assert_array_equal(blocks.scale, [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]])
    low_power = of_aimet(
        output_dtype="int4",
        y_scale=None,
        y_zero_point=None,
        per_channel_float_scale=[[0.5], [0.25]],
        per_block_int_scale=[[1, 2], [3, 16]],
        axis=1,
        block_size=2,
    )
    np.testing.assert_array_equal(low_power.scale, [[0.5, 0.5, 1, 1], [0.75, 0.75, 4, 4]])
    named = aimet.parse({"version": "2.0.0", "encodings": {"t": {"output_dtype": "int8", "y_scale": 1.0}}}, "FILE")[0]
    assert list(named) == ["t"]


@pytest.mark.parametrize(
    ("shape", "qtype"),
    [
        ((6, 5), qc.QuantType(4, symmetric=True, axis=(0, 1), block_size=(4, 1))),
        ((3, 3, 8, 5), qc.QuantType(8, symmetric=True, axis=(2, 3), block_size=(4, 1))),
        ((6, 2, 4), qc.QuantType(8, symmetric=True, axis=(1, 2))),
        ((2, 4), qc.QuantType(8, axis=(0, 1))),
        ((6, 5), qc.QuantType(8, axis=(1,), block_size=(2,))),
        ((6, 1), qc.QuantType(8, axis=(1,))),
        ((6,), qc.QuantType(8)),
    ],
    ids=str,
)
def test_layouts_there_and_back(shape, qtype):
    """`QuantizeLinear` broadcasts what is written to the scale of each element; what is read gives the same again."""
    from qcompiler.numerics.types import over_blocks
    from qcompiler.passes._overrides import fitted

    sizes = [n if d in qtype.axis else 1 for d, n in enumerate(shape)] if qtype.axis else []
    scale = over_blocks(np.minimum, np.abs(normal(*sizes)) + np.float32(0.1), qtype) if sizes else np.float32(0.5)
    zero = np.zeros(np.shape(scale), np.int32)
    y_scale, y_zero, axis, block = layout.to_onnx(Encoding(qtype, scale, zero), shape)
    spread = y_scale
    if block:
        spread = np.take(np.repeat(y_scale, block, axis=axis), range(shape[axis]), axis=axis)
        assert spread.shape == shape
    elif axis is not None:
        spread = y_scale.reshape([-1 if d == axis else 1 for d in range(len(shape))])
    np.testing.assert_array_equal(np.broadcast_to(spread, shape), np.broadcast_to(scale, shape))
    read = layout.of_onnx(qc.QuantType(qtype.bits, qtype.symmetric), y_scale, y_zero, axis, block)
    back = fitted(read, shape, qtype, set(qtype.axis), "t")
    np.testing.assert_array_equal(np.broadcast_to(back.scale, shape), np.broadcast_to(scale, shape))
    assert back.type == qtype or np.size(scale) == 1


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ([{"bitwidth": 8, "scale": 0.1, "offset": 1}], "offset is a whole number from -255 to 0, got 1"),
        ([{"bitwidth": 8, "scale": 0.1, "offset": -256}], "from -255 to 0, got -256"),
        ([{"bitwidth": 8, "scale": 0.1}], "offset is a whole number"),
        ([{"bitwidth": 8, "offset": 0}], "an offset and no scale"),
        ([{"bitwidth": 8, "min": 0.0}], "one of min and max"),
        ([{"bitwidth": 8, "min": 1.0, "max": 2.0}], "min <= 0"),
        ([{"bitwidth": 8, "min": -1.0, "max": 1.0, "scale": 1.0, "offset": -128}], "contradicts itself"),
        ([{"scale": 0.1, "offset": 0}], "bitwidth"),
        ([{"bitwidth": 1}], "bitwidth is a whole number from 2"),
        ([{"bitwidth": 20}], "2 to 16 bits"),
        ([{"bitwidth": 16, "dtype": "float"}], "keep the layer in float"),
        ([{"bitwidth": 8, "dtype": "int4"}], "contradict each other"),
        ([{"bitwidth": 8, "is_symmetric": "yes"}], "is_symmetric is true or false"),
        ([{"bitwidth": 4, "group_size": 32}], "group_size has no axis"),
        ([{"bitwidth": 8, "scales": 1.0}], "unknown key 'scales'; nearest: 'scale'"),
        ([{"bitwidth": 8}, {"bitwidth": 4}], "several types: int4, int8"),
        ([{"bitwidth": 8}, {"bitwidth": 8, "scale": 1.0, "offset": 0}], "some of its channels"),
    ],
)
def test_entries_of_qnn_that_cannot_be(entry, match):
    with pytest.raises(qc.RecipeError, match=f"FILE: .*t.*{match}"):
        of_qnn(entry)


def test_entries_of_qnn():
    affine = of_qnn([{"bitwidth": 8, "scale": 0.5, "offset": -120, "is_symmetric": "False", "dtype": "int"}])
    assert affine.type == qc.QuantType(8) and affine.zero_point == -8
    ends = of_qnn([{"bitwidth": 8, "min": -1.0, "max": 1.55}])
    # 0.01 apart; -1 is code 0, so real 0 is code 100, which is -28 as a signed one.
    np.testing.assert_allclose(ends.scale, 0.01, rtol=1e-6)
    assert ends.zero_point == -28
    symmetric = of_qnn([{"bitwidth": 8, "min": -1.27, "max": 1.27, "is_symmetric": True}])
    assert symmetric.type == qc.QuantType(8, symmetric=True, narrow_range=True) and symmetric.zero_point == 0
    # An unsigned code with is_symmetric, as AIMET writes of what is never negative, is affine.
    assert of_qnn([{"bitwidth": 8, "scale": 0.1, "offset": 0, "is_symmetric": "True"}]).type == qc.QuantType(8)
    channels = of_qnn([{"bitwidth": 4, "scale": s, "offset": -8, "is_symmetric": "True"} for s in (0.5, 0.25)])
    assert channels.type == qc.QuantType(4, symmetric=True) and channels.scale.tolist() == [0.5, 0.25]
    assert of_qnn({"dtype": "int16", "is_symmetric": True}) == qc.QuantType(16, symmetric=True)
    assert of_qnn({"dtype": "int4"}) == qc.QuantType(4)


def test_entries_of_qnn_in_a_list():
    entry = {"name": "t", "enc_type": "PER_CHANNEL", "dtype": "INT", "bw": 4, "is_sym": True}
    entry |= {"scale": [0.5, 0.25], "offset": [-8, -8]}
    found = qnn.parse({"version": "1.0.0", "param_encodings": [entry]}, "FILE")[0]["t"]
    assert found.type == qc.QuantType(4, symmetric=True) and found.scale.tolist() == [0.5, 0.25]
    with pytest.raises(qc.RecipeError, match="LPBQ has no axis"):
        qnn.parse({"param_encodings": [{**entry, "enc_type": "LPBQ"}]}, "FILE")
    with pytest.raises(qc.RecipeError, match="different lengths"):
        qnn.parse({"param_encodings": [{**entry, "offset": [-8]}]}, "FILE")


def test_unknown_formats(tmp_path):
    (tmp_path / "file.json").write_text('{"param_encodings": {}}')
    with pytest.raises(qc.RecipeError, match="unknown format 'onnx' of encodings; known: aimet2, qnn"):
        qc.interchange.load(tmp_path / "file.json", format="onnx")


def model(p, x):
    with jax.named_scope("block_1"):
        h = jax.nn.relu(x @ p["a"]["weight"] + p["bias"])
    with jax.named_scope("block_2"):
        return jax.nn.sigmoid(h @ p["b"]["weight"])


PARAMS = {"a": {"weight": normal(8, 8)}, "b": {"weight": normal(8, 8, seed=1)}, "bias": normal(8, seed=2)}
X = normal(16, 8, seed=3)


def quantized(document, tmp_path, names=None, **options):
    (tmp_path / "overrides.json").write_text(json.dumps(document))
    recipe = qc.interchange.load(tmp_path / "overrides.json", names=names)
    return qc.quantize(model, [X], params=PARAMS, recipe=recipe, verify="types", **options)


def types_of(qmodel, region):
    found = qmodel._quantized.program.notes["types"][region]
    return [t.bits for t in found if t is not None]


def test_wildcards(tmp_path):
    document = {
        "param_encodings": {
            "*weight*": {"dtype": "int4", "is_symmetric": True},
            weights()[1]: {"dtype": "int6", "is_symmetric": True},
        },
        "activation_encodings": {".*dot_general.*": {"dtype": "int16", "is_symmetric": True}},
    }
    qmodel = quantized(document, tmp_path)
    # What is spelled out goes before what only matches; the result of block_1 is read in 16 bits.
    assert types_of(qmodel, "block_1/dot_general#0")[:2] == [8, 4]
    assert types_of(qmodel, "block_2/dot_general#0")[:2] == [16, 6]


def weights():
    """Names of the weights as the program holds them, in order."""
    return [n for n in qc.trace(model, X, params=PARAMS).program.weights if "weight" in n]


def test_wildcards_match_names_of_the_file(tmp_path):
    names = dict(zip(weights(), ("model.layers.0.proj.weight", "model.layers.1.proj.weight"), strict=True))
    document = {"param_encodings": {"model.layers.*.proj.weight": {"dtype": "int4", "is_symmetric": True}}}
    qmodel = quantized(document, tmp_path, names)
    assert [types_of(qmodel, f"block_{k}/dot_general#0")[1] for k in (1, 2)] == [4, 4]


def test_names_that_the_model_does_not_have(tmp_path):
    document = {"activation_encodings": {"block_1/dot_general#7": {"dtype": "int16"}}}
    with pytest.raises(
        qc.RecipeError, match=r"1 encodings are of nothing.*\n  block_1/dot_general#7; nearest: 'block_1/dot"
    ):
        quantized(document, tmp_path)
    with pytest.raises(qc.RecipeError, match=re.escape("conv_9.*")):
        quantized({"param_encodings": {"conv_9.*": {"dtype": "int4"}}}, tmp_path)


def test_encodings_that_do_not_fit_the_weight(tmp_path):
    name, _ = weights()
    entry = {"bitwidth": 8, "scale": 0.1, "offset": -128, "is_symmetric": "True"}
    with pytest.raises(qc.RecipeError, match=rf"{name} of block_1.*3 scales and no axis"):
        quantized({"param_encodings": {name: [entry] * 3}}, tmp_path)
    with pytest.raises(qc.RecipeError, match="16 bits; the integer backend takes at most 8"):
        quantized({"param_encodings": {name: [{**entry, "bitwidth": 16, "offset": -32768}]}}, tmp_path)
    with pytest.raises(qc.RecipeError, match="several scales; activations have one"):
        quantized({"activation_encodings": {"input:x": [entry, {**entry, "scale": 0.2}]}}, tmp_path)
    along = {"name": name, "output_dtype": "int8", "y_scale": [0.1 + 0.01 * k for k in range(8)], "axis": 0}
    with pytest.raises(qc.RecipeError, match=r"along dimension 0 .* over which the layer sums"):
        quantized({"version": "2.0.0", "encodings": [along]}, tmp_path)
    # Counted from the last dimension, the axis is that of the output channels.
    qmodel = quantized({"version": "2.0.0", "encodings": [{**along, "axis": -1}]}, tmp_path)
    scale = qmodel._quantized.programs["insert_qdq"].weights[f"{name}:int8s[1]@block_1/dot_general#0/scale"]
    np.testing.assert_array_equal(scale, np.float32([along["y_scale"]]))


def test_an_encoding_of_a_bias_that_is_not_that_of_its_accumulator_is_reported(tmp_path):
    program = qc.trace(model, X, params=PARAMS).calibrate([X]).program
    (bias,) = [n for n, w in program.weights.items() if np.array_equal(np.ravel(w), PARAMS["bias"])]
    entry = {"bitwidth": 32, "scale": 0.5, "offset": -(2**31), "is_symmetric": "True"}
    with pytest.warns(UserWarning, match=f"not followed of the recipe:\n.*bias {bias}.*product of the scales"):
        qmodel = quantized({"param_encodings": {bias: [entry]}}, tmp_path)
    assert len(qmodel.report.unfollowed) == 1 and "not followed" in str(qmodel.report)


def test_a_table_reads_a_wide_encoding_over_the_same_range(tmp_path):
    entry = {"bitwidth": 16, "scale": 1e-3, "offset": -32768, "is_symmetric": "True"}
    qmodel = quantized({"activation_encodings": {"block_2/dot_general#0": [entry]}}, tmp_path)
    scale = qmodel._quantized.programs["insert_qdq"].weights["block_2/dot_general#0:int12/scale"]
    np.testing.assert_allclose(scale * 4095, 65535e-3, rtol=1e-6)


def test_supergroups(tmp_path):
    groups = [{"op_list": ["Gemm", "Relu"], "fuse": True}, {"op_list": ["Gemm", "Sigmoid"], "fuse": False}]
    qmodel = quantized({"supergroups": groups}, tmp_path)
    relu, sigmoid = qmodel.report.supergroups
    assert (relu.ops, relu.agree, relu.disagree) == (("Gemm", "Relu"), 1, ())
    assert (sigmoid.ops, sigmoid.agree, sigmoid.disagree) == (("Gemm", "Sigmoid"), 1, ())
    groups = [{"op_list": ["Gemm", "Relu"], "fuse": False}, {"op_list": ["MatMul", "Sigmoid"]}]
    with pytest.warns(UserWarning, match="supergroup Gemm, Relu, which is not ops apart in block_1/dot_general#0\n"):
        qmodel = quantized({"supergroups": groups}, tmp_path)
    relu, sigmoid = qmodel.report.supergroups
    assert relu.disagree == ("block_1/dot_general#0",) and relu.agree == 0
    assert sigmoid.disagree == ("block_2/dot_general#0 -> block_2/logistic#0",)
    with pytest.raises(qc.RecipeError, match="no op of a supergroup is called 'Rleu'; nearest: 'Relu'"):
        quantized({"supergroups": [{"op_list": ["Conv", "Rleu"]}]}, tmp_path)
