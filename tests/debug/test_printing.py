"""Programs as text: one line an equation, bodies below their regions, ids and source lines, the same every time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.ir.tracing import trace
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
WEIGHTS = {"w": np.ones((3, 5), np.float32), "b": np.ones(5, np.float32)}


def _model(p, x):
    with jax.named_scope("head"):
        y = jax.nn.relu(x @ p["w"] + p["b"])
    return jnp.sort(y), y, 2.0


def _program(fun=_model):
    return trace(fun, WEIGHTS, (jax.ShapeDtypeStruct(X.shape, X.dtype),), parameter_names=("x",))


def test_a_traced_program():
    lines = _program().text().splitlines()
    assert lines[0] == "program trace"
    assert "  weight w: float32[3,5]" in lines and "  input %x: float32[4,3]" in lines
    (dot,) = [line for line in lines if "dot_general[" in line]
    assert re.fullmatch(
        r"  %\d+: float32\[4,5\] = dot_general\[dimension_numbers=.*\] %x w"
        r"    # head/dot_general#0  .*test_printing\.py:\d+ \(_model\)",
        dot,
    )
    assert re.fullmatch(r"  return %\d+, %\d+, 2\.0", lines[-1])


def test_bodies_stand_below_their_regions():
    text = partition(fold_norms(simplify(_program()))).text()
    lines = text.splitlines()
    start = next(k for k, line in enumerate(lines) if "qc_region[kind=dot]" in line)
    body = lines[start + 1 : start + 5]
    assert [line.split(" = ")[1].partition("[")[0].split()[0] for line in body[:3]] == ["dot_general", "add", "max"]
    assert "%x w" in body[0] and body[3].split() == ["yield", ".3"]
    assert "roles" not in text and "sharding" not in text and "None" not in text


def test_text_is_the_same_every_time():
    assert partition(simplify(_program())).text() == partition(simplify(_program())).text()
    assert str(_program().text()) == _program().text()


def test_several_results_bodies_and_types():
    def fun(p, x):
        values, indices = lax.top_k(x, 2)
        return lax.scan(lambda c, v: (c + v, c), jnp.zeros((2,), jnp.float32), values), indices

    text = _program(fun).text()
    assert re.search(r"%\d+: float32\[4,2\], %\d+: int32\[4,2\] = top_k", text)
    assert "scan[" in text and "lambda" not in text.partition("scan[")[2].partition("]")[0]
