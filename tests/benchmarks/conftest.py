"""The benchmarks are imported from the checkout: they do not ship."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
