"""tcnca: what its proofs need."""

from typing import Any

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import TCNCA

SMALL: dict[str, Any] = {"d_key": 6, "d_value": 10, "chunk_size": 8, "conv_size": 3, "growth": 2, "n_levels": 2}

MIXERS = {
    "tcnca": MixerCase(lambda: TCNCA(D, **SMALL)),
    "tcnca-dense": MixerCase(lambda: TCNCA(D, **SMALL, convolution="dense", weight_norm=True), tier=EVERYTHING),
    "tcnca-separable": MixerCase(
        lambda: TCNCA(D, **SMALL, convolution="separable", per_level=2, weights="laplace", bias="simple"),
        tier=EVERYTHING,
    ),
    "tcnca-short chunks": MixerCase(lambda: TCNCA(D, **(SMALL | {"chunk_size": 3})), tier=EVERYTHING),
}

MODELS = {"tcnca": CausalCase(fields=SMALL, published={"enwik8": 39_186_944})}
