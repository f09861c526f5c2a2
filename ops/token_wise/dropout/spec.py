"""What dropout must prove: every form draws the same mask, and its gradient is masked alike."""

from functools import partial

from zoo.ops.core.spec import OperatorSpec, randn
from zoo.ops.token_wise.dropout import dropout

SPECS = (
    OperatorSpec(
        name="dropout",
        function=partial(dropout, p=0.3, seed=0x1234_5678_9ABC_DEF1, stream=5),  # a seed beyond 32 bits
        make=lambda B, T, sizes, generator: {"x": randn(generator, B, T, sizes["D"])},
        state=None,
        sizes=({"D": 8}, {"D": 13}),
        time=("x",),
        extremes={"large": lambda i: i | {"x": i["x"] * 1e30}},
        packed=False,
    ),
)
