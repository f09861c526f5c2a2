"""The fused loss: what it must not hold, must not wait for, and must not get wrong."""

import importlib
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.ops import linear_cross_entropy
from zoo.ops.core.spec import relative_error

MODULE = importlib.import_module("zoo.ops.token_wise.linear_cross_entropy")
CHUNKED = importlib.import_module("zoo.ops.token_wise.linear_cross_entropy.chunked")
FORMS = ["torch", pytest.param("triton", marks=pytest.mark.kernels)]


def inputs(B: int = 2, T: int = 23, D: int = 6, V: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (B, T), generator=generator)
    return x, weight, bias, torch.where(targets == 3, -100, targets)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, reduction: str = "mean") -> Tensor:
    logits = F.linear(x, weight, bias).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 7 tokens, softmax over 2 rows at a time: 46 tokens end in a ragged chunk."""
    monkeypatch.setattr(CHUNKED, "CPU_TOKENS", (7, 7))
    monkeypatch.setattr(CHUNKED, "DEVICE_TOKENS", (7, 7))
    monkeypatch.setattr(CHUNKED, "ROW_BYTES", 2 * 11 * 8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", FORMS)
def test_chunks_add_up_to_torchs_own_loss(backend: str, reduction: str) -> None:
    """Per-token upstream gradients included: a form that scales dW after its sum over tokens is wrong there."""
    *leaves, targets = inputs()
    ours = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction=reduction, backend=backend)
    want = plain(*leaves, targets, reduction)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    assert relative_error(ours, want) < 1e-12
    found, exact = (torch.autograd.grad(loss, leaves, upstream) for loss in (ours, want))
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.usefixtures("small_chunks")
def test_tiny_upstream_gradients_survive_half_precision() -> None:
    x, weight, _, targets = inputs(dtype=torch.float16)
    losses = linear_cross_entropy(x, weight, targets, reduction="none")
    dx = torch.autograd.grad(losses, x, torch.full_like(losses, 1e-3))[0]
    want = torch.autograd.grad(plain(x.double(), weight.double(), None, targets, "sum"), x)[0]
    assert relative_error(dx, want.double() * 1e-3) < 4e-3


def test_weight_gradients_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As precise in chunks of one token as in one chunk, though every sum ends in bfloat16."""
    x, weight, _, targets = inputs(T=500, dtype=torch.bfloat16)
    exact = torch.autograd.grad(plain(x.double(), weight.double(), None, targets), weight)[0]
    for tokens in (1, 1000):
        monkeypatch.setattr(CHUNKED, "CPU_TOKENS", (tokens, tokens))
        dweight = torch.autograd.grad(linear_cross_entropy(x, weight, targets), weight)[0]
        assert dweight.dtype == torch.bfloat16
        assert relative_error(dweight, exact) < 2**-8


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return self.count["mm"] + self.count["addmm"] + self.count["addmm_"]


