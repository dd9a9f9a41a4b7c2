"""Makes the benchmarks' package importable: it is no part of the installed one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
