"""What validation measures does not depend on the size of a batch, nor on the number of ranks."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

import zoo
from zoo.tokenizers import ByteTokenizer
from zoo.train.data.core.corpus import IGNORE, Corpus, validation_source
from zoo.train.data.text.hub import Hub
from zoo.train.data.text.pydocs import PyDocs
from zoo.train.data.text.text_files import TextFiles

TEXTS = st.lists(st.text(st.sampled_from("abé漢\n"), max_size=20), min_size=1, max_size=6).filter(any)
LENGTHS = ByteTokenizer().byte_lengths()


def contexts(batches: list[dict[str, Tensor]]) -> list[tuple[tuple[int, ...], int]]:
    """Every scored target, in order, with all that a model sees before it."""
    seen = []
    for batch in batches:
        rows = batch["tokens"].tolist()
        borders = batch["cu_seqlens"].tolist() if "cu_seqlens" in batch else [0, len(rows[0])]
        for tokens, targets in zip(rows, batch["targets"].tolist(), strict=True):
            for first, last in itertools.pairwise(borders):
                for at in range(first, last):
                    if targets[at] != IGNORE:
                        seen.append((tuple(tokens[first : at + 1]), targets[at]))
    return seen


@pytest.mark.parametrize("packing", ["cut", "packed"])
def test_every_target_has_the_same_context_at_every_batch_size(packing: Any) -> None:
    @settings(deadline=None, max_examples=60)
    @given(texts=TEXTS, seq_len=st.integers(1, 9))
    def check(texts: list[str], seq_len: int) -> None:
        corpus = Corpus.of(texts, ByteTokenizer())

        def seen(batch_size: int, world: int) -> tuple[list[tuple[tuple[int, ...], int]], int]:
            source = validation_source(packing, corpus, LENGTHS, seq_len=seq_len, batch_size=batch_size)
            steps = [(step, rank) for step in range(source.steps(world)) for rank in range(world)]
            batches = [source.batch(0, step, rank, world) for step, rank in steps]
            return sorted(contexts(batches)), sum(int(batch["n_bytes"]) for batch in batches)

        want = seen(1, 1)
        assert len(want[0]) == len(corpus)
        assert max(len(context) for context, _ in want[0]) <= seq_len
        for batch_size, world in ((2, 1), (3, 1), (5, 1), (64, 1), (1, 2), (2, 3)):
            assert seen(batch_size, world) == want
        if packing == "packed":  # nothing before a document reaches it
            end = ByteTokenizer.eos_id
            assert all(end not in context[1:] for context, _ in want[0])

    check()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for i in range(12):
        words = " ".join(str(n * n) for n in range(i, 12 + 9 * i))
        (tmp_path / "texts" / f"{i}.jsonl").write_text('{"text": "' + words + '"}\n')
    return tmp_path / "texts"


def bits_per_byte(model: torch.nn.Module, batches: list[dict[str, Tensor]]) -> float:
    nll, n_bytes = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits = model(batch["tokens"], cu_seqlens=batch.get("cu_seqlens"))[0].double()
            nll += float(cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum"))
            n_bytes += int(batch["n_bytes"])
    return nll / n_bytes / 0.6931471805599453


@pytest.mark.parametrize("packing", ["cut", "packed"])
@pytest.mark.parametrize("kind", ["files", "hub"])
def test_bits_per_byte_are_the_same_at_every_batch_size(folder: Path, packing: Any, kind: str) -> None:
    torch.manual_seed(0)
    model = zoo.create_model("gla", "tiny", vocab_size=257).eval().double()
    for parameter in model.parameters():  # far from the start, so that context matters
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)

    def measured(batch_size: int) -> float:
        common: dict[str, Any] = {"seq_len": 32, "batch_size": batch_size, "packing": packing}
        data = (
            TextFiles(path=str(folder), **common)
            if kind == "files"
            else Hub(name=str(folder), val_documents=4, **common)
        )
        return bits_per_byte(model, list(data.val_dataloader()))

    want = measured(1)
    for batch_size in (2, 3, 7, 16):
        assert measured(batch_size) == pytest.approx(want, rel=1e-12)
    shorter = TextFiles(path=str(folder), seq_len=8, packing=packing).val_dataloader()
    assert kind == "hub" or bits_per_byte(model, list(shorter)) != pytest.approx(want, rel=1e-3)  # context does matter


def test_training_rows_are_cut_at_their_ends_only() -> None:
    """As they were: seq_len in training means a share of the row, and documents may be as long as it is."""
    batch = next(iter(PyDocs(seq_len=64, batch_size=8, packing="packed").train_dataloader()))
    longest = int(batch["cu_seqlens"].diff().max())
    assert longest > 64
