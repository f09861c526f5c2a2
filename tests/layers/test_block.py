"""Blocks and stacks: where norms stand, cross attention, stochastic depth, memory plans, embeddings and heads."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.layers import (
    GRU,
    Attention,
    BidirectionalAttention,
    Block,
    CrossAttention,
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Hydra,
    Input,
    Mamba,
    Mixer,
    SequenceConfig,
    SequenceModel,
    Stack,
    Surroundings,
    SwiGLU,
)
from zoo.layers.block import BlockState
from zoo.layers.dropout import DropPath
from zoo.layers.encoder import SequenceHead
from zoo.layers.memory import MemoryPlan

D = 8
PLANS = [
    MemoryPlan(),
    MemoryPlan(recompute="block"),
    MemoryPlan(recompute="mixer_saved", tile_mlp=3),
    MemoryPlan(recompute="block", tile_mlp=4),
]


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 7, D)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Looking(Mixer):
    """Adds the mean of the memory, and counts its calls in its state."""

    takes = ("memory",)

    def forward(self, x: Tensor, state: Any = None, *, memory: Tensor | None = None) -> tuple[Tensor, Any]:
        assert memory is not None
        calls = torch.zeros(len(x)) if state is None else state
        return memory.mean(dim=1, keepdim=True).expand_as(x), calls + 1

    def init_state(self, batch: int) -> Any:
        return torch.zeros(batch)


def test_norms_stand_before_or_behind() -> None:
    torch.manual_seed(0)
    before = Block(D, GRU(D, n_heads=2), SwiGLU(D, hidden_size=12), norm=nn.LayerNorm).double()
    after = Block(D, before.mixer, before.feed_forward, norm=nn.LayerNorm, post_norm=True).double()
    h = x() + before.mixer(before.mixer_norm(x()))[0]
    assert_close(before(x())[0], h + before.feed_forward(before.feed_forward_norm(h)))
    h = after.mixer_norm(x() + after.mixer(x())[0])
    assert_close(after(x())[0], after.feed_forward_norm(h + after.feed_forward(h)))


def test_cross_attention_stands_between_and_has_a_state_of_its_own() -> None:
    torch.manual_seed(0)
    block, memory = Block(D, GRU(D, n_heads=2), None, cross=Looking()).double(), x(3, 5, D)
    around = Surroundings(memory=memory)
    y, state = block(x(), around=around)
    h, own = block.mixer(block.mixer_norm(x()))
    assert_close(y, x() + h + memory.mean(dim=1, keepdim=True))
    assert isinstance(state, BlockState)
    assert torch.equal(state.mixer.cell, own.cell)
    assert (block(x(), state, around=around)[1].cross == 2).all()
    assert isinstance(block.init_state(3), BlockState)
    assert block.state_bytes(3) == block.mixer.state_bytes(3) + 12


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_stochastic_depth_drops_whole_rows_alike_under_every_plan(plan: MemoryPlan) -> None:
    torch.manual_seed(0)
    block = Block(D, GRU(D, n_heads=2), SwiGLU(D, hidden_size=12), drop_path=0.5, dropout=0.2).double().train()
    seen = []
    for chosen in (MemoryPlan(), plan):
        torch.manual_seed(4)
        block.memory = chosen
        given = x(8, 7, D).requires_grad_()
        y, _ = block(given)
        seen.append((y, *torch.autograd.grad(y.sin().sum(), [given, *block.parameters()])))
    assert_close(seen[0], seen[1])


def test_stochastic_depth_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    y = drop(torch.ones(4000, 2, 3))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs(float(y.mean()) - 1) < 0.05
    assert (y == y[:, :1, :1]).all()
    assert torch.equal(drop.eval()(y), y)


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("plan", PLANS[1:3], ids=str)
def test_an_encoder_takes_memory_plans(plan: MemoryPlan, prenorm: bool) -> None:
    torch.manual_seed(0)
    config = EncoderConfig(d_model=16, n_layers=2, vocab_size=11, prenorm=prenorm, dropout=0.0)
    model = Encoder(config, lambda i: Hydra(16, d_state=4, head_dim=8)).double()
    batch, grads = model.example(2, 12), []
    for chosen in (MemoryPlan(), plan):
        model.use_memory(chosen)
        assert model.memory == chosen
        grads.append(torch.autograd.grad(model(**batch)[0].sin().sum(), list(model.parameters())))
    assert_close(grads[0], grads[1])
    assert {name.split(".")[2] for name in model.state_dict() if name.startswith("blocks.")} == {"mixer", "norm"}


def test_a_stack_is_a_list_with_states_and_refuses_the_future() -> None:
    stack = Stack((Block(D, Mamba(D, d_state=2), None) for _ in range(3)), causal=True)
    assert len(stack) == 3
    assert isinstance(stack[:2], Stack)
    assert all(name.startswith(("0.", "1.", "2.")) for name in stack.state_dict())
    y, states = stack(torch.randn(2, 5, D))
    assert len(states) == 3
    assert stack.state_bytes(2) == sum(t.nbytes for t in torch.utils._pytree.tree_leaves(states))
    first, states = stack(y[:, :2])
    second, _ = stack(y[:, 2:], states)
    assert_close(torch.cat([first, second], dim=1), stack(y)[0])
    assert stack(y, keep=False)[1] == ()
    with pytest.raises(ValueError, match="causal model must not see the future, and Hydra does"):
        Stack([Block(D, Hydra(D, head_dim=8), None)], causal=True)


class Frames(nn.Module):
    inputs = (Input("frames", "B T 5", torch.float32),)

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(5, D)

    def forward(self, frames: Tensor) -> Tensor:
        y: Tensor = self.proj(frames)
        return y


def test_embeddings_and_heads_are_objects() -> None:
    torch.manual_seed(0)
    config = SequenceConfig(d_model=D, n_layers=1, vocab_size=3, hidden_size=0)
    model = SequenceModel(config, lambda i: Mamba(D, d_state=2), embed=Frames(), head=nn.Linear(D, 2))
    batch = model.example(2, 6)
    assert batch["tokens"].shape == (2, 6, 5)
    outputs, _ = model(**batch)
    assert outputs.shape == (2, 6, 2)
    with pytest.raises(ValueError, match=r"tie_embeddings shares the matrix .* got Frames and Linear"):
        SequenceModel(SequenceConfig(d_model=D, n_layers=1, tie_embeddings=True), lambda i: Mamba(D), embed=Frames())


def test_an_encoder_takes_objects() -> None:
    torch.manual_seed(0)
    config = EncoderConfig(d_model=D, n_layers=1, vocab_size=3)
    mixer = lambda i: Hydra(D, d_state=4, head_dim=8)
    model = Encoder(config, mixer, embed=Frames(), head=nn.Linear(D, 2)).eval()
    batch = model.example(2, 6)
    assert batch.keys() == {"tokens"}
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    outputs, _ = model(**batch, mask=mask)
    assert outputs.shape == (2, 6, 2)
    torch.testing.assert_close(outputs[1:, :4], model(batch["tokens"][1:, :4])[0])
    targets = torch.randint(2, (2, 6))
    loss = model.head_loss(model.encode(batch["tokens"])[0], targets)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(**batch)[0].flatten(0, 1), targets.flatten()))
    with pytest.raises(ValueError, match=r"token_types are for the encoder's own embeddings; .* by Frames"):
        model(**batch, token_types=torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shares the matrix .* got embed=Frames without a head"):
        Encoder(config, mixer, embed=Frames())
    with pytest.raises(ValueError, match=r"got Linear and n_classes=4"):
        Encoder(replace(config, n_classes=4), mixer, head=nn.Linear(D, 2))


class Longest(SequenceHead):
    """The largest number of every channel."""

    def forward(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        return (x if mask is None else x.masked_fill(~mask.unsqueeze(-1), float("-inf"))).amax(1)


def test_an_encoder_takes_a_head_of_whole_sequences() -> None:
    torch.manual_seed(0)
    config = EncoderConfig(d_model=D, n_layers=1, vocab_size=7)
    model = Encoder(config, lambda i: Hydra(D, d_state=4, head_dim=8), head=Longest()).eval()
    tokens = model.example(2, 6)["tokens"]
    outputs, _ = model(tokens, mask=torch.arange(6) < torch.tensor([[6], [4]]))
    torch.testing.assert_close(outputs[1:], model(tokens[1:, :4])[0])
    with pytest.raises(ValueError, match="head_loss is that of a head for tokens"):
        model.head_loss(model.encode(tokens)[0], tokens)


def test_an_encoder_decoder_takes_objects() -> None:
    """As for speech to text: frames in, tokens out."""
    torch.manual_seed(0)
    config = EncoderDecoderConfig(d_model=D, n_layers=1, vocab_size=9)
    model = EncoderDecoder(
        config, lambda i: BidirectionalAttention(D, n_heads=2), lambda i: Attention(D, n_heads=2),
        lambda i: CrossAttention(D, n_heads=2), source_embed=Frames(),
    ).eval()  # fmt: skip
    batch = model.example(2, 6)
    assert batch["source"].shape == (2, 6, 5)
    lengths = torch.tensor([6, 3])
    outputs, _ = model(**batch, source_lengths=lengths)
    state = model.begin(batch["source"][1:, :3])
    torch.testing.assert_close(outputs[1:], model(batch["tokens"][1:], state)[0])
    assert "embedding.weight" in model.state_dict()


def test_a_block_adds_its_input_as_it_is_unless_told_otherwise() -> None:
    assert Block(D, GRU(D), None).residual_scale is None
    assert Block(D, GRU(D), None, residual_scale=True).residual_scale is not None
