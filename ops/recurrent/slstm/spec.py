"""What the sLSTM must prove."""

import torch
from torch import Tensor

from zoo.ops.recurrent.rnn_sequential.cell_spec import rnn_spec
from zoo.ops.recurrent.slstm import slstm


def _valid(state: Tensor) -> Tensor:
    """n is at least 1."""
    h, c, n, m = state.unbind(1)
    return torch.stack([h, c, 1 + n.abs(), m], dim=1)


SPECS = (rnn_spec(slstm, ({"H": 1, "D": 5},), {"gates shut or open": lambda i: i | {"x": i["x"] * 30}}, _valid),)
