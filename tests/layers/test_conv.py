"""Short convolutions side by side, where one message has all their halos."""

import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore

from zoo.layers import ShortConvolution
from zoo.layers.conv import side_by_side
from zoo.ops import shard


def test_states_of_several_streams_are_kept_apart_under_a_shard() -> None:
    """On the first rank the given states are those before the sequence, each of its own width."""
    torch.manual_seed(0)
    convs = nn.ModuleList(ShortConvolution(d, 4) for d in (3, 5))
    xs = [torch.randn(2, 7, d) for d in (3, 5)]
    states = [torch.randn(2, 3, d) for d in (3, 5)]
    exact = side_by_side(convs, xs, states)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        with shard.use(shard.SequenceShard()):
            ours = side_by_side(convs, xs, states)
    finally:
        dist.destroy_process_group()
    assert_close(ours, exact)
