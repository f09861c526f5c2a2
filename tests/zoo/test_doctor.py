"""`zoo doctor` says of every operator which backend runs, and why, as the operator itself decides."""

import pytest
import torch

from zoo.cli import doctor
from zoo.ops.core import dispatch
from zoo.ops.core.call import Choice, Operator
from zoo.ops.core.table import OPERATORS

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["delta_rule", "fft_convolution", "quasiseparable", "rms_norm"])
def test_the_default_is_the_operators_own_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.default(OPERATORS[name], CPU) == Choice("torch", "tensors on cpu")
    monkeypatch.setattr(Operator, "choose", lambda *_, **__: Choice("torch", "because the test says so"))
    assert doctor.default(OPERATORS[name], CPU).why == "because the test says so"


def test_an_operator_without_kernels_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_cuda", lambda x: True)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    runs = doctor.default(OPERATORS["fft_convolution"], CPU)
    assert runs == Choice("torch", "there is no Triton form, the transform is the device's library")


def test_an_operator_that_fails_is_no_end_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Choice:
        raise RuntimeError("no driver")

    monkeypatch.setattr(Operator, "choose", fails)
    assert doctor.default(OPERATORS["swiglu"], CPU) == Choice("nothing", "RuntimeError")


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_the_interpreter_checks_what_the_kernels_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that refuse float64 are not wrong; float32 is checked wherever there are kernels."""
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    spec = OPERATORS[name]
    cases = doctor.form_cases(spec, CPU)
    assert (("triton", torch.float32) in cases) == ("triton" in spec.forms)
    assert ("torch", torch.float64) in cases
    assert (("triton", torch.float64) in cases) == ("triton" in spec.forms and spec.operator.float64)


def test_the_interpreter_says_what_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setattr(doctor, "OPERATORS", {})
    assert doctor.doctor_command("cpu") == 0
    assert "it has no bfloat16, so that kernels in bfloat16 are not checked here" in capsys.readouterr().out


def test_the_interpreter_looks_at_the_first_sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sizes of all operators took two minutes of CPU time."""
    spec, sizes = OPERATORS["causal_conv1d"], []

    def notes(spec: object, inputs: dict[str, torch.Tensor], **_: object) -> dict[str, float]:
        sizes.append(tuple(inputs["x"].shape))
        return {"output 0": 0.0}

    monkeypatch.setattr(doctor, "parity", notes)
    doctor.check(spec, "triton", torch.float32, CPU)
    assert len(sizes) == 1
    doctor.check(spec, "torch", torch.float32, CPU)
    assert len(sizes) == 1 + len(spec.sizes) > 2
