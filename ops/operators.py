"""The table of operators: each folder's `spec.py` brings all proofs of the harness, and a line in `zoo doctor`."""

from zoo.ops.causal_conv1d.spec import SPECS as CAUSAL_CONV1D
from zoo.ops.delta_rule.spec import SPECS as DELTA_RULE
from zoo.ops.gated_linear_attention.spec import SPECS as GATED_LINEAR_ATTENTION
from zoo.ops.proof import OperatorSpec
from zoo.ops.ssd.spec import SPECS as SSD

OPERATORS: dict[str, OperatorSpec] = {
    spec.name: spec
    for specs in (
        CAUSAL_CONV1D,
        GATED_LINEAR_ATTENTION,
        DELTA_RULE,
        SSD,
    )
    for spec in specs
}
