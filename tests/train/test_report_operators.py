"""Which backend every operator of a run takes is said once, and the run folder keeps it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config

from zoo.ops import swiglu
from zoo.ops.core import call, dispatch
from zoo.ops.core.call import Choice
from zoo.train.callbacks.operators import ReportOperators, describe_choices
from zoo.train.run import fit

MODEL = {"name": "mamba", "size": "tiny", "d_model": 16, "n_layers": 1, "vocab_size": None}
NOTHING: Any = None  # the callback reads neither trainer nor module nor batch


def test_a_run_says_which_backend_runs_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.run(config(model=MODEL), tmp_path / "run") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("operators: ")]
    names = "causal_conv1d, linear_cross_entropy, rms_norm, selective_scan, swiglu"
    assert said == [f"operators: {names} by torch (tensors on cpu)"]
    assert said[0] in (tmp_path / "run" / "log.txt").read_text()
    kept = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert kept["operators"]["swiglu"] == {"backend": "torch", "why": "tensors on cpu"}
    assert list(kept["operators"]) == names.split(", ")
    assert "torch" in kept


def test_what_runs_elsewhere_is_said_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_cuda", lambda x: True)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    dispatch.say_once.cache_clear()
    reports: list[Mapping[str, Choice]] = []
    callback = ReportOperators(reports.append)
    for batch in range(3):
        callback.on_train_batch_start(NOTHING, NOTHING, NOTHING, batch)
        if batch == 0:
            with pytest.warns(UserWarning, match="Triton is not installed"):
                swiglu(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
        callback.on_train_batch_end(NOTHING, NOTHING, NOTHING, NOTHING, batch)
    dispatch.say_once.cache_clear()
    assert [describe_choices(report) for report in reports] == ["swiglu by torch (Triton is not installed)"]


def test_a_first_step_that_fails_is_watched_no_longer() -> None:
    callback = ReportOperators(lambda choices: None)
    callback.on_train_batch_start(NOTHING, NOTHING, NOTHING, 0)
    assert call._WATCHERS
    callback.on_exception(NOTHING, NOTHING, ValueError())
    assert not call._WATCHERS
