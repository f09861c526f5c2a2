"""What a user can get wrong about data: one sentence with the rule, the fact and the remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from zoo.errors import UserError
from zoo.train.data.core.base import DataModule
from zoo.train.data.synthetic.copying import Copying
from zoo.train.data.synthetic.induction_heads import InductionHeads
from zoo.train.data.synthetic.mqar import MQAR
from zoo.train.data.text.hub import Hub
from zoo.train.data.text.pydocs import PyDocs
from zoo.train.data.text.text_files import TextFiles


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


def refused(words: str, make: Callable[[], DataModule]) -> None:
    """Constructing or setting up fails with one sentence that has the words."""
    with pytest.raises(UserError, match=words) as error:
        make().setup("fit")
    message = str(error.value)
    assert "\n" not in message
    assert not message.endswith(".")
    assert ":" in message  # the remedy comes after the last colon
    assert len(message.rsplit(":", 1)[-1]) > 5


def lines(*rows: object) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


FILES: dict[str, tuple[str, bytes, str]] = {
    "not utf-8": ("a.txt", "caf\xe9 au lait".encode("latin1") * 1000, r"must be UTF-8; .*a\.txt.*byte 3.*iconv"),
    "empty": ("a.txt", b"", "must hold text"),
    "only empty rows": ("a.jsonl", lines({"text": ""}, {"text": None}), "must hold text"),
    "short": (
        "a.txt",
        b"too short for one sequence",
        "at least one sequence; .* 25 tokens .* is 256: .*lower data.seq_len",
    ),
    "one sequence, not eight": ("a.txt", b"word " * 200, "data.batch_size=8 sequences.*lower data.batch_size"),
    "no field": ("a.jsonl", lines({"texts": "a"}), r"field 'text'; line 1 of .* has texts; did you mean 'texts'\?.*"),
    "later row without": ("a.jsonl", lines({"text": "a"}, {"body": "b"}), "line 2 .* has body: name it by data.field"),
    "field of numbers": ("a.jsonl", lines({"text": 3}), "must hold text; line 1 of .* holds int"),
    "no object": ("a.jsonl", lines(["text"]), "must have named fields"),
    "no json": ("a.jsonl", b'{"text": "a"}\n{"text', "line 2 of .* is not"),
    "jsonl not utf-8": ("a.jsonl", b'{"text": "\xe9"}', "must be UTF-8"),
    "no parquet": ("a.parquet", b"PAR1 cut short", "must be readable by pyarrow; .*complete"),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, tmp_path: Path) -> None:
    name, content, words = FILES[case]
    (tmp_path / name).write_bytes(content)
    refused(words, lambda: TextFiles(path=str(tmp_path / name)))
    if "must hold text" not in words:  # and through a folder
        refused(words, lambda: TextFiles(path=str(tmp_path)))


def test_parquet_without_the_field(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"content": ["a"]}).to_parquet(str(tmp_path / "a.parquet"))
    refused("field 'text'; row 1 of .* has content: name it", lambda: TextFiles(path=str(tmp_path)))


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused("must be readable; .*Permission denied", lambda: TextFiles(path=str(tmp_path / "a.txt")))


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    refused("that matches; .*none.txt' does not", lambda: TextFiles(path=str(tmp_path / "none.txt")))
    refused(r"that matches; .*\*\.txt' does not", lambda: TextFiles(path=str(tmp_path / "*.txt")))
    refused(r"a folder must hold \.jsonl, .* holds none: .*glob", lambda: TextFiles(path=str(tmp_path)))
    refused("it is empty: set data.path", lambda: TextFiles(path=""))


SETTINGS: dict[str, tuple[Callable[..., DataModule], dict[str, Any], str]] = {
    "seq_len": (PyDocs, {"seq_len": 0}, "data.seq_len must be at least 1; got 0"),
    "batch_size": (PyDocs, {"batch_size": -1}, "data.batch_size must be at least 1"),
    "workers": (MQAR, {"num_workers": -1}, "data.num_workers must be at least 0"),
    "seed": (MQAR, {"seed": -1}, "data.seed must be at least 0"),
    "packing": (PyDocs, {"packing": "loose"}, "cut or packed; got 'loose'"),
    "fraction": (PyDocs, {"val_fraction": 1.0}, "between 0 and 1, both excluded; got 1.0"),
    "vocabulary of bytes": (PyDocs, {"vocab_size": 300}, "has no meaning: .*sentencepiece"),
    "small vocabulary": (PyDocs, {"tokenizer": "sentencepiece", "vocab_size": 99}, "must fit its corpus; 99"),
    "tokenizer": (PyDocs, {"tokenizer": "no/such/folder"}, "tokenizer.json or tokenizer.model; 'no/such/folder'"),
    "too long": (PyDocs, {"seq_len": 10**6}, "at least one sequence; .* 1000000"),
    "too many": (PyDocs, {"batch_size": 10**4}, "data.batch_size=10000 sequences"),
    "packed, too many": (PyDocs, {"batch_size": 10**4, "packing": "packed"}, "data.batch_size=10000 sequences"),
    "separator": (lambda **kw: TextFiles(path=__file__, **kw), {"separator": ""}, "must not be empty"),
    "mqar odd": (MQAR, {"vocab_size": 129}, "even data.vocab_size"),
    "mqar vocabulary": (MQAR, {"vocab_size": 64}, "the first above the second; got 64 and 64"),
    "mqar pairs": (MQAR, {"n_pairs": 17}, r"2 \* n_pairs \* \(n_passes \+ 1\) <= seq_len; got 17"),
    "mqar filler": (MQAR, {"filler": "noise"}, "zero or random; got 'noise'"),
    "mqar power": (MQAR, {"power": 0.0}, "data.power must be above 0"),
    "mqar samples": (MQAR, {"train_samples": 8}, "data.train_samples must be at least 32; got 8"),
    "copying length": (Copying, {"seq_len": 20}, "2 \\* n_tokens \\+ 1 <= seq_len; got 16 tokens and length 20"),
    "copying vocabulary": (Copying, {"vocab_size": 2}, "got data.vocab_size=2"),
    "copying variant": (Copying, {"variant": "backwards"}, "selective or plain; got 'backwards'"),
    "induction length": (InductionHeads, {"seq_len": 2}, "got data.vocab_size=16, data.seq_len=2: raise both"),
    "induction vocabulary": (InductionHeads, {"vocab_size": 2}, "got data.vocab_size=2, data.seq_len=256"),
    "hub name": (Hub, {"name": ""}, "data.name must name a data set"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str) -> None:
    make, settings, words = SETTINGS[case]
    refused(words, lambda: make(**settings))


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach\nthe hub"), FileNotFoundError(), TimeoutError("60 s")]
)
def test_a_hub_out_of_reach_names_the_local_way(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused(
        f"'some/set' cannot be reached or read .{type(error).__name__}.* data=text_files data.path",
        lambda: Hub(name="some/set"),
    )


def test_a_stream_with_other_columns_or_too_few_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*({"body": "word " * 100} for _ in range(5))))
    refused("field 'text'; .* has body: name it by data.field", lambda: Hub(name=str(tmp_path)))
    data = Hub(name=str(tmp_path), field="body", val_documents=5)
    data.setup("fit")
    with pytest.raises(UserError, match=r"none behind the 5 held out: lower data\.val_documents"):
        next(iter(data.train_dataloader()))
