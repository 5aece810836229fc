"""The intermediate representation, a jaxpr with named weights (`Program`): how it is captured, replayed and kept."""

from qcompiler.ir.program import Builder as Builder
from qcompiler.ir.program import Program as Program
from qcompiler.ir.program import Signature as Signature
from qcompiler.ir.program import build as build
from qcompiler.ir.program import rewrite as rewrite
