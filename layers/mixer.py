"""What mixers and feed-forwards declare of themselves, so that models, optimisers and strategies need not guess."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from zoo.layers.state import state_bytes
from zoo.ops.core.call import Operators

__all__ = [
    "FeedForward", "Initialises", "Layer", "LimitsRates", "Mixer", "Solver", "Surroundings", "TokenWise", "as_mixer",
]  # fmt: skip


class Surroundings(NamedTuple):
    """What a mixer may see beside its input. A mixer is given those that its `takes` names.

    cu_seqlens: boundaries (n + 1,) of packed documents, B = 1.
    positions: (B, T) integers, where every token stands, when it is not 0 ... T - 1.
    visible: which keys a query sees, a value of the attention operator.
    memory: (B, S, D) outputs of another stack, for cross attention.
    memory_lengths: (B,) integers, how many rows of `memory` exist; all when omitted.
    grid: (rows, columns) of a picture whose patches are the tokens, row by row.
    condition: (B, C) or (B, T, C), what the output is conditioned on.
    """

    cu_seqlens: Tensor | None = None
    positions: Tensor | None = None
    visible: Any = None
    memory: Tensor | None = None
    memory_lengths: Tensor | None = None
    grid: tuple[int, int] | None = None
    condition: Tensor | None = None

    def given(self, mixer: "Mixer") -> dict[str, Any]:
        """The keyword arguments of one mixer.

        Raises:
            ValueError: documents or a mask are given that the mixer does not take: it would mix what must stay apart.
        """
        takes = mixer.takes
        if self.cu_seqlens is not None and "cu_seqlens" not in takes:
            raise ValueError(_untaken("cu_seqlens", "packed documents", mixer))
        if self.visible is not None and "visible" not in takes:
            raise ValueError(_untaken("visible", "a mask", mixer))
        return {name: getattr(self, name) for name in takes}


def _untaken(name: str, what: str, mixer: nn.Module) -> str:
    kind = type(mixer).__name__
    return f"{what} must reach every mixer, and {kind} does not take {name}; name it in {kind}.takes, or leave it out"


class Layer(nn.Module):
    """A module that says of itself what an optimiser, a strategy and a model's start need to know.

    Class members, each with a default:
        operators: the public operators that the layer's own code calls.
        weight_decay: {name of a parameter: whether it decays}, where the rule of zoo.train.optim does not fit. A name
            may be of an inner module, as "proj.weight".
    """

    operators: Operators = ()
    weight_decay: ClassVar[Mapping[str, bool]] = MappingProxyType({})

    @property
    def max_learning_rates(self) -> Mapping[str, float]:
        """{name of a parameter: the learning rate that it must not exceed}."""
        return {}

    def initialise(self, n_layers: int = 1) -> None:
        """Start as the layer's source says, in a model of so many layers; its linear layers have started before."""


class Mixer(Layer):
    """A layer that looks along time, (B, T, D) -> (B, T, D): `y, state = mixer(x, state=None, **surroundings)`.

    Cutting time anywhere and handing the state on changes nothing. A subclass gives `forward` and `init_state`, and
    says what differs from these defaults:
        causal: True where no output sees a later input. A mixer that sees both sides has no state: it returns
            (y, None) and refuses one. An instance may differ from its class.
        takes: which of `Surroundings` it wants as keyword arguments.
    """

    causal: bool = True
    takes: tuple[str, ...] = ("cu_seqlens",)

    forward: Callable[..., tuple[Tensor, Any]]
    __call__: Callable[..., tuple[Tensor, Any]]

    def init_state(self, batch: int) -> Any:
        """The state before the first token, what `state=None` stands for; None for a mixer that sees both sides."""
        if self.causal:
            raise NotImplementedError(f"{type(self).__name__} is causal, and must say its first state: init_state")
        return None

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state after `length` tokens; here those of the first one, the same for every length."""
        state = self.init_state(batch)
        return 0 if state is None else state_bytes(state)


class Solver(Mixer):
    """A mixer that solves for its states, and can measure how well.

    watched: whether it measures; training switches it on for the steps that are logged.
    residual: of the newest call while `watched` was true, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watched = False
        self.residual: Tensor | None = None


class FeedForward(Layer):
    """The half of a block over channels, (..., D) -> (..., D).

    token_wise: it treats every token alone, so that a block may give it tiles of tokens.
    """

    token_wise: bool = False

    forward: Callable[..., Tensor]
    __call__: Callable[..., Tensor]


@runtime_checkable
class TokenWise(Protocol):
    """A feed-forward that says whether it treats every token alone, a FeedForward or not."""

    token_wise: bool


@runtime_checkable
class Initialises(Protocol):
    """A module with a start of its own, a Layer or not."""

    def initialise(self, n_layers: int) -> None:
        """Start as the module's source says, in a model of so many layers."""


@runtime_checkable
class LimitsRates(Protocol):
    """A module with parameters that must learn slowly, a Layer or not."""

    @property
    def max_learning_rates(self) -> Mapping[str, float]:
        """{name of a parameter: the learning rate that it must not exceed}."""


def as_mixer(module: nn.Module) -> Mixer:
    """A mixer as it is; a plain module with `forward` and `init_state` gets the members of Mixer that it lacks.

    Modules that do not inherit from Mixer are deprecated: write `class MyMixer(Mixer)`.
    """
    if isinstance(module, Mixer):
        return module
    plain: Any = module
    own = {name for kind in type(module).__mro__ for name in vars(kind)} | set(vars(module))
    if "causal" not in own:
        plain.causal = not (plain.bidirectional if "bidirectional" in own else False)
    for name, value in (("takes", Mixer.takes), ("operators", ())):
        if name not in own:
            setattr(module, name, value)
    for name in ("init_state", "state_bytes"):
        if name not in own:
            setattr(module, name, partial(vars(Mixer)[name], module))  # a bound method would not be pickled
    return cast(Mixer, module)
