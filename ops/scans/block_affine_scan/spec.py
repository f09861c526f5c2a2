"""What the scan of 2x2 blocks must prove."""

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.scans.block_affine_scan import block_affine_scan, block_affine_scan_summary


def _block_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    # rotations and shears of either sign whose products neither die at once nor explode
    return {
        "A": 0.75 * torch.tanh(2 * randn(generator, B, T, sizes["D"], 2, 2)),
        "b": randn(generator, B, T, sizes["D"], 2),
    }


SPECS = (
    OperatorSpec(
        name="block_affine_scan",
        function=block_affine_scan,
        make=_block_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["D"], 2),
        sizes=({"D": 5},),
        time=("A", "b"),
        extremes={
            "A-0": lambda i: i | {"A": i["A"] * 0},
            "A-identity": lambda i: i | {"A": i["A"] * 0 + torch.eye(2)},
            "A-rotation": lambda i: i | {"A": i["A"] * 0 + torch.tensor([[0.0, -1.0], [1.0, 0.0]])},
        },
        summary=lambda i, cu: block_affine_scan_summary(i["A"], i["b"], cu_seqlens=cu),
        resets=lambda i, where: i | {"A": i["A"].masked_fill(where[..., None, None, None], 0)},
    ),
)
