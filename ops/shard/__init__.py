"""Time cut across the ranks of a process group: which slice is here, and what crosses its edges.

    with shard.use(shard.SequenceShard(group, method="zeco")):
        logits, state = model(tokens)  # every rank holds the next stretch of the same sequences, in order of rank

Operators with a state ask once and receive the state at their left edge; nothing above them knows. The state that they
return is the one at the right edge of the rank's own stretch. A `state` that is passed in is respected on the first
rank; on later ranks the past is what the earlier ranks send.

Packed documents: every rank gets its slice of the flattened stream with the boundaries that `local_boundaries` makes.
The first local document is the one that goes on from earlier ranks: where a new document begins exactly at the edge,
an empty one comes first. The last local document goes on to later ranks.

What sees both sides of every token hears from both neighbours: `rows_before` and `rows_after` of a convolution, the
two states of `incoming_states`; and inside `from_the_right()` every operator on a flipped stretch runs from the last
rank to the first.

Every exchange remembers its shard, because the backward pass runs when the `with` is over.

| file | its one idea |
|---|---|
| `place.py` | `SequenceShard`: one rank's place, and how what crosses the edges travels |
| `layout.py` | which tokens a rank holds, in which documents they lie, and at which positions they stand |
| `scope.py` | the shard in use here; recomputation that reads arrivals back and sends nothing |
| `exchange.py` | messages and collectives, the only calls of torch.distributed; who counts them |
| `scan.py` | `incoming_state`: the state at the left edge, in four ways; `crossing`: inside an operator's own node |
| `ends.py` | `across`: the same for operators whose element costs a run; the ranks at both ends make none |
| `both.py` | `incoming_states`: the states at both edges, from either side at once |
| `halo.py` | `halo`: the rows before the left edge, for convolutions; `rows_before`, `rows_after`: on either side |
| `heads.py` | `over_heads`: from slices of time to slices of heads and back, for any mixer with heads |
| `serial.py` | `serial`: states that no summary can replace, handed on in micro-batches |
| `tied.py` | `tied`: outputs of a rank without a token, kept in the graph of its inputs |
| `total.py` | `total`: sums over all ranks; `whole`: what all ranks hold |
"""

from zoo.ops.shard.both import incoming_states
from zoo.ops.shard.ends import across
from zoo.ops.shard.exchange import Message, observed
from zoo.ops.shard.halo import halo, mirrored, rows_after, rows_before
from zoo.ops.shard.heads import over_heads
from zoo.ops.shard.layout import LocalBoundaries, held, local_boundaries, owners, positions, stretch, tokens_of
from zoo.ops.shard.place import ATTENTION, LAYOUTS, METHODS, Link, SequenceShard
from zoo.ops.shard.scan import Crossing, crossing, incoming_state, largest
from zoo.ops.shard.scope import alone, arrived, checkpoint_contexts, current, from_the_right, refuse, seen_as, use
from zoo.ops.shard.serial import serial
from zoo.ops.shard.tied import tied
from zoo.ops.shard.total import total, whole

__all__ = [
    "ATTENTION",
    "LAYOUTS",
    "METHODS",
    "Crossing",
    "Link",
    "LocalBoundaries",
    "Message",
    "SequenceShard",
    "across",
    "alone",
    "arrived",
    "checkpoint_contexts",
    "crossing",
    "current",
    "from_the_right",
    "halo",
    "held",
    "incoming_state",
    "incoming_states",
    "largest",
    "local_boundaries",
    "mirrored",
    "observed",
    "over_heads",
    "owners",
    "positions",
    "refuse",
    "rows_after",
    "rows_before",
    "seen_as",
    "serial",
    "stretch",
    "tied",
    "tokens_of",
    "total",
    "use",
    "whole",
]
