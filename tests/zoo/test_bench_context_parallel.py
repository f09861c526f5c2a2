"""Predictions for many ranks: the bytes are those of the model, the seconds those of the link."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import zoo
from zoo.bench.context_parallel import STATES, Exchange, Traffic, exchanges_of, predict, predict_model, seconds_of
from zoo.errors import UserError
from zoo.ops.shard import Link

LINK = Link(latency=1e-5, bandwidth=1e9)
H, K, V, LAYERS = 2, 32, 64, 2


def gla(layers: int = LAYERS) -> torch.nn.Module:
    return zoo.create_model("gla", d_model=128, n_layers=layers, n_heads=H, vocab_size=11)


@pytest.mark.parametrize("ranks", [2, 3, 64, 1000])
def test_bytes_are_those_of_the_tables(ranks: int) -> None:
    model = gla()
    state, decay = 4 * H * K * V, 4 * H * K
    expected = {
        "allgather": 2 * (ranks - 1) * (state + decay),
        "lasp2": (ranks - 1) * (2 * state + decay),
        "lasp": 2 * state,
        "zeco": 2 * state,
    }
    for method in STATES:
        traffic = exchanges_of(model, ranks, method, LINK)
        assert traffic.received == LAYERS * expected[method], method
        assert len(traffic.states) == 2 * LAYERS
        assert not traffic.halos
    assert exchanges_of(model, ranks, "zeco", LINK).states[0].blocks == LINK.blocks(ranks, state, V)
    assert not dist.is_initialized()


def test_convolutions_are_counted_as_halos() -> None:
    traffic = exchanges_of(zoo.create_model("deltanet", vocab_size=11), 4, "zeco", LINK)
    assert len(traffic.halos) == 4 * 2  # layers, forward and backward; q, k and v in one message
    assert set(traffic.halos) == {3 * 3 * 128 * 4}


@pytest.mark.parametrize("ranks", [3, 50, 1000])
def test_states_from_both_sides_are_told_apart(ranks: int) -> None:
    """Their blocks arrive mixed, and need not be of one size."""
    model = zoo.create_model("hydra", d_model=128, n_layers=2, head_dim=52, expand=13, d_state=16, vocab_size=11)
    state = 4 * 32 * 16 * 52
    traffic = exchanges_of(model, ranks, "zeco", LINK)
    assert traffic.states == [Exchange("zeco", state, LINK.blocks(ranks, state, 52))] * (2 * 2 * 2)
    assert len(traffic.halos) == 2 * 2 * 4  # layers, passes; the convolution and C from either side


def test_one_rank_sends_nothing() -> None:
    assert exchanges_of(gla(), 1, "zeco") == Traffic()
    assert predict(Traffic(), 2.0, 1, LINK) == 2.0


def test_seconds_follow_the_link() -> None:
    size = 1_000_000  # 1 ms
    assert seconds_of(Exchange("lasp", size), 9, LINK) == pytest.approx(8 * (1e-5 + 1e-3))
    assert seconds_of(Exchange("allgather", 8 * size), 9, LINK) == pytest.approx(4 * 1e-5 + 8e-3)
    best = LINK.blocks(9, size, 10_000)
    assert best == round((7 * 1e-3 / 1e-5) ** 0.5)
    at = [seconds_of(Exchange("zeco", size, n), 9, LINK) for n in range(1, 200)]
    assert min(at) == at[best - 1]
    assert at[best - 1] < 0.25 * at[0]  # 8 ms as a chain, 1.6 ms in blocks


def test_depth_is_a_multiple_of_a_period() -> None:
    found = predict_model(gla, 8, 1, ranks=[1, 4], tokens=64, link=LINK, local=0.5)
    assert found.local == 0.5
    (one, alone), (four, cut) = found.rows
    assert (one, four) == (1, 4)
    assert all(seconds == 0.5 for seconds, _ in alone.values())
    deep = exchanges_of(gla(8), 4, "lasp", LINK)
    assert cut["lasp"][1] == deep.received
    assert cut["lasp"][0] == pytest.approx(predict(deep, 0.5, 4, LINK))


def test_a_process_group_of_ones_own_is_refused(tmp_path: object) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="needs a process without a process group"):
            exchanges_of(gla(), 4, "zeco")
    finally:
        dist.destroy_process_group()


@pytest.mark.everything
def test_the_command() -> None:
    words = ["cp", "model=gla", "ranks=2,64", "local=0.1", "latency=1e-5", "bandwidth=5e10", "tokens=8192"]
    done = subprocess.run([sys.executable, "-m", "zoo", "bench", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| 64 | 524,288 |" in done.stdout
    assert "link 10 us, 50 GB/s" in done.stdout
    for wrong, answer in (("methods=pigeon", "methods can be"), ("latency=-1", "latency must be a number over 0")):
        done = subprocess.run(
            [sys.executable, "-m", "zoo", "bench", "cp", "model=gla", wrong],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert answer in done.stderr
