"""Block diffusion: the two streams, the noise, the loss by enumeration, and which models it takes."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.config import compose
from zoo.errors import UserError
from zoo.ops import Visible
from zoo.train.data.synthetic.mqar import MQAR
from zoo.train.data.text.pydocs import PyDocs
from zoo.train.optim import AdamW, Limits
from zoo.train.run import fit
from zoo.train.run.evaluate import evaluate
from zoo.train.tasks.block_diffusion import BlockDiffusion, Grid, subset_weights, whole_text

SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "hidden_size": 32}
MASK = 257


class Ranks:
    """What the task asks a trainer."""

    def __init__(self) -> None:
        self.distributed_sampler_kwargs = {"rank": 0, "num_replicas": 1}


def make(name: str = "sdar", dtype: torch.dtype = torch.float64, fields: Any = None, **settings: Any) -> BlockDiffusion:
    torch.manual_seed(0)
    model = zoo.create_model(name, **(SMALL | {"vocab_size": 258, "init_std": 0.3} | (fields or {}))).to(dtype)
    task = BlockDiffusion(model, AdamW(), Limits(), PyDocs(), **settings)
    task._trainer = Ranks()  # type: ignore[assignment]
    return task


def batch(rows: int = 2, length: int = 11) -> dict[str, Tensor]:
    text = torch.randint(256, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return {"tokens": text[:, :-1], "targets": text[:, 1:].clone(), "n_bytes": torch.tensor(rows * length)}


def alone(model: Any, prefix: Tensor, block: Tensor) -> Tensor:
    """Logits of a noisy block (B, n) behind a clean prefix, by a dense mask over one stream."""
    P, n = prefix.shape[1], block.shape[1]
    tokens = torch.cat([prefix, block], dim=1)
    size = model_block(model)
    at = torch.arange(P + n) // size
    at[P:] = P // size  # a short block is one block
    end = torch.full_like(at, int(at.max()) + 1)
    visible = Visible(at[None], at[None], end[None])
    return model.head(model.hidden(tokens, visible=visible))[:, P:]


def model_block(model: Any) -> int:
    return int(model.config.block_size)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 12])
def test_two_streams_are_the_blocks_one_after_the_other(size: int) -> None:
    task = make(fields={"block_size": size})
    made = task.prepared(batch(), 0, training=True)
    logits = task.model.head(task.noisy_hidden(made))
    noisy, clean = made["tokens"][:, :12], made["clean"]
    assert (noisy != clean).any()
    for begin in range(0, 12, size):
        want = alone(task.model, clean[:, :begin], noisy[:, begin : begin + size])
        torch.testing.assert_close(logits[:, begin : begin + size], want, rtol=1e-12, atol=1e-12)
    visible = Visible(made["label"], made["first"], made["end"])
    if 12 % size == 0:
        assert visible.pairs() == 2 * 12 * (12 + size)  # of two rows
    last = (11 // size) * size
    wrong = alone(task.model, noisy[:, :last], noisy[:, last:])  # a noisy past is seen to differ
    assert size == 12 or not torch.allclose(logits[:, last:], wrong)


def test_a_block_has_no_gradient_in_the_noise_of_another() -> None:
    task = make(fields={"block_size": 4})
    made = task.prepared(batch(1), 0, training=True)
    x = task.model.embedding(made["tokens"]).detach().requires_grad_()
    task.model.embedding = torch.nn.Identity()
    logits = task.model.head(task.noisy_hidden(made | {"tokens": x}))
    for block in range(3):
        (dx,) = torch.autograd.grad(logits[:, 4 * block : 4 * block + 4].sum(), x, retain_graph=True)
        own, seen = slice(4 * block, 4 * block + 4), dx[0].abs().sum(-1) > 0
        want = torch.zeros(24, dtype=torch.bool)
        want[own] = True
        want[12 : 12 + 4 * block] = True
        assert torch.equal(seen, want)


def every_subset(task: BlockDiffusion, given: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """The bound twice, by Sum 1/n mean over subsets of n, and by quadrature over t of every subset's probability."""
    clean, scored, _ = whole_text(given)
    nodes, weights = (torch.from_numpy(z) for z in np.polynomial.legendre.leggauss(20))
    t, dt = (nodes + 1) / 2, weights / 2
    by_count = by_rate = torch.zeros((), dtype=torch.float64)
    for begin in range(0, clean.shape[1], size):
        block = clean[:, begin : begin + size]
        free = [i for i in range(block.shape[1]) if bool(scored[0, begin + i])]
        m = len(free)
        for n in range(1, m + 1):
            for chosen in itertools.combinations(free, n):
                noisy = block.clone()
                noisy[:, list(chosen)] = task.mask_id
                logits = alone(task.model, clean[:, :begin], noisy)[:, list(chosen)]
                ce = F.cross_entropy(logits.flatten(0, 1), block[:, list(chosen)].flatten(), reduction="sum")
                by_count = by_count + ce / (n * math.comb(m, n))
                by_rate = by_rate + ce * (dt * t ** (n - 1) * (1 - t) ** (m - n)).sum()
    return by_count, by_rate


