"""What the LSTM must prove."""

from zoo.ops.lstm import lstm
from zoo.ops.rnn_sequential.spec import rnn_spec

SPECS = (rnn_spec(lstm, ({"H": 1, "D": 5},), {"gates shut or open": lambda i: i | {"x": i["x"] * 100}}),)
