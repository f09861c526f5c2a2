"""Text data: nothing lost, nothing seen twice, targets shifted, documents kept apart, bytes counted exactly."""

import ast
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo import tokenizers
from zoo.tokenizers import ByteTokenizer, SentencePieceTokenizer
from zoo.train.data.core import base, corpus, loader
from zoo.train.data.core.base import DataModule
from zoo.train.data.core.corpus import Corpus, CutSource, PackedSource
from zoo.train.data.text import base as text_module
from zoo.train.data.text import pydocs
from zoo.train.data.text.base import Document, hold_out
from zoo.train.data.text.hub import Hub
from zoo.train.data.text.pydocs import PyDocs
from zoo.train.data.text.text_files import TextFiles

END = ByteTokenizer.eos_id
LENGTHS = ByteTokenizer().byte_lengths()
TEXTS = st.lists(st.text(st.sampled_from("abé漢\n"), max_size=30), min_size=1, max_size=8).filter(any)
FAST = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


def flat(texts: Iterable[str]) -> list[int]:
    """The documents with one end symbol between them and at both ends."""
    return [END, *(i for text in texts if text for i in [*text.encode(), END])]


def batches(source: CutSource | PackedSource, epoch: int = 0, world: int = 1) -> list[dict[str, Tensor]]:
    return [source.batch(epoch, step, rank, world) for step in range(source.steps(world)) for rank in range(world)]


def scored(parts: list[dict[str, Tensor]]) -> tuple[list[int], list[int]]:
    """Inputs and targets of all scored positions."""
    tokens, targets = (torch.cat([part[key].flatten() for part in parts]) for key in ("tokens", "targets"))
    return tokens[targets >= 0].tolist(), targets[targets >= 0].tolist()


@FAST
@given(texts=TEXTS, seq_len=st.integers(1, 12), batch_size=st.integers(1, 3), world=st.integers(1, 3))
def test_cut_validation_scores_every_byte_once(texts: list[str], seq_len: int, batch_size: int, world: int) -> None:
    source = CutSource(Corpus.of(texts, ByteTokenizer()), LENGTHS, seq_len=seq_len, batch_size=batch_size, seed=None)
    parts = batches(source, world=world)
    assert all(part["tokens"].shape == part["targets"].shape == (batch_size, seq_len) for part in parts)
    pairs = sorted(zip(*scored(parts), strict=True))
    stream = flat(texts)
    assert pairs == sorted(itertools.pairwise(stream))
    if world == 1:
        assert scored(parts) == (stream[:-1], stream[1:])
    assert sum(int(part["n_bytes"]) for part in parts) == len("".join(texts).encode())


@FAST
@given(texts=TEXTS, seq_len=st.integers(1, 12), batch_size=st.integers(1, 3), world=st.integers(1, 3))
def test_packed_validation_scores_every_byte_once(texts: list[str], seq_len: int, batch_size: int, world: int) -> None:
    source = PackedSource(Corpus.of(texts, ByteTokenizer()), LENGTHS, seq_len=seq_len, batch_size=batch_size, seed=None)
    parts = batches(source, world=world)
    stream = flat(texts)
    assert scored(parts) == (stream[:-1], stream[1:])  # ranks take rows in turn
    assert sum(int(part["n_bytes"]) for part in parts) == len("".join(texts).encode())
    for part in parts:
        check_borders(part, seq_len * batch_size)


def check_borders(batch: dict[str, Tensor], row: int) -> None:
    """Documents start at borders and nowhere else."""
    tokens, targets, borders = batch["tokens"], batch["targets"], batch["cu_seqlens"]
    assert tokens.shape == targets.shape == (1, row)
    assert borders.dtype == torch.int32
    assert borders[0] == 0
    assert borders[-1] == row
    assert (borders.diff() > 0).all()
    for first, last in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        inside, next_ = tokens[0, first:last], targets[0, first:last]
        if (next_ < 0).all():
            continue  # the stretch of padding
        assert (next_ >= 0).all()
        assert torch.equal(inside[1:], next_[:-1])  # shifted by one
        assert END not in inside[1:].tolist()  # the start symbol is first, or in the row before
        assert END not in next_[:-1].tolist()  # the end symbol is the last target, or in the next row
        if first > 0:
            assert inside[0] == END
        if last < row:
            assert next_[-1] == END