def test_the_bound_by_enumeration_is_its_integral_over_the_rate_and_what_the_loss_estimates() -> None:
    task, given = make(fields={"block_size": 4}), batch(1)
    with torch.no_grad():
        by_count, by_rate = every_subset(task, given, 4)
        torch.testing.assert_close(by_count, by_rate, rtol=1e-12, atol=0)
        losses = torch.stack([task.batch_loss(task.prepared(given, i, training=True))[0] for i in range(400)])
    error = float(losses.std()) / math.sqrt(len(losses))
    assert abs(float(losses.mean()) - float(by_count)) < 4 * error < 0.05 * float(by_count)


@pytest.mark.parametrize("noise", ["block", "document"])
def test_the_weights_of_rates_have_the_mean_one(noise: Any) -> None:
    task = make(noise=noise, lowest=0.2, highest=0.9, fields={"block_size": 4})
    given = batch(64, 99)
    weights = task.prepared(given, 0, training=True)["weights"]
    assert not weights[:, 0].any()  # the first token is given
    shown = weights[:, 1:]
    assert float(shown.mean()) == pytest.approx(1, abs=0.03)  # E[1/t over hidden] = 1
    assert float(shown.max()) <= 1 / 0.2
    assert float(shown[shown > 0].min()) >= 1 / 0.9 - 1e-6
    per_row = torch.tensor([len(row[row > 0].unique()) for row in shown])
    assert (per_row == 1).all() if noise == "document" else (per_row > 1).all()
    plain = make(noise=noise, weight="one", denominator="masked").prepared(given, 0, training=True)
    assert set(plain["weights"].unique().tolist()) == {0.0, 1.0}


def test_denominators_count_all_targets_or_the_hidden_ones() -> None:
    given = batch()
    scored, masked = ((task, task.prepared(given, 0, training=True)) for task in (make(), make(denominator="masked")))
    (nll, n), (same, hidden) = (task.batch_loss(made) for task, made in (scored, masked))
    assert (nll, n, hidden) == (same, 22, (scored[1]["weights"] > 0).sum())


def test_rates_of_one_and_blocks_of_one_are_the_chain_rule() -> None:
    task, given = make(noise="block", lowest=1.0, highest=1.0, block_size=1), batch(2)
    made = task.prepared(given, 0, training=True)
    clean = made["clean"]
    want = torch.zeros((), dtype=torch.float64)
    task.model.config.__dict__["block_size"] = 1  # what `alone` reads
    for i in range(1, 12):
        logits = alone(task.model, clean[:, :i], torch.full((2, 1), MASK))[:, 0]
        want = want + F.cross_entropy(logits, clean[:, i], reduction="sum")
    torch.testing.assert_close(task.batch_loss(made)[0], want, rtol=1e-12, atol=0)
    subsets = make(block_size=1)  # all of one token: no draw is left
    again = subsets.batch_loss(subsets.prepared(given, 5, training=False))[0]
    torch.testing.assert_close(again, want, rtol=1e-12, atol=0)


