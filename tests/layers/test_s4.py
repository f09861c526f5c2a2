"""S4's starts, published sizes, both directions, dropout, and where it differs from what a causal model may hold."""

import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from zoo.layers import S4, ChannelDropout, Mamba, SequenceConfig, SequenceModel, hippo
from zoo.ops.core.pairs import as_complex
from zoo.train.optim import AdamW

W4, W8 = (0.55650, 4.60329), (0.42749, 1.95779, 5.35421, 19.85741)
W64 = (0.26386, 0.90586, 1.70297, 2.62565, 3.66481, 4.81914)


@pytest.mark.parametrize(
    ("N", "want"), [(4, (0.55650, 4.60329)), (8, (0.42749, 1.95779, 5.35421, 19.85741)), (64, W64)]
)
def test_frequencies_of_hippo(N: int, want: tuple[float, ...]) -> None:
    A = hippo.legs(N)[0]
    assert_close(A.imag[: len(want)], torch.tensor(want, dtype=torch.float64), rtol=0, atol=6e-6)
    assert_close(A.real, torch.full_like(A.real, -0.5), rtol=0, atol=1e-12)
    if N == 64:
        assert A.imag[-1].item() == pytest.approx(1303.27384, abs=6e-6)


def test_the_pairs_are_the_real_hippo_matrix() -> None:
    N = 16
    A, P, B, V = hippo.legs(N)
    n = torch.arange(N, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    want = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1)
    V, A, P = torch.cat([V, V.conj()], 1), torch.cat([A, A.conj()]), torch.cat([P, P.conj()])
    assert_close(V @ (torch.diag(A) - torch.outer(P, P.conj())) @ V.mH, want.to(V.dtype), rtol=0, atol=1e-11)
    assert_close(V @ torch.cat([B, B.conj()]), root.to(V.dtype), rtol=0, atol=1e-11)


def test_starts_of_s4d() -> None:
    n = torch.arange(3, dtype=torch.float64)
    assert_close(hippo.diagonal("lin", 6)[0].imag, math.pi * n)
    assert_close(hippo.diagonal("inv", 6)[0].imag, 6 / math.pi * (6 / (2 * n + 1) - 1))
    assert_close(hippo.diagonal("real", 6)[0], torch.complex(-(n + 1), 0 * n))
    layer = S4(4, d_state=6, init="real")
    assert_close(layer.log_A_real[2].exp(), (n + 1).float())
    assert (layer.log_dt.exp() >= 1e-3 - 1e-6).all()
    assert (layer.log_dt.exp() <= 1e-1 + 1e-6).all()


@pytest.mark.parametrize(("H", "N", "n_ssm", "count"), [
    (256, 4, 1, 808_008),  # ListOps, Text, Retrieval
    (256, 64, 256, 1_287_168),  # Pathfinder, Path-X
    (512, 64, 1, 3_558_528),  # sequential CIFAR
])  # fmt: skip
def test_sizes_of_the_long_range_arena(H: int, N: int, n_ssm: int, count: int) -> None:
    """Six layers with batch norm, without encoder and decoder, as in the official configurations."""
    with torch.device("meta"):
        layers = nn.ModuleList(
            nn.ModuleList([nn.BatchNorm1d(H), S4(H, d_state=N, mode="dplr", n_ssm=n_ssm, bidirectional=True)])
            for _ in range(6)
        )
    assert sum(p.numel() for p in layers.parameters()) == count


@pytest.mark.parametrize("mode", ["diag", "dplr"])
def test_both_directions_are_two_kernels(mode: str) -> None:
    """y_t = sum_l K_l u_{t-l} + sum_l K'_l u_{t+1+l} + D u_t, packed documents each alone."""
    torch.manual_seed(0)
    layer = S4(4, d_state=4, mode=mode, bidirectional=True).double()
    layer.out_proj = nn.Identity()
    x, cuts = torch.randn(1, 12, 4, dtype=torch.float64), [0, 5, 5, 6, 12]
    impulse = torch.zeros(1, 12, 4, dtype=torch.float64)
    impulse[:, 0] = 1
    K, back = (layer._run(impulse, i, None, None, None)[0][0] for i in range(2))
    out, state = layer(x, cu_seqlens=torch.tensor(cuts))
    assert state is None
    assert layer.state_bytes() == 0
    wanted = []
    for left, right in itertools.pairwise(cuts):
        if left == right:
            continue
        u, want = x[0, left:right], []
        for t in range(right - left):
            past = sum(K[l] * u[t - l] for l in range(t + 1))
            future = sum(back[l] * u[t + 1 + l] for l in range(right - left - t - 1))
            want.append(past + future + layer.D * u[t])
        wanted.append(torch.stack(want))
    assert_close(out[0], F.glu(F.gelu(torch.cat(wanted)), dim=-1))


