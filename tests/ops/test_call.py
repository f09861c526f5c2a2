"""The beginning of every operator: one value an operator, one policy for kernels, one token the short way."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import zoo.ops
from zoo.ops import (
    attention,
    causal_conv1d,
    delta_rule,
    fft_convolution,
    gated_linear_attention,
    gated_rms_norm,
    lstm,
    para_gru,
    rms_norm,
    selective_scan,
    ssd,
    swiglu,
)
from zoo.ops.core import dispatch
from zoo.ops.core.call import CP_KINDS, Choice, Operator, operator_of, watched
from zoo.ops.core.spec import OperatorSpec, convert
from zoo.ops.core.table import OPERATORS


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors as if on a CUDA device, with Triton there."""
    monkeypatch.setattr(dispatch, "on_cuda", lambda x: True)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    dispatch.say_once.cache_clear()
    yield
    dispatch.say_once.cache_clear()


@pytest.mark.parametrize("spec", [pytest.param(s, id=n) for n, s in OPERATORS.items()])
def test_a_spec_proves_a_public_operator(spec: OperatorSpec) -> None:
    assert spec.operator.function is getattr(zoo.ops, spec.operator.name)
    assert spec.operator.cp_kind in CP_KINDS


def test_an_unknown_way_across_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mine: cp_kind must be one of affine, .*local; got 'afine'"):
        Operator("mine", cp_kind="afine")  # type: ignore[arg-type]


def test_a_spec_of_another_function_is_refused() -> None:
    swiglu = dataclasses.replace(OPERATORS["swiglu"], function=functools.partial(torch.add))
    with pytest.raises(ValueError, match=r"swiglu: function must be a public operator.*mark it by"):
        _ = swiglu.operator


def test_every_public_operator_is_a_value() -> None:
    """What takes a backend is an operator, or a summary of one."""
    for name in zoo.ops.__all__:
        value = getattr(zoo.ops, name)
        if inspect.isfunction(value) and "backend" in inspect.signature(value).parameters:
            assert operator_of(value) is not None or name.endswith("_summary"), name


# -- which backend runs, and why --------------------------------------------------------------------------------------


def test_kernels_run_on_cuda_where_they_take_the_call(cuda: None) -> None:
    choice = operator_of(delta_rule).choose("auto", torch.ones(1), {"K": 256})
    assert choice == Choice("triton", "tensors on cuda")


def test_torch_runs_on_a_cpu_and_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = operator_of(delta_rule).choose("auto", torch.ones(1, dtype=torch.float64), {"K": 1000})
    assert choice == Choice("torch", "tensors on cpu")


