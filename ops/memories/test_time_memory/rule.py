"""The four choices that make a memory, and the size of its chunks."""

from dataclasses import dataclass, field
from typing import Literal

from zoo.ops.memories.test_time_memory.algorithm import Algorithm, GradientDescent
from zoo.ops.memories.test_time_memory.loss import InnerLoss, L2Loss
from zoo.ops.memories.test_time_memory.memory import Memory, MLPMemory
from zoo.ops.memories.test_time_memory.retention import Retention, WeightDecay

Reads = Literal["token", "exact", "chunk"]


@dataclass(frozen=True, kw_only=True)
class MemoryRule:
    """What is learnt at test time, from which loss, with which retention and which algorithm.

    All gradients of a chunk are taken at the weights at its beginning, so the chunk's size is part of the model; with 1
    every token's gradient is taken at the newest weights.

    Args:
        memory: the network whose weights are the state.
        loss: the attentional bias.
        retention: the gate, beside the decay `g` that every rule has.
        algorithm: how gradients become updates.
        chunk_size: C, tokens.
        reads: what a query reads. "token": the weights behind its own token's update; a factor of the gate is that at
            the beginning of the chunk. "exact": the same with the gate's map at every token, in C times the memory.
            "chunk": the weights at the beginning of the chunk.

    Raises:
        ValueError: a chunk of less than one token, or reads that the gate or the algorithm cannot give.

    Source: arXiv 2504.13173 (Miras).
    """

    memory: Memory = field(default_factory=MLPMemory)
    loss: InnerLoss = field(default_factory=L2Loss)
    retention: Retention = field(default_factory=WeightDecay)
    algorithm: Algorithm = field(default_factory=GradientDescent)
    chunk_size: int = 16
    reads: Reads = "token"

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"MemoryRule: chunk_size must be at least 1; got {self.chunk_size}")
        if self.reads not in ("token", "exact", "chunk"):
            raise ValueError(f"MemoryRule: reads must be token, exact or chunk; got {self.reads!r}")
        if self.reads == "token" and not self.retention.linear:
            raise ValueError(
                f"MemoryRule: inside a chunk the weights of {type(self.retention).__name__} are no sum of rank-one "
                "updates; got reads='token', use 'chunk' or 'exact'"
            )
        if self.reads != "chunk" and self.algorithm.by_chunk:
            raise ValueError(
                f"MemoryRule: {type(self.algorithm).__name__} changes the sum of a whole chunk; got "
                f"reads={self.reads!r}, use 'chunk'"
            )

    @property
    def gates(self) -> tuple[str, ...]:
        """The gates of a token and head that this rule reads, in the order in which a state keeps them."""
        more = ("theta",) * self.algorithm.momentum + ("delta",) * self.loss.thresholded
        return ("eta", "g", *more)
