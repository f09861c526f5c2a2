"""Memory of a training step: the estimate against what is measured, the fraction to offload, the automatic plan."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import zoo
from zoo.bench.measure import peak_bytes
from zoo.config import compose
from zoo.errors import UserError
from zoo.layers.memory import MemoryPlan
from zoo.train.memory import estimate as estimating
from zoo.train.memory.choose import SPARE, MemoryConfig, choose, parse_size
from zoo.train.memory.estimate import estimate
from zoo.train.memory.live_bytes import LiveBytes, flash_on_meta
from zoo.train.memory.offload_fraction import measure, offload_fraction
from zoo.train.run import fit

PLANS = {
    "none": MemoryPlan(),
    "block": MemoryPlan(recompute="block"),
    "mixer_saved": MemoryPlan(recompute="mixer_saved"),
    "tiles": MemoryPlan(recompute="mixer_saved", tile_mlp="auto"),
    "only tiles": MemoryPlan(tile_mlp=8),
}
FIELDS: dict[str, Any] = {"d_model": 64, "n_layers": 4, "n_heads": 2, "vocab_size": 257, "hidden_size": 192}


def build(device: str = "meta", **changes: Any) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return zoo.create_model("deltanet", **{**FIELDS, **changes})


def live(call: Any) -> int:
    with LiveBytes() as counted:
        call()
    return counted.peak


# -- counting ---------------------------------------------------------------------------------------------------


def test_live_bytes_are_those_of_the_profiler() -> None:
    model, tokens = build("cpu"), torch.randint(257, (2, 400))

    def step() -> None:
        loss = model.head_loss(model.hidden(tokens), tokens)
        torch.autograd.grad(loss, list(model.parameters()))

    step()
    assert live(step) == pytest.approx(peak_bytes(step, torch.device("cpu")), rel=0.02)


def test_live_bytes_by_hand() -> None:
    there = torch.ones(1000)
    with LiveBytes() as counted:
        view = there[:10].view(5, 2)
        assert counted.live == 0
        a = there + 1
        b = a.view(10, 100).t()
        assert counted.live == 4000
        del a
        assert counted.live == 4000
        c = torch.empty(3, dtype=torch.float64)
        del b
        assert (counted.live, counted.peak) == (24, 4024)
        counted.reset()
        assert counted.peak == 24
    assert view.numel() == 10
    assert c.numel() == 3


def test_attention_on_the_meta_device_makes_no_square() -> None:
    q = torch.empty(1, 2, 4096, 16, device="meta", requires_grad=True)
    real = torch.nn.functional.scaled_dot_product_attention
    with flash_on_meta():
        peak = live(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward())
    assert peak < 4 * 4096 * 4096
    assert torch.nn.functional.scaled_dot_product_attention is real


# -- the estimate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    "fields", [{}, {"pattern": "deltanet, attention, mamba2(d_state=16, head_dim=16), attention(window=64)"}],
    ids=["deltanet", "hybrid"],
)  # fmt: skip
def test_the_estimate_is_what_is_measured(fields: dict[str, Any], plan: MemoryPlan) -> None:
    """At every phase of a step with Adam; from the meta device alone, where nothing has been computed."""
    B, T = 1, 1500
    expected = estimate(build(**fields), B, T, plan)
    model, tokens = build("cpu", **fields), torch.randint(257, (B, T))
    model.use_memory(plan)

    def step() -> None:
        model.head_loss(model.hidden(tokens), tokens, reduction="sum").backward()

    static = 12 * sum(p.numel() for p in model.parameters())
    assert expected.peak == pytest.approx(static + live(step), rel=0.1)
    assert expected.peak > 3 * static  # activations are what was estimated


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_long_sequences_by_two_short_ones(plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    T = 12_288
    far = estimate(build(n_layers=1, d_model=128), 1, T, plan)
    monkeypatch.setattr(estimating, "SHORTEST", T)
    run = estimate(build(n_layers=1, d_model=128), 1, T, plan)
    assert far.peak == pytest.approx(run.peak, rel=0.05)
    assert far.inputs == run.inputs


def test_the_table_of_the_field() -> None:
    """bf16-mixed takes 18 bytes a parameter; full checkpointing keeps B T D L numbers."""
    model = build()
    n = sum(p.numel() for p in model.parameters())
    found = estimate(model, 2, 512, PLANS["block"], precision="bf16-mixed")
    assert found.weights + found.gradients + found.optimizer == 18 * n
    assert found.inputs == 2 * 512 * 64 * 4 * 2
    assert (found.mixers, found.feed_forwards, found.host) == (0, 0, 0)
    plain = estimate(model, 2, 512, PLANS["none"])
    assert plain.inputs == 2 * found.inputs
    norm, up = 64, 192
    assert plain.feed_forwards == pytest.approx(4 * 2 * 512 * 4 * (2 * norm + 4 * up), rel=0.01)
    assert "block inputs" in plain.table()
    with pytest.raises(ValueError, match="precision must be one of"):
        estimate(model, 1, 1, precision="8")
    with pytest.raises(ValueError, match="SequenceModel"):
        estimate(torch.nn.Linear(2, 2), 1, 1)


def test_offloaded_inputs_leave_the_device() -> None:
    B, T = 1, 4096
    here = estimate(build(n_layers=8), B, T, MemoryPlan(recompute="block"))
    there = estimate(build(n_layers=8), B, T, MemoryPlan(recompute="block", offload="inputs"))
    assert there.host == here.inputs == 8 * T * 64 * 4
    assert there.inputs == 0
    # seven inputs; then the peak is at the first block, when all others have their gradients
    grads = 4 * sum(p.numel() for p in build().blocks[0].parameters())
    assert here.peak - there.peak == pytest.approx(7 * (T * 64 * 4 - grads), rel=0.05)


def test_kernels_keep_less_than_the_torch_forms() -> None:
    pytest.importorskip("triton")
    there, here = (estimate(build(), 1, 1024, PLANS["mixer_saved"], device=device) for device in ("cuda", "cpu"))
    # an operator that saves its inputs alone: its output, and the boundary states
    assert there.mixers < here.mixers
    assert there.mixers == pytest.approx(there.inputs, rel=0.2)


# -- the fraction to offload ------------------------------------------------------------------------------------

SIZES = st.floats(0.0, 100.0)


@example(1.0, 1.0, 100.0, 10.0, 100.0, 3, 10.0)  # three blocks are the fewest that send one
@given(*[SIZES] * 4, st.floats(0.01, 100.0), st.integers(1, 80), st.floats(0.01, 10.0))
def test_the_fraction_is_the_best_of_a_fine_grid(
    inputs: float, mixer: float, others: float, host: float, bandwidth: float, n: int, seconds: float
) -> None:
    """A linear programme in one variable, by brute force: no better alpha is feasible, and the answer is."""

    def feasible(alpha: float, slack: float) -> bool:
        sent = inputs + mixer + alpha * others
        return sent <= bandwidth * seconds + slack and (n - 2) * sent <= host + slack

    found = offload_fraction(
        bandwidth=bandwidth, seconds=seconds, inputs=inputs, mixer=mixer, others=others, host=host, n_layers=n
    )
    grid = [i / 200 for i in range(201)]
    if found is None:
        assert not any(feasible(alpha, -1e-9) for alpha in grid)
        return
    assert 0 <= found <= 1
    assert feasible(found, 1e-6 * (1 + n * 300))
    assert all(alpha <= found + 1e-9 for alpha in grid if feasible(alpha, -1e-6))
    for change in ({"bandwidth": 2 * bandwidth}, {"host": 2 * host + 1}, {"seconds": 2 * seconds}):
        more = offload_fraction(
            **{
                "bandwidth": bandwidth, "seconds": seconds, "inputs": inputs, "mixer": mixer, "others": others,
                "host": host, "n_layers": n, **change,
            }
        )  # fmt: skip
        assert more is not None
        assert more >= found


def test_a_linear_models_fraction_does_not_depend_on_length() -> None:
    """Bytes and seconds both grow with T: k = 12 D BW / F hidden tensors, alpha = (k - 2) / 14."""
    for D, alpha in ((2048, 0.08), (4096, 0.29), (8192, 0.74)):
        for T in (10_000, 1_000_000):
            unit = 2.0 * T * D
            found = offload_fraction(
                bandwidth=50e9, seconds=2 * 12 * D * D * T / 400e12, inputs=unit, mixer=unit, others=14 * unit,
                host=float("inf"), n_layers=32,
            )  # fmt: skip
            assert found == pytest.approx(alpha, abs=0.01)


def test_the_measurement_runs_here() -> None:
    seconds, bandwidth = measure(lambda x: x @ x, torch.randn(64, 64))
    assert seconds > 0
    assert bandwidth > 0


# -- the automatic plan -----------------------------------------------------------------------------------------


@pytest.mark.everything
def test_auto_takes_the_first_plan_that_fits() -> None:
    model = build()
    sizes = {}
    for recompute in ("none", "mixer_saved", "block"):
        for tile_mlp in ("off", "auto"):
            plan = MemoryPlan(recompute=recompute, tile_mlp=tile_mlp)
            sizes[plan] = estimate(model, 2, 1024, plan).peak
    auto = MemoryConfig(recompute="auto", offload="auto", tile_mlp="auto", budget=1)
    for budget in sorted(sizes.values()):
        config = MemoryConfig(recompute="auto", offload="auto", tile_mlp="auto", budget=int(budget / (1 - SPARE)) + 1)
        choice = choose(model, 2, 1024, config)
        assert choice.estimate is not None
        assert choice.estimate.peak <= budget
    roomy = choose(model, 2, 1024, MemoryConfig(recompute="auto", tile_mlp="auto", budget="10GiB"))
    assert roomy.plan == MemoryPlan()
    tight = choose(model, 2, 1024, auto)
    assert tight.estimate is not None
    assert tight.estimate.peak == min(sizes.values())
    assert "warning: even this" in str(tight)
    fixed = choose(model, 2, 1024, MemoryConfig(recompute="mixer_saved", tile_mlp="auto", offload="auto", budget=1))
    assert fixed.plan == MemoryPlan(recompute="mixer_saved", tile_mlp="auto")
    assert choose(model, 2, 1024, MemoryConfig(recompute="auto", budget=1), device="cpu").plan.offload == "none"


def test_a_device_offloads_last() -> None:
    pytest.importorskip("triton")
    config = MemoryConfig(recompute="auto", tile_mlp="auto", offload="auto", budget=1)
    assert choose(build(n_layers=24), 1, 1024, config, device="cuda").plan.offload == "inputs"


def test_alpha_from_a_measurement() -> None:
    model = build(n_layers=8)
    config = MemoryConfig(recompute="mixer_saved", offload="alpha:auto")
    found = [choose(model, 1, 512, config, trial=lambda s=s: (s, 1e9)).plan.offload for s in (1e-6, 0.003, 1.0)]
    assert found[0] == "inputs"  # not even those hide; nothing else is sent
    assert found[2] == "alpha:1.000"
    assert 0 < float(found[1].removeprefix("alpha:")) < 1
    run = build("cpu", n_layers=1)
    assert choose(run, 1, 64, config).plan.recompute == "mixer_saved"


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2**31), ("1.5 MiB", 3 * 2**19), ("40GB", 40 * 10**9), ("7", 7), ("3k", 3000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute": "all"}, "memory.recompute must be"),
        ({"recompute": "none", "offload": "inputs"}, "offload=inputs"),
        ({"recompute": "block", "offload": "alpha:auto"}, "needs recompute=mixer_saved"),
        ({"budget": "many"}, "must read like 2GiB"),
        ({"budget": "2iB"}, "must read like 2GiB"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MemoryConfig(**settings)


def test_knobs_are_held_against_the_models_own_plan() -> None:
    config = MemoryConfig(offload="inputs")
    config.check(MemoryPlan(recompute="block"))
    with pytest.raises(UserError, match="needs recompute=block"):
        config.check(MemoryPlan())


# -- runs -------------------------------------------------------------------------------------------------------


@pytest.mark.everything
def test_a_run_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.n_layers=2", "data=copying", "trainer.max_steps=2", "trainer.accelerator=cpu"]
    losses = []
    for number, words in enumerate((["memory=auto", "memory.budget=8MiB"], ["model.activation_checkpointing=true"])):
        run = tmp_path / str(number)
        assert fit.run(compose([*small, *words]), run) == 0
        losses.append((run / "metrics.csv").read_text().splitlines()[-1].split(",")[0])
        out = capsys.readouterr().out
        assert ("memory: recompute=" in out) == (number == 0)
        assert ("memory of the first step" in out) == (number == 0)
        assert zoo.load(run).config.activation_checkpointing == (number == 1)
    assert losses[0] == losses[1]


def test_a_run_of_before_the_group_goes_on() -> None:
    assert fit._memory(None, build("cpu"), None) == []  # type: ignore[arg-type]


@pytest.mark.everything
def test_two_processes(tmp_path: Path) -> None:
    """DDP averages gradients as without tiles; under a sequence shard mixer_saved sends every message once."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory_processes.py")), str(tmp_path)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["ddp"]) == 4
    assert max(found["ddp"].values()) < 1e-12
    assert len(found["shard"]) == 4
    for errors in found["shard"].values():
        assert errors["gradient"] < 1e-12
    messages = {name: errors["messages"] for name, errors in found["shard"].items()}
    assert len(set(messages.values())) == 1
    assert messages["none-off"] > 0
