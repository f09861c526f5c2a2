"""Memories that learn at test time: autograd as the oracle, the rules that they contain, and what their maps do."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from memory_cases import (
    LOSSES,
    MEMORIES,
    MLP,
    PLAIN,
    RETENTIONS,
    B,
    D,
    H,
    inputs_of,
    leaves_of,
    memory,
    randn,
    start_of,
)
from torch import Tensor
from torch.testing import assert_close

from zoo import ops
from zoo.ops import (
    DotProductLoss,
    GatedMLPMemory,
    HuberLoss,
    L2Loss,
    LpLoss,
    LqRetention,
    MatrixMemory,
    MemoryRule,
    MLPMemory,
    Momentum,
    Muon,
    RowNormRetention,
    delta_rule,
    first_state,
    gated_linear_attention,
)


def oracle(rule: MemoryRule, start: Sequence[Tensor], T: int, **given: Tensor) -> Tensor:
    """Every token's weights, formed, from gradients that autograd takes token by token and head by head.

    It shares with the operator's reference the value of the loss and the network, and not the loop.
    """
    learnt = [
        [torch.stack([given[name][h] for name in ("gain", "offset")]) if "gain" in given else None for h in range(H)]
    ][0]
    rows = []
    for b in range(B):
        outputs = []
        for h in range(H):
            norm = ops.memories.test_time_memory.Norm(*((None, None) if learnt[h] is None else learnt[h]))
            gate = {name: given[name][b, :, h] for name in rule.gates}
            A0 = [x[h] for x in start]
            S0 = [torch.zeros_like(x) for x in A0]
            ys = []
            for first in range(0, T, rule.chunk_size):
                tokens = range(first, min(first + rule.chunk_size, T))
                W = [rule.retention.weights(x) for x in A0]

                def inner(W: Sequence[Tensor], i: int, b: int = b, h: int = h, norm=norm, gate=gate) -> Tensor:  # type: ignore[no-untyped-def]
                    delta = gate["delta"][i : i + 1] if "delta" in gate else None
                    return rule.loss.value(rule.memory(W, given["k"][b, i, h], norm), given["v"][b, i, h], delta)

                gradients = {i: torch.autograd.grad(inner(W, i), W, create_graph=True) for i in tokens}

                def behind(l: int, t: int, first: int = first, A0=A0, S0=S0, gate=gate, gradients=gradients):  # type: ignore[no-untyped-def]
                    """Sums over the tokens of the chunk, each with its own product of gates."""
                    A = gate["g"][first : t + 1].sum().exp() * A0[l]
                    S = torch.zeros_like(A)
                    if rule.algorithm.momentum:
                        for j in range(first, t + 1):
                            S = gate["theta"][first : j + 1].sum().exp() * S0[l]
                            for i in range(first, j + 1):
                                S = S - gate["theta"][i + 1 : j + 1].sum().exp() * gate["eta"][i] * gradients[i][l]
                            A = A + gate["g"][j + 1 : t + 1].sum().exp() * S
                        return A, S
                    total = torch.zeros_like(A)
                    for i in range(first, t + 1):
                        total = total + gate["g"][i + 1 : t + 1].sum().exp() * gate["eta"][i] * gradients[i][l]
                    return A, total

                for t in tokens:
                    if rule.reads == "chunk":
                        read = W
                    else:
                        sums = [behind(l, t) for l in range(len(A0))]
                        A = [a if rule.algorithm.momentum else a - s for a, s in sums]
                        factors = [rule.retention.factor(x) for x in A0] if rule.retention.linear else []
                        if rule.reads == "exact":
                            read = [rule.retention.weights(x) for x in A]
                        else:
                            read = [x if f is None else f * x for f, x in zip(factors, A, strict=True)]
                    ys.append(rule.memory(read, given["q"][b, t, h], norm))
                sums = [behind(l, tokens[-1]) for l in range(len(A0))]
                if rule.algorithm.momentum:
                    S0 = [s for _, s in sums]
                    ends = [a for a, _ in sums]
                else:
                    ends = [a - rule.algorithm.update(s) for a, s in sums]
                A0 = [rule.retention.border(x, y) for x, y in zip(A0, ends, strict=True)]
            outputs.append(torch.stack(ys))
        rows.append(torch.stack(outputs, dim=1))
    return torch.stack(rows)


def same_as_the_oracle(rule: MemoryRule, T: int = 14, tolerance: float = 1e-12) -> None:
    """Outputs, and gradients of all inputs and of the start, of both forms: relative to the largest number of each."""
    given, start = leaves_of(rule, T)
    leaves = [*given.values(), *start]
    want = oracle(rule, start, T, **given)
    upstream = randn(*want.shape, seed=30)
    exact = [want, *torch.autograd.grad(want, leaves, upstream, allow_unused=True, materialize_grads=True)]
    for backend in ("torch", "reference"):
        y, _ = memory(**given, state=first_state(rule, start, B, D, D), rule=rule, backend=backend)
        ours = [y, *torch.autograd.grad(y, leaves, upstream, allow_unused=True, materialize_grads=True)]
        for name, a, b in zip(("output", *given, *(f"start {i}" for i in range(len(start)))), ours, exact, strict=True):
            error = (a - b).abs().max() / b.abs().max().clamp_min(1e-3)
            assert error < tolerance, (backend, name, error.item())


@pytest.mark.parametrize("algorithm", ["descent", "momentum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_equals_autograd(loss: str, algorithm: str) -> None:
    """In this regime: 14 tokens in chunks of 5, unit keys of 12, steps below 0.1, decays of about 1/150."""
    rule = MemoryRule(memory=MLP, loss=LOSSES[loss], chunk_size=5)
    same_as_the_oracle(dataclasses.replace(rule, algorithm=Momentum()) if algorithm == "momentum" else rule)


@pytest.mark.parametrize("kind", MEMORIES)
def test_every_memory_equals_autograd(kind: str) -> None:
    same_as_the_oracle(MemoryRule(memory=MEMORIES[kind], chunk_size=4))


@pytest.mark.parametrize("reads", ["token", "exact", "chunk"])
@pytest.mark.parametrize("retention", RETENTIONS)
def test_every_retention_equals_autograd(retention: str, reads: str) -> None:
    gate = RETENTIONS[retention]
    if reads == "token" and not gate.linear:
        with pytest.raises(ValueError, match="no sum of rank-one updates; got reads='token', use 'chunk' or 'exact'"):
            MemoryRule(retention=gate)
        return
    eps = 1e-2 if retention == "softmax" else 1e-6
    inner = MLPMemory(expansion=2, norm_eps=eps)
    same_as_the_oracle(MemoryRule(memory=inner, retention=gate, reads=reads, chunk_size=5))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, "narrow"), (0.5, "wide")], ids=lambda shape: shape[1])
def test_muon_equals_autograd(shape: tuple[float, str]) -> None:
    inner = GatedMLPMemory(expansion=shape[0], residual=False, norm=False)
    rule = MemoryRule(
        memory=inner, loss=DotProductLoss(), retention=RowNormRetention(), algorithm=Muon(), reads="chunk", chunk_size=5
    )
    same_as_the_oracle(rule)
    with pytest.raises(ValueError, match="changes the sum of a whole chunk; got reads='token', use 'chunk'"):
        dataclasses.replace(rule, reads="token")


def test_the_oracle_sees_a_gradient_without_its_second_order() -> None:
    """The negative control: inner gradients that are constants give the same outputs and other outer gradients."""
    rule = MemoryRule(memory=MLP, chunk_size=5)
    given, start = leaves_of(rule, 14)

    @dataclasses.dataclass(frozen=True)
    class Constant(L2Loss):
        def gradient(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
            return (y - v).detach()

    ys = [
        memory(**given, state=first_state(rule, start, B, D, D), rule=dataclasses.replace(rule, loss=loss))[0]
        for loss in (L2Loss(), Constant())
    ]
    assert torch.equal(*ys)
    a, b = (torch.autograd.grad(y.sum(), given["k"])[0] for y in ys)
    assert (a - b).norm() > 1e-2 * a.norm()


# -- rules that it contains ------------------------------------------------------------------------------------------


def matrices(S: Tensor) -> tuple[Tensor, ...]:
    """The state of linear attention (B, H, K, V) as that of a matrix memory (B, H, V, K)."""
    return (S.mT,)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("decays", [False, True])
def test_a_matrix_with_squares_and_chunks_of_one_is_the_gated_delta_rule(backend: str, decays: bool) -> None:
    """Miras takes the gradient before the decay a, the delta rule behind it: its beta is eta / a, its value a v."""
    rule = MemoryRule(memory=PLAIN, chunk_size=1)
    given = inputs_of(rule, 40)
    given["g"] = given["g"] * decays
    S = randn(B, H, D, D, seed=10)
    blank = first_state(rule, (torch.zeros(H, D, D, dtype=torch.float64),), B, D, D)
    y, last = memory(**given, state=blank._replace(weights=matrices(S)), rule=rule, backend=backend)
    a = given["g"].exp()
    v, beta = a.unsqueeze(-1) * given["v"], given["eta"] / a
    want, S_last = delta_rule(given["q"], given["k"], v, beta, given["g"], S, scale=1.0)
    assert_close(y, want, rtol=0, atol=1e-12)
    assert_close(last.weights[0], S_last.mT, rtol=0, atol=1e-12)
    plain, _ = delta_rule(given["q"], given["k"], given["v"], given["eta"], given["g"], S, scale=1.0)
    assert ((y - plain).abs().max() > 1e-3) == decays  # the two orders are two rules


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_matrix_with_the_dot_product_is_gated_linear_attention(size: int) -> None:
    """Whatever the chunk is: the gradient does not depend on the weights."""
    rule = MemoryRule(memory=PLAIN, loss=DotProductLoss(), chunk_size=size)
    given = inputs_of(rule, 40)
    y, _ = memory(**given, rule=rule)
    q, k, v, eta, g = (given[name] for name in ("q", "k", "v", "eta", "g"))
    want, _ = gated_linear_attention(q, k, eta.unsqueeze(-1) * v, g.unsqueeze(-1).expand_as(k), scale=1.0)
    assert_close(y, want, rtol=0, atol=1e-12)


def test_one_chunk_is_linear_attention_of_gradients() -> None:
    rule = MemoryRule(memory=PLAIN, chunk_size=64)
    given = inputs_of(rule, 40)
    W = randn(H, D, D, seed=11)
    y, _ = memory(**given, state=first_state(rule, (W,), B, D, D), rule=rule)
    q, k, v, eta, g = (given[name] for name in ("q", "k", "v", "eta", "g"))
    residual = torch.einsum("hvk,bthk->bthv", W, k) - v
    S = W.mT.expand(B, H, D, D)
    want, _ = gated_linear_attention(q, k, -eta.unsqueeze(-1) * residual, g.unsqueeze(-1).expand_as(k), S, scale=1.0)
    assert_close(y, want, rtol=0, atol=1e-12)


def test_huber_without_a_threshold_is_squares_and_a_power_of_two_is_twice_them() -> None:
    rule = MemoryRule(memory=MLP, chunk_size=5)
    given, start = inputs_of(rule, 23), start_of(rule)
    state = first_state(rule, start, B, D, D)
    y, _ = memory(**given, state=state, rule=rule)
    far = torch.full_like(given["eta"], 1e6)
    wide = first_state(dataclasses.replace(rule, loss=HuberLoss()), start, B, D, D)
    for form in ("norm", "coordinate", "switch"):
        ours, _ = memory(**given, delta=far, state=wide, rule=dataclasses.replace(rule, loss=HuberLoss(form)))  # type: ignore[arg-type]
        assert_close(ours, y, rtol=0, atol=1e-12)
    half = given | {"eta": given["eta"] / 2}
    ours, _ = memory(**half, state=state, rule=dataclasses.replace(rule, loss=LpLoss(2)))
    assert_close(ours, y, rtol=0, atol=1e-12)


def test_moneta_at_q_2_is_titans_without_momentum() -> None:
    rule = MemoryRule(memory=MLP, loss=LpLoss(2), retention=LqRetention(2), chunk_size=5)
    given, start = inputs_of(rule, 23), start_of(rule)
    y, _ = memory(**given, state=first_state(rule, start, B, D, D), rule=rule)
    titans = MemoryRule(memory=MLP, algorithm=Momentum(), chunk_size=5)
    theta = torch.full_like(given["g"], -1e3)  # nothing of the running sum is left
    twice = given | {"eta": 2 * given["eta"]}
    want, _ = memory(**twice, theta=theta, state=first_state(titans, start, B, D, D), rule=titans)
    assert_close(y, want, rtol=0, atol=1e-12)


def test_ttt_linear_equals_the_public_form() -> None:
    """Of flash-linear-attention, whose step size belongs to the reader, so that one number alone is the same in both;
    it adds the memory's own output, and not the query, to the norm: weights and biases are compared."""
    naive = pytest.importorskip("fla.ops.ttt.naive", reason="needs flash-linear-attention; install the extra parity")
    rule = MemoryRule(memory=MatrixMemory(bias=True), chunk_size=16)
    given = {name: x.float() for name, x in inputs_of(rule, 48).items()}
    given |= {"eta": torch.full_like(given["eta"], 0.05), "g": torch.zeros_like(given["g"])}
    W = 0.3 * randn(H, D, D + 1, seed=11).float()
    _, last = memory(**given, state=first_state(rule, (W,), B, D, D), rule=rule)
    h, hb = (x.expand(B, *x.shape).contiguous() for x in (W[..., :-1].mT, W[..., -1:].mT))
    q, k, v = (given[name].transpose(1, 2).clone() for name in ("q", "k", "v"))
    eta = given["eta"].transpose(1, 2).unsqueeze(-1)
    _, h, hb = naive.ttt_linear(q, k, v, given["gain"], given["offset"], eta, 1.0, 1e-6, 16, h, hb, True)
    assert_close(last.weights[0][..., :-1], h.mT, rtol=1e-5, atol=1e-5)
    assert_close(last.weights[0][..., -1:], hb.mT, rtol=1e-5, atol=1e-5)
