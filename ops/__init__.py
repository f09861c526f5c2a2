"""Operators: functions on tensors, each with a reference loop, a fast torch form and Triton kernels.

Every folder of a family (`linear_attention/`, `scans/`, ...) is one operator. What it names in `__all__` is public
here, under a flat name: `zoo.ops.delta_rule`, wherever its folder lies. `__init__.pyi` tells type checkers these names;
`python -m zoo.registry` writes it.
"""

import sys

from zoo import _discover
from zoo.ops.core.recompute import no_recompute, runs_once

__all__ = ["no_recompute", "runs_once"]

for _operator in _discover.load_packages(sys.modules[__name__], depth=2):
    for _name in _discover.public_names(_operator):
        globals()[_name] = getattr(_operator, _name)
        __all__.append(_name)
