"""Adapters in the place of linear layers (LoRA): each is called and learns, and merged it is the same model."""

import warnings
from typing import Any

import pytest
import torch
from case_table import CausalCase, EncoderCase, make_model, models, parametrize
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.layers import SequenceModel
from zoo.ops.core import dispatch

KINDS = {name: case for name, case in models().items() if isinstance(case, CausalCase | EncoderCase)}


class LowRank(nn.Module):
    """y = base(x) + x A B, the base frozen."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base, self.calls = base.requires_grad_(False), 0
        draw = torch.Generator().manual_seed(0)
        made = {"dtype": base.weight.dtype}
        self.A = nn.Parameter((0.3 * torch.randn(base.in_features, rank, generator=draw)).to(**made))
        self.B = nn.Parameter((0.3 * torch.randn(rank, base.out_features, generator=draw)).to(**made))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        added = x.to(self.A.dtype) @ self.A @ self.B
        y: Tensor = self.base(x)
        return y + added.to(y.dtype)

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base.weight += (self.A @ self.B).T
        return self.base


def adapted(model: nn.Module) -> dict[str, LowRank]:
    """Put an adapter in the place of every linear layer."""
    places = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapters = {name: LowRank(module) for name, module in places.items()}
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter)
    return adapters


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the head is a LowRank")
        loss: Tensor = model.head_loss(model.encode(batch["tokens"])[0], batch["tokens"].roll(-1, dims=1))
    return loss


@parametrize("case", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_adapter_is_called_and_learns(case: str, dtype: torch.dtype) -> None:
    model = make_model(case).to(dtype)
    adapters = adapted(model)
    loss_of(model, model.example(2, 12)).backward()
    for name, adapter in adapters.items():
        assert adapter.calls, name
        for parameter in (adapter.A, adapter.B):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@parametrize("case", KINDS)
@torch.no_grad()
def test_merged_adapters_are_the_same_model(case: str) -> None:
    """Except on a matrix that is shared: there merging would change the embedding, too."""
    model = make_model(case, **({} if case == "hydra" else {"tie_embeddings": False})).double()
    adapters = adapted(model)
    if case == "hydra":  # its decoder's matrix is the embedding's
        model.set_submodule("lm_head.decoder", adapters.pop("lm_head.decoder").base)
    batch = model.example(2, 12)
    want, loss = model(**batch)[0], loss_of(model, batch)
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.merged())
    assert_close(model(**batch)[0], want, rtol=1e-9, atol=1e-9)
    assert_close(loss_of(model, batch), loss, rtol=1e-9, atol=1e-9)


def test_a_head_that_is_no_linear_layer_any_more_is_said_once() -> None:
    model = make_model("gla")
    assert isinstance(model, SequenceModel)
    adapted(model)
    dispatch.say_once.cache_clear()
    batch = model.example(1, 5)
    with pytest.warns(UserWarning, match="the head is a LowRank in place of a plain linear layer, so it is called"):
        model.head_loss(model.encode(batch["tokens"])[0], batch["tokens"])
    model.head_loss(model.encode(batch["tokens"])[0], batch["tokens"])  # the second time nothing is said


def test_a_parametrized_head_is_called() -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = make_model("gla").double()
    assert isinstance(model, SequenceModel)
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Twice())
    batch = model.example(1, 5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the head is a ")
        ours = model.head_loss(model.encode(batch["tokens"])[0], batch["tokens"], reduction="none")
    logits = model(**batch)[0]
    want = nn.functional.cross_entropy(logits[0], batch["tokens"][0], reduction="none")
    assert_close(ours[0], want)