def test_packed_documents_are_what_each_is_alone() -> None:
    task = make(fields={"block_size": 4}, noise="block", lowest=1.0, highest=1.0)
    text = batch(1, 14)
    bounds = torch.tensor([0, 9, 14], dtype=torch.int32)
    packed = text | {"cu_seqlens": bounds}
    whole = task.batch_loss(task.prepared(packed, 0, training=True))
    parts = [
        task.batch_loss(task.prepared({k: v[:, a:b] if v.ndim else v for k, v in text.items()}, 0, training=True))
        for a, b in ((0, 9), (9, 14))
    ]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0], rtol=1e-12, atol=0)
    assert whole[1] == 14
    joined = task.batch_loss(task.prepared(text, 0, training=True))[0]
    assert not torch.allclose(joined, whole[0])


def test_what_fills_up_a_row_changes_nothing() -> None:
    task, given = make(fields={"block_size": 4}, noise="block", lowest=1.0, highest=1.0), batch(1, 9)
    filled = {
        "tokens": F.pad(given["tokens"], (0, 5)), "targets": F.pad(given["targets"], (0, 5), value=-100),
        "n_bytes": given["n_bytes"],
    }  # fmt: skip
    want, got = (task.batch_loss(task.prepared(each, 0, training=True)) for each in (given, filled))
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=0)
    assert got[1] == want[1] == 9
    got[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.model.parameters())


def test_every_size_of_a_subset_is_as_likely() -> None:
    grid = Grid.of([0, 4000], 4, torch.device("cpu"))
    weights = subset_weights(torch.ones(1, 4000, dtype=torch.bool), grid, 4, torch.Generator().manual_seed(0))
    n = (weights.view(-1, 4) > 0).sum(1)
    assert torch.equal(n.bincount(), torch.tensor([0, 250, 250, 250, 250]))  # stratified: exactly
    torch.testing.assert_close(weights.view(-1, 4).sum(1), torch.full((1000,), 4.0))


def test_models_and_data_that_do_not_go_with_it_are_refused() -> None:
    with pytest.raises(UserError, match="task=block_diffusion lets the tokens of a block see each other, and Mamba"):
        task_of("mamba")
    with pytest.raises(UserError, match="Attention with a window of transformer cannot"):
        task_of("transformer", window=4)
    with pytest.raises(UserError, match="and hydra is none"):
        task_of("hydra")
    with pytest.raises(UserError, match=r"set model\.vocab_size=258"):
        task_of("transformer", vocab_size=257)
    with pytest.raises(UserError, match=r"0 < lowest <= highest <= 1; got 0.5, 0.2"):
        task_of("transformer", settings={"lowest": 0.5, "highest": 0.2})
    with pytest.raises(UserError, match="denoises text, and MQAR is none"):
        BlockDiffusion.fields(MQAR())
    assert task_of("transformer", vocab_size=257, settings={"mask_id": 255}).mask_id == 255


def task_of(name: str, settings: dict[str, Any] | None = None, **fields: Any) -> BlockDiffusion:
    model = zoo.create_model(name, "tiny", **({"n_layers": 1, "vocab_size": 258} | fields))
    return BlockDiffusion(model, AdamW(), Limits(), PyDocs(), **(settings or {}))


@pytest.mark.everything
def test_a_causal_run_is_converted(tmp_path: Path) -> None:
    small = [
        "model.d_model=32", "model.n_layers=2", "data.batch_size=4", "data.seq_len=64", "optim.lr=1e-2",
        "model.vocab_size=258", "trainer.accelerator=cpu", "logger=csv",
    ]  # fmt: skip
    parent, child = tmp_path / "parent", tmp_path / "child"
    causal = compose(["model=sdar", "task=language_modelling", *small, "trainer.max_steps=100"])
    assert fit.run(causal, parent) == 0
    assert fit.run(compose(["model=sdar", *small, f"init_from={parent}", "trainer.max_steps=1"]), tmp_path / "one") == 0
    settings = compose(["model=sdar", *small, f"init_from={parent}", "trainer.max_steps=100"])
    assert fit.run(settings, child) == 0
    before, after = (evaluate(run, [])["bits_per_byte"] for run in (tmp_path / "one", child))
    assert after < before - 0.3
