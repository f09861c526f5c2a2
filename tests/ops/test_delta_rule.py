"""The delta rule against implementations that are not ours, and against algebra that needs no implementation."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops import delta_rule
from zoo.ops.core.spec import outputs_and_gradients, parity, red, relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.linear_attention.delta_rule.chunked import delta_rule_chunked

KV = [(8, 16), (16, 8), (64, 64), (100, 128), (128, 100)]


def inputs(T: int, K: int = 16, V: int = 24, *, H: int = 2, B: int = 2, seed: int = 0) -> dict[str, Tensor]:
    return OPERATORS["gated_delta_rule"].inputs(B, T, {"H": H, "K": K, "V": V}, seed=seed)


@pytest.mark.parametrize("g", [None, 0.0, -8.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("T", [1, 15, 16, 63, 64, 65, 200])
def test_chunks_equal_the_loop_in_float64(T: int, beta: float, g: float | None) -> None:
    K, V = KV[T % len(KV)]
    given = inputs(T, K, V, H=1, B=1)
    given["beta"] = torch.full_like(given["beta"], beta)
    given["g"] = None if g is None else torch.full_like(given["g"], g)
    for ours, exact in zip(delta_rule(**given), delta_rule(**given, backend="reference"), strict=True):
        assert relative_error(ours, exact) < 1e-10


@pytest.mark.parametrize(("K", "V"), KV)
@pytest.mark.parametrize("size", [1, 2, 16, 32, 64, 128])
def test_chunk_size_changes_nothing(size: int, K: int, V: int) -> None:
    given = [x.requires_grad_() for x in inputs(70, K, V, H=1, B=1).values()]
    ours = delta_rule_chunked(*given, 0.3, size=size)
    exact = delta_rule(*given, scale=0.3, backend="reference")
    cotangents = [torch.randn_like(x) for x in exact]
    for got, want in zip(
        (*ours, *torch.autograd.grad(ours, given, cotangents)),
        (*exact, *torch.autograd.grad(exact, given, cotangents)),
        strict=True,
    ):
        assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("cuts", [(0, 75), (0, 5, 5, 60, 75), (0, 0, 33, 75, 75)])
def test_stretches_of_packed_documents_change_nothing(cuts: tuple[int, ...], gated: bool) -> None:
    made = OPERATORS["gated_delta_rule"].inputs(1, 75, {"H": 2, "K": 16, "V": 24}, documents=len(cuts) - 1)
    leaves: list[Any] = [x.requires_grad_() for x in made.values()]
    names = list(made)
    if not gated:
        leaves[names.index("g")] = None
    wanted_of = [x for x in leaves if x is not None]
    exact = delta_rule(**dict(zip(names, leaves, strict=True)), cu_seqlens=torch.tensor(cuts), backend="reference")
    cotangents = [torch.randn_like(x) for x in exact]
    wanted = (*exact, *torch.autograd.grad(exact, wanted_of, cotangents))
    for segment in (1, 3000):  # one chunk position at a time; a few
        ours = delta_rule_chunked(*leaves, 0.25, cuts, size=16, segment=segment)
        found = (*ours, *torch.autograd.grad(ours, wanted_of, cotangents))
        for got, want in zip(found, wanted, strict=True):
            assert relative_error(got, want) < 1e-11


def test_a_gradient_through_one_output_alone() -> None:
    given = {name: x.requires_grad_() for name, x in inputs(70).items()}
    for i in (0, 1):
        ours, exact = delta_rule(**given)[i], delta_rule(**given, backend="reference")[i]
        needed = [x for name, x in given.items() if not (i == 1 and name == "q")]
        cotangent = torch.randn_like(exact)
        for got, want in zip(
            torch.autograd.grad(ours, needed, cotangent), torch.autograd.grad(exact, needed, cotangent), strict=True
        ):
            assert relative_error(got, want) < 1e-10


def test_a_single_token_is_the_definition() -> None:
    for name in ("delta_rule", "gated_delta_rule"):
        spec = OPERATORS[name]
        errors = parity(spec, spec.inputs(3, 1), backend="torch", dtype=torch.float64)
        assert not red(errors, torch.float64)


def test_decays_to_nothing_are_finite() -> None:
    given = inputs(70)
    given["g"][:, ::3] = float("-inf")
    found = outputs_and_gradients(OPERATORS["gated_delta_rule"], given, backend="torch")
    assert all(x.isfinite().all() for x in found.values())
    exact = delta_rule(**given, backend="reference")
    assert relative_error(found["output 0"], exact[0]) < 1e-10
    assert relative_error(found["output 1"], exact[1]) < 1e-10


def test_gates_may_be_wider_than_the_rest() -> None:
    given = {name: x.float() for name, x in inputs(20).items()}
    half = given | {name: given[name].bfloat16() for name in "qkv"}
    o, S = delta_rule(**half)
    assert (o.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    exact = delta_rule(**{name: x.float() for name, x in half.items()})
    assert relative_error(S, exact[1]) < 1e-6  # only the output was rounded


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule"])
def test_kernels_take_half_precision(name: str) -> None:
    # half precision has longer chunks, whose triangular inverse is made in two parts
    spec = OPERATORS[name]
    given = spec.inputs(1, 70, {"H": 1, "K": 16, "V": 16})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors = parity(spec, given, backend="triton", dtype=torch.float16, device=device)
    assert not red(errors, torch.float16)


@pytest.mark.kernels
def test_kernels_say_what_they_do_not_take() -> None:
    given = inputs(5)
    with pytest.raises(ValueError, match=r"delta_rule: kernels take float32 or narrower; got float64.*backend='torch'"):
        delta_rule(**given, backend="triton")
    given = {name: x.float() for name, x in inputs(5, K=300).items()}
    with pytest.raises(ValueError, match=r"delta_rule: kernels take keys of at most 256 .*K = 300, use"):
        delta_rule(**given, backend="triton")


def test_orthonormal_keys_are_kept_exactly() -> None:
    # 32 orthonormal keys in 64 dimensions, each written twice: the second write replaces the first
    K = V = 64
    keys = torch.linalg.qr(torch.randn(K, 32, dtype=torch.float64)).Q.T  # (32, K)
    k = torch.cat([keys, keys, keys])[None, :, None]
    values = torch.randn(64, V, dtype=torch.float64)
    v = torch.cat([values, torch.zeros(32, V, dtype=torch.float64)])[None, :, None]
    beta = torch.cat([torch.ones(64, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)])[None, :, None]
    o, _ = delta_rule(k, k, v, beta, scale=1.0)
    assert relative_error(o[0, 64:, 0], values[32:]) < 1e-12
    # linear attention would return the sum of both writes
    assert relative_error(values[:32] + values[32:], values[32:]) > 0.5


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_parity_of_bits_is_exact(backend: str) -> None:
    bits = torch.randint(2, (1, 1000, 1), generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, 1000, 1, 1)
    _, S = delta_rule(one, one, one * 0, 2.0 * bits, state=torch.ones(1, 1, 1, 1), backend=backend)
    assert S.item() == (-1) ** int(bits.sum())


# implementations that are not ours


def test_agrees_with_flash_linear_attention() -> None:
    naive = pytest.importorskip(
        "fla.ops.delta_rule.naive", reason="needs flash-linear-attention; install the extra parity"
    )
    given = {name: x.float() for name, x in inputs(64).items() if name != "g"}
    q, k, v, beta = (given[name].transpose(1, 2) for name in ("q", "k", "v", "beta"))
    o, S = delta_rule(**given)
    o_theirs, S_theirs = naive.delta_rule_recurrence(q, k, v, beta, initial_state=given["state"])
    assert relative_error(o, o_theirs.transpose(1, 2)) < 1e-5
    assert relative_error(S, S_theirs) < 1e-5
    o, S = delta_rule(**{name: x for name, x in given.items() if name != "state"})
    o_theirs, S_theirs = naive.delta_rule_chunkwise(q, k, v, beta, chunk_size=32)
    assert relative_error(o, o_theirs.transpose(1, 2)) < 1e-5
    assert relative_error(S, S_theirs) < 1e-5


@pytest.mark.parametrize("T", [1, 37, 130])
def test_agrees_with_gated_flash_linear_attention(T: int) -> None:
    naive = pytest.importorskip(
        "fla.ops.gated_delta_rule.naive", reason="needs flash-linear-attention; install the extra parity"
    )
    given = {name: x.float() for name, x in inputs(T).items()}
    rest = {"initial_state": given["state"], "output_final_state": True}
    q, k, v, beta, g = (given[name] for name in ("q", "k", "v", "beta", "g"))
    ours = delta_rule(**given)
    for theirs in (
        naive.naive_recurrent_gated_delta_rule(q, k, v, beta, g, **rest),
        naive.naive_chunk_gated_delta_rule(q, k, v, g, beta, **rest),  # the other order of g and beta
    ):
        for got, want in zip(ours, theirs, strict=True):
            assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("T", [1, 130])
def test_agrees_with_transformers(T: int, gated: bool) -> None:
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    given = {name: x.float() for name, x in inputs(T).items()}
    given["k"] = F.normalize(given["k"], dim=-1)
    g = given["g"] if gated else given["g"] * 0
    if not gated:
        del given["g"]
    rest = {"g": g, "beta": given["beta"], "initial_state": given["state"], "output_final_state": True}
    ours = delta_rule(**given)
    for form in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        # with fla installed, transformers wraps its kernels around the plain torch functions
        o, S = inspect.unwrap(form)(given["q"], given["k"], given["v"], **rest)
        assert relative_error(ours[0], o) < 1e-5
        assert relative_error(ours[1], S) < 1e-5
