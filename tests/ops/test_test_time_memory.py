"""Memories that learn at test time: autograd as the oracle, the rules that they contain, and what their maps do."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from zoo import ops
from zoo.ops import (
    DotProductLoss,
    ElasticRetention,
    GatedMLPMemory,
    HuberLoss,
    KLLoss,
    L2Loss,
    LpLoss,
    LqRetention,
    MatrixMemory,
    MemoryRule,
    MemoryState,
    MirrorRetention,
    MLPMemory,
    Momentum,
    Muon,
    RowNormRetention,
    SoftmaxRetention,
    WeightDecay,
    delta_rule,
    first_state,
    gated_linear_attention,
)
from zoo.ops.core.spec import parity
from zoo.ops.core.table import OPERATORS

memory = ops.test_time_memory  # by a name that pytest does not take for a test's
B, H, D = 2, 2, 12
PLAIN = MatrixMemory(residual=False, norm=False)
MLP = MLPMemory(expansion=2)
LOSSES = {
    "l2": L2Loss(),
    "l3": LpLoss(3),
    "l1.5": LpLoss(1.5),
    "huber": HuberLoss(),
    "huber by coordinate": HuberLoss("coordinate"),
    "huber by switch": HuberLoss("switch"),
    "dot": DotProductLoss(),
    "kl": KLLoss(),
}
MEMORIES = {
    "matrix": PLAIN,
    "matrix, norm, bias": MatrixMemory(bias=True),
    "mlp": MLP,
    "mlp, bias": MLPMemory(expansion=1.5, bias=True),
    "gated mlp": GatedMLPMemory(expansion=2, residual=False, norm=False),
    "gated mlp, norm": GatedMLPMemory(expansion=1),
}
RETENTIONS = {
    "decay": WeightDecay(),
    "l4": LqRetention(4),
    "l2.5": LqRetention(2.5),
    "mirror": MirrorRetention(4),
    "elastic": ElasticRetention(1e-2),
    "softmax": SoftmaxRetention(),
    "row norms": RowNormRetention(),
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gates_of(rule: MemoryRule, T: int, rows: int = B) -> dict[str, Tensor]:
    made = {"eta": 0.1 * randn(rows, T, H, seed=4).sigmoid(), "g": F.logsigmoid(randn(rows, T, H, seed=5) + 5)}
    if rule.algorithm.momentum:
        made["theta"] = F.logsigmoid(randn(rows, T, H, seed=6))
    if rule.loss.thresholded:
        made["delta"] = 1 + randn(rows, T, H, seed=7).abs()
    return made


def inputs_of(rule: MemoryRule, T: int, rows: int = B) -> dict[str, Tensor]:
    q, k = (F.normalize(randn(rows, T, H, D, seed=i), dim=-1) for i in (1, 2))
    made = {"q": q, "k": k, "v": randn(rows, T, H, D, seed=3), **gates_of(rule, T, rows)}
    if rule.memory.norm:
        made |= {"gain": 1 + 0.1 * randn(H, D, seed=8), "offset": 0.1 * randn(H, D, seed=9)}
    return made


def start_of(rule: MemoryRule) -> tuple[Tensor, ...]:
    """Learnt accumulators (H, out, in): weights of about 1 over the root of the inputs, or log weights."""
    shapes = rule.memory.shapes(D, D)
    made = (randn(H, *shape, seed=20 + i) for i, shape in enumerate(shapes))
    if isinstance(rule.retention, SoftmaxRetention):
        return tuple(made)
    return tuple(rule.retention.start(x * x.shape[-1] ** -0.5) for x in made)


def leaves_of(rule: MemoryRule, T: int) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    given = {name: x.requires_grad_() for name, x in inputs_of(rule, T).items()}
    return given, tuple(x.requires_grad_() for x in start_of(rule))


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


# -- what the maps do --------------------------------------------------------------------------------------------------


def test_the_map_of_moneta_is_an_inversion_at_q_4() -> None:
    """Twice gives back, half is double, and the start exposes the learnt weights."""
    gate, A = LqRetention(4), randn(2, H, 8, 5, seed=1)
    W = gate.weights(A)
    assert_close(gate.weights(W), A, rtol=0, atol=1e-14)
    assert_close(gate.weights(A / 2), 2 * W, rtol=0, atol=1e-14)
    assert_close(LqRetention(2.5).weights(3 * A), 3**0.5 * LqRetention(2.5).weights(A))  # of degree 3 - q
    for q in (2, 2.5, 4, 5):
        assert_close(LqRetention(q).weights(LqRetention(q).start(A)), A, rtol=0, atol=1e-12)
    assert LqRetention(4).weights(torch.zeros(3, 3)).isfinite().all()


def test_the_mirror_map_is_linear_at_2_and_its_start_is_its_inverse() -> None:
    A = randn(2, H, 8, 5, seed=1)
    assert_close(MirrorRetention(2).weights(A), A, rtol=0, atol=1e-14)
    gate = MirrorRetention(3, eps=1e-20)
    assert_close(gate.weights(gate.start(A)), A, rtol=1e-9, atol=1e-9)
    assert_close(gate.weights(2 * A), 2 * gate.weights(A), rtol=1e-9, atol=1e-9)


def test_weights_of_memora_stay_on_the_simplex() -> None:
    """And the sum of frozen gradients in log space is the nested softmax of logarithms."""
    gate = SoftmaxRetention(scale=3.0)
    L, steps, keep = randn(H, 6, 5, seed=1), randn(9, H, 6, 5, seed=2), 0.9
    W = gate.weights(L)
    for step in steps:
        L = keep * L - step
        W = 3 * torch.softmax(keep * (W / 3).log() - step, dim=-1)
    assert_close(gate.weights(L), W, rtol=0, atol=1e-14)
    assert (W > 0).all()
    assert_close(W.sum(-1), torch.full((H, 6), 3.0, dtype=torch.float64))
    assert_close(gate.weights(gate.start(W)), W)


def test_the_elastic_net_makes_zeros() -> None:
    rule = MemoryRule(memory=PLAIN, retention=ElasticRetention(0.05), chunk_size=4)
    _, last = memory(**inputs_of(rule, 24), rule=rule)
    share = (last.weights[0] == 0).double().mean()
    assert 0.05 < share < 0.95
    plain = dataclasses.replace(rule, retention=WeightDecay())
    assert (memory(**inputs_of(rule, 24), rule=plain)[1].weights[0] != 0).all()


def test_rows_keep_their_lengths_and_muon_brings_singular_values_near_one() -> None:
    inner = GatedMLPMemory(expansion=2, residual=False, norm=False)
    rule = MemoryRule(memory=inner, loss=DotProductLoss(), retention=RowNormRetention(), reads="chunk", chunk_size=4)
    start = start_of(rule)
    _, last = memory(**inputs_of(rule, 24), state=first_state(rule, start, B, D, D), rule=rule)
    for before, after in zip(start, last.weights, strict=True):
        assert_close(after.norm(dim=-1), before.norm(dim=-1).expand(B, *before.shape[:2]), rtol=1e-4, atol=0)
        assert (after - before).norm() > 0.01 * before.norm()
    values = torch.linalg.svdvals(Muon().update(randn(3, 20, 12, seed=1)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_gradient_of_huber_is_never_longer_than_its_threshold() -> None:
    y, v, delta = randn(50, D, seed=1), 5 * randn(50, D, seed=2), randn(50, 1, seed=3).abs() + 0.1
    assert (HuberLoss().gradient(y, v, delta).norm(dim=-1, keepdim=True) <= delta * (1 + 1e-12)).all()
    assert (HuberLoss("switch").gradient(y, v, delta).norm(dim=-1, keepdim=True) > delta).any()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_value(name: str) -> None:
    loss, y, v = LOSSES[name], randn(50, D, seed=1).requires_grad_(), randn(50, D, seed=2)
    delta = 2 + 2 * randn(50, 1, seed=3).abs()
    (want,) = torch.autograd.grad(loss.value(y, v, delta).sum(), y)
    assert_close(loss.gradient(y, v, delta), want, rtol=0, atol=1e-12)


# -- chunks ------------------------------------------------------------------------------------------------------------


RULES = {
    "yaad": MemoryRule(memory=MLP, loss=HuberLoss(), chunk_size=5),
    "moneta": MemoryRule(memory=MLP, loss=LpLoss(3), retention=LqRetention(4), chunk_size=5),
    "moneta, exact": MemoryRule(memory=MLP, loss=LpLoss(3), retention=LqRetention(4), reads="exact", chunk_size=5),
    "memora": MemoryRule(
        memory=MLPMemory(expansion=2, norm_eps=1e-2), retention=SoftmaxRetention(), reads="chunk", chunk_size=5
    ),
    "titans": MemoryRule(memory=MLP, algorithm=Momentum(), chunk_size=5),
    "lact": MemoryRule(
        memory=GatedMLPMemory(residual=False, norm=False),
        loss=DotProductLoss(), retention=RowNormRetention(), algorithm=Muon(), reads="chunk", chunk_size=5,
    ),
}  # fmt: skip


def parts(given: dict[str, Tensor], cut: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: x if name in ("gain", "offset") else cut(x) for name, x in given.items()}


@pytest.mark.parametrize("name", RULES)
def test_token_by_token_equals_the_whole_at_every_length(name: str) -> None:
    """Every prefix, ragged tails too: outputs, and the state behind it."""
    rule, T = RULES[name], 13
    given, start = inputs_of(rule, T), start_of(rule)
    state = first = first_state(rule, start, B, D, D)
    for t in range(T):
        y, state = memory(**parts(given, lambda x, t=t: x[:, t : t + 1]), state=state, rule=rule)
        want, after = memory(**parts(given, lambda x, t=t: x[:, : t + 1]), state=first, rule=rule)
        assert_close(y[:, 0], want[:, t], rtol=0, atol=1e-11)
        for a, b in zip(torch.utils._pytree.tree_leaves(state), torch.utils._pytree.tree_leaves(after), strict=True):
            assert_close(a, b, rtol=0, atol=1e-11)
        assert state.filled.tolist() == [(t + 1) % 5] * B


@pytest.mark.parametrize("name", RULES)
def test_rows_that_stand_at_different_places_of_their_chunks(name: str) -> None:
    rule = RULES[name]
    given, start = inputs_of(rule, 17), start_of(rule)
    begun = [memory(**parts(given, lambda x, n=n: x[:1, :n]), state=first_state(rule, start, 1, D, D), rule=rule)[1]
             for n in (1, 4, 10)]  # fmt: skip
    leaves = [torch.utils._pytree.tree_flatten(s) for s in begun]
    joined = torch.utils._pytree.tree_unflatten(
        [torch.cat(x) for x in zip(*(x for x, _ in leaves), strict=True)], leaves[0][1]
    )
    more = inputs_of(rule, 8, rows=3)
    y, last = memory(**more, state=joined, rule=rule)
    for i, state in enumerate(begun):
        want, after = memory(**parts(more, lambda x, i=i: x[i : i + 1]), state=state, rule=rule)
        assert_close(y[i : i + 1], want, rtol=0, atol=1e-11)
        assert torch.equal(last.filled[i : i + 1], after.filled)
        assert_close(last.chunk[i : i + 1], after.chunk)
        for a, b in zip(last.weights, after.weights, strict=True):
            assert_close(a[i : i + 1], b, rtol=0, atol=1e-11)


def test_the_chunk_is_part_of_the_model() -> None:
    rule = MemoryRule(memory=MLP, chunk_size=4)
    given, start = inputs_of(rule, 24), start_of(rule)
    ys = [
        memory(**given, state=first_state(one, start, B, D, D), rule=one)[0]
        for one in (rule, dataclasses.replace(rule, chunk_size=8))
    ]
    assert_close(ys[0][:, :4], ys[1][:, :4])
    assert (ys[0] - ys[1])[:, 4:].abs().max() > 1e-3


def test_every_sequence_has_weights_of_its_own() -> None:
    rule = MemoryRule(memory=MLP, chunk_size=4)
    given, start = inputs_of(rule, 12), start_of(rule)
    state = first_state(rule, start, B, D, D)
    y, _ = memory(**given, state=state, rule=rule)
    other = given | {"v": torch.cat([given["v"][:1], -given["v"][1:]])}
    assert torch.equal(memory(**other, state=state, rule=rule)[0][0], y[0])
    assert (memory(**other, state=state, rule=rule)[0][1] - y[1]).abs().max() > 1e-2


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"delta": None}, "this rule reads the gate delta; got None, pass delta"),
        ({"theta": torch.zeros(B, 6, H).double()}, "theta must be left out where nothing reads it"),
        (
            {"v": torch.zeros(B, 6, H, 5).double(), "gain": None, "offset": None},
            "so K and V must agree; got K = 12 and V = 5, use a memory with residual=False",
        ),
    ],
)  # fmt: skip
def test_refusals(change: dict[str, Tensor | None], words: str) -> None:
    rule = RULES["yaad"]
    with pytest.raises(ValueError, match=words):
        memory(**(inputs_of(rule, 6) | change), rule=rule)


def test_states_of_another_rule_are_refused() -> None:
    rule = RULES["yaad"]
    given = inputs_of(rule, 6)
    state = first_state(rule, start_of(rule), B, D, D)
    one = state._replace(weights=state.weights[:1])
    with pytest.raises(
        ValueError, match="has 2 matrices and 0 running sums; got 1 and 0, pass a state of the same rule"
    ):
        memory(**given, state=one, rule=rule)
    with pytest.raises(ValueError, match=r"filled must be \(n,\) int64 with n = 2; got \(2,\) torch.float32"):
        memory(**given, state=state._replace(filled=state.filled.float()), rule=rule)
    with pytest.raises(ValueError, match="gain and offset belong to the memory's norm; got a memory without a norm"):
        memory(**given, rule=dataclasses.replace(rule, memory=MLPMemory(norm=False)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: MemoryRule(chunk_size=0), lambda: MemoryRule(reads="never"), lambda: LpLoss(0.5),
        lambda: HuberLoss("vague"), lambda: LqRetention(1), lambda: MirrorRetention(0.5), lambda: Muon(0),
        lambda: SoftmaxRetention(0.0), lambda: ElasticRetention(-1),
    ],
)  # fmt: skip
def test_choices_have_ranges(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must be .*got"):
        build()


def test_free_slots_of_a_chunk_mean_nothing() -> None:
    rule = RULES["yaad"]
    given = inputs_of(rule, 6)
    _, state = memory(**given, state=first_state(rule, start_of(rule), B, D, D), rule=rule)
    assert state.filled.tolist() == [1, 1]
    dirty = MemoryState(state.weights, state.momentum, state.chunk.clone(), state.filled)
    dirty.chunk[:, :, 1:] = 7.0
    for a, b in itertools.zip_longest(*(memory(**given, state=s, rule=rule)[0] for s in (state, dirty))):
        assert torch.equal(a, b)


@pytest.mark.everything
@pytest.mark.parametrize("name", [name for name in OPERATORS if name.startswith("test_time_memory")])
def test_float32_gradients_are_as_exact_as_the_loops_on_average(name: str) -> None:
    """One ratio is chance, for memories magnify rounding; the mean over seeds, inputs and gates is not."""
    spec, logs = OPERATORS[name], []
    for seed in range(2):
        given = spec.inputs(2, 200, seed=seed)
        for inputs in (given, spec.extremes["no decay"](given)):
            ours, loop = (parity(spec, inputs, backend=form, dtype=torch.float32) for form in ("torch", "reference"))
            logs += [math.log(ours[key] / loop[key]) for key in ours if key.startswith("d ") and loop[key] > 1e-8]
    assert math.exp(statistics.mean(logs)) < 1.0
