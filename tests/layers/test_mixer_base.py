"""What a mixer declares: defaults of the base, what it is given beside its input, plain modules of before."""

from typing import Any

import pytest
import torch
from case_table import make_mixer, mixers
from torch import Tensor, nn

import zoo
from zoo.layers import Block, Mixer, SequenceConfig, SequenceModel, Surroundings, register_mixer
from zoo.layers.mixer import as_mixer
from zoo.layers.mixer_registry import MIXERS
from zoo.layers.mixers.para_rnn import ParaGRU
from zoo.train.optim import parameter_groups

D = 8


class Summing(Mixer):
    """A running sum."""

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        total = x.cumsum(dim=1) + (0 if state is None else state[0].unsqueeze(1))
        return total, (total[:, -1],)

    def init_state(self, batch: int) -> Any:
        return (torch.zeros(batch, D),)


class PlainSum(nn.Module):
    """The same as people wrote it before there was a base."""

    def __init__(self, d_model: int = D):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        total = (self.scale * x).cumsum(dim=1) + (0 if state is None else state[0].unsqueeze(1))
        return total, (total[:, -1],)

    def init_state(self, batch: int) -> Any:
        return (torch.zeros(batch, len(self.scale)),)


def test_every_mixer_of_ours_inherits() -> None:
    for name, maker in MIXERS.items():
        if maker.__module__.startswith("zoo.layers."):
            assert isinstance(maker(32), Mixer), name


@pytest.mark.parametrize("name", [name for name in mixers() if name != "short_convolution"])
def test_a_mixers_first_state_says_whether_it_is_causal(name: str) -> None:
    mixer = make_mixer(name)
    assert isinstance(mixer, Mixer)
    assert (mixer.init_state(2) is None) == (not mixer.causal)
    assert (mixer.state_bytes(2, 0) == 0) <= (not mixer.causal or name.startswith("attention"))


def test_the_base_counts_the_state_and_starts_nothing() -> None:
    mixer = Summing()
    assert mixer.state_bytes(3, 100) == 3 * D * 4
    assert mixer.causal
    assert not mixer.max_learning_rates
    mixer.initialise(2)
    with pytest.raises(NotImplementedError, match="Mixer is causal, and must say its first state: init_state"):
        Mixer().init_state(1)


class Positioned(Summing):
    takes = ("cu_seqlens", "positions", "memory")
    seen: dict[str, Any]

    def forward(self, x: Tensor, state: Any = None, **surroundings: Any) -> tuple[Tensor, Any]:  # type: ignore[override]
        self.seen = surroundings
        return super().forward(x, state)


def test_a_mixer_is_given_what_it_takes_and_no_more() -> None:
    positions, memory = torch.arange(4)[None], torch.zeros(1, 3, D)
    given = Surroundings(positions=positions, memory=memory, grid=(2, 2)).given(Positioned())
    assert given.keys() == {"cu_seqlens", "positions", "memory"}
    assert given["positions"] is positions
    assert given["memory"] is memory
    assert Surroundings(positions=positions).given(Summing()) == {"cu_seqlens": None}


class Mixing(Summing):
    takes = ()


def test_documents_and_masks_are_never_dropped() -> None:
    with pytest.raises(ValueError, match="packed documents must reach every mixer, and Mixing does not take cu_seq"):
        Surroundings(cu_seqlens=torch.tensor([0, 2])).given(Mixing())
    with pytest.raises(ValueError, match="a mask must reach every mixer, and Summing does not take visible"):
        Surroundings(visible=object()).given(Summing())


def test_a_plain_module_still_works_with_the_same_parameters() -> None:
    block = Block(D, PlainSum(), None)
    assert "mixer.scale" in block.state_dict()
    assert block.mixer.causal
    assert block.mixer.state_bytes(2, 5) == 2 * D * 4
    register_mixer("plain_sum")(PlainSum)
    try:
        model = zoo.create_model("gla", pattern="plain_sum, gla", d_model=32, n_layers=2, vocab_size=20)
    finally:
        del MIXERS["plain_sum"]
    tokens = torch.arange(12)[None]
    whole = model(tokens)[0]
    first, state = model(tokens[:, :5])
    torch.testing.assert_close(torch.cat([first, model(tokens[:, 5:], state)[0]], dim=1), whole)


def test_a_plain_module_without_a_first_state_is_refused_when_one_is_asked_for() -> None:
    with pytest.raises(NotImplementedError, match="Linear is causal, and must say its first state: init_state"):
        as_mixer(nn.Linear(2, 2)).init_state(1)


class BothSides(PlainSum):
    bidirectional = True


def test_a_plain_module_that_said_bidirectional_is_not_causal() -> None:
    assert not as_mixer(BothSides()).causal
    with pytest.raises(ValueError, match="must not see the future, and BothSides does"):
        SequenceModel(SequenceConfig(d_model=D, n_layers=1, vocab_size=5), lambda i: BothSides())


def test_a_layer_says_what_decays() -> None:
    names = {kind: [name for name, _ in group] for kind, group in parameter_groups(ParaGRU(8)).items()}
    assert "B" in names["decay"]
    assert "a" in names["no_decay"]

    class Spared(Mixer):
        weight_decay = {"proj.weight": False}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4, bias=False)

    assert parameter_groups(Spared())["decay"] == []