@FAST
@given(texts=TEXTS, seq_len=st.integers(1, 12), batch_size=st.integers(1, 3), epoch=st.integers(0, 2))
def test_packed_training_shuffles_documents_and_loses_less_than_a_row(
    texts: list[str], seq_len: int, batch_size: int, epoch: int
) -> None:
    row = seq_len * batch_size
    corpus = Corpus.of(texts, ByteTokenizer())
    parts = batches(PackedSource(corpus, LENGTHS, seq_len=seq_len, batch_size=batch_size, seed=1), epoch)
    for part in parts:
        check_borders(part, row)
        assert int(part["n_bytes"]) == int((part["targets"] < 256).sum())
    assert len(parts) == len(corpus) // row
    left = sorted(flat(texts)[1:])
    for token in scored(parts)[1] if parts else []:
        left.remove(token)
    assert len(left) < row


def test_cut_training_has_every_sequence_but_the_rest_of_the_last_step() -> None:
    corpus = Corpus.of(topics.values(), ByteTokenizer())
    source = CutSource(corpus, LENGTHS, seq_len=100, batch_size=8, seed=1)
    rows = [row for part in batches(source) for row in zip(part["tokens"], part["targets"], strict=True)]
    assert len(rows) == source.n // 8 * 8
    starts = {tuple(corpus.tokens[i : i + 20].tolist()) for i in range(0, len(corpus), 100)}
    seen = {tuple(tokens[:20].tolist()) for tokens, _ in rows}
    assert len(starts - seen) < 8
    for tokens, targets in rows:
        kept = targets >= 0
        assert torch.equal(tokens[kept][1:], targets[kept][:-1])


@pytest.mark.parametrize("packing", ["cut", "packed"])
@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_bits_per_byte_have_the_true_denominator(packing: Any, tokenizer: str) -> None:
    data = PyDocs(packing=packing, tokenizer=tokenizer)
    train, val = data.split
    assert sum(int(batch["n_bytes"]) for batch in data.val_dataloader()) == len("".join(val).encode())
    assert sorted([*train, *val]) == sorted(topics.values())
    got = [i for batch in data.val_dataloader() for i in batch["targets"][batch["targets"] >= 0].tolist()]
    assert data.tokenizer.decode(got) == "".join(val)
    assert got.count(data.tokenizer.eos_id) == len(val)
    assert data.metrics == ("bits_per_byte", "perplexity")
    assert max(got) < data.vocab_size


class Lossy(ByteTokenizer):
    """Says two bytes for every byte: the bytes of a document must come out right all the same."""

    def byte_lengths(self) -> np.ndarray:
        return np.array([2] * 256 + [0])


@pytest.mark.parametrize("kind", [CutSource, PackedSource])
def test_bytes_are_exact_for_a_tokenizer_that_only_estimates(kind: Any) -> None:
    texts = ["hello", "", "world wide", "x"]
    lengths = Lossy().byte_lengths()
    source = kind(Corpus.of(texts, Lossy()), lengths, seq_len=3, batch_size=2, seed=None)
    assert sum(int(part["n_bytes"]) for part in batches(source)) == len("".join(texts))


def test_hold_out_is_whole_topics_about_a_tenth_and_no_matter_of_order() -> None:
    documents = PyDocs().documents()
    train, val = hold_out(documents, 0.1)
    assert 0.08 < len("".join(val).encode()) / len("".join(topics.values()).encode()) <= 0.1
    assert len(val) > 3
    again = hold_out(documents[::-1], 0.1)
    assert set(again[1]) == set(val)
    assert set(again[0]) == set(train)
    assert PyDocs(seed=1).split == PyDocs(seed=2).split


