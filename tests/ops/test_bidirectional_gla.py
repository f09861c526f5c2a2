"""Bidirectional gated linear attention: two scans, a mirror, and a closed form in matrices."""

import torch
from torch import Tensor
from torch.testing import assert_close

from zoo.ops import bidirectional_gla, gated_linear_attention
from zoo.ops.core.table import OPERATORS

SPEC = OPERATORS["bidirectional_gla"]


def given(length: int = 70, seed: int = 0) -> dict[str, Tensor]:
    return {name: x.requires_grad_() for name, x in SPEC.inputs(2, length, seed=seed).items()}


def two_scans(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    left = gated_linear_attention(q, k, v, g[:, :, 0], backend="reference")[0]
    right = gated_linear_attention(*(x.flip(1) for x in (q, k, v, g[:, :, 1])), backend="reference")[0].flip(1)
    return (left + right) / 2


def closed(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The published parallel form: a T x T matrix of scores for each side, from sums of log decays."""
    T = q.shape[1]
    left, right = g[:, :, 0].cumsum(1), g[:, :, 1].flip(1).cumsum(1).flip(1)

    def scores(c: Tensor, seen: Tensor) -> Tensor:
        decay = (
            (c.unsqueeze(2) - c.unsqueeze(1)).masked_fill(~seen[..., None, None], -torch.inf).exp()
        )  # (B, t, s, H, K)
        return torch.einsum("bthk,bshk,btshk->bhts", q, k, decay)

    below = torch.ones(T, T, dtype=torch.bool).tril()
    A = scores(left, below) + scores(right, below.mT)
    return torch.einsum("bhts,bshv->bthv", A, v) * q.shape[-1] ** -0.5 / 2


def test_it_equals_two_separate_scans_and_the_closed_form() -> None:
    ours = given()
    outputs = [form(**ours) for form in (bidirectional_gla, two_scans, closed)]
    weight = torch.randn(outputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((y * weight).sum(), list(ours.values())) for y in outputs]
    for other in (1, 2):
        assert_close(outputs[0], outputs[other], rtol=1e-11, atol=1e-12)
        assert_close(gradients[0], gradients[other], rtol=1e-10, atol=1e-11)


def test_a_mirrored_sequence_with_swapped_gates_has_mirrored_outputs() -> None:
    ours = given(33)
    mirrored = {name: x.flip(1) for name, x in ours.items()}
    mirrored["g"] = mirrored["g"].flip(2)
    assert_close(bidirectional_gla(**mirrored).flip(1), bidirectional_gla(**ours), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(
        bidirectional_gla(**{**mirrored, "g": ours["g"].flip(1)}).flip(1), bidirectional_gla(**ours)
    )
