"""An output that depends on nothing stays in the graph of what it was asked of."""

import torch

from zoo.ops.shard import tied


def test_the_output_of_an_empty_stretch_asks_for_every_gradient() -> None:
    """Without it autograd would never call the backward of an exchange, and the neighbours would wait."""
    asked = []
    arrived = torch.full((2, 3), float("inf"), requires_grad=True)
    weight, count = torch.ones(4, requires_grad=True), torch.arange(2)
    through = arrived * 1.0
    through.register_hook(lambda g: asked.append(g))
    y = tied(torch.zeros(2, 0, 3), through, None, weight, count)
    assert y.shape == (2, 0, 3)
    d_arrived, d_weight = torch.autograd.grad(y.sum(), [arrived, weight])  # None would be refused here
    assert [g.shape for g in asked] == [(2, 3)]
    assert torch.equal(d_arrived, torch.zeros(2, 3))  # of infinite states, too
    assert torch.equal(d_weight, torch.zeros(4))


def test_values_and_gradients_pass_through() -> None:
    y, x = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    out = tied(y, x)
    assert torch.equal(out, y)
    assert out.data_ptr() == y.data_ptr()
    dy, dx = torch.autograd.grad(out.square().sum(), [y, x], create_graph=True)
    assert torch.equal(dy, 2 * y)
    assert torch.equal(dx, torch.zeros(2))
