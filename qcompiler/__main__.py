"""`python -m qcompiler`: see `qcompiler.cli`."""

import sys

from qcompiler.cli import main

sys.exit(main())
