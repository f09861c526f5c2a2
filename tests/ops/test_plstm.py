"""pLSTM on a line beyond what every operator proves: what it is to gated linear attention, signs, long products."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from zoo.ops import gated_linear_attention, plstm
from zoo.ops.core.table import OPERATORS
from zoo.ops.linear_attention.plstm.chunked import between

SPEC = OPERATORS["plstm"]


def by_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence by another operator: accumulated signs go into q, k and the state, queries read one step later.

    With s_t = sign(T_1) ... sign(T_t) and C_t = s_t C'_t, C' decays by |T|: a gated linear attention that writes
    s_t S_t k_t. Token t reads C_{t-1}, so that its query stands one step earlier, behind a step for the state.
    """
    signs = transition.sign().cumprod(1)
    first = torch.ones_like(signs[:, :1])
    queries = q * (mark * torch.cat([first, signs[:, :-1]], dim=1)).unsqueeze(-1)
    keys = k * (source * signs).unsqueeze(-1)
    g = transition.abs().log().unsqueeze(-1).expand(k.shape)
    nothing = torch.zeros_like(k[:, :1])
    o, last = gated_linear_attention(
        torch.cat([queries, nothing], dim=1),
        torch.cat([nothing, keys], dim=1),
        F.pad(v, (0, 0, 0, 0, 1, 0)),
        torch.cat([nothing, g], dim=1),
        state,
    )
    own = (direct * (q * k).sum(-1)).unsqueeze(-1) * v * q.shape[-1] ** -0.5
    return o[:, :-1] + own, last * signs[:, -1, :, None, None]


def test_signs_and_a_shift_make_it_gated_linear_attention() -> None:
    """To 1e-12 in float64 against the loop, gradients too where no transition is near 0."""
    inputs = SPEC.inputs(2, 77)
    inputs["transition"] = inputs["transition"].sign() * (0.1 + 0.9 * inputs["transition"].abs())
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    exact = plstm(**leaves, backend="reference")
    ours = by_gated_linear_attention(**leaves)
    cotangents = [torch.randn_like(x) for x in exact]
    for a, b in zip(ours, exact, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(x, list(leaves.values()), cotangents) for x in (ours, exact))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_mark_that_reads_the_new_state_is_gated_linear_attention() -> None:
    inputs = SPEC.inputs(2, 50)
    inputs["transition"] = inputs["transition"].abs()
    inputs |= {"mark": inputs["transition"], "direct": inputs["source"]}
    ours, ours_last = plstm(**inputs)
    k = inputs["k"] * inputs["source"].unsqueeze(-1)
    g = inputs["transition"].log().unsqueeze(-1).expand(k.shape)
    exact, last = gated_linear_attention(inputs["q"], k, inputs["v"], g, inputs["state"], backend="reference")
    assert_close(ours, exact, rtol=1e-11, atol=1e-12)
    assert_close(ours_last, last, rtol=1e-11, atol=1e-12)


def test_the_mark_does_not_see_its_own_token() -> None:
    inputs = SPEC.inputs(1, 20)
    inputs["direct"] = inputs["direct"] * 0
    before, _ = plstm(**inputs)
    inputs["k"][:, 10], inputs["v"][:, 10] = 7.0, -3.0
    after, _ = plstm(**inputs)
    assert torch.equal(after[:, :11], before[:, :11])
    assert not torch.allclose(after[:, 11], before[:, 11])


def test_weights_between_nodes_are_the_products_of_what_lies_between() -> None:
    T = torch.tensor([[0.5, -2.0, 0.0, 3.0]], dtype=torch.float64)
    W = between(T)[0]
    for i in range(6):
        for j in range(6):
            expected = T[0, j:i - 1].prod() if j < i else torch.tensor(0.0, dtype=torch.float64)  # fmt: skip
            assert W[i, j] == expected, (i, j)


def test_a_parity_is_kept_over_many_chunks() -> None:
    """One head counts ones modulo 2, exactly: its transition is -1 at a one."""
    bits = torch.randint(0, 2, (1, 1000, 1), generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, 1000, 1, 1)
    gate = torch.zeros(1, 1000, 1)
    o, last = plstm(one, one, one, gate, 1.0 - 2.0 * bits, gate + 1, gate, torch.ones(1, 1, 1, 1), scale=1.0)
    assert torch.equal(o[0, 1:, 0, 0], 1.0 - 2.0 * (bits[0, :-1, 0].cumsum(0) % 2))
    assert last.item() == 1 - 2 * (bits.sum().item() % 2)
