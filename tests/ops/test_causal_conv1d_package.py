"""The causal convolution through the optional package causal-conv1d: when it is asked, how, and with equal results."""

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.cli import doctor
from zoo.ops import causal_conv1d
from zoo.ops.convolutions.causal_conv1d import external
from zoo.ops.core import dispatch
from zoo.ops.core.spec import convert, outputs_and_gradients, parity, red, relative_error
from zoo.ops.core.table import OPERATORS

SPEC = OPERATORS["causal_conv1d"]
SIZES = {"D": 16, "W": 4}
Calls = list[dict[str, Any]]


def documented(calls: Calls) -> Callable[..., Tensor]:
    """causal_conv1d_fn as version 1.4 and newer document it, in plain torch, with the demands of its CUDA code."""

    def causal_conv1d_fn(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None, return_final_states: bool = False, final_states_out: None = None,
        activation: str | None = None,
    ) -> Tensor:  # fmt: skip
        calls.append({"seq_idx": seq_idx, "initial_states": initial_states, "x": x})
        (B, D, T), W = x.shape, weight.shape[1]
        assert weight.shape == (D, W)
        assert x.stride(1) == 1 < x.stride(2)
        assert not any(n % 8 for n in (D, x.stride(0), x.stride(2), x.storage_offset()))
        assert 2 <= W <= 4
        assert activation in (None, "silu", "swish")
        assert not return_final_states
        assert final_states_out is None
        if initial_states is not None:
            assert initial_states.shape == (B, D, W - 1)
            assert initial_states.stride(1) == 1
            assert initial_states.dtype == x.dtype
            assert seq_idx is None
        history = F.pad(x, (W - 1, 0)) if initial_states is None else torch.cat([initial_states, x], dim=-1)
        if seq_idx is None:
            y = F.conv1d(history, weight.unsqueeze(1), bias, groups=D)
        else:
            assert (seq_idx.dtype, seq_idx.shape) == (torch.int32, (B, T))
            assert seq_idx.is_contiguous()
            own = F.pad(seq_idx, (W - 1, 0), value=-1)
            taps = [history[..., w : w + T] * (own[:, None, w : w + T] == seq_idx[:, None]) for w in range(W)]
            y = sum(weight[:, w : w + 1] * tap for w, tap in enumerate(taps))
            y = y if bias is None else y + bias[:, None]
        y = y if activation is None else F.silu(y)
        y = y.mT.contiguous().mT  # channels last, as its kernels leave it
        if y.requires_grad:
            y.register_hook(strides_are_even)
        return y

    return causal_conv1d_fn


def strides_are_even(dy: Tensor) -> None:
    """What the package's backward demands of a gradient with the channels next to each other."""
    assert dy.stride(1) != 1 or not (dy.stride(0) % 8 or dy.stride(2) % 8), dy.stride()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The package as if installed, and CPU tensors as if on its device; yields the calls that reach it."""
    calls: Calls = []
    module = types.ModuleType("causal_conv1d")
    module.causal_conv1d_fn = documented(calls)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    monkeypatch.setattr(external, "_on_its_device", lambda x: True)
    torch.use_deterministic_algorithms(False)  # the tests' own setting, put back by its fixture
    external.installed.cache_clear()
    yield calls
    external.installed.cache_clear()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[BaseException], None]]:
    """Makes the package's import fail in a given way."""

    def install(error: BaseException) -> None:
        def importing(name: str) -> None:
            assert name == "causal_conv1d"
            raise error

        monkeypatch.setattr(external.importlib, "import_module", importing)
        monkeypatch.setattr(external, "_on_its_device", lambda x: True)
        torch.use_deterministic_algorithms(False)
        external.installed.cache_clear()
        dispatch.say_once.cache_clear()

    yield install
    external.installed.cache_clear()
    dispatch.say_once.cache_clear()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("W", [2, 3, 4])
def test_the_package_gives_equal_results(
    package: Calls, W: int, with_state: bool, with_bias: bool, activation: str | None
) -> None:
    given = convert(SPEC.inputs(2, 21, {"D": 16, "W": W}), torch.float32)
    given = {n: x for n, x in given.items() if (n != "state" or with_state) and (n != "bias" or with_bias)}
    leaves = [x.requires_grad_() for x in given.values()]
    ours, exact = (causal_conv1d(**given, activation=activation, backend=b) for b in ("auto", "reference"))
    assert len(package) == 1
    assert (package[0]["initial_states"] is not None) == with_state
    cotangents = [torch.randn_like(x) for x in exact]
    wanted = torch.autograd.grad(exact, leaves, cotangents)
    for got, want in zip((*ours, *torch.autograd.grad(ours, leaves, cotangents)), (*exact, *wanted), strict=True):
        assert got.shape == want.shape
        assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("cuts", [(0, 30), (0, 1, 17, 17, 30), (0, 0, 2, 30, 30)])
def test_the_package_takes_packed_documents_without_states(package: Calls, cuts: tuple[int, ...]) -> None:
    given = convert(SPEC.inputs(1, 30, SIZES, documents=len(cuts) - 1), torch.float32)
    cu, state = torch.tensor(cuts), given.pop("state")
    leaves = [x.requires_grad_() for x in given.values()]
    ours, exact = (causal_conv1d(**given, cu_seqlens=cu, backend=b) for b in ("auto", "reference"))
    assert len(package) == 1
    cotangents = [torch.randn_like(x) for x in exact]
    wanted = torch.autograd.grad(exact, leaves, cotangents)
    for got, want in zip((*ours, *torch.autograd.grad(ours, leaves, cotangents)), (*exact, *wanted), strict=True):
        assert relative_error(got, want) < 1e-6
    causal_conv1d(**given, state=state, cu_seqlens=cu)
    assert len(package) == 1  # with states it is not asked


