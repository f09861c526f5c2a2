"""Makes the studies of benchmarks/ importable, in tests and in the processes that tests start."""

import os
import sys
from pathlib import Path

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [BENCHMARKS, os.environ.get("PYTHONPATH")]))
