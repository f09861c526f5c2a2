"""Attention against its definition: masks, windows, grouped heads, caches, packing."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from zoo.ops import attention
from zoo.ops.attention import sdpa


def inputs(B: int, T: int, S: int, H: int = 4, Hk: int = 2, K: int = 8, V: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H, K), (B, S, Hk, K), (B, S, Hk, V))
    return tuple(torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes)


def loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """One query at a time, in the words of the docstring."""
    B, T, H, K = q.shape
    S, groups = k.shape[1], H // k.shape[2]
    o = q.new_zeros(B, T, H, v.shape[-1])
    for t in range(T):
        here = S - T + t
        first = 0 if window is None else max(0, here - window + 1)
        for h in range(H):
            scores = (q[:, t, h, None] * k[:, first : here + 1, h // groups]).sum(-1) * K**-0.5
            o[:, t, h] = (scores.softmax(-1).unsqueeze(-1) * v[:, first : here + 1, h // groups]).sum(1)
    return o


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (7, 7), (5, 12)])
def test_both_backends_equal_a_loop(T: int, S: int, window: int | None) -> None:
    q, k, v = inputs(2, T, S)
    want = loop(q, k, v, window)
    assert_close(attention(q, k, v, window=window), want)
    assert_close(attention(q, k, v, window=window, backend="reference"), want)


@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize(("T", "S"), [(600, 600), (513, 700)])
def test_values_and_gradients_equal_the_reference(T: int, S: int, window: int | None) -> None:
    args = inputs(1, T, S)
    lengths = torch.tensor([S - 3])
    ours = attention(*args, window=window, key_lengths=lengths)
    want = attention(*args, window=window, key_lengths=lengths, backend="reference")
    assert_close(ours, want)
    do = torch.randn_like(want)
    for got, exact in zip(torch.autograd.grad(ours, args, do), torch.autograd.grad(want, args, do), strict=True):
        assert_close(got, exact)


def test_gradcheck() -> None:
    args = inputs(1, 4, 6)
    assert torch.autograd.gradcheck(lambda *a: attention(*a, window=3), args)


def test_it_is_torchs_attention() -> None:
    q, k, v = inputs(2, 9, 9, V=8)
    want = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    assert_close(attention(q, k, v), want.transpose(1, 2))


def test_a_long_window_never_builds_a_square_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(1, 2000, 2000)
    seen: list[int] = []
    visible = sdpa.visible
    monkeypatch.setattr(sdpa, "visible", lambda T, S, *rest: (seen.append(T * S), visible(T, S, *rest))[1])
    attention(q, k, v, window=100)
    assert seen
    assert max(seen) <= sdpa.WINDOW_BLOCK * (sdpa.WINDOW_BLOCK + 100)


def test_rows_of_different_cache_lengths() -> None:
    q, k, v = inputs(3, 2, 8)
    o = attention(q, k, v, key_lengths=torch.tensor([8, 5, 2]))
    for row, length in enumerate((8, 5, 2)):
        alone = attention(q[row : row + 1], k[row : row + 1, 8 - length :], v[row : row + 1, 8 - length :])
        assert_close(o[row : row + 1], alone)


def test_a_query_without_keys_gives_zeros() -> None:
    q, k, v = inputs(2, 1, 4)
    for backend in ("torch", "reference"):
        o = attention(q, k, v, key_lengths=torch.tensor([0, 4]), backend=backend)
        assert_close(o[0], torch.zeros_like(o[0]))
        assert torch.isfinite(torch.autograd.grad(o.sum(), k)[0]).all()


def test_packed_documents_do_not_see_each_other() -> None:
    q, k, v = inputs(1, 20, 26)
    cu, cu_k = torch.tensor([0, 5, 5, 20]), torch.tensor([0, 8, 9, 26])
    o = attention(q, k, v, cu_seqlens=cu, cu_seqlens_k=cu_k)
    assert_close(o[:, :5], attention(q[:, :5], k[:, :8], v[:, :8]))
    assert_close(o[:, 5:], attention(q[:, 5:], k[:, 9:], v[:, 9:]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"backend": "triton"}, "backend must be one of auto, torch, reference; got 'triton'"),
        ({"cu_seqlens_k": torch.tensor([0, 9])}, "cu_seqlens_k needs cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "end at T = 9; got 0 and 4"),
    ],
)
def test_refusals(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention(*inputs(1, 9, 9), **change)


def test_refuses_shapes_that_do_not_fit() -> None:
    q, k, v = inputs(1, 9, 9)
    with pytest.raises(ValueError, match="multiple of key heads; got 3, 2"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="T <= S; got T = 9, S = 4"):
        attention(q, k[:, :4], v[:, :4])
    with pytest.raises(ValueError, match=r"v must be .* with S = 9 as in k"):
        attention(q, k, v[:, :4])
