"""The passes in a row, each callable alone."""

import jax
import pytest

from qcompiler.ir.tracing import trace
from qcompiler.passes import observe as observers
from qcompiler.passes.assign_precision import assign_precision
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.fold_zero_points import fold_zero_points
from qcompiler.passes.fuse import fuse
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify
from qcompiler.recipe import Recipe


@pytest.fixture
def passes():
    """`passes(fun, weights, batches, recipe, until="fold_zero_points")`: the program after each pass, by name."""

    def run(fun, weights, batches, recipe=None, until="fold_zero_points"):
        recipe = recipe or Recipe()
        batches = [b if isinstance(b, tuple) else (b,) for b in batches]
        steps = {
            "simplify": simplify,
            "fold_norms": fold_norms,
            "partition": partition,
            "observe": lambda p: observers.collect(observers.observe(p), batches),
            "assign_precision": lambda p: assign_precision(observers.without_observers(p), recipe),
            "insert_qdq": lambda p: insert_qdq(p, recipe.estimator_for),
            "fuse": fuse,
            "fold_zero_points": fold_zero_points,
        }
        program = trace(fun, weights, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in batches[0]))
        found = {"trace": program}
        for name, step in steps.items():
            program = found[name] = step(program)
            if name == until:
                break
        return found

    return run
