"""What the GRU must prove."""

from zoo.ops.recurrent.gru import gru
from zoo.ops.recurrent.rnn_sequential.cell_spec import rnn_spec

SPECS = (rnn_spec(gru, ({"H": 1, "D": 5},), {"gates shut or open": lambda i: i | {"x": i["x"] * 100}}),)
