"""One random program, compiled and checked, and what is said of it."""

from __future__ import annotations

import traceback

from qcompiler.debug.fuzz.cases import RECIPES, Case
from qcompiler.debug.fuzz.checks import CheckFailed, Findings, check
from qcompiler.debug.fuzz.stages import compile_stages
from qcompiler.errors import CalibrationError, OverflowProofError


def run_case(case: Case) -> Findings | None:
    """Compiles and checks a program; None where the compiler may refuse it.

    It may where a proof of the integers fails, and where a value is so close to zero that no float32 scale fits it.

    Raises:
      CheckFailed: a check failed, or the compiler broke.
    """
    try:
        stages = compile_stages(case, case.weights, case.inputs, RECIPES[case.recipe])
        return check(stages, case.inputs, case.thorough)
    except OverflowProofError:
        return None
    except CheckFailed:
        raise
    except Exception as error:
        if isinstance(error, CalibrationError) and "too narrow" in str(error):
            return None
        raise CheckFailed(f"{type(error).__name__} in {_place(error)}", str(error)) from error


def _place(error: Exception) -> str:
    """The innermost function of ours that an error came through, without line numbers."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    return f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].name}"
