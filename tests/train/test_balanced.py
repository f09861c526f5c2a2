"""Training by plans equals training in one process; the processes are in balanced_training.py."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from balanced_cases import CASES, MODELS, Case
from balanced_data import Uneven, documents
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from sharded_data import V

from zoo.config import compose
from zoo.errors import UserError
from zoo.ops import shard
from zoo.registry import create_model
from zoo.train.balance import CostModel, Flexible, Hybrid, PackedStream, Uniform
from zoo.train.balance.plan import edge
from zoo.train.data.core.planned import FILLER, InMemory, PlanBatch, Rows
from zoo.train.data.text.documents import TextDocuments, TokenDocuments
from zoo.train.strategies import BalancedFSDPStrategy, BalancedStrategy

Found = dict[str, dict[str, list[Any]]]
COMPARED = [c for c in CASES if not c.refused and not c.broken and c.strategy != "auto" and c.model != "dropping"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("balanced")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("balanced_training.py")), str(folder)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "found.json").read_text())


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of any weight."""
    return float((torch.tensor(one["weights"]) - torch.tensor(other["weights"])).abs().max())


@pytest.mark.everything
@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
def test_three_updates_by_plans_equal_one_process(case: Case, found: Found) -> None:
    """Losses, weights, metrics and tokens, with clipping, two batches an update, and documents on up to four ranks."""
    whole = found[case.like or case.model]["1"][0]
    assert {int(world) for world in found[case.name]} == set(case.worlds)
    for world, ranks in found[case.name].items():
        assert len(ranks) == int(world)
        for result in ranks:
            losses = whole["losses"][-len(result["losses"]) :]
            assert result["losses"] == pytest.approx(losses, rel=1e-10 if case.double else 1e-2, abs=0), world
            if result["weights"] and case.double:  # cut ones are gathered on the first rank
                assert apart(result, whole) < 1e-10, world
            assert result["metrics"] == pytest.approx(whole["metrics"], rel=1e-5 if case.double else 1e-2)
            if not case.resume and case.strategy not in ("ddp", "lightseq"):
                assert result["tokens"] == whole["tokens"]
        assert ranks[0]["weights"]


@pytest.mark.everything
def test_the_plans_were_uneven(found: Found) -> None:
    """Else the comparison says little."""
    for world, ring in ((3, 3), (4, 4)):
        ranks = [result["steps"] for result in found["transformer balanced"][str(world)]]
        counts = [{len(batch) for batch in batches} for batches in zip(*ranks, strict=True)]
        assert any(len(c) > 1 for c in counts), "ranks with unequal numbers of micro-steps"
        assert max(size for batches in ranks for batch in batches for size, _ in batch) == ring
    four = [result["steps"] for result in found["idle"]["4"]]
    assert any(not batch for batches in four for batch in batches), "a rank without a micro-step"
    for name, world, ring in (("transformer fsdp", 4, 4), ("hybrid fsdp", 4, 4), ("idle fsdp", 2, 1)):
        ranks = [result["steps"] for result in found[name][str(world)]]
        for batches in zip(*ranks, strict=True):
            assert len({len(batch) for batch in batches}) == 1, "every rank runs every micro-step of cut weights"
        assert max(size for batches in ranks for batch in batches for size, _ in batch) == ring
    assert any(tokens == 0 for batches in ranks for batch in batches for _, tokens in batch), "one without work"


@pytest.mark.everything
def test_the_comparison_can_fail(found: Found) -> None:
    """Without the states of earlier ranks, or with the ranks of rings in the wrong order, weights are others."""
    for name, world in (("dropped", "2"), ("turned round", "3")):
        for result in found[name][world]:
            assert apart(result, found["deltanet"]["1"][0]) > 1e-4, name


@pytest.mark.everything
@pytest.mark.parametrize("case", [c for c in CASES if c.refused], ids=lambda case: case.name)
def test_what_cannot_be_run_is_refused_on_every_rank(case: Case, found: Found) -> None:
    """In one sentence and without a hang; so is a rank that died, by those that are left."""
    for world, ranks in found[case.name].items():
        assert len(ranks) == int(world) - case.killed
        for result in ranks:
            assert result["error"].startswith("UserError: ")
            assert case.refused in result["error"]


