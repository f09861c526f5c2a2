"""Gated linear attention against an implementation that is not ours, and against closed forms."""

import pytest
import torch
from torch import Tensor

from zoo.ops import gated_linear_attention
from zoo.ops.core.spec import outputs_and_gradients, parity, red, relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.linear_attention.gated_linear_attention import chunked
from zoo.ops.linear_attention.gated_linear_attention.chunked import gated_linear_attention_chunked

SPEC = OPERATORS["gated_linear_attention"]
SIZES = {"H": 2, "K": 16, "V": 24}


def inputs(T: int, *, B: int = 2, sizes: dict[str, int] = SIZES, seed: int = 0) -> dict[str, Tensor]:
    return SPEC.inputs(B, T, sizes, seed=seed)


@pytest.mark.parametrize("T", [1, 37, 130])
def test_agrees_with_flash_linear_attention(T: int) -> None:
    naive = pytest.importorskip("fla.ops.gla.naive", reason="needs flash-linear-attention; install the extra parity")
    given = {name: x.float() for name, x in inputs(T).items()}
    ours = gated_linear_attention(**given)
    theirs = naive.naive_recurrent_gla(
        given["q"], given["k"], given["v"], given["g"], initial_state=given["state"], output_final_state=True
    )
    for got, want in zip(ours, theirs, strict=True):
        assert relative_error(got, want) < 1e-5


def test_chunk_and_segment_lengths_change_nothing() -> None:
    given = [x.requires_grad_() for x in inputs(75).values()]
    exact = gated_linear_attention(*given, scale=0.3, backend="reference")
    cotangents = [torch.randn_like(x) for x in exact]
    wanted = (*exact, *torch.autograd.grad(exact, given, cotangents))
    for chunk in (1, 2, 16, 64, 128):
        for segment in (1, 3000, 2**20):  # one chunk at a time; a few; all
            ours = gated_linear_attention_chunked(*given, 0.3, None, chunk=chunk, segment=segment)
            found = (*ours, *torch.autograd.grad(ours, given, cotangents))
            for got, want in zip(found, wanted, strict=True):
                assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("cuts", [(0, 75), (0, 5, 5, 60, 75), (0, 0, 33, 75, 75)])
def test_segments_of_packed_documents_change_nothing(cuts: tuple[int, ...]) -> None:
    given = SPEC.inputs(1, 75, SIZES, documents=len(cuts) - 1)
    leaves = [x.requires_grad_() for x in given.values()]
    exact = gated_linear_attention(*leaves, cu_seqlens=torch.tensor(cuts), backend="reference")
    cotangents = [torch.randn_like(x) for x in exact]
    wanted = (*exact, *torch.autograd.grad(exact, leaves, cotangents))
    for segment in (1, 3000):
        ours = gated_linear_attention_chunked(*leaves, 0.25, cuts, chunk=16, segment=segment)
        found = (*ours, *torch.autograd.grad(ours, leaves, cotangents))
        for got, want in zip(found, wanted, strict=True):
            assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("share", [0.99, 1.01])
