"""Decoding: generators that yield as they go."""

from zoo.decoding.causal import refuse_unless_causal
from zoo.decoding.sampling import generate, generate_batch, sample
from zoo.decoding.session import Session

__all__ = ["Session", "generate", "generate_batch", "refuse_unless_causal", "sample"]
