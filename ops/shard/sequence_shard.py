"""One rank's place in a sequence that is cut across a process group, and how what crosses the edges travels."""

from dataclasses import dataclass, field, replace

import torch.distributed as dist

METHODS = ("allgather", "lasp", "lasp2", "zeco", "heads")
ATTENTION = ("allgather", "ring", "zigzag", "striped", "ulysses", "usp", "tokenring", "lightseq")
LAYOUTS = ("contiguous", "zigzag", "striped")
OWN_LAYOUT = {"zigzag": "zigzag", "striped": "striped"}  # the ring methods that are named after theirs


@dataclass(frozen=True)
class Link:
    """What a message between neighbouring ranks costs: latency + bytes / bandwidth.

    Args:
        latency: seconds a message.
        bandwidth: bytes a second.
    """

    latency: float = 20e-6
    bandwidth: float = 25e9

    def blocks(self, ranks: int, size: int, most: int) -> int:
        """Into how many blocks All-Scan cuts a state of `size` bytes, at most `most`.

        A chain of P ranks that hands on b blocks takes (P - 2 + b)(latency + t / b) with t = size / bandwidth, least
        at b = sqrt((P - 2) t / latency).
        """
        best = ((ranks - 2) * size / self.bandwidth / max(self.latency, 1e-12)) ** 0.5 if ranks > 2 else 1.0
        return max(1, min(round(best), most))

    def seconds(self, ranks: int, size: int, blocks: int) -> float:
        """The time until the last rank has the state, by the same model; one hop for two ranks."""
        return (max(ranks - 2, 0) + blocks) * (self.latency + size / self.bandwidth / blocks)


@dataclass(frozen=True)
class SequenceShard:
    """One rank's place in a sequence that is cut across a process group.

    Args:
        group: the process group whose ranks hold the stretches in order; None for the default group.
        method: how states cross ranks.
            "allgather": every rank gets transitions and increments of all and folds those before it, both ways.
            "lasp2": the same forward; the transitions are kept, so that backward only gradients of states travel.
            "lasp": a chain; each rank receives one state, applies its element, sends one state.
            "zeco": the same chain in blocks of columns, so that the ranks work side by side (All-Scan).
            "heads": two all-to-alls turn slices of time into slices of heads and back; no summary is needed.
            Convolutions always exchange a halo; memories without a summary pass their state on in micro-batches.
        attention: how softmax attention crosses ranks, see zoo.ops.attention.
        layout: which tokens a rank holds. "contiguous": stretches in order of rank, which every operator with a state
            needs; "zigzag": of 2 P chunks the r-th from both ends; "striped": every P-th token. None is the layout
            that the attention method is named after, or contiguous.
        length: tokens of the whole sequence; None where all ranks hold equally many.
        chunk: contiguous stretches begin at multiples of it. Attention and "heads" want even ones, 1.
        documents: boundaries of the packed documents in the whole stream, as a tuple; None for a batch. Attention and
            positions need it; operators with a state read their own `cu_seqlens`.
        link: what a message costs; "zeco" chooses its number of blocks by it.
        blocks: of "zeco", in place of that choice.
        inner: of "usp", the ranks of one head group, neighbours; a divisor of the group's size.
        ranks: those of the group's ranks that hold the stretches, in the order of time; None for all of them. Then all
            exchanges are messages between pairs, so that any ranks may share a sequence without a group of their own,
            and others may share another one at the same time. The group must have been used by all its ranks before.
        backwards: time runs from the last rank to the first, see `reversed`.

    Attributes: rank and size, among those that share the sequence; backwards, the last one is rank 0.
    """

    group: dist.ProcessGroup | None = None
    method: str = "allgather"
    attention: str = "allgather"
    layout: str | None = None
    length: int | None = None
    chunk: int = 1
    documents: tuple[int, ...] | None = None
    link: Link = Link()
    blocks: int | None = None
    inner: int | None = None
    ranks: tuple[int, ...] | None = None
    backwards: bool = False
    rank: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        if not dist.is_initialized():
            raise ValueError("SequenceShard: needs a process group; call torch.distributed.init_process_group first")
        layout = self.layout or OWN_LAYOUT.get(self.attention, "contiguous")
        for name, value, known in (
            ("method", self.method, METHODS),
            ("attention", self.attention, ATTENTION),
            ("layout", layout, LAYOUTS),
        ):
            if value not in known:
                raise ValueError(f"SequenceShard: {name} must be one of {', '.join(known)}; got {value!r}")
        if OWN_LAYOUT.get(self.attention, layout) != layout:
            raise ValueError(
                f"SequenceShard: attention {self.attention!r} is a ring over the {OWN_LAYOUT[self.attention]} layout; "
                f"got layout {layout!r}, leave it out"
            )
        if self.chunk < 1 or (self.chunk > 1 and (layout != "contiguous" or self.method == "heads")):
            raise ValueError(
                f"SequenceShard: chunk must be at least 1, and 1 where stretches are even, as the {layout} layout and "
                f"method {self.method!r} want them; got {self.chunk}"
            )
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "size", dist.get_world_size(self.group))
        rank = dist.get_rank(self.group)
        if rank < 0:
            raise ValueError("SequenceShard: this process is no member of the group; make it on the group's ranks only")
        if self.ranks is not None:
            if (
                rank not in self.ranks
                or len(set(self.ranks)) < len(self.ranks)
                or not set(self.ranks) <= set(range(self.size))
            ):
                raise ValueError(
                    f"SequenceShard: ranks must be different ones of the group's {self.size}, this one among them; got "
                    f"{self.ranks} on rank {rank}"
                )
            rank = self.ranks.index(rank)
            object.__setattr__(self, "size", len(self.ranks))
        object.__setattr__(self, "rank", self.size - 1 - rank if self.backwards else rank)
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"SequenceShard: blocks must be at least 1; got {self.blocks}")
        if self.inner is not None and (self.inner < 1 or self.size % self.inner):
            raise ValueError(f"SequenceShard: inner must divide the {self.size} ranks; got {self.inner}")

    def peer(self, rank: int) -> int:
        """The rank in the process group of one that shares the sequence."""
        rank = self.size - 1 - rank if self.backwards else rank
        return rank if self.ranks is None else self.ranks[rank]

    def reversed(self) -> "SequenceShard":
        """The same stretch with time run the other way: what comes from the ranks before now comes from those after.

        For what crosses the edges of flipped stretches. Which tokens a rank holds is said by the place itself alone:
        stretches need not be symmetric, so positions and slices of heads refuse its reverse.
        """
        return replace(self, backwards=not self.backwards)

    def require_forward(self, what: str) -> None:
        """Raise where time runs from the last rank to the first."""
        if self.backwards:
            raise ValueError(f"{what} are those of time run forward; got a reversed place, ask outside of it")

    def require_contiguous(self, what: str) -> None:
        """Raise unless every rank holds a stretch of time in one piece."""
        if self.layout != "contiguous":
            raise ValueError(
                f"{what} needs every rank to hold one contiguous stretch of time; got layout {self.layout!r}, use a "
                "contiguous attention method such as 'lightseq' or 'ulysses' beside it"
            )
