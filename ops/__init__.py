"""Operators: functions on tensors, each with a reference loop, a fast torch form and Triton kernels."""

from zoo.ops.affine_scan import affine_scan, affine_scan_summary
from zoo.ops.attention import attention
from zoo.ops.block_affine_scan import block_affine_scan, block_affine_scan_summary
from zoo.ops.causal_conv1d import causal_conv1d, causal_conv1d_summary
from zoo.ops.complex_affine_scan import complex_affine_scan, complex_affine_scan_summary
from zoo.ops.delta_rule import delta_rule, delta_rule_summary
from zoo.ops.depthwise_conv1d import depthwise_conv1d
from zoo.ops.dropout import dropout
from zoo.ops.elman import elman
from zoo.ops.fft_convolution import fft_convolution
from zoo.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_summary
from zoo.ops.gru import gru
from zoo.ops.linear_cross_entropy import linear_cross_entropy
from zoo.ops.lstm import lstm
from zoo.ops.newton_scan import newton_corrections, newton_residual, newton_scan
from zoo.ops.once import runs_once
from zoo.ops.para_gru import para_gru
from zoo.ops.para_lstm import para_lstm
from zoo.ops.quasiseparable import quasiseparable
from zoo.ops.rms_norm import gated_rms_norm, rms_norm
from zoo.ops.rotary import rotary
from zoo.ops.s4 import s4, s4_summary, s4d, s4d_summary
from zoo.ops.selective_scan import selective_scan, selective_scan_summary
from zoo.ops.slstm import slstm
from zoo.ops.ssd import ssd, ssd_summary
from zoo.ops.swiglu import swiglu

__all__ = [
    "affine_scan",
    "affine_scan_summary",
    "attention",
    "block_affine_scan",
    "block_affine_scan_summary",
    "causal_conv1d",
    "causal_conv1d_summary",
    "complex_affine_scan",
    "complex_affine_scan_summary",
    "delta_rule",
    "delta_rule_summary",
    "depthwise_conv1d",
    "dropout",
    "elman",
    "fft_convolution",
    "gated_linear_attention",
    "gated_linear_attention_summary",
    "gated_rms_norm",
    "gru",
    "linear_cross_entropy",
    "lstm",
    "newton_corrections",
    "newton_residual",
    "newton_scan",
    "para_gru",
    "para_lstm",
    "quasiseparable",
    "rms_norm",
    "rotary",
    "runs_once",
    "s4",
    "s4_summary",
    "s4d",
    "s4d_summary",
    "selective_scan",
    "selective_scan_summary",
    "slstm",
    "ssd",
    "ssd_summary",
    "swiglu",
]
