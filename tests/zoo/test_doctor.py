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
