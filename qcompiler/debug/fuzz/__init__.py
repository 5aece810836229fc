"""Random programs through the whole compiler, their integers checked against the reference.

    python -m qcompiler.debug.fuzz --count 200 --seed 0

A program is a list of steps drawn from a seed. One that fails is shrunk while it fails in the same way, printed as
text, and saved with its arrays, so that `--replay FILE` runs it again. The checks are `check`'s, for any function.
"""

from qcompiler.debug.fuzz.cases import RECIPES as RECIPES
from qcompiler.debug.fuzz.cases import Case as Case
from qcompiler.debug.fuzz.cases import Step as Step
from qcompiler.debug.fuzz.checks import CheckFailed as CheckFailed
from qcompiler.debug.fuzz.checks import Findings as Findings
from qcompiler.debug.fuzz.checks import assert_same as assert_same
from qcompiler.debug.fuzz.checks import check as check
from qcompiler.debug.fuzz.command import main as main
from qcompiler.debug.fuzz.generator import random_case as random_case
from qcompiler.debug.fuzz.reproducer import load as load
from qcompiler.debug.fuzz.reproducer import save as save
from qcompiler.debug.fuzz.running import run_case as run_case
from qcompiler.debug.fuzz.shrinking import shrink as shrink
from qcompiler.debug.fuzz.shrinking import values_of as values_of
from qcompiler.debug.fuzz.stages import Stages as Stages
from qcompiler.debug.fuzz.stages import compile_stages as compile_stages