@pytest.mark.parametrize(
    ("x_learns", "weight_learns", "products"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_only_gradients_that_are_asked_for_are_computed(x_learns: bool, weight_learns: bool, products: int) -> None:
    x, weight, _, targets = inputs()
    x, weight = x.detach().requires_grad_(x_learns), weight.detach().requires_grad_(weight_learns)
    with Calls() as forward:
        loss = linear_cross_entropy(x, weight, targets)
    assert forward.products == products
    if loss.requires_grad:
        with Calls() as backward:
            loss.backward()
        assert backward.products == 0
    assert (x.grad is not None, weight.grad is not None) == (x_learns, weight_learns)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_gradients_only_the_logits_are_computed(reduction: str) -> None:
    x, weight, _, targets = inputs()
    with torch.no_grad(), Calls() as calls:
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
    assert calls.products == 1
    assert not loss.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_the_device(reduction: str) -> None:
    """Meta tensors have no values, and every read of one is an error."""
    x, weight = (torch.zeros(*shape, 4, device="meta", requires_grad=True) for shape in ((2, 8), (9,)))
    targets = torch.zeros(2, 8, dtype=torch.long, device="meta")
    linear_cross_entropy(x, weight, targets, reduction=reduction, backend="torch").sum().backward()
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)
    with pytest.raises(RuntimeError, match="item"):
        targets.sum().item()


def test_tied_embeddings_get_both_gradients() -> None:
    _, table, _, targets = inputs()
    tokens = targets.clamp(min=0)
    ours = torch.autograd.grad(linear_cross_entropy(F.embedding(tokens, table).sin(), table, targets), table)[0]
    want = torch.autograd.grad(plain(F.embedding(tokens, table).sin(), table, None, targets), table)[0]
    assert relative_error(ours, want) < 1e-12


def test_sums_of_slices_over_the_count_of_all_are_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _, targets = inputs()
    slices = [
        linear_cross_entropy(x[:, cut], weight, targets[:, cut], reduction="sum") for cut in (slice(9), slice(9, None))
    ]
    whole = linear_cross_entropy(x, weight, targets)
    assert relative_error(sum(slices) / (targets != -100).sum(), whole) < 1e-12
    monkeypatch.setattr(MODULE.shard, "current", object)
    linear_cross_entropy(x, weight, targets, reduction="sum")
    with pytest.raises(ValueError, match="one rank's slice of the sequence; use 'sum'"):
        linear_cross_entropy(x, weight, targets)


def test_a_second_backward_is_refused_or_right() -> None:
    x, weight, _, targets = inputs()
    want = torch.autograd.grad(plain(x, weight, None, targets), (x, weight))
    loss = linear_cross_entropy(x, weight, targets)
    for keep in (True, True, False):
        for a, b in zip(torch.autograd.grad(loss, (x, weight), retain_graph=keep), want, strict=True):
            assert relative_error(a, b) < 1e-12
    with pytest.raises(RuntimeError, match=r"this is a second one; pass retain_graph=True to the first"):
        loss.backward()
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="has no second derivatives, and create_graph=True asks for them"):
            torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", FORMS)
