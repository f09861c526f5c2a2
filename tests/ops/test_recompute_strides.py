"""Recomputation that lays out an operator's inputs in another way is refused: gradients would be of other places."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zoo.layers.memory import MemoryPlan
from zoo.ops import no_recompute

Layout = Callable[[Tensor], Tensor]


@no_recompute
def operator(x: Tensor) -> Tensor:
    """Saves its input."""
    return x.square().cumsum(1)


def as_it_comes(x: Tensor) -> Tensor:
    return x * 1.0


def channels_first(x: Tensor) -> Tensor:
    """The same numbers; channels are the slow dimension in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) * 1.0


class Block(nn.Module):
    """Its mixer's input is laid out as `layouts` says, one for each time that it runs."""

    token_wise = True

    def __init__(self, *layouts: Layout):
        super().__init__()
        self.layouts = list(layouts)

    def mix(self, x: Tensor, state: None, cu_seqlens: Tensor | None) -> tuple[Tensor, None]:
        layout = self.layouts.pop(0)
        return operator(layout(x)), None

    def feed(self, x: Tensor, tokens: slice | None = None) -> Tensor:
        return x


def gradient(block: Block, x: Tensor) -> Tensor:
    y, _ = MemoryPlan(recompute="mixer_saved").run(block, x, None, None)
    (got,) = torch.autograd.grad(y.sin().sum(), [x])
    assert not block.layouts  # it ran as often as there are layouts
    return got


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("first", "again"), [(as_it_comes, channels_first), (channels_first, as_it_comes)], ids=["slow", "fast"]
)
def test_another_stride_at_recomputation_is_refused(x: Tensor, first: Layout, again: Layout) -> None:
    with pytest.raises(RuntimeError, match="must lay out an operator's inputs as the first pass did; got strides"):
        gradient(Block(first, again), x)


@pytest.mark.parametrize("layout", [as_it_comes, channels_first])
def test_any_stride_is_right_when_it_comes_back(x: Tensor, layout: Layout) -> None:
    (want,) = torch.autograd.grad(operator(x).sin().sum(), [x])
    torch.testing.assert_close(gradient(Block(layout, layout), x), want)
