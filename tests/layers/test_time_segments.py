"""Stretches of time change nothing but where memory comes from."""

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.layers import Mamba, time_segments
from zoo.layers.time_segments import in_segments
from zoo.ops import shard
from zoo.ops.core.spec import relative_error


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that a mixer was called with."""
    lengths: list[int] = []
    original = Mamba._mix

    def counted(self: Mamba, x: Tensor, *rest: Any) -> Any:
        lengths.append(x.shape[1])
        return original(self, x, *rest)

    monkeypatch.setattr(Mamba, "_mix", counted)
    monkeypatch.setattr(time_segments, "NUMBERS", 2 * 64 * 32)  # two rows of 64 steps of the widest array
    return lengths


def results(mixer: Mamba, x: Tensor, state: Any) -> list[Tensor]:
    y, after = mixer(x, state)
    leaves = [x, state.h, *mixer.parameters()]
    torch.manual_seed(1)
    return [y, *after, *torch.autograd.grad((y, *after), leaves, [torch.randn_like(z) for z in (y, *after)])]


def test_stretches_change_nothing(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer = Mamba(8).double()
    x = torch.randn(2, 200, 8, dtype=torch.float64, requires_grad=True)
    state = mixer.init_state(2)
    state = state._replace(h=torch.randn_like(state.h).requires_grad_())
    found = results(mixer, x, state)
    assert calls == [64, 64, 64, 8]
    monkeypatch.setattr(time_segments, "NUMBERS", 2**30)
    for ours, exact in zip(found, results(mixer, x, state), strict=True):
        assert relative_error(ours, exact) < 1e-12
    assert calls[4:] == [200]


def test_documents_and_slices_of_ranks_are_not_cut(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = Mamba(8)
    mixer(torch.randn(1, 300, 8), cu_seqlens=torch.tensor([0, 250, 300]))
    assert calls == [300]
    monkeypatch.setattr(shard, "current", lambda: object())
    seen = []
    in_segments(lambda x, state: (seen.append(x.shape[1]), state), torch.randn(2, 300, 8), None, width=32)  # type: ignore[arg-type, return-value]
    assert seen == [300]