@pytest.mark.everything
def test_generators_stay_alike_whatever_the_micro_steps(found: Found) -> None:
    ranks = found["dropout"]["3"]
    assert len({result["drawn"] for result in ranks}) == 1
    assert len({sum(map(len, result["steps"])) for result in ranks}) > 1
    assert ranks[0]["losses"][0] != found["gla"]["1"][0]["losses"][0]


# -- one process ------------------------------------------------------------------------------------------------


class Ranks:
    """Stands for a launcher."""

    def __init__(self, ranks: int, rank: int):
        self.ranks, self.rank = ranks, rank

    def world_size(self) -> int:
        return self.ranks

    def global_rank(self) -> int:
        return self.rank


def strategy_of(model: str, cls: Any = BalancedStrategy, ranks: int = 6, rank: int = 0, **settings: Any) -> Any:
    """A strategy that is not started."""
    strategy = cls(**settings)
    name, fields = MODELS[model]
    strategy._lightning_module = create_model(name, "tiny", vocab_size=V, **fields)
    strategy.cluster_environment = Ranks(ranks, rank)
    return strategy


def planned(data: TokenDocuments | TextDocuments, ranks: int, rank: int, **settings: Any) -> tuple[Any, Any]:
    """A rank's loaders of training and validation."""
    strategy = strategy_of("gla", ranks=ranks, rank=rank, planner="hybrid", **settings)
    data.trainer = SimpleNamespace(strategy=strategy, limit_train_batches=1.0)  # type: ignore[assignment]
    data._in_flight = lambda: 0  # type: ignore[method-assign]
    return data.train_dataloader(), data.val_dataloader()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("max_length", [None, 7])
def test_every_target_once_an_epoch_on_some_rank(ranks: int, max_length: int | None) -> None:
    """In training and validation, cut or whole: the pairs of token and target are those of the documents."""
    loaders = [planned(Uneven(max_length=max_length), ranks, rank) for rank in range(ranks)]
    orders = []
    for split, texts in ((0, documents(40, 1)), (1, documents(9, 2))):
        want = sorted((int(a), int(b)) for text in texts for a, b in itertools.pairwise(text))
        for _ in range(2):  # epochs, whose numbers of batches may differ
            passes = [list(each[split]) for each in loaders]
            assert len({len(batches) for batches in passes}) == 1
            assert all(len({batch.digest for batch in same}) == 1 for same in zip(*passes, strict=True))
            parts = [part for batches in passes for batch in batches for _, part in batch.micro_batches]
            pairs = [
                (int(a), int(b)) for p in parts for a, b in zip(p["tokens"][0], p["targets"][0], strict=True)
            ]  # fmt: skip
            assert sorted(pairs) == want
            orders.append([batch.digest for batch in passes[0]])
    assert orders[0] != orders[1]
    assert orders[2] == orders[3]


