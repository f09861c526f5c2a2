"""A softmax read from a bank of learnt vectors, for every token by itself."""

import torch
from torch import Tensor

from zoo.ops.core.call import Operator
from zoo.ops.token_wise.memory_bank.reference import memory_bank_reference

__all__ = ["memory_bank"]

OPERATOR = Operator(
    "memory_bank", cp_kind="local", forms=("torch",), no_kernels="two matrix products are nearly all of its work"
)


@OPERATOR.public(recomputed=True)
def memory_bank(x: Tensor, bank: Tensor, *, scale: float = 1.0, backend: str = "auto") -> Tensor:
    """Read from a bank whose vectors are keys and values at once: y_t = bank^T softmax(scale * bank x_t).

    It is attention of one head to M fixed vectors. No token sees another one.

    Args:
        x: (B, T, D), any float dtype.
        bank: (M, D), M at least 1, in the dtype of x.
        scale: of the scores; GAM has none, which is 1.
        backend: "auto" and "torch" are matrix products, "reference" is the loop.

    Returns:
        y: (B, T, D), in the dtype of x: averages of the bank's vectors.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the bank is empty, or the backend cannot run here.

    Cost: 4 B T M D operations. The softmax of the scores, (B, T, M), is kept for the backward pass. Products are
    in the dtype of x, the softmax in float32 at least.
    Source: Acharya, "Gated Associative Memory", arXiv 2509.00605, the global path.
    """
    call = OPERATOR.begin({"x": (x, "B T D"), "bank": (bank, "M D")}, alike=("x", "bank"), backend=backend)
    if not call.sizes["M"]:
        raise ValueError("memory_bank: bank must have at least one vector; got M = 0")
    if call.backend == "reference":
        return memory_bank_reference(x, bank, scale)
    scores = (x @ bank.t()).to(call.dtype) * scale  # (B, T, M)
    y: Tensor = torch.softmax(scores, dim=-1).to(x.dtype) @ bank
    return y
