"""The table of operators: each folder's `spec.py` brings all proofs of the harness, and a line in `zoo doctor`."""

from zoo.ops.affine_scan.spec import SPECS as AFFINE_SCAN
from zoo.ops.attention.spec import SPECS as ATTENTION
from zoo.ops.block_affine_scan.spec import SPECS as BLOCK_AFFINE_SCAN
from zoo.ops.causal_conv1d.spec import SPECS as CAUSAL_CONV1D
from zoo.ops.complex_affine_scan.spec import SPECS as COMPLEX_AFFINE_SCAN
from zoo.ops.delta_rule.spec import SPECS as DELTA_RULE
from zoo.ops.depthwise_conv1d.spec import SPECS as DEPTHWISE_CONV1D
from zoo.ops.elman.spec import SPECS as ELMAN
from zoo.ops.fft_convolution.spec import SPECS as FFT_CONVOLUTION
from zoo.ops.gated_linear_attention.spec import SPECS as GATED_LINEAR_ATTENTION
from zoo.ops.gru.spec import SPECS as GRU
from zoo.ops.linear_cross_entropy.spec import SPECS as LINEAR_CROSS_ENTROPY
from zoo.ops.lstm.spec import SPECS as LSTM
from zoo.ops.newton_scan.spec import SPECS as NEWTON_SCAN
from zoo.ops.para_gru.spec import SPECS as PARA_GRU
from zoo.ops.para_lstm.spec import SPECS as PARA_LSTM
from zoo.ops.proof import OperatorSpec
from zoo.ops.quasiseparable.spec import SPECS as QUASISEPARABLE
from zoo.ops.rms_norm.spec import SPECS as RMS_NORM
from zoo.ops.rotary.spec import SPECS as ROTARY
from zoo.ops.s4.spec import SPECS as S4
from zoo.ops.selective_scan.spec import SPECS as SELECTIVE_SCAN
from zoo.ops.slstm.spec import SPECS as SLSTM
from zoo.ops.ssd.spec import SPECS as SSD
from zoo.ops.swiglu.spec import SPECS as SWIGLU

OPERATORS: dict[str, OperatorSpec] = {
    spec.name: spec
    for specs in (
        CAUSAL_CONV1D,
        DEPTHWISE_CONV1D,
        GATED_LINEAR_ATTENTION,
        DELTA_RULE,
        SSD,
        QUASISEPARABLE,
        AFFINE_SCAN,
        BLOCK_AFFINE_SCAN,
        COMPLEX_AFFINE_SCAN,
        SELECTIVE_SCAN,
        NEWTON_SCAN,
        PARA_GRU,
        PARA_LSTM,
        FFT_CONVOLUTION,
        S4,
        LSTM,
        GRU,
        ELMAN,
        SLSTM,
        ATTENTION,
        RMS_NORM,
        SWIGLU,
        ROTARY,
        LINEAR_CROSS_ENTROPY,
    )
    for spec in specs
}