def test_bytes_are_counted_once_wherever_documents_are_cut(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("|".join("naïve text " * n for n in (1, 2, 30, 3, 4, 1)) + "|end")
    path = str(tmp_path / "book.txt")

    def make() -> TextDocuments:
        return TextDocuments(path=path, separator="|", global_tokens=150, val_fraction=0.2)

    texts = make().text.split
    rows = [list(loader) for loader in (make().train_dataloader(), make().val_dataloader())]
    for split in (0, 1):
        parts = [
            part
            for rank in range(3)
            for batch in planned(make(), 3, rank, capacity=130)[split]
            for _, part in batch.micro_batches
        ]
        want = sum(len(text.encode()) for text in texts[split])
        assert sum(int(part["n_bytes"]) for part in parts) == want
        assert sum(int(row["n_bytes"]) for row in rows[split]) == want
        assert len(parts) > len(rows[split])


@pytest.mark.parametrize("stop", [1, 5, 8, 9, 20])
def test_a_position_goes_on_under_any_strategy_and_number_of_ranks(stop: int) -> None:
    """Its documents are those that would have come."""

    def names(batch: Any) -> list[int]:
        if isinstance(batch, PlanBatch):
            return [batch.digest]
        return sorted(np.diff(batch["cu_seqlens"]).tolist())

    def after(loader: Any) -> list[Any]:
        return [names(batch) for batch in itertools.chain.from_iterable(loader for _ in range(4))]

    whole = Uneven()
    want = after(whole.train_dataloader())
    first = Uneven(num_workers=0)
    loader, _ = planned(first, 3, 1)
    batches = itertools.chain.from_iterable(loader for _ in range(4))
    for _ in range(stop):
        next(batches)
    state = first.state_dict()
    second = Uneven()
    second.load_state_dict(state)
    got = after(second.train_dataloader())
    left = want[stop : stop + 15]
    assert left == got[: len(left)]
    third = Uneven(num_workers=1)
    third.load_state_dict(state)
    ahead = [names(batch) for batch in itertools.islice(planned(third, 3, 1)[0], 3)]
    assert ahead == [names(batch) for batch in itertools.islice(batches, 3)][: len(ahead)]
    with pytest.raises(UserError, match="belongs to its documents"):
        Uneven(global_tokens=130).load_state_dict(state)


def test_the_cuts_of_plans_are_those_of_places() -> None:
    for length, size, chunk in itertools.product((1, 5, 41, 64), (1, 2, 3, 5), (1, 4, 64)):
        cuts = [edge(length, i, size, chunk) for i in range(size + 1)]
        assert [shard.stretch(length, i, size, chunk) for i in range(size)] == list(itertools.pairwise(cuts))


def test_a_rank_without_a_document_gets_a_row_that_scores_nothing() -> None:
    data = TokenDocuments(documents(3, 5), documents(1, 6), vocab_size=V)
    rows = [data.sources[0].batch(0, 0, rank, 4) for rank in range(4)]
    assert [int((row["targets"] >= 0).any()) for row in rows] == [1, 1, 1, 0]
    assert sum(int((row["targets"] >= 0).sum()) for row in rows) == sum(len(x) - 1 for x in documents(3, 5))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: TokenDocuments([torch.tensor([1])], [torch.tensor([1, 2])], vocab_size=V).documents, "at least two"),
        (lambda: TokenDocuments([torch.ones(3)], [torch.tensor([1, 2])], vocab_size=V).documents, "whole numbers"),
        (lambda: TokenDocuments([], [torch.tensor([1, 2])], vocab_size=V).documents, "training part must hold"),
        (lambda: Uneven(global_tokens=0), "data.global_tokens must be at least 1"),
        (lambda: Uneven(max_length=0), "data.max_length must be at least 1"),
        (lambda: TextDocuments(separator="|"), "got no data.path"),
    ],
)
def test_documents_are_refused(made: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made()


@pytest.mark.parametrize("strategy", [BalancedStrategy, BalancedFSDPStrategy])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"planner": "fastest"}, r"planner must be one of auto, .* got 'fastest'"),
        ({"method": "heads"}, r"method must be one of allgather, .* got 'heads'"),
        ({"attention": "zigzag"}, r"attention must be one of lightseq, .* got 'zigzag'"),
        ({"capacity": 0}, "capacity must be at least 1 token; got 0"),
        ({"timeout": 0.0}, "timeout must be above 0 seconds; got 0"),
    ],
)
def test_settings_are_refused_before_anything_starts(strategy: Any, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        strategy(**settings)


def test_unequal_micro_steps_are_refused_where_weights_are_cut() -> None:
    with pytest.raises(UserError, match="planner=hybrid gives ranks unequal numbers"):
        BalancedFSDPStrategy(planner="hybrid")


def test_auto_chooses_the_planner_by_the_model() -> None:
    assert isinstance(strategy_of("deltanet").planner_of(10, 100), PackedStream)
    assert isinstance(strategy_of("deltanet", BalancedFSDPStrategy).planner_of(10, 100), PackedStream)
    for model in ("transformer", "hybrid"):
        assert isinstance(strategy_of(model).planner_of(10, 100), Hybrid)
        assert isinstance(strategy_of(model, BalancedFSDPStrategy).planner_of(10, 100), Flexible)
    assert isinstance(strategy_of("hybrid", planner="uniform").planner_of(10, 100), Uniform)


def test_the_default_capacity_is_twice_a_share_of_the_batch_and_holds_the_longest_document() -> None:
    found = [strategy_of("hybrid", cls).planner_of(9000, 600) for cls in (BalancedStrategy, BalancedFSDPStrategy)]
    assert [planner.cost.capacity for planner in found] == [1500, 2250]  # on six ranks, or the four of a group
    assert strategy_of("hybrid").planner_of(10, 600).cost.capacity == 200
    assert strategy_of("gla", chunk=64).planner_of(10, 600).capacity == 256


def test_nominal_costs_follow_from_the_model_and_can_be_replaced() -> None:
    linear, squared = (strategy_of(model).cost(100) for model in ("gla", "transformer"))
    assert linear.a1 == 0 < squared.a1
    # two layers of 6 H K s^2 against six operations for each weight that is no table
    model = strategy_of("transformer").lightning_module
    weights = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    assert squared.a1 / squared.a2 == pytest.approx(2 * 6 * 16 / (6 * weights), rel=0.2)
    window = strategy_of("transformer")
    window._lightning_module = create_model("transformer", "tiny", vocab_size=V, **MODELS["transformer"][1], window=4)
    assert window.cost(100).a1 == 0
    own = CostModel(a1=1.0, a2=2.0, b1=3.0, capacity=7, communication=squared.communication)
    found = strategy_of("transformer", cost=own, b1=5.0).cost(100)
    assert (found.a1, found.a2, found.b1, found.capacity) == (1.0, 2.0, 5.0, 100)
    with pytest.raises(UserError, match="strategy: CostModel: a1 and b1 must be at least 0"):
        strategy_of("transformer", a1=-1.0).cost(100)


def test_the_names_are_presets_and_settings() -> None:
    for name, cls in (("balanced", BalancedStrategy), ("balanced_fsdp", BalancedFSDPStrategy)):
        assert type(StrategyRegistry.get(name)) is cls
        composed = compose([f"strategy={name}", "data=documents", "strategy.planner=flexible", "strategy.capacity=512"])
        assert composed["strategy"]["capacity"] == 512
    trainer = Trainer(accelerator="cpu", devices=2, strategy="balanced", logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, BalancedStrategy)


def test_a_rank_without_a_document_has_a_row_of_filler() -> None:
    """As long as a row that four ranks may share, and nothing in it is scored."""
    held = InMemory([torch.arange(6)])
    sampler: Any = SimpleNamespace(documents=lambda epoch, step: np.array([0]), lengths=held.lengths)
    rows = [Rows(held, sampler).batch(0, 0, rank, 2) for rank in range(2)]
    full, filler = sorted(rows, key=lambda row: bool((row["targets"] == -100).all()))
    assert full["tokens"].tolist() == [[0, 1, 2, 3, 4]]
    assert full["targets"].tolist() == [[1, 2, 3, 4, 5]]
    assert filler["tokens"].tolist() == [[0] * FILLER]
    assert filler["targets"].tolist() == [[-100] * FILLER]
    assert filler["cu_seqlens"].tolist() == [0, FILLER]


def test_all_ranks_begin_with_the_weights_of_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(flat: torch.Tensor, src: int) -> None:
        flat.fill_(10.0 + src)  # what every number of that rank is

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    strategy = BalancedStrategy()
    strategy.model = torch.nn.BatchNorm1d(3)
    strategy.configure_ddp()
    for x in (*strategy.model.parameters(), *strategy.model.buffers()):
        assert (x == 10).all()
