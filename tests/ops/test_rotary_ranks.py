"""Rotary embedding of tensors with any leading dimensions, as of pictures and of windows."""

import pytest
import torch

from zoo.ops import rotary


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_leading_dimensions_are_rows(lead: tuple[int, ...], shared: bool, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*lead, 5, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = tuple(1 for _ in lead) if shared else lead
    angles = torch.randn(*rows, 5, 4, generator=generator, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    y = rotary(x, cos, sin, backend=backend)
    n = torch.Size(lead).numel()
    flat = [t.expand(*lead, 5, 4).reshape(n, 5, 4) for t in (cos, sin)]
    wanted = rotary(x.reshape(n, 5, 2, 8), *flat, backend="reference").view_as(x)
    torch.testing.assert_close(y, wanted)
    cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(z, x, cotangent, retain_graph=True)[0] for z in (y, wanted))
    torch.testing.assert_close(ours, theirs)


def test_other_leading_dimensions_of_tables_are_refused() -> None:
    x, table = torch.randn(2, 3, 5, 2, 8), torch.randn(3, 2, 5, 4)
    with pytest.raises(ValueError, match=r"rotary: tables must lead with \(2, 3\) as x does, or with ones"):
        rotary(x, table, table)
    with pytest.raises(ValueError, match="rotary: x must be"):
        rotary(torch.randn(4, 8), table, table)
