"""Several losses: each over its count in the whole update, whatever the ranks, batches and cuts in time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import several_losses_training as training
import torch
from several_losses_training import OPTIM, UPDATES, WEIGHT, TwoLosses, whole_batch
from tiny import config
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.errors import UserError
from zoo.train.optim import Limits
from zoo.train.run import fit
from zoo.train.run.endless_epoch import EndlessData
from zoo.train.run.loggers import read_csv
from zoo.train.strategies import BalancedStrategy
from zoo.train.tasks.losses import sequence_means
from zoo.train.tasks.refusals import refuse_uneven_steps
from zoo.train.tasks.task import Task


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("several")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("several_losses_training.py")), str(folder)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    weights = [torch.tensor(each["weights"], dtype=torch.float64) for each in (one, other)]
    return float((weights[0] - weights[1]).abs().max())


@pytest.mark.parametrize("case", [name for name in training.CASES if "itself" not in name])
def test_two_unequal_ranks_equal_one_process(case: str, found: dict[str, Any]) -> None:
    """Four rows and two, with two and none, or one, of the second loss; and with time cut."""
    one = found["1-0"][case]
    for rank in ("2-0", "2-1"):
        assert difference(found[rank][case], one) < 1e-10
        assert found[rank][case]["row"] == pytest.approx(one["row"], rel=1e-6)


def test_ranks_that_divide_by_their_own_counts_are_told_apart(found: dict[str, Any]) -> None:
    case = "each rank by itself"
    assert difference(found["1-0"][case], found["1-0"]["one batch"]) == 0
    assert difference(found["2-0"][case], found["1-0"][case]) > 1e-3


@pytest.mark.parametrize("together", [1, 2])
def test_the_update_is_that_of_a_bare_loop(together: int, found: dict[str, Any]) -> None:
    model: Any = training.model()
    optimizer = OPTIM.build(model)
    for step in range(UPDATES):
        batches = [whole_batch(step * together + i) for i in range(together)]
        batch = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
        logits = model(batch["tokens"])[0]
        nll = F.cross_entropy(logits.transpose(1, 2), batch["targets"], ignore_index=-100, reduction="none")
        text = [row[t != -100].mean() for row, t in zip(nll, batch["targets"], strict=True) if (t != -100).any()]
        square = logits.logsumexp(-1).square()
        bound = [row[there].mean() for row, there in zip(square, batch["bounded"], strict=True) if there.any()]
        optimizer.zero_grad()
        (torch.stack(text).mean() + WEIGHT * torch.stack(bound).mean()).backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    ours = torch.tensor(found["1-0"][{1: "one batch", 2: "two batches"}[together]]["weights"], dtype=torch.float64)
    assert (ours - weights).abs().max() < 1e-10


def test_means_of_sequences_leave_out_what_is_not_there() -> None:
    values = torch.tensor([[1.0, 2.0, torch.nan], [5.0, torch.nan, torch.nan], [torch.nan] * 3], requires_grad=True)
    loss = sequence_means(values, ~values.isnan(), weight=2.0)
    assert loss.total.item() == 1.5 + 5
    assert (loss.number.item(), loss.weight) == (2, 2.0)
    (gradient,) = torch.autograd.grad(loss.total, values)
    assert gradient.tolist() == [[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]]
    whole = sequence_means(values.detach()[:1, :2])
    assert (whole.total.item(), whole.number.item()) == (1.5, 1)


class Wrong(TwoLosses):
    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().counts(batch) | {"bound": torch.tensor(7)}


class Silent(TwoLosses):
    counts = Task.counts


class Renamed(TwoLosses):
    loss_names = ("text", "other")


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kind: type[TwoLosses], together: int) -> None:
        training.fit(kind(training.model(), OPTIM, Limits(max_steps=UPDATES)), together=together)

    with pytest.raises(UserError, match=r"counts\(batch\) of a task must give the counts of its losses"):
        run(Wrong, 2)
    run(Wrong, 1)  # nobody asks
    with pytest.raises(UserError, match=r"Silent has several losses.* give it a method counts\(batch\), or set"):
        run(Silent, 2)
    with pytest.raises(UserError, match="that its loss_names name, text, other; got text, bound"):
        run(Renamed, 1)
    task = TwoLosses(training.model(), OPTIM, Limits(max_steps=1))
    monkeypatch.setattr(training, "EndlessData", lambda data, _: EndlessData(data))
    with pytest.raises(UserError, match=r"EndlessData\(data, task\)"):
        training.fit(task, together=2)
    with pytest.raises(UserError, match="TwoLosses exchanges the counts of its several losses in each; use strategy"):
        refuse_uneven_steps(BalancedStrategy(), "TwoLosses")


def test_a_run_logs_each_loss_and_goes_on_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.allow_package(training.__name__)
    made = config(
        task={"_target_": f"{training.__name__}.TinyTwo"}, trainer__accumulate_grad_batches=2, trainer__log_every=3,
        trainer__max_steps=6, trainer__checkpoint_every=5,
    )  # fmt: skip
    assert fit.run(made, tmp_path / "whole") == 0
    said = capsys.readouterr().out
    assert re.search(r"validation  loss 3.6552  text loss \S+  bound loss \S+  how sure -\d+\.\d dB", said), said
    rows = read_csv(tmp_path / "whole" / "metrics.csv")
    assert all("val_certainty" in row for row in rows if "val_loss" in row)
    for row in rows:
        for way in ("", "val_"):
            if f"{way}loss" in row:
                want = row[f"{way}loss_text"] + 0.5 * row[f"{way}loss_bound"]
                assert row[f"{way}loss"] == pytest.approx(want, rel=1e-4)
    assert rows[-1]["val_loss"] < rows[0]["loss"]

    monkeypatch.setenv("TINY_SIGNALS", "2@9")  # Ctrl-C while the batches of update 5 are read ahead
    assert fit.run(made, tmp_path / "cut") == 130
    monkeypatch.delenv("TINY_SIGNALS")
    assert fit.resume(tmp_path / "cut") == 0
    clock = ("tokens_per_second", "elapsed")
    again = read_csv(tmp_path / "cut" / "metrics.csv")
    assert [{k: v for k, v in row.items() if k not in clock} for row in again] == [
        {k: v for k, v in row.items() if k not in clock} for row in rows
    ]
