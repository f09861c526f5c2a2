"""MEGA's and TCNCA's block against the equations written out, token by token; what a chunk sees, and how far back."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import zoo
from zoo.layers import TCNCA, Mega
from zoo.layers.chunked_attention import ChunkedAttention
from zoo.layers.mixers.mega import GatedChunkedAttention
from zoo.layers.temporal_convolution import TemporalConvolution

SMALL: dict[str, Any] = {"d_key": 6, "d_value": 10, "chunk_size": 8}
D = 12


class Nothing(nn.Module):
    """In the place of what moves along time: each token sees itself alone."""

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x), 0)


def made(kind: type[GatedChunkedAttention], **fields: Any) -> GatedChunkedAttention:
    """In float64, with every parameter far from where it starts."""
    torch.manual_seed(0)
    layer = kind(D, **(SMALL | fields)).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def turned(x: Tensor, position: int) -> Tensor:
    """x (Z,) at a position: pairs (m, m + Z/2) turned by position * 10000^(-2m / Z)."""
    half = len(x) // 2
    out = x.clone()
    for m in range(half):
        angle = position * 10000.0 ** (-m / half)
        out[m] = x[m] * math.cos(angle) - x[m + half] * math.sin(angle)
        out[m + half] = x[m + half] * math.cos(angle) + x[m] * math.sin(angle)
    return out


def averages(move: nn.Module, x: Tensor) -> Tensor:
    """MEGA's equations 2 to 4 for one sequence (T, D), channel by channel, and the skip."""
    p, alpha = move.delta.sigmoid(), move.alpha.sigmoid()
    h, ys = torch.zeros_like(move.delta), []
    for x_t in x:
        h = (1 - p * alpha) * h + p * move.beta * x_t[:, None]
        y = (move.gamma * h).sum(1) / math.sqrt(move.gamma.shape[1]) + move.omega * x_t
        ys.append(y * y.sigmoid())
    return torch.stack(ys)


def network(move: TemporalConvolution, x: Tensor) -> Tensor:
    """Levels of depthwise convolutions for one sequence (T, D), tap by tap."""
    h = x
    for i, conv in enumerate(move.levels):
        dilation, K = move.growth**i, move.width
        made = []
        for t in range(len(x)):
            z = conv.bias.clone()
            for tap in range(K):
                source = t - (K - 1 - tap) * dilation
                z = z + (conv.weight[:, tap] * h[source] if source >= 0 else 0)
            made.append(z * z.sigmoid())
        h = h + torch.stack(made)
    y = h + move.omega * x
    return y * y.sigmoid()


def block(layer: GatedChunkedAttention, x: Tensor) -> Tensor:
    """The gated residual of one sequence (T, D): the equations of arXiv 2209.10655, one query at a time."""

    def silu(z: Tensor) -> Tensor:
        return z * z.sigmoid()

    Z, E, C, attention = layer.d_key, layer.d_value, layer.attention.chunk_size, layer.attention
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
    v = silu(normed @ layer.v_proj.weight.T + layer.v_proj.bias)
    move = averages if isinstance(layer, Mega) else network
    base = move(layer.move, normed) @ layer.mx_proj.weight.T + layer.mx_proj.bias
    u, z, r, g = base[:, :D].sigmoid(), silu(base[:, D : D + Z]), silu(base[:, D + Z : D + Z + E]), base[:, D + Z + E :]
    q, k = (z * layer.gamma[i] + layer.beta[i] for i in range(2))
    rows = []
    for i in range(len(x)):
        first = i // C * C
        seen = range(first, i + 1)
        scores = []
        for j in seen:
            if attention.turned is not None:
                bias = turned(attention.turned[0], i - first) @ turned(attention.turned[1], j - first)
            else:
                bias = attention.by_distance[C - 1 + i - j]
            product = q[i] @ k[j]
            scores.append(
                product / math.sqrt(Z) + bias if attention.weights == "softmax" else product / len(seen) + bias
            )
        weight = torch.stack(scores)
        if attention.weights == "softmax":
            weight = weight.exp() / weight.exp().sum()
        elif attention.weights == "laplace":
            weight = 0.5 * (1 + torch.erf((weight - 0.707107) / (0.282095 * math.sqrt(2))))
        else:
            weight = weight.clamp_min(0) ** 2
        o = weight @ v[first : i + 1]
        h = silu(g[i] + (o * r[i]) @ layer.h_proj.weight.T + layer.h_proj.bias)
        rows.append(x[i] + u[i] * (h - x[i]))
    return torch.stack(rows)


