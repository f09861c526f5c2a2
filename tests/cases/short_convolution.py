"""The short convolution that mixers hold: what its proofs need."""

from case_table import D, MixerCase

from zoo.layers import ShortConvolution

MIXERS = {
    "short_convolution": MixerCase(lambda: ShortConvolution(D, 4, bias=True)),
}
