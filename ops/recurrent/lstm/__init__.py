"""The long short-term memory, with a recurrent matrix for each head."""

from torch import Tensor

from zoo.ops.recurrent.lstm.reference import lstm_reference
from zoo.ops.recurrent.rnn_sequential import operator, run

__all__ = ["lstm"]


OPERATOR = operator("lstm")


@OPERATOR.public()
def lstm(
    x: Tensor,
    R: Tensor,
    b: Tensor | None = None,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run c_t = sig(f) c_{t-1} + sig(i) tanh(z), h_t = sig(o) tanh(c_t) in each head.

    The gates i, f, z, o are x_t + R h_{t-1} + b.

    Args:
        x: what the input brings to the gates i, f, z, o, (B, T, 4, H, D), any float dtype.
        R: recurrent matrices of i, f, z, o, (4, H, D_out, D_in), in x's dtype.
        b: biases of the same, (4, H, D), in x's dtype; zeros when omitted.
        state: h and c before the first step, (B, 2, H, D); zeros when omitted. With packed documents (n, 2, H, D).
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" (Triton on CUDA; torch elsewhere, for float64, for D > 128 and for a single token), "triton",
            "torch" or "reference".

    Returns:
        h: (B, T, H, D), in the dtype of x.
        last: the state after the last step, (B, 2, H, D) or (n, 2, H, D), float32 (float64 for float64 inputs); feed it
            back as `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: 8 B T H D^2 operations in T steps one after the other. For the backward the torch form keeps 6 float32 numbers
        for each of h; the kernels keep 1 and make the gates again.
    Source: Hochreiter and Schmidhuber 1997, with forget gates; heads as in arXiv 2412.07752. With one head, R is
        weight_hh of torch.nn.LSTM and b the sum of its biases.
    """
    return run(OPERATOR, lstm_reference, x, R, b, state, cu_seqlens, backend)