def test_nothing_held_out_is_quoted_in_training() -> None:
    """Topics such as "if" are sections of others, here "compound": a split by topics alone would leak them."""
    groups = pydocs.related(topics)
    assert groups["if"] == groups["else"] == groups["compound"] != groups["types"]
    train, val = PyDocs().split
    known = " ".join(" ".join(text.split()) for text in train)
    for text in val:
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        assert not [p for p in paragraphs if len(p) >= pydocs.LONG and p in known]


@given(texts=st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=50), min_size=1, max_size=4))
def test_hold_out_of_few_documents_takes_their_ends(texts: list[str]) -> None:
    train, val = hold_out([Document(str(i), text) for i, text in enumerate(texts)], 0.3)
    if len(train) == len(val) == len(texts):
        assert [a + b for a, b in zip(train, val, strict=True)] == texts
    else:
        assert sorted([*train, *val]) == sorted(texts)
    one_train, one_val = hold_out([Document("", "".join(texts))], 0.3)
    assert one_train[0] + one_val[0] == "".join(texts)


def test_the_tail_starts_at_a_line() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (train,), (val,) = hold_out([Document("", text)], 0.2)
    assert train.endswith("\n")
    assert val.startswith("line 8")
    assert train + val == text


def write(folder: Path, kind: str) -> Path:
    """The topics as files of one kind."""
    folder.mkdir()
    if kind == "folder":
        for name in topics:
            (folder / f"{name}.txt").write_text(topics[name], encoding="utf-8")
        (folder / "ignored.bin").write_bytes(b"\xff\xff")
        return folder
    if kind == "jsonl":
        lines = [json.dumps({"id": name, "text": text}) for name, text in topics.items()]
        (folder / "a.jsonl").write_text("\n".join(lines[:40]) + "\n\n", encoding="utf-8")
        (folder / "b.jsonl").write_text("\n".join(lines[40:]), encoding="utf-8")
        return folder / "*.jsonl"
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": list(topics.values())}).to_parquet(str(folder / "a.parquet"))
        return folder / "a.parquet"
    (folder / "all.log").write_text("<|end|>".join(topics.values()), encoding="utf-8")
    return folder / "all.log"


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "separated"])
def test_every_kind_of_file_gives_the_same_documents(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "files", kind)
    data = TextFiles(path=str(path), separator="<|end|>" if kind == "separated" else None)
    train, val = data.split
    assert sorted([*train, *val]) == sorted(topics.values())
    want = hold_out([*data.documents()[::-1]], 0.1)
    assert set(val) == set(want[1])
    data.setup("fit")
    assert data.steps_per_epoch == len(data) == len(data.train_dataloader()) > 100
    assert sum(int(batch["n_bytes"]) for batch in data.val_dataloader()) == len("".join(val).encode())


def test_one_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"\xef\xbb\xbf" + topics["strings"].encode())  # with a byte-order mark
    train, val = TextFiles(path=str(file)).split
    assert train[0] + val[0] == topics["strings"]


