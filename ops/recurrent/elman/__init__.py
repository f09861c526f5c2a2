"""Elman's recurrent network, with a recurrent matrix for each head."""

from torch import Tensor

from zoo.ops.recurrent.elman.reference import elman_reference
from zoo.ops.recurrent.rnn_sequential import operator, run

__all__ = ["elman"]


OPERATOR = operator("elman")


@OPERATOR.public()
def elman(
    x: Tensor,
    R: Tensor,
    b: Tensor | None = None,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run h_t = tanh(x_t + R h_{t-1} + b) in each head.

    Args:
        x: what the input brings, (B, T, 1, H, D), any float dtype.
        R: recurrent matrices, (1, H, D_out, D_in), in x's dtype.
        b: biases, (1, H, D), in x's dtype; zeros when omitted.
        state: h before the first step, (B, 1, H, D); zeros when omitted. With packed documents (n, 1, H, D).
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" (Triton on CUDA; torch elsewhere, for float64, for D > 128 and for a single token), "triton",
            "torch" or "reference".

    Returns:
        h: (B, T, H, D), in the dtype of x.
        last: the state after the last step, (B, 1, H, D) or (n, 1, H, D), float32 (float64 for float64 inputs); feed it
            back as `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: 2 B T H D^2 operations in T steps one after the other. For the backward the torch form keeps 2 float32 numbers
        for each of h, the kernels none.
    Source: Elman 1990; heads as in arXiv 2412.07752. With one head it is torch.nn.RNN.
    """
    return run(OPERATOR, elman_reference, x, R, b, state, cu_seqlens, backend)
