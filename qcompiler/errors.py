"""The errors a user can meet. Each message says what is wrong, where, and what to do."""

from __future__ import annotations


class QuantizationError(Exception):
    """Base class of every error that qcompiler raises about a model, its data or its recipe."""


class TraceError(QuantizationError):
    """The function cannot be captured as a program: side effects, training mode, inputs that are not arrays."""


class CalibrationError(QuantizationError):
    """The calibration data is unusable: no batches, NaN or infinity, another structure than was traced."""


class SignatureError(QuantizationError):
    """A call's structure, ranks or dtypes are not those that were calibrated."""


class RecipeError(QuantizationError):
    """A recipe, pass, target or option is unknown or contradicts itself."""


class OverflowProofError(QuantizationError):
    """An int32 accumulator or bias could overflow for some input, so the integer program would be wrong."""


class IslandError(QuantizationError):
    """Strict mode: part of the program would stay float."""


class VerificationError(QuantizationError):
    """A pass broke an invariant or changed the function; the message names the reproducer it left."""


class SerializationError(QuantizationError):
    """A program cannot be written to, or read from, a file."""