def test_tokens_are_cached_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "CACHED_TOKENS", 1000)
    path = write(tmp_path / "files", "jsonl")
    first = TextFiles(path=str(path))
    first.setup()
    with monkeypatch.context() as patch:
        patch.setattr(TextFiles, "documents", lambda self: pytest.fail("read again"))
        again = TextFiles(path=str(path))
        again.setup()
        assert isinstance(again.sources[0].corpus.tokens, np.memmap)  # type: ignore[attr-defined]
        for a, b in zip(first.val_dataloader(), again.val_dataloader(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
        with pytest.raises(pytest.fail.Exception, match="read again"):
            TextFiles(path=str(path), val_fraction=0.2).setup()
    next(iter((tmp_path / "cache" / "tokens").glob("*train.tokens.npy"))).write_bytes(b"damaged")
    repaired = TextFiles(path=str(path))
    repaired.setup()
    assert len(repaired) == len(first)
    with (tmp_path / "files" / "b.jsonl").open("a") as file:
        file.write('\n{"text": "' + "new " * 5000 + '"}')
    changed = TextFiles(path=str(path))
    assert "".join(changed.split[0] + changed.split[1]).count("new new") > 100


def stream(tmp_path: Path, **kwargs: Any) -> Hub:
    path = tmp_path / "hub"
    if not path.exists():
        path.mkdir()
        lines = [json.dumps({"text": topics[name]}) for name in sorted(topics)]
        (path / "data.jsonl").write_text("\n".join(["", *lines]), encoding="utf-8")
    return Hub(**{"name": str(path), "val_documents": 7, "steps_per_epoch": 5, "seq_len": 64, **kwargs})


@pytest.mark.parametrize("packing", ["cut", "packed"])
def test_the_hub_streams_in_order_and_begins_again(packing: Any, tmp_path: Path) -> None:
    data = stream(tmp_path, packing=packing, steps_per_epoch=1000)
    data.setup("fit")
    texts = [topics[name] for name in sorted(topics)]
    parts = list(data.train_dataloader())
    assert len(parts) == data.steps_per_epoch == len(data.train_dataloader()) == 1000
    tokens, targets = scored(parts)
    once = flat(texts[7:])
    want = (once[:-1] * 2)[: len(tokens)]
    assert len(tokens) == 1000 * 8 * 64 > len(once)
    assert tokens == want
    assert targets == (once[1:] * 2)[: len(tokens)]
    assert sum(int(part["n_bytes"]) for part in parts) == sum(i < 256 for i in targets)
    if packing == "packed":
        for part in parts:
            check_borders(part, 512)
    assert sum(int(part["n_bytes"]) for part in data.val_dataloader()) == len("".join(texts[:7]).encode())


def test_the_hub_resumes(tmp_path: Path) -> None:
    def run(data: DataModule, n: int) -> list[Tensor]:
        loader = data.train_dataloader()
        tokens: list[Tensor] = []
        while len(tokens) < n:
            for batch in loader:
                tokens.append(batch["tokens"])
                if len(tokens) == n:
                    break
        return tokens

    want = run(stream(tmp_path), 20)
    for stop in (3, 5, 7):
        first, second = stream(tmp_path), stream(tmp_path)
        run(first, stop)
        second.load_state_dict(first.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(run(second, 13), want[stop : stop + 13], strict=True))


def test_the_hub_shares_out_among_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [batch["tokens"] for batch in stream(tmp_path, batch_size=4).train_dataloader()]
    for rank in (0, 1):
        data = stream(tmp_path, batch_size=2)
        monkeypatch.setattr(data, "_shard", lambda rank=rank: (rank, 2))
        for ours, all_ in zip(data.train_dataloader(), whole, strict=True):
            assert torch.equal(ours["tokens"], all_[rank::2])


def test_a_sentencepiece_model_for_a_stream(tmp_path: Path) -> None:
    data = stream(tmp_path, tokenizer="sentencepiece", vocab_size=600)
    assert data.vocab_size == 600
    assert isinstance(data.tokenizer, SentencePieceTokenizer)
    assert sum(int(batch["n_bytes"]) for batch in data.val_dataloader()) == sum(
        len(topics[name].encode()) for name in sorted(topics)[:7]
    )


def test_the_default_text_needs_no_heavy_packages() -> None:
    """`datasets` takes a second to import, so the modules behind pydocs leave it to the other sources."""
    for module in (pydocs, text_module, base, corpus, loader, tokenizers):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not any(str(name).partition(".")[0] in ("datasets", "transformers", "pyarrow") for name in names)


def test_other_pythons_have_the_same_topics_to_hold_out() -> None:
    """The hold-out goes by name: texts that grow a little leave most of it as it was."""
    documents = PyDocs().documents()
    grown = [Document(group, text + " and more" * (len(text) // 300)) for group, text in documents]
    names = [{group for group, text in docs if text in hold_out(docs, 0.1)[1]} for docs in (documents, grown)]
    assert len(names[0] & names[1]) >= 0.7 * len(names[0])
