"""`python -m qcompiler.debug.fuzz`."""

import sys

from qcompiler.debug.fuzz.command import main

if __name__ == "__main__":
    sys.exit(min(main(), 1))
