"""The way back from `_serial_encode`: equations are bound again in a trace, and what came out is checked."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.errors import SerializationError
from qcompiler.ir import _compat, _serial_names, _serial_sources, classes
from qcompiler.ir._serial_encode import Writer
from qcompiler.ir.program import Program, Signature
from qcompiler.numerics.histogram import RangeStats


class Reader:
    """The inverse of `_serial_encode.Writer`; `read_array` gives the stored array of a position."""

    def __init__(self, document: dict[str, Any], read_array: Callable[[int], np.ndarray]) -> None:
        self.document, self.read_array = document, read_array
        self.tracebacks = _serial_sources.tracebacks(document["sources"])

    def program(self) -> Program:
        doc = self.document
        weights = {name: self.value(w) for name, w in doc["weights"]}
        if len(weights) != len(doc["weights"]) or len(weights) > len(doc["body"]["args"]):
            raise SerializationError("the weights are not the arguments of the program")
        for weight, (dtype, shape, *_) in zip(weights.values(), doc["body"]["args"], strict=False):
            if list(weight.shape) != shape or dtype not in _serial_names.DTYPES:
                raise SerializationError("the weights are not the arguments of the program")
        sign = doc["signature"]
        signature = Signature(_tree(self, sign["inputs"]), _tree(self, sign["results"]), tuple(sign["input_names"]))
        program = Program(
            jaxpr=self.jaxpr(doc["body"]),
            weights=weights,
            signature=signature,
            stats={
                key: RangeStats.from_arrays({n: self.value(v) for n, v in s.items()}) for key, s in doc["stats"].items()
            },
            notes=self.value(doc["notes"]),
            stage=doc["stage"],
        )
        if len(signature.input_names) != len(program.input_vars) or signature.in_tree.num_leaves != len(
            program.input_vars
        ):
            raise SerializationError("the signature is not that of the program")
        if signature.out_tree.num_leaves != len(program.outvars):
            raise SerializationError("the signature is not that of the program")
        self.check(program)
        return program

    def check(self, program: Program) -> None:
        """What was bound must be what was written, for no newer default or rule may change a program in silence."""
        again = Writer()
        document = json.loads(json.dumps(again.jaxpr(program.jaxpr, nested=False)))
        wanted = self.document["body"]
        for found, written in zip(document["equations"], wanted["equations"], strict=True):
            for key in ("primitive", "operands", "types", "params", "scopes"):
                if _without_references(found[key]) != _without_references(written[key]):
                    raise SerializationError(
                        f"{written['primitive']} came back with other {key}: {_short(found[key])} for"
                        f" {_short(written[key])}"
                    )
        if any(_without_references(document[key]) != _without_references(wanted[key]) for key in ("args", "results")):
            raise SerializationError("arguments or results came back with other types")

    # Equations

    def jaxpr(self, doc: dict[str, Any]) -> Any:
        """Traces the equations of a (nested) program; a closed jaxpr."""
        consts = [jnp.asarray(self.value(c)) for c in doc["consts"]]
        avals = [_struct(self, *t) for t in doc["args"]]
        return jax.make_jaxpr(lambda *args: self.run(doc, [*consts, *args]))(*avals)

    def run(self, doc: dict[str, Any], values: list[Any]) -> list[Any]:
        for equation in doc["equations"]:
            values.extend(self.bind(equation, [self.atom(a, values) for a in equation["operands"]]))
        return [self.atom(a, values) for a in doc["results"]]

    def bind(self, doc: dict[str, Any], operands: list[Any]) -> Sequence[Any]:
        name = doc["primitive"]
        primitive = _serial_names.primitive(name)
        if primitive is None:
            raise SerializationError(f"the primitive {name!r} is unknown here")
        params = {k: self.value(v, name, k) for k, v in doc["params"].items()}
        source = doc["source"]
        traceback = self.tracebacks[-1 if source is None else source]
        allowed = _known_parameters(name, tuple(jax.typeof(v).dtype for v in operands))
        if allowed is not None and not allowed.issuperset(params):
            raise SerializationError(f"the primitive {name!r} has no parameters {sorted(set(params) - allowed)} here")
        with _compat.source_context(traceback, _compat.name_stack_of(doc["scopes"])):
            try:
                results = self.bind_library(primitive, operands, params)
            except (TypeError, KeyError, AttributeError, AssertionError) as error:
                raise SerializationError(
                    f"the primitive {name!r} rejects its parameters {sorted(params)}: {error}"
                ) from error
        if len(results) != len(doc["types"]):
            raise SerializationError(
                f"the primitive {name!r} has {len(results)} results instead of {len(doc['types'])}"
            )
        return results

    def bind_library(self, primitive: Any, operands: list[Any], params: dict[str, Any]) -> Sequence[Any]:
        if primitive.name == "jit":
            run = functools.partial(jax.core.eval_jaxpr, _compat.open_jaxpr(params["jaxpr"]))
            consts = _compat.consts_of(params["jaxpr"])

            def called(*args: Any) -> list[Any]:
                return run(consts, *args)

            called.__name__ = called.__qualname__ = params["name"]
            return jax.jit(called)(*operands)
        if primitive.name == "scan":
            params = _scan_params(params)
        elif primitive.name == "reduce":
            params["computation"] = functools.partial(_call_flat, params["jaxpr"])
        results = primitive.bind(*operands, **params)
        return results if primitive.multiple_results else [results]

    def atom(self, atom: Any, values: list[Any]) -> Any:
        if isinstance(atom, int):
            if atom < 0:
                raise SerializationError("an operand is no value")
            return values[atom]
        if "array" in atom:
            return self.value(atom["array"])
        number = self.number(atom["dtype"], atom["literal"])
        return number.item() if atom.get("weak") else number

    # Values

    def value(self, value: Any, primitive: str = "", key: str = "") -> Any:
        if isinstance(value, list):
            return tuple(self.value(v, primitive, key) for v in value)
        if not isinstance(value, dict):
            return value
        if not any(k.startswith("$") for k in value):
            return {k: self.value(v, primitive, key) for k, v in value.items()}
        kind, held = next(iter(value.items()))
        if kind == "$list":
            return [self.value(v, primitive, key) for v in held]
        if kind == "$dict":
            return {self.value(k): self.value(v, primitive, key) for k, v in held}
        if kind == "$float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[held]
        if kind == "$scalar":
            return self.number(*held)
        if kind == "$dtype":
            return self.dtype(held)
        if kind == "$array":
            return self.array(held, self.dtype(value["dtype"]))
        if kind == "$jaxpr":
            closed = self.jaxpr(held)
            # Scatter's update is an open jaxpr where there are two kinds.
            return _compat.open_jaxpr(closed) if key == "update_jaxpr" else closed
        if kind == "$enum":
            return self.known(held[0])[held[1]]
        if kind == "$class":
            cls = self.known(held)
            fields = {k: self.value(v, primitive, key) for k, v in value["fields"].items()}
            if set(fields) != set(_serial_names.fields(cls)):
                raise SerializationError(
                    f"{held} has the fields {sorted(fields)} instead of {sorted(_serial_names.fields(cls))}"
                )
            return cls(**fields)
        raise SerializationError(f"{kind} is no kind of value")

    def known(self, name: str) -> Any:
        if name not in _serial_names.CLASSES:
            raise SerializationError(f"the class {name!r} is unknown here")
        return _serial_names.CLASSES[name]

    def dtype(self, name: str) -> np.dtype:
        if name not in _serial_names.DTYPES:
            raise SerializationError(f"the dtype {name!r} is unknown here")
        return _serial_names.DTYPES[name]

    def number(self, name: str, value: Any) -> Any:
        dtype = self.dtype(name)
        if isinstance(value, str):
            return np.frombuffer(bytes.fromhex(value), dtype)[0]
        return np.asarray(value).astype(dtype)[()]

    def array(self, index: int, dtype: np.dtype) -> np.ndarray:
        array = self.read_array(index)
        if array.dtype != dtype:
            if array.dtype != np.dtype(f"uint{8 * dtype.itemsize}"):
                raise SerializationError(f"array {index} is {array.dtype} instead of {dtype}")
            array = array.view(dtype)
        return array


def _tree(reader: Reader, doc: Any) -> Any:
    """The pytree structure behind `Writer.tree`."""

    def node(held: Any) -> Any:
        if held is None:
            return None
        ((kind, inner),) = held.items()
        if kind == "dict":
            return {reader.value(k): node(v) for k, v in inner}
        return inner if kind == "leaf" else {"tuple": tuple, "list": list}[kind](node(v) for v in inner)

    return jax.tree_util.tree_structure(node(doc))


def _struct(reader: Reader, dtype: str, shape: list[int], weak: str = "") -> jax.ShapeDtypeStruct:
    found = reader.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise SerializationError(f"the program computes in {dtype}; enable jax_enable_x64 to load it")
    return jax.ShapeDtypeStruct(tuple(shape), found, weak_type=bool(weak))


@functools.cache
def _known_parameters(name: str, operands: tuple[Any, ...]) -> frozenset[str] | None:
    """The parameters of an elementwise primitive: JAX takes and forgets any other. None if they are not to be found."""
    fun = getattr(lax, name, None)
    if name not in classes.ELEMENTWISE or fun is None:
        return None
    try:
        jaxpr = jax.make_jaxpr(fun)(*(jax.ShapeDtypeStruct((), d) for d in operands))
    except (TypeError, ValueError):  # takes more than operands
        return None
    found = [e for e in _compat.open_jaxpr(jaxpr).eqns if e.primitive.name == name]
    return frozenset(found[0].params) if len(found) == 1 else None


def _call_flat(jaxpr: Any, *args: Any) -> Any:
    return jax.core.eval_jaxpr(_compat.open_jaxpr(jaxpr), _compat.consts_of(jaxpr), *args)


def _scan_params(plain: dict[str, Any]) -> dict[str, Any]:
    """What this version's scan wants to be bound with: `plain`, and the rest from a scan with the same counts."""
    consts, carry = plain["num_consts"], plain["num_carry"]
    total, results = len(_compat.invars_of(plain["jaxpr"])), len(_compat.open_jaxpr(plain["jaxpr"]).outvars)

    def example(held: list[Any], init: list[Any], xs: list[Any]) -> Any:
        def step(state: list[Any], _: Any) -> Any:
            start = sum(held, np.float32(0))
            return [lax.neg(s) for s in state], [lax.sin(start) for _ in range(results - carry)]

        return lax.scan(step, init, xs, length=1)

    one, row = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((1,), np.float32)
    jaxpr = jax.make_jaxpr(example)([one] * consts, [one] * carry, [row] * (total - consts - carry))
    (eqn,) = (e for e in _compat.open_jaxpr(jaxpr).eqns if e.primitive.name == "scan")
    return {k: plain.get(k, v) for k, v in eqn.params.items()}


def _without_references(doc: Any) -> Any:
    """`doc` without positions of arrays, which another order of writing changes."""
    if isinstance(doc, dict):
        return {k: _without_references(v) for k, v in doc.items() if k not in ("$array", "source")}
    return [_without_references(v) for v in doc] if isinstance(doc, list) else doc


def _short(doc: Any) -> str:
    text = json.dumps(doc)
    return text if len(text) < 120 else text[:117] + "..."
