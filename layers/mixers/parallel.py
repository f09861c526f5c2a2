"""Several mixers side by side on one input, as in Hymba and Falcon-H1."""

from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor, nn

from zoo.layers.mixer import Mixer, Surroundings, as_mixer
from zoo.layers.norms import RMSNorm
from zoo.layers.state import LayersPrefixes, State, look_ahead, refuse_state, reserve

__all__ = ["Parallel"]

Combine = Literal["sum", "mean"]
MUST_REACH_ALL = ("cu_seqlens", "visible")  # a mixer that does not hear of them mixes what must stay apart


class Parallel(Mixer):
    """y = sum or mean over mixers of norm_i(mixer_i(x)); the state is the tuple of theirs, in order.

    It is causal where all of its mixers are. Of what lies around (zoo.layers.Surroundings) each mixer gets what it
    takes. Documents and masks must reach all of them, and are refused where one does not take them.

    Args:
        d_model: D.
        mixers: at least two of (B, T, D) -> (B, T, D).
        combine: "sum" of the outputs, or their "mean".
        norm: each output goes through an RMSNorm of its own, as in Hymba; their scales then weigh the mixers.
        norm_eps: of these norms.

    Raises:
        ValueError: fewer than two mixers, or another word for `combine`.

    Source: Falcon-H1, arXiv 2507.22448 (sum); Hymba, arXiv 2411.13676 (mean of norms).
    """

    def __init__(
        self,
        d_model: int,
        mixers: Iterable[nn.Module],
        *,
        combine: Combine = "sum",
        norm: bool = False,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        made = [as_mixer(mixer) for mixer in mixers]
        if len(made) < 2:
            raise ValueError(f"Parallel needs at least two mixers; got {len(made)}, use a single one by itself")
        if combine not in get_args(Combine):
            raise ValueError(f"combine must be one of {', '.join(get_args(Combine))}; got {combine!r}")
        self.combine = combine
        self.mixers = nn.ModuleList(made)
        self.norms = nn.ModuleList(RMSNorm(d_model, eps=norm_eps) for _ in made) if norm else None
        self.causal = all(mixer.causal for mixer in made)
        self.takes = tuple(
            name
            for name in Surroundings._fields
            if (all if name in MUST_REACH_ALL else any)(name in mixer.takes for mixer in made)
        )

    def members(self) -> tuple[Mixer, ...]:
        """The mixers, with their type."""
        return tuple(as_mixer(mixer) for mixer in self.mixers)

    def forward(self, x: Tensor, state: State = None, **surroundings: object) -> tuple[Tensor, State]:
        """Every mixer on x (B, T, D), with its own part of the state; (B, T, D) and the states.

        Raises:
            ValueError: a state is given and one of the mixers sees both sides.
        """
        if not self.causal:
            refuse_state(type(self).__name__, state)
        outputs, after = [], []
        for mixer, before in zip(self.members(), state or [None] * len(self.mixers), strict=True):
            y, last = mixer(x, before, **{name: given for name, given in surroundings.items() if name in mixer.takes})
            outputs.append(y)
            after.append(last)
        return self._combined(outputs), tuple(after) if self.causal else None

    def look_ahead(self, x: Tensor, state: State, *, cu_seqlens: Tensor) -> tuple[Tensor, LayersPrefixes]:
        """As `forward`, with each mixer's own way back to the state after any prefix."""
        pairs = [
            look_ahead(mixer, x, before, cu_seqlens=cu_seqlens)
            for mixer, before in zip(self.members(), state, strict=True)
        ]
        outputs, prefixes = zip(*pairs, strict=True)
        return self._combined(outputs), LayersPrefixes(prefixes, cu_seqlens.diff().long())

    def _combined(self, outputs: Iterable[Tensor]) -> Tensor:
        if self.norms is not None:
            outputs = [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        first, *others = outputs
        for y in others:
            first = first + y
        return first / len(self.mixers) if self.combine == "mean" else first

    def init_state(self, batch: int) -> State:
        """The states of all mixers before the first token; None where one sees both sides."""
        return tuple(mixer.init_state(batch) for mixer in self.members()) if self.causal else None

    def reserve(self, state: State, slots: int) -> State:
        """The states with room for `slots` tokens a row in those that grow with the text."""
        return tuple(reserve(mixer, part, slots) for mixer, part in zip(self.members(), state, strict=True))

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of all states after `length` tokens."""
        return sum(mixer.state_bytes(batch, length) for mixer in self.members()) if self.causal else 0

    def extra_repr(self) -> str:
        """How outputs become one, for print(model)."""
        return f"combine={self.combine}"