@pytest.mark.parametrize("b", [32, 16])
def test_blocks_are_as_large_as_the_gates_allow(
    b: int, share: float, uneven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just within the limit, and just beyond it: the sum over half a block of b rows, in equal steps or in one."""
    given, half = inputs(96, B=1), b // 2
    steps = torch.arange(96) % half == (torch.arange(96) // half * 7) % half if uneven else torch.ones(96) / half
    given["g"] = (-share * chunked.LIMIT * steps.double()).view(1, 96, 1, 1).expand_as(given["g"]).contiguous()
    taken, blocks = set(), chunked._blocks
    monkeypatch.setattr(chunked, "_blocks", lambda g: (found := blocks(g), taken.add(found[0]))[0])
    assert not red(parity(SPEC, given, backend="torch", dtype=torch.float32), torch.float32)
    assert not red(parity(SPEC, given, backend="torch", dtype=torch.float64), torch.float64)
    smaller = {32: 16, 16: 1}
    assert taken == {b if share < 1 else smaller[b]} if not uneven else max(taken) <= (b if share < 1 else smaller[b])


def test_the_gate_gradient_has_a_closed_form() -> None:
    # dg_t = sum over i >= t of (q_i dq_i - k_i dk_i), plus what the last state's gradient passes to every gate
    given = inputs(70)
    cotangent = torch.randn(*given["v"].shape, dtype=torch.float64)
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    o, S = gated_linear_attention(**leaves)
    dS = torch.randn_like(S)
    grads = torch.autograd.grad((o, S), list(leaves.values()), (cotangent, dS))
    dq, dk, _, dg, _ = grads
    db = given["q"] * dq - given["k"] * dk
    closed = db.flip(1).cumsum(1).flip(1) + (S * dS).sum(-1)[:, None]
    assert relative_error(dg, closed.detach()) < 1e-11


def test_strong_gates_are_finite_and_exact_in_float32() -> None:
    given = inputs(200)
    given["g"] = torch.full_like(given["g"], -8.0)
    found = outputs_and_gradients(SPEC, {name: x.float() for name, x in given.items()}, backend="torch")
    rounded = {name: x.float().double() for name, x in given.items()}
    exact = outputs_and_gradients(SPEC, rounded, backend="reference")
    for name, x in found.items():
        assert x.isfinite().all()
        assert relative_error(x, exact[name]) < 1e-6, name


def test_a_reset_is_a_new_start() -> None:
    given = inputs(40)
    given["g"][:, 25] = float("-inf")
    o, S = gated_linear_attention(**given)
    second = {name: x[:, 25:] for name, x in given.items() if name != "state"}
    second["g"] = second["g"].clone()
    second["g"][:, 0] = 0
    o2, S2 = gated_linear_attention(**second)
    assert relative_error(o[:, 25:], o2) < 1e-12
    assert relative_error(S, S2) < 1e-12


def test_without_a_gate_it_is_plain_linear_attention() -> None:
    given = inputs(90) | {"state": torch.zeros(2, 2, 16, 24, dtype=torch.float64)}
    given["g"] = given["g"] * 0
    o, S = gated_linear_attention(**given, scale=1.0)
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")  # (B, H, T, K)
    assert relative_error(o.transpose(1, 2), (q @ k.mT).tril() @ v) < 1e-12
    assert relative_error(S, k.mT @ v) < 1e-12


def test_a_later_token_changes_no_earlier_output() -> None:
    given = inputs(60)
    o, _ = gated_linear_attention(**given)
    for name in ("q", "k", "v"):
        given[name][:, 45] -= 1.0
    changed, _ = gated_linear_attention(**given)
    assert torch.equal(o[:, :45], changed[:, :45])
    assert not torch.equal(o[:, 45], changed[:, 45])
    given["g"][:, 45] -= 40.0  # other blocks, so another order of the same sums
    assert relative_error(gated_linear_attention(**given)[0][:, :45], o[:, :45]) < 1e-14


def test_a_scale_multiplies_the_output_alone() -> None:
    given = inputs(20)
    o, S = gated_linear_attention(**given)
    doubled, same = gated_linear_attention(**given, scale=2 * 16**-0.5)
    assert relative_error(doubled, 2 * o) < 1e-12
    assert torch.equal(same, S)


def test_a_gradient_through_one_output_alone() -> None:
    given = {name: x.requires_grad_() for name, x in inputs(70).items()}
    for i in (0, 1):
        ours, exact = (gated_linear_attention(**given, backend=b)[i] for b in ("torch", "reference"))
        needed = [x for name, x in given.items() if not (i == 1 and name == "q")]
        for got, want in zip(
            torch.autograd.grad(ours.sum(), needed), torch.autograd.grad(exact.sum(), needed), strict=True
        ):
            assert relative_error(got, want) < 1e-10


def test_inputs_and_cotangents_are_left_alone() -> None:
    # B = H = 1 and whole chunks: the chunks are views of the arguments
    given = {name: x.requires_grad_() for name, x in inputs(64, B=1, sizes={"H": 1, "K": 8, "V": 8}).items()}
    before = {name: x.detach().clone() for name, x in given.items()}
    o, S = gated_linear_attention(**given)
    do, dS = torch.randn_like(o), torch.randn_like(S)
    kept = do.clone(), dS.clone()
    torch.autograd.grad((o, S), list(given.values()), (do, dS))
    assert torch.equal(do, kept[0])
    assert torch.equal(dS, kept[1])
    assert all(torch.equal(given[name], x) for name, x in before.items())


def test_nothing_but_empty_documents() -> None:
    given = SPEC.inputs(1, 0, SIZES, documents=3)
    o, S = gated_linear_attention(**given, cu_seqlens=torch.tensor([0, 0, 0, 0]))
    assert o.shape == given["v"].shape
    assert torch.equal(S, given["state"])


def test_gates_may_be_wider_than_the_rest() -> None:
    given = {name: x.float() for name, x in inputs(40).items()}
    half = given | {name: given[name].bfloat16() for name in "qkv"}
    o, S = gated_linear_attention(**half)
    assert (o.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(S, gated_linear_attention(**{name: x.float() for name, x in half.items()})[1]) < 1e-6


@pytest.mark.kernels
def test_kernels_refuse_float64() -> None:
    with pytest.raises(ValueError, match="kernels take float32 or narrower; got float64"):
        gated_linear_attention(**inputs(4), backend="triton")
