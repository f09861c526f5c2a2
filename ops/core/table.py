"""The table of operators: each folder's `spec.py` brings all proofs of the harness, and a line in `zoo doctor`."""

import zoo.ops
from zoo import _discover
from zoo.ops.core.spec import OperatorSpec

OPERATORS: dict[str, OperatorSpec] = {
    spec.name: spec for module in _discover.load_leaves(zoo.ops, "spec", depth=2) for spec in module.SPECS
}