def test_the_package_gets_no_strides_that_it_refuses(package: Calls) -> None:
    """Slices of wider rows go as they are where they are aligned; gradients with odd strides are laid out again."""
    wide = torch.randn(2, 21, 48, requires_grad=True)
    weight = torch.randn(16, 4, requires_grad=True)
    for first, as_it_is in ((16, True), (17, False)):
        x = wide[..., first : first + 16]
        y, _ = causal_conv1d(x, weight)
        assert (package[-1]["x"].data_ptr() == x.data_ptr()) == as_it_is
        exact, _ = causal_conv1d(x, weight, backend="reference")
        for cotangent in (torch.ones(()).expand(2, 21, 16), torch.randn(2, 23, 19)[:, 2:, 3:]):
            ours, want = (torch.autograd.grad(z, (wide, weight), cotangent, retain_graph=True) for z in (y, exact))
            assert all(relative_error(a, b) < 1e-6 for a, b in zip(ours, want, strict=True))


def test_what_the_package_lacks_stays_ours(package: Calls) -> None:
    given = convert(SPEC.inputs(2, 21, SIZES), torch.float32)
    for other in (
        convert(given, torch.float64),
        convert(SPEC.inputs(2, 21, {"D": 16, "W": 5}), torch.float32),
        convert(SPEC.inputs(2, 21, {"D": 12, "W": 4}), torch.float32),
        convert(SPEC.inputs(2, 3, SIZES), torch.float32),
        convert(SPEC.inputs(2, 0, SIZES), torch.float32),
    ):
        causal_conv1d(**other)
    causal_conv1d(**given, backend="torch")
    torch.use_deterministic_algorithms(True)
    causal_conv1d(**given)
    assert not package
    torch.use_deterministic_algorithms(False)
    causal_conv1d(**given)
    assert len(package) == 1


def test_nothing_changes_on_a_cpu(package: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    external.installed.cache_clear()
    sys.modules.pop("causal_conv1d", None)
    module = types.ModuleType("causal_conv1d")
    module.causal_conv1d_fn = documented(package)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    torch.use_deterministic_algorithms(False)
    given = convert(SPEC.inputs(2, 21, SIZES), torch.float32)
    for ours, own in zip(causal_conv1d(**given), causal_conv1d(**given, backend="torch"), strict=True):
        assert torch.equal(ours, own)
    assert not package


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'causal_conv1d_cuda'", name="causal_conv1d_cuda"),
        ImportError("causal_conv1d_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi\nmore"),
        OSError("libcudart.so.11.0: cannot open shared object file"),
        AttributeError("module 'causal_conv1d' has no attribute 'causal_conv1d_fn'"),
        RuntimeError("Detected that PyTorch and causal_conv1d were compiled with different CUDA versions"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_build_is_told_once_and_breaks_nothing(
    broken: Callable[[BaseException], None], error: BaseException
) -> None:
    broken(error)
    given = convert(SPEC.inputs(2, 21, SIZES), torch.float32)
    with pytest.warns(UserWarning, match=f"installed and cannot be used .{type(error).__name__}: ") as said:
        ours = causal_conv1d(**given)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        causal_conv1d(**given)
    for got, own in zip(ours, causal_conv1d(**given, backend="torch"), strict=True):
        assert torch.equal(got, own)
    assert "cannot be used" in external.status()
    assert SPEC.library() == ""


def test_a_missing_package_is_no_finding(broken: Callable[[BaseException], None]) -> None:
    broken(ModuleNotFoundError("No module named 'causal_conv1d'", name="causal_conv1d"))
    given = convert(SPEC.inputs(2, 21, SIZES), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        causal_conv1d(**given)
    assert "not installed" in external.status()


def test_doctor_checks_the_package_where_it_runs(package: Calls) -> None:
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert ("auto", torch.bfloat16) in doctor.form_cases(SPEC, cuda)
    assert all(form != "auto" for form, _ in doctor.form_cases(SPEC, cpu))
    assert all(form != "auto" for form, _ in doctor.form_cases(OPERATORS["ssd"], cuda))
    assert "runs causal_conv1d on CUDA" in external.status()
    _, error, wrong = doctor.check(SPEC, "auto", torch.float32, cpu)  # through the package, by the fixture
    assert package
    assert wrong is None
    assert error < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("W", [2, 3, 4])
def test_the_real_package_agrees_with_the_definition_and_our_kernels(W: int, dtype: torch.dtype) -> None:
    external.installed.cache_clear()
    if not external.available():
        pytest.skip(external.status())
    inputs = SPEC.inputs(2, 300, {"D": 64, "W": W})
    assert external.serves(convert(inputs, dtype, "cuda")["x"], W, packed=False, with_state=True)
    assert not red(parity(SPEC, inputs, backend="auto", dtype=dtype, device="cuda"), dtype)
    given = convert(inputs, dtype, "cuda")
    theirs, ours = (outputs_and_gradients(SPEC, given, backend=b) for b in ("auto", "triton"))
    assert not red({name: relative_error(theirs[name], ours[name]) for name in ours}, dtype)
    packed = SPEC.inputs(1, 300, {"D": 64, "W": W})
    del packed["state"]
    cu = torch.tensor([0, 1, 100, 100, 300])
    assert not red(parity(SPEC, packed, backend="auto", dtype=dtype, device="cuda", cu_seqlens=cu), dtype)


def test_a_package_that_lacks_another_package_is_no_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str) -> types.ModuleType:
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr(external.importlib, "import_module", lacking)
    external.installed.cache_clear()
    try:
        assert "cannot be used (ModuleNotFoundError: No module named 'einops')" in external.status()
    finally:
        external.installed.cache_clear()