REFUSED = {
    "float64": (gated_linear_attention, torch.float64, {}, "kernels take float32 or narrower; got float64"),
    "float64 delta": (delta_rule, torch.float64, {}, "kernels take float32 or narrower; got float64"),
    "keys": (delta_rule, torch.float32, {"K": 300}, "kernels take keys of at most 256 numbers; got K = 300"),
    "heads": (lstm, torch.float32, {"D": 200}, "kernels take heads of at most 128 numbers; got D = 200"),
    "values": (attention, torch.float32, {"K": 8, "V": 512}, "kernels take heads of at most 256 numbers; got V = 512"),
    "rows": (rms_norm, torch.float32, {"D": 20_000}, "kernels take rows of at most 16384 numbers; got D = 20000"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_kernels_cannot_take_runs_in_torch_and_is_said_once(cuda: None, case: str) -> None:
    function, dtype, sizes, problem = REFUSED[case]
    operator, x = operator_of(function), torch.ones(1, dtype=dtype)
    assert operator is not None
    with pytest.warns(UserWarning, match=f"{operator.name}: {problem}, so the torch form runs on this CUDA") as said:
        choices = [operator.choose("auto", x, sizes) for _ in range(2)]
    assert choices == [Choice("torch", problem)] * 2
    assert len(said) == 1
    with pytest.raises(ValueError, match=f"{operator.name}: {problem}, .*backend='torch'"):
        operator.choose("triton", x, sizes)
    for asked in ("torch", "reference"):
        assert operator.choose(asked, x, sizes) == Choice(asked, "asked for")


def test_a_call_that_kernels_cannot_take_gives_the_numbers_of_torch(cuda: None) -> None:
    """The whole way, not the choice alone: delta_rule raised here under "auto"."""
    q, k, v = (torch.randn(1, 3, 1, n) for n in (300, 300, 4))
    beta = torch.rand(1, 3, 1)
    with pytest.warns(UserWarning, match="delta_rule: kernels take keys of at most 256"):
        ours = delta_rule(q, k, v, beta)
    for got, want in zip(ours, delta_rule(q, k, v, beta, backend="torch"), strict=True):
        assert torch.equal(got, want)


def test_options_that_kernels_lack_are_told_as_well(cuda: None) -> None:
    u, a = torch.randn(1, 5, 3, 4), torch.rand(3, 4)
    with pytest.warns(UserWarning, match="para_gru: kernels choose iterations and window by themselves"):
        para_gru(u, a, iterations=2)
    with pytest.raises(ValueError, match=r"para_gru: kernels choose iterations and window .* use backend='torch'"):
        para_gru(u, a, iterations=2, backend="triton")


def test_an_operator_without_kernels_has_nothing_to_say(cuda: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fft_convolution(torch.randn(1, 4, 2), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"fft_convolution: there is no Triton form, .*use backend='torch'"):
        fft_convolution(torch.randn(1, 4, 2), torch.randn(2, 4), backend="triton")


def test_what_is_watched_is_what_runs() -> None:
    seen: list[tuple[str, str, bool]] = []
    with watched(lambda operator, choice, outermost: seen.append((operator.name, choice.backend, outermost))):
        swiglu(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
        zoo.ops.depthwise_conv1d(torch.ones(1, 2, 4), torch.ones(4, 3), backend="torch")
    assert seen == [("swiglu", "torch", True), ("depthwise_conv1d", "torch", True), ("causal_conv1d", "torch", False)]
    swiglu(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    assert len(seen) == 3


# -- one token --------------------------------------------------------------------------------------------------------

SHORT = [gated_linear_attention, delta_rule, ssd, selective_scan, causal_conv1d, rms_norm, gated_rms_norm, swiglu]


def _one_token(name: str, dtype: torch.dtype) -> tuple[OperatorSpec, dict[str, Tensor]]:
    spec = next(s for n, s in OPERATORS.items() if n.split("_norm_first")[0] == name)
    return spec, convert(spec.inputs(2, 1), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", SHORT, ids=lambda function: function.__name__)
def test_the_short_way_of_a_token_gives_the_numbers_of_the_long_one(
    function: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, inputs = _one_token(function.__name__, dtype)  # type: ignore[attr-defined]
    first, *rest = inputs

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out = spec.function(inputs[first], **{name: inputs[name] for name in rest})
        return out if isinstance(out, tuple) else (out,)

    with torch.no_grad():
        with watched(lambda *_: None):  # the long way
            want = call(inputs)
        call(inputs)
        begun = []
        monkeypatch.setattr(Operator, "begin", lambda *_, **__: begun.append(1))
        for got, exact in zip(call(inputs), want, strict=True):
            assert torch.equal(got, exact)
        assert not begun


def test_what_does_not_fit_is_refused_after_tokens_that_did() -> None:
    u, w, s = torch.randn(2, 1, 4), torch.randn(4, 3), torch.zeros(2, 2, 4)
    with torch.no_grad():
        for _ in range(3):
            causal_conv1d(u, w, None, s)
        with pytest.raises(ValueError, match="causal_conv1d: state must be"):
            causal_conv1d(u, w, None, s[:1])
        with pytest.raises(ValueError, match="causal_conv1d: x, weight must share one dtype"):
            causal_conv1d(u, w.double(), None, s)
        with pytest.raises(ValueError, match="causal_conv1d: activation must be"):
            causal_conv1d(u, w, None, s, activation="relu")
        with pytest.raises(ValueError, match="causal_conv1d: state must be a tensor"):
            causal_conv1d(u, w, None, s.tolist())
        for _ in range(2):  # a mix is converted, every time
            assert causal_conv1d(u, w, None, s.double())[1].dtype == torch.float32


def test_a_token_with_gradients_goes_the_long_way() -> None:
    u, w = torch.randn(1, 1, 4), torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        for _ in range(2):
            causal_conv1d(u, w)
    causal_conv1d(u, w)[0].sum().backward()
    assert w.grad is not None


@pytest.mark.parametrize(
    "resets", [torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 5), torch.zeros(5, dtype=torch.bool)]
)
def test_resets_of_another_shape_or_dtype_are_refused(resets: Tensor) -> None:
    a = torch.rand(2, 5, 3)
    with pytest.raises(ValueError, match=r"affine_scan: resets must be a bool tensor \(B, T\) = \(2, 5\)"):
        zoo.ops.affine_scan(a, a, resets=resets)