def test_a_causal_model_takes_no_layer_that_sees_the_future() -> None:
    with pytest.raises(ValueError, match="of a causal model must not see the future, and S4 does"):
        SequenceModel(SequenceConfig(vocab_size=7), lambda i: S4(128, d_state=4, bidirectional=i == 2))
    with pytest.raises(ValueError, match="must not see the future"):
        zoo.create_model("s4", d_model=16, n_layers=2, pattern="s4, s4(bidirectional=true)")
    layer = S4(4, d_state=4, bidirectional=True)
    with pytest.raises(ValueError, match="takes no state; got one"):
        layer(torch.zeros(1, 3, 4), S4(4, d_state=4).init_state(1))


def test_dropout_is_tied_over_time_and_drawn_for_each_sequence() -> None:
    torch.manual_seed(0)
    dropout, x = ChannelDropout(0.5), torch.ones(3, 7, 50)
    y = dropout(x)
    assert (y == y[:, :1]).all()
    assert not torch.equal(y[0], y[1])
    assert set(y.unique().tolist()) == {0.0, 2.0}
    y = dropout(torch.ones(1, 7, 50), torch.tensor([0, 3, 3, 7]))
    assert (y[0, :3] == y[0, 0]).all()
    assert (y[0, 3:] == y[0, 3]).all()
    assert not torch.equal(y[0, 0], y[0, 3])
    assert torch.equal(dropout.eval()(x), x)


def test_copies_are_shared_in_turn() -> None:
    layer = S4(6, d_state=4, n_ssm=2)
    A = layer._shared(torch.complex(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)))
    assert A[:, 0].real.tolist() == [1, 2, 1, 2, 1, 2]


def test_systems_stay_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer, x = S4(8, d_state=16), torch.randn(2, 300, 8).bfloat16()
    exact = layer._run(x.float(), 0, None, None, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer._run(x, 0, None, None, None)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert_close(state, exact[1])
    assert_close(y, exact[0].bfloat16())


def test_the_system_learns_slowly() -> None:
    model = zoo.create_model("s4", d_model=8, n_layers=1, vocab_size=7, d_state=4, mode="dplr")
    optimizer = AdamW(lr=1e-2).build(model)
    names = {id(p): name for name, p in model.named_parameters()}
    slow = {names[id(p)] for g in optimizer.param_groups for p in g["params"] if g["lr"] == pytest.approx(1e-3)}
    assert slow == {f"blocks.0.mixer.{name}" for name in ("log_A_real", "A_imag", "B", "P", "log_dt")}
    assert all(g["weight_decay"] == 0 for g in optimizer.param_groups if g["lr"] < 5e-3 and g["params"])
    assert not Mamba(8).max_learning_rates


@pytest.mark.parametrize(("options", "words"), [
    ({"mode": "dense"}, "mode must be one of diag, dplr; got 'dense'"),
    ({"init": "hippo"}, "init must be one of legs, lin, inv, real with mode='diag'; got 'hippo'"),
    ({"mode": "dplr", "init": "lin"}, "init must be one of legs with mode='dplr'; got 'lin'"),
    ({"mode": "dplr", "rule": "zoh"}, "rule must be bilinear, or zoh with mode='diag'; got 'zoh'"),
    ({"n_ssm": 3}, "n_ssm must divide d_model = 4; got 3"),
    ({"d_state": 5}, "must be even; got 5"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
])  # fmt: skip
def test_refusals(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        S4(4, **options)  # type: ignore[arg-type]


def test_one_of_each_pair_is_kept() -> None:
    """The kernel is that of the real system with both: twice the real part."""
    layer = S4(1, d_state=2).double()
    impulse = torch.zeros(1, 4, 1, dtype=torch.float64)
    impulse[:, 0] = 1
    y, _ = layer._run(impulse, 0, None, None, None)
    step = layer.log_dt.exp() * torch.complex(-layer.log_A_real.exp(), layer.A_imag)[0]
    bar = (step.exp() - 1) / (step / layer.log_dt.exp()) * as_complex(layer.B)[0] * as_complex(layer.C)[0, 0]
    want = torch.stack([2 * (bar * step.exp() ** l).real.sum() for l in range(4)])
    assert_close(y[0, :, 0], want)


@pytest.mark.everything
def test_the_delay_task_needs_oscillations() -> None:
    """100 steps back: S4D-Lin learns it; decaying averages and a plain RNN of the same width stay at chance."""
    path = Path(__file__).parents[2] / "benchmarks" / "delay.py"
    spec = importlib.util.spec_from_file_location("delay", path)
    assert spec is not None
    assert spec.loader is not None
    delay = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(delay)
    assert delay.train("s4d-lin", steps=100)[-1] < 0.3
    for name in ("s4d-real", "rnn"):
        assert min(delay.train(name, steps=60)[-20:]) > 0.9
