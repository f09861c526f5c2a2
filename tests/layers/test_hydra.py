"""Hydra's mixer: its wiring against loops, both directions, packing, and what only both sides can know."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from zoo.layers import Encoder, EncoderConfig, Hydra, Mamba2

D = 16


def make(**options: int) -> Hydra:
    torch.manual_seed(0)
    mixer = Hydra(D, **{"d_state": 4, "head_dim": 8, **options}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():  # far from the start, where everything matters
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_loops(m: Hydra, u: Tensor) -> Tensor:
    """One sequence (T, D) as the official layer computes it: two recurrences, their outputs moved on by one step."""
    T, (E, N, H, P, G) = len(u), (m.d_inner, m.d_state, m.n_heads, m.head_dim, m.n_groups)
    z, mixed, dt = torch.split(u @ m.in_proj.weight.T, [E, E + 4 * G * N, 2 * H], dim=1)
    conv = F.conv1d(mixed.T[None], m.conv1d.weight.unsqueeze(1), m.conv1d.bias, padding=3, groups=E + 4 * G * N)[0].T
    conv = conv * torch.sigmoid(conv)
    x, parts = conv[:, :E], conv[:, E:].split(G * N, dim=1)
    y = torch.zeros(T, H, P, dtype=u.dtype)
    for direction, order in enumerate((range(T), range(T - 1, -1, -1))):
        B, C = parts[2 * direction].view(T, G, N), parts[2 * direction + 1].view(T, G, N)
        step = F.softplus(dt[:, direction * H : (direction + 1) * H] + m.dt_bias)
        for h in range(H):
            S, before = torch.zeros(N, P, dtype=u.dtype), torch.zeros(P, dtype=u.dtype)
            for t in order:
                y[t, h] += before
                written = torch.outer(B[t, h * G // H], x[t, h * P : (h + 1) * P])
                S = torch.exp(-step[t, h] * m.A_log[h].exp()) * S + step[t, h] * written
                before = C[t, h * G // H] @ S
    y = y.flatten(1) + x * (x @ m.fc_D.weight.T + m.D).repeat_interleave(P, dim=1)
    y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
    return (y * z * torch.sigmoid(z)) @ m.out_proj.weight.T


@pytest.mark.parametrize("length", [1, 2, 7, 40])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_wiring_equals_loops(length: int, groups: int) -> None:
    mixer, u = make(n_groups=groups), random(2, length, D)
    y, state = mixer(u)
    assert state is None
    assert_close(y, torch.stack([by_loops(mixer, row) for row in u]), rtol=1e-10, atol=1e-12)


def test_published_count_and_start() -> None:
    mixer = Hydra(768)
    assert sum(p.numel() for p in mixer.parameters()) == 3_825_224
    assert (mixer.A_log == 0).all()
    assert (mixer.D == 1).all()
    steps = F.softplus(mixer.dt_bias)
    assert 9e-4 < steps.min() < steps.max() < 0.11
    assert steps.std() > 1e-3


@torch.no_grad()
def test_the_reversed_input_gives_the_reversed_output_with_directions_swapped() -> None:
    mixer, turned, x = make(), make(), random(2, 30, D)
    E, GN, H = mixer.d_inner, mixer.d_state, mixer.n_heads
    channels = torch.cat([torch.arange(E), E + torch.arange(2 * GN, 4 * GN), E + torch.arange(2 * GN)])
    rows = torch.cat([torch.arange(E), E + channels, 2 * E + 4 * GN + torch.arange(2 * H).roll(H)])
    turned.in_proj.weight.copy_(mixer.in_proj.weight[rows])
    turned.conv1d.weight.copy_(mixer.conv1d.weight[channels].flip(1))
    turned.conv1d.bias.copy_(mixer.conv1d.bias[channels])
    assert_close(turned(x.flip(1))[0].flip(1), mixer(x)[0])
    assert not torch.allclose(mixer(x.flip(1))[0].flip(1), mixer(x)[0])


@torch.no_grad()
def test_every_token_reaches_every_other() -> None:
    mixer, x = make(), random(1, 20, D)
    for t in (0, 11, 19):
        changed = x.clone()
        changed[:, t] += 1.0
        assert ((mixer(changed)[0] - mixer(x)[0]).abs().amax(-1) > 1e-9).all(), t


@settings(deadline=None, max_examples=10)
@given(cuts=st.lists(st.integers(0, 30), max_size=4))
@torch.no_grad()
def test_packed_documents_equal_separate_ones(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), 30]
    mixer, x = make(), random(1, 30, D)
    y, _ = mixer(x, cu_seqlens=torch.tensor(bounds))
    for left, right in itertools.pairwise(bounds):
        assert_close(y[:, left:right], mixer(x[:, left:right])[0])


def test_every_parameter_gets_a_gradient() -> None:
    mixer = make()
    mixer(random(2, 20, D))[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_bfloat16_autocast_runs_forward_and_backward() -> None:
    mixer, x = make().float(), random(2, 20, D).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = mixer(x)
    y.float().square().sum().backward()
    assert_close(y.float(), mixer(x)[0], rtol=0.1, atol=0.1 * y.abs().max().item())  # a sanity check, not a proof
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


def test_there_is_no_state() -> None:
    mixer = make()
    assert mixer.init_state(3) is None
    assert mixer.state_bytes(3, 100) == 0
    with pytest.raises(ValueError, match="Hydra sees both sides of every token and carries no state, but was given"):
        mixer(random(1, 5, D), (random(1, 2),))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Hydra(D, head_dim=5), "head_dim must divide expand"),
        (lambda: Hydra(D, head_dim=8, n_groups=3), "n_groups must divide the 4 heads; got 3"),
    ],
)
def test_refusals(build: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def accuracy_of(mixer: Callable[[], nn.Module], steps: int = 200) -> float:
    """Of telling whether a token's symbol occurs again later, after 200 steps on fresh sequences.

    Vocabulary 8, length 16, width 32, 2 post-norm layers, AdamW 3e-3, batch 32.
    """
    torch.manual_seed(0)
    config = EncoderConfig(d_model=32, n_layers=2, vocab_size=8, dropout=0.0)
    model, out = Encoder(config, lambda i: mixer()), nn.Linear(32, 2)
    optimiser = torch.optim.AdamW([*model.parameters(), *out.parameters()], lr=3e-3)
    draw = torch.Generator().manual_seed(1)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(8, (size, 16), generator=draw)
        again = (x.unsqueeze(2) == x.unsqueeze(1)).triu(1).any(2)
        return x, again.long()

    for _ in range(steps):
        x, labels = batch(32)
        loss = F.cross_entropy(out(model.encode(x)[0]).flatten(0, 1), labels.flatten())
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        optimiser.step()
    x, labels = batch(512)
    with torch.no_grad():
        return (out(model.encode(x)[0]).argmax(-1) == labels).float().mean().item()


@pytest.mark.everything
def test_both_sides_know_what_the_past_cannot() -> None:
    hydra = accuracy_of(lambda: Hydra(32, d_state=16, head_dim=16, d_conv=3))
    causal = accuracy_of(lambda: Mamba2(32, d_state=16, head_dim=16, d_conv=3))
    print(f"occurs again later: Hydra {hydra:.3f}, causal Mamba-2 {causal:.3f}")
    assert hydra > 0.99
    assert causal < 0.8  # no causal rule knows: the best one guesses from the position and what is left
