"""Layers to compose models from, (B, T, D) -> (B, T, D); a mixer is `layer(x, state=None) -> (y, state)`.

What a module of `mixers/` names in `__all__` is public here. `__init__.pyi` tells type checkers these names;
`python -m zoo.registry` writes it.
"""

from zoo import _discover
from zoo.layers import mixers
from zoo.layers.backbone import SequenceConfig, SequenceModel
from zoo.layers.block import Block
from zoo.layers.block_diffusion import BlockDiffusionConfig
from zoo.layers.channel_dropout import ChannelDropout
from zoo.layers.conv import DepthwiseConvolution, ShortConvolution
from zoo.layers.dropout import Dropout
from zoo.layers.encoder import Encoder, EncoderConfig
from zoo.layers.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from zoo.layers.feed_forward import MLP, SwiGLU
from zoo.layers.mixer import FeedForward, Layer, Mixer, Solver, Surroundings
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.model import Input, Model
from zoo.layers.norms import GatedRMSNorm, HeadNorm, RMSNorm
from zoo.layers.pattern import layer_mixers
from zoo.layers.stack import Stack
from zoo.layers.vision import VisionConfig, VisionModel

__all__ = [
    "MLP",
    "Block",
    "BlockDiffusionConfig",
    "ChannelDropout",
    "DepthwiseConvolution",
    "Dropout",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "FeedForward",
    "GatedRMSNorm",
    "HeadNorm",
    "Input",
    "Layer",
    "Mixer",
    "Model",
    "RMSNorm",
    "SequenceConfig",
    "SequenceModel",
    "ShortConvolution",
    "Solver",
    "Stack",
    "Surroundings",
    "SwiGLU",
    "VisionConfig",
    "VisionModel",
    "layer_mixers",
    "register_mixer",
]

for _module in _discover.load_modules(mixers):
    for _name in _discover.public_names(_module):
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)
