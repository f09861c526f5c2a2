"""Layers to compose models from, (B, T, D) -> (B, T, D); a mixer is `layer(x, state=None) -> (y, state)`."""

from zoo.layers.backbone import SequenceConfig, SequenceModel
from zoo.layers.block import Block
from zoo.layers.conv import DepthwiseConvolution, ShortConvolution
from zoo.layers.dropout import Dropout
from zoo.layers.encoder import Encoder, EncoderConfig
from zoo.layers.feed_forward import SwiGLU
from zoo.layers.mixers.attention import Attention
from zoo.layers.mixers.delta_net import DeltaNet, GatedDeltaNet
from zoo.layers.mixers.gated_linear_attention import GatedLinearAttention
from zoo.layers.mixers.hydra import Hydra
from zoo.layers.mixers.mamba import Mamba, Mamba2
from zoo.layers.mixers.para_rnn import ParaGRU, ParaLSTM
from zoo.layers.mixers.rnn import GRU, LSTM, SLSTM, Elman
from zoo.layers.mixers.s4 import S4
from zoo.layers.mixers.s5 import S5
from zoo.layers.norms import GatedRMSNorm, HeadNorm, RMSNorm
from zoo.layers.pattern import layer_mixers, register_mixer
from zoo.layers.tied_dropout import TiedDropout

__all__ = [
    "GRU",
    "LSTM",
    "S4",
    "S5",
    "SLSTM",
    "Attention",
    "Block",
    "DeltaNet",
    "DepthwiseConvolution",
    "Dropout",
    "Elman",
    "Encoder",
    "EncoderConfig",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedRMSNorm",
    "HeadNorm",
    "Hydra",
    "Mamba",
    "Mamba2",
    "ParaGRU",
    "ParaLSTM",
    "RMSNorm",
    "SequenceConfig",
    "SequenceModel",
    "ShortConvolution",
    "SwiGLU",
    "TiedDropout",
    "layer_mixers",
    "register_mixer",
]
