"""The gated recurrent unit, with recurrent matrices for each head."""

from torch import Tensor

from zoo.ops.recurrent.gru.reference import gru_reference
from zoo.ops.recurrent.rnn_sequential import operator, run

__all__ = ["gru"]


OPERATOR = operator("gru")


@OPERATOR.public()
def gru(
    x: Tensor,
    R: Tensor,
    b: Tensor | None = None,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run h_t = z h_{t-1} + (1 - z) tanh(x_n + b_n + r (R_g h_{t-1} + b_g)) in each head.

    The gates are r, z = sig(x_t + R h_{t-1} + b).

    Args:
        x: what the input brings to the gates r, z, n, (B, T, 3, H, D), any float dtype.
        R: recurrent matrices of g, r, z, (3, H, D_out, D_in), in x's dtype; g is the recurrent part of n.
        b: biases of g, r, z, n, (4, H, D), in x's dtype; zeros when omitted.
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

    Cost: 6 B T H D^2 operations in T steps one after the other. For the backward the torch form keeps 5 float32 numbers
        for each of h; the kernels keep none and make the gates again.
    Source: arXiv 1406.1078, in the form whose r gates the product; heads as in arXiv 2412.07752. With one head it is
        torch.nn.GRU, whose rows r, z, n of weight_hh are R's r, z, g.
    """
    return run(OPERATOR, gru_reference, x, R, b, state, cu_seqlens, backend)