TCN = {"conv_size": 3, "growth": 2, "n_levels": 3}


@pytest.mark.parametrize("bias", ["rotary", "simple"])
@pytest.mark.parametrize("weights", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize(("kind", "fields"), [(Mega, {"d_state": 4}), (TCNCA, TCN)], ids=["mega", "tcnca"])
def test_a_layer_is_its_equations(kind: type, fields: dict[str, Any], weights: str, bias: str) -> None:
    layer = made(kind, **fields, weights=weights, bias=bias)
    x = torch.randn(2, 27, D, dtype=torch.float64)  # three chunks and a ragged one
    with torch.no_grad():
        exact = torch.stack([block(layer, row) for row in x])
        ours = x + layer(x)[0]
    # laplace's mean and deviation have six digits in the official code; rotary tables are made in float32
    tolerance = 1e-5 if weights == "laplace" or bias == "rotary" else 1e-10
    assert_close(ours, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [Mega, TCNCA])
def test_nothing_but_what_moves_crosses_a_chunk(kind: type) -> None:
    """With each token alone in its place, chunks do not see each other; with it they do."""
    layer = made(kind, **(TCN if kind is TCNCA else {}))
    for move in (layer.move, Nothing()):
        layer.move = move
        x = torch.randn(1, 32, D, dtype=torch.float64, requires_grad=True)
        seen = torch.zeros(4, 4, dtype=torch.bool)  # of chunk i, whether chunk j reaches it
        for i in range(4):
            (dx,) = torch.autograd.grad(layer(x)[0][:, 8 * i : 8 * i + 8].square().sum(), x)
            seen[i] = dx[0].abs().sum(-1).view(4, 8).sum(1) > 0
        if isinstance(move, Nothing):
            assert torch.equal(seen, torch.eye(4, dtype=torch.bool))
        elif kind is Mega:
            assert torch.equal(seen, torch.ones(4, 4, dtype=torch.bool).tril())
        else:  # its convolutions reach 14 tokens back: two chunks
            assert torch.equal(seen, torch.ones(4, 4, dtype=torch.bool).tril().triu(-2))


def lags(network: TemporalConvolution, length: int) -> list[int]:
    """How many tokens back the last output sees."""
    x = torch.randn(1, length, 4, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(network(x)[0][:, -1].sum(), x)
    return [lag for lag in range(length) if dx[0, length - 1 - lag].abs().sum() > 0]


@pytest.mark.parametrize("kind", ["depthwise", "separable", "dense"])
@pytest.mark.parametrize(
    ("width", "growth", "n_levels", "per_level", "field"),
    [(3, 2, 3, 1, 15), (4, 4, 3, 1, 64), (17, 4, 2, 1, 81), (3, 1, 4, 1, 9), (3, 3, 2, 2, 17), (1, 1, 2, 1, 1)],
)
def test_the_receptive_field_is_what_the_sizes_say(
    width: int, growth: int, n_levels: int, per_level: int, field: int, kind: str
) -> None:
    torch.manual_seed(0)
    made = TemporalConvolution(
        4, width=width, growth=growth, n_levels=n_levels, per_level=per_level, kind=kind
    ).double()  # fmt: skip
    assert made.receptive_field == field
    assert lags(made, field + 20) == list(range(field))  # every lag below it, and none beyond


def test_taps_that_stand_farther_apart_than_they_are_many_leave_holes() -> None:
    with pytest.warns(UserWarning, match="some lags are reached by no path; width >= growth leaves no holes"):
        made = TemporalConvolution(4, width=2, growth=3, n_levels=3).double()
    assert lags(made, 40) == [0, 1, 3, 4, 9, 10, 12, 13]  # sums of 1, 3 and 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TemporalConvolution(4, width=2, growth=3, n_levels=1)
    with pytest.raises(ValueError, match="conv_size must be at least growth = 5, or no path of taps reaches some lags"):
        zoo.create_model("tcnca", conv_size=3, growth=5)


def test_a_stack_reaches_as_far_as_its_layers_together() -> None:
    """At most L (R - 1 + c - 1) = 2 (14 + 7) tokens; exactly, where chunks begin decides."""
    torch.manual_seed(0)
    fields = SMALL | TCN | {"d_model": 16, "n_layers": 2, "vocab_size": 11, "hidden_size": 0, "init_std": 0.3}
    model = zoo.create_model("tcnca", **fields).double()
    x = torch.randn(1, 64, 16, dtype=torch.float64, requires_grad=True)
    y, _ = model.blocks(x)
    for t in range(48, 56):
        (dx,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        first = int((dx[0].abs().sum(-1) > 0).nonzero()[0])
        # each layer reaches the beginning of the chunk, and R - 1 = 14 tokens before it: 48 - 14 = 34, 32 - 14 = 18
        assert first == 18
        assert t - first <= 2 * (14 + 7)


def test_the_first_token_of_a_chunk_sees_itself() -> None:
    torch.manual_seed(0)
    layer = ChunkedAttention(4, chunk_size=5).double()
    q, k, v = (torch.randn(1, 13, n, dtype=torch.float64) for n in (4, 4, 3))
    o, state = layer(q, k, v)
    for first in (0, 5, 10):
        assert_close(o[:, first], v[:, first])
    assert state.filled.tolist() == [3]
    assert torch.equal(state.v[:, :3], v[:, 10:])
    assert not state.v[:, 3:].any()


@pytest.mark.parametrize("kind", [Mega, TCNCA])
@pytest.mark.parametrize("gradients", [True, False])
def test_steps_over_three_borders_of_chunks_equal_one_pass(kind: type, gradients: bool) -> None:
    layer = made(kind)
    x = torch.randn(3, 30, D, dtype=torch.float64)
    whole, last = layer(x)
    state, outputs = layer.init_state(3), []
    with torch.set_grad_enabled(gradients):
        for token in x.split(1, dim=1):
            y, state = layer(token, state)
            outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-10, atol=1e-10)
    assert_close(state, last, rtol=1e-10, atol=1e-10)


def test_rows_that_stand_at_different_places_of_a_chunk_go_on_alone() -> None:
    """One call for rows with 0, 3 and 7 tokens in their chunks, of 20 tokens each and then of one."""
    layer = made(Mega)
    x = torch.randn(3, 28, D, dtype=torch.float64)
    states, rows = [], []
    for row, begun in zip(x.split(1), (0, 3, 7), strict=True):
        states.append(layer(row[:, :begun], layer.init_state(1))[1] if begun else layer.init_state(1))
        rows.append(row[:, begun : begun + 21])
    joined = zoo.layers.state.join(states)
    y, after = layer(torch.cat(rows)[:, :20], joined)
    z, _ = layer(torch.cat(rows)[:, 20:], after)
    for i, (row, begun) in enumerate(zip(x.split(1), (0, 3, 7), strict=True)):
        exact, _ = layer(row[:, : begun + 21])
        assert_close(torch.cat([y, z], dim=1)[i], exact[0, begun:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"d_key": 5}, "d_key must be even and at least 2; got 5"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"weights": "sigmoid"}, "weights must be one of softmax, laplace, relu2, and bias one of rotary, simple"),
        ({"bias": "alibi"}, "got 'softmax' and 'alibi'"),
        ({"d_value": 0}, "d_value must be at least 1; got 0"),
    ],
)
def test_refusals(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mega(D, **(SMALL | fields))


def test_a_network_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of depthwise, separable, dense; got 'sparse'"):
        TCNCA(D, convolution="sparse")
    with pytest.raises(ValueError, match="sizes must be at least 1; got"):
        TCNCA(D, n_levels=0)


def test_parameters_of_a_layer_are_those_of_the_official_code() -> None:
    """The counts that arXiv 2209.10655's code has at EnWik8's sizes, part by part."""
    layer = Mega(512, d_key=128, d_value=1024, chunk_size=2048)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in layer.named_children()}
    assert counts == {
        "norm": 1_024, "move": 33_280, "v_proj": 525_312, "mx_proj": 1_116_288, "h_proj": 524_800, "attention": 256,
        "dropout": 0,
    }  # fmt: skip
    assert layer.gamma.numel() + layer.beta.numel() == 512
    network = TCNCA(512, d_key=128, d_value=1024).move
    assert sum(p.numel() for p in network.parameters()) == 36_864 + 512


def test_dropout_drops_in_training_alone() -> None:
    layer, x = made(Mega, dropout=0.5), torch.randn(2, 20, D, dtype=torch.float64)
    torch.manual_seed(0)
    dropped = layer(x)[0]
    assert not torch.allclose(dropped, layer(x)[0])
    torch.manual_seed(0)
    assert torch.equal(dropped, layer(x)[0])
    whole = layer.eval()(x)[0]
    assert torch.equal(whole, layer(x)[0])
