"""The blocks of a backbone: run in order, with their memory plan, their states, and padding taken out."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from zoo.layers.block import Block
from zoo.layers.memory import MemoryPlan
from zoo.layers.mixer import Mixer, Surroundings
from zoo.layers.padding import rows_apart, unpadded
from zoo.ops import shard

__all__ = ["Stack"]


_ALL = slice(None)


class Stack(nn.ModuleList):
    """Blocks one behind the other, (B, T, D) -> (B, T, D), and the tuple of their states.

    It is a list: a backbone that calls it `blocks` has parameters `blocks.0...`.

    Args:
        blocks: the blocks, in order.
        causal: True refuses mixers that see the future.

    Raises:
        ValueError: a mixer of a causal stack sees the future.
    """

    def __init__(self, blocks: Iterable[Block] = (), *, causal: bool = False):
        super().__init__(blocks)
        self.causal = causal
        self._memory = MemoryPlan()
        for mixer in self.mixers() if causal else ():
            if not mixer.causal:
                raise ValueError(
                    f"the mixers of a causal model must not see the future, and {type(mixer).__name__} does; "
                    "take it out of the pattern, or compose a zoo.layers.Encoder of it"
                )

    def members(self) -> Iterator[Block]:
        """The blocks, with their type."""
        for block in self:
            assert isinstance(block, Block)
            yield block

    def mixers(self) -> list[Mixer]:
        """Whatever has a state, in order."""
        return [mixer for block in self.members() for mixer in block.mixers]

    @property
    def memory(self) -> MemoryPlan:
        """What blocks keep for the backward pass."""
        return self._memory

    def use_memory(self, plan: MemoryPlan) -> None:
        """Change what blocks keep for the backward pass: no number of the model, and nothing in its checkpoints."""
        self._memory = plan
        for block in self.members():
            block.memory = plan

    def forward(
        self,
        x: Tensor,
        states: Any = None,
        *,
        around: Surroundings | None = None,
        mask: Tensor | None = None,
        final: Callable[[Tensor], Tensor] | None = None,
        keep: bool = True,
        part: slice = _ALL,
    ) -> tuple[Tensor, Any]:
        """Run all blocks.

        Args:
            x: (B, T, D).
            states: what an earlier call returned, or None.
            around: what the mixers may see beside x.
            mask: (B, T) bool, False for padding on either side; padding changes no state, and its outputs are zeros.
            final: what the last output goes through before padding is put back, as a norm.
            keep: return the states; otherwise none is held, which in attention is all keys and values.
            part: of the blocks, which run; `states` are theirs.

        Raises:
            ValueError: the mask has another shape or goes with packed documents; or, in a causal stack, time is cut
                across ranks.
        """
        around = Surroundings() if around is None else around
        packed = apart = None
        if mask is not None and (self.causal or shard.current() is None):
            packed = unpadded(x[..., 0], mask, around.cu_seqlens)
        elif mask is not None:
            apart = rows_apart(x[..., 0], mask, around.cu_seqlens)
        if packed is not None:
            x, around = packed.pack(x), around._replace(cu_seqlens=packed.cu_seqlens)
        blocks, after = list(self.members())[part], []
        for block, state in zip(blocks, states or [None] * len(blocks), strict=True):
            x, state = block(x, state, around=around, rows=apart)
            if keep:
                after.append(state)
            del state
        x = x if final is None else final(x)
        if packed is not None:
            x = packed.unpack(x)
        elif apart is not None and mask is not None:
            x = x * mask.unsqueeze(-1)
        return x, tuple(after)

    def init_state(self, batch: int) -> Any:
        """The states before the first token; None where no mixer carries one."""
        states = tuple(block.init_state(batch) for block in self.members())
        return None if all(state is None for state in states) else states

    def reserve(self, states: Any, slots: int) -> Any:
        """The states with room for `slots` tokens a row in whatever grows with the text."""
        return tuple(block.reserve(state, slots) for block, state in zip(self.members(), states, strict=True))

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of all states after `length` tokens."""
        return sum(block.state_bytes(batch, length) for block in self.members())