def test_what_is_not_scored_may_be_anything(backend: str, reduction: str) -> None:
    *leaves, targets = inputs()
    poisoned = leaves[0].detach().clone()
    poisoned[targets == -100] = torch.nan
    poisoned.requires_grad_()
    clean = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction=reduction, backend=backend)
    ours = linear_cross_entropy(poisoned, leaves[1], targets, bias=leaves[2], reduction=reduction, backend=backend)
    assert torch.equal(ours, clean)
    found = torch.autograd.grad(ours.sum(), [poisoned, *leaves[1:]])
    for a, b in zip(found, torch.autograd.grad(clean.sum(), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", *FORMS])
def test_nothing_scored(backend: str) -> None:
    x, weight, _, targets = inputs()
    targets = torch.full_like(targets, -100)
    mean = linear_cross_entropy(x, weight, targets, backend=backend)
    assert mean.isnan()  # as torch's
    assert linear_cross_entropy(x, weight, targets, reduction="sum", backend=backend) == 0
    if backend != "reference":
        assert all((g == 0).all() for g in torch.autograd.grad(mean, (x, weight)))


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_gradients_keep_their_dtypes(products: torch.dtype) -> None:
    x, weight, _, targets = inputs(dtype=torch.float32)
    want = torch.autograd.grad(plain(x, weight, None, targets), (x, weight))
    with torch.autocast("cpu", dtype=products):
        loss = linear_cross_entropy(x.to(products), weight, targets)
    assert loss.dtype == torch.float32
    for a, b in zip(torch.autograd.grad(loss, (x, weight)), want, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 1e-2


def test_no_tokens() -> None:
    _, weight, _, _ = inputs()
    x, targets = torch.zeros(1, 0, 6, dtype=torch.float64, requires_grad=True), torch.zeros(1, 0, dtype=torch.long)
    loss = linear_cross_entropy(x, weight, targets, reduction="sum")
    loss.backward()
    assert loss == 0
    assert (weight.grad == 0).all()


def test_refusals() -> None:
    x, weight, _, targets = inputs()
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none; got 'max'"):
        linear_cross_entropy(x, weight, targets, reduction="max")
    with pytest.raises(ValueError, match=r"targets must be a tensor of int64 or int32 tokens; got torch.float32"):
        linear_cross_entropy(x, weight, targets.float())
    with pytest.raises(ValueError, match="targets must be a tensor of int64 or int32 tokens; got list"):
        linear_cross_entropy(x, weight, targets.tolist())
    with pytest.raises(ValueError, match=r"targets must be \(B, T\) = \(2, 23\) as x is; got \(46,\)"):
        linear_cross_entropy(x, weight, targets.flatten())
    for wrong in (11, -1):
        with pytest.raises(ValueError, match=rf"targets must be in \[0, V\) = \[0, 11\) or .*-100; got {wrong}"):
            linear_cross_entropy(x, weight, targets.index_fill(1, torch.tensor([4]), wrong))
    with pytest.raises(ValueError, match=r"weight must be \(V, D\) with D = 6 as in x; got \(6, 11\)"):
        linear_cross_entropy(x, weight.T, targets)
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        linear_cross_entropy(x, weight, targets.to("meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_chunk_of_logits_becomes_its_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 inside, also where the logits are half precision, as on a device."""
    monkeypatch.setattr(CHUNKED, "ROW_BYTES", 64)
    z, targets = inputs()[0].detach().flatten(0, 1).to(dtype), torch.arange(46) % 6
    leaf = z.double().clone().requires_grad_()
    want = F.cross_entropy(leaf, targets, reduction="none")
    assert relative_error(CHUNKED.TORCH_STEP.losses(z.clone(), targets), want) < 1e-6
    losses = CHUNKED.TORCH_STEP.gradients_(z, targets)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(losses, want) < 1e-6
    assert relative_error(z, torch.autograd.grad(want.sum(), leaf)[0]) < 2 * torch.finfo(dtype).eps


@pytest.mark.kernels
def test_a_kernel_answers_nan_to_a_target_that_is_no_token() -> None:
    kernels = importlib.import_module("zoo.ops.token_wise.linear_cross_entropy.kernels")
    losses, _ = kernels.linear_cross_entropy_fwd(torch.zeros(3, 5), torch.tensor([5, -1, -7]))
    assert losses.isnan().tolist() == [True, False, True]


MEASURE = """
import sys, torch
from torch.nn import functional as F
from zoo.ops import linear_cross_entropy

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

N, V, D = int(sys.argv[2]), 50_000, 16
x, weight = torch.randn(1, N, D).requires_grad_(), torch.randn(V, D).requires_grad_()
targets = torch.randint(V, (1, N))
loss = {
    "ours": lambda n: linear_cross_entropy(x[:, :n], weight, targets[:, :n]),
    "plain": lambda n: F.cross_entropy(F.linear(x[0, :n], weight), targets[0, :n]),
}[sys.argv[1]]
loss(8).backward()
x.grad = weight.grad = None
open("/proc/self/clear_refs", "w").write("5")  # the peak starts afresh
before = memory("VmRSS")
loss(N).backward()
print((memory("VmHWM") - before - 4 * (x.numel() + weight.numel())) / (4 * N * V))
"""


@pytest.mark.everything
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_beyond_the_gradients_is_under_a_tenth_of_the_logits() -> None:
    def share(form: str, tokens: int) -> float:
        command = [sys.executable, "-c", MEASURE, form, str(tokens)]
        return float(subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout)

    assert share("plain", 512) > 1.9  # the logits and their gradient: the measurement sees what it should
    assert share("ours", 4096) < 0.1
