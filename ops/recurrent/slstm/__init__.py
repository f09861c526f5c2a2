"""The sLSTM of xLSTM: exponential input gates, a normaliser and a stabiliser, a recurrent matrix for each head."""

from torch import Tensor

from zoo.ops.recurrent.rnn_sequential import operator, run
from zoo.ops.recurrent.slstm.reference import slstm_reference

__all__ = ["slstm"]


OPERATOR = operator("slstm")


@OPERATOR.public()
def slstm(
    x: Tensor,
    R: Tensor,
    b: Tensor | None = None,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run c_t = sig(f) c_{t-1} + exp(i) tanh(z), n_t = sig(f) n_{t-1} + exp(i), h_t = sig(o) c_t / n_t in each head.

    The gates i, f, z, o are x_t + R h_{t-1} + b. c and n are held over exp(m), m_t = max(i, logsigmoid(f) + m_{t-1}),
    so that no gate overflows.

    Args:
        x: what the input brings to the gates i, f, z, o, (B, T, 4, H, D), any float dtype.
        R: recurrent matrices of i, f, z, o, (4, H, D_out, D_in), in x's dtype.
        b: biases of the same, (4, H, D), in x's dtype; zeros when omitted.
        state: h, c, n, m before the first step, (B, 4, H, D); zeros when omitted. n is at least 1, or 0 where
            nothing was written yet and c is 0, too. With packed documents (n, 4, H, D).
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" (Triton on CUDA; torch elsewhere, for float64, for D > 128 and for a single token), "triton",
            "torch" or "reference".

    Returns:
        h: (B, T, H, D), in the dtype of x.
        last: the state after the last step, (B, 4, H, D) or (n, 4, H, D), float32 (float64 for float64 inputs); feed it
            back as `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: 8 B T H D^2 operations in T steps one after the other. For the backward the torch form keeps 9 float32 numbers
        for each of h; the kernels keep 3 and make the gates again. Gradients are exact for losses on all of `last`.
    Source: arXiv 2405.04517, section 2.2 and appendix A; heads as in arXiv 2412.07752.
    """
    return run(OPERATOR, slstm_reference, x, R, b, state, cu_seqlens, backend)
