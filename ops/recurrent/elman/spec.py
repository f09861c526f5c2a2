"""What Elman's network must prove."""

from zoo.ops.recurrent.elman import elman
from zoo.ops.recurrent.rnn_sequential.cell_spec import rnn_spec

SPECS = (rnn_spec(elman, ({"H": 1, "D": 16},), {"no recurrence": lambda i: i | {"R": i["R"] * 0}}),)
