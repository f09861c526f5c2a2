"""Makes `tiny` and the fork server importable, in tests and in the processes that tests start."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
