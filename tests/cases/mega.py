"""mega: what its proofs need."""

from typing import Any

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import Mega

SMALL: dict[str, Any] = {"d_key": 6, "d_value": 10, "chunk_size": 8, "d_state": 4}

MIXERS = {
    "mega": MixerCase(lambda: Mega(D, **SMALL)),
    "mega-laplace": MixerCase(lambda: Mega(D, **SMALL, weights="laplace"), tier=EVERYTHING),
    "mega-relu2": MixerCase(lambda: Mega(D, **SMALL, weights="relu2", bias="simple"), tier=EVERYTHING),
}

MODELS = {"mega": CausalCase(fields=SMALL, published={"enwik8": 39_137_792})}
