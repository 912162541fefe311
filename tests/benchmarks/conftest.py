"""The benchmarks are scripts: their folder is theirs to import from."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
