"""Codecs: samples come back, what was fitted stays, and a checkpoint carries its codec."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import zoo
from zoo import codecs, tokenizers
from zoo.codecs import BinsCodec, BSplineCodec, Codec, Codes, FASTCodec, TextCodec, padded, register_codec
from zoo.codecs.codec import CODECS
from zoo.errors import UsageError, UserError

TEXTS = ["", "a", "na\u00efve caf\u00e9 \u2581 x\n\n", "the end " * 9]


def series(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 100.0, 0.0])
    return [torch.randn(length, 3, generator=generator) * scale for length in lengths]


def chunks(number: int) -> list[torch.Tensor]:
    """Smooth chunks of 12 actions of 2 numbers."""
    generator = torch.Generator().manual_seed(0)
    return list((0.3 * torch.randn(number, 12, 2, generator=generator)).cumsum(1).unbind(0))


CASES: dict[str, tuple[Callable[[], Codec], list[Any]]] = {
    "text": (lambda: TextCodec(tokenizers.ByteTokenizer()), TEXTS),
    "bins": (lambda: BinsCodec(64).fit(series(50, 7)), series(9, 0, 4)),
    "bspline": (lambda: BSplineCodec(12, n_controls=5, degree=3).fit(chunks(40)), chunks(3)),
    "fast": (lambda: FASTCodec(12, vocab=300).fit(chunks(40)), chunks(3)),
}
EVERY = pytest.mark.parametrize("name", CASES)


def test_every_codec_has_a_case_and_is_named_after_its_file() -> None:
    ours = {name: kind for name, kind in CODECS.items() if kind.__module__.startswith("zoo.")}
    assert set(CASES) == set(ours)
    for name, kind in ours.items():
        assert kind.__module__ == f"zoo.codecs.formats.{name}"
        assert kind.__name__ in codecs.__all__


@EVERY
def test_ids_are_padded_and_in_range(name: str) -> None:
    make, samples = CASES[name]
    codec = make()
    ids, lengths = codes = codec.encode(samples)
    assert isinstance(codec, Codec)
    assert isinstance(codes, Codes)
    assert (ids.dtype, lengths.dtype) == (torch.int64, torch.int64)
    assert ids.shape == (len(samples), max(lengths.tolist()), *([codec.streams] if codec.streams > 1 else []))
    assert 0 <= ids.min() <= ids.max() < codec.vocab_size
    for row, length in zip(ids, lengths.tolist(), strict=True):
        assert not row[length:].any()
    assert codec.encode([]).ids.shape[0] == 0
    assert all(value >= 0 for value in codec.errors(samples).values())


@EVERY
def test_a_saved_codec_is_the_same(name: str, tmp_path: Path) -> None:
    make, samples = CASES[name]
    codec = make()
    codec.save(tmp_path)
    again = codecs.load(tmp_path)
    assert type(again) is type(codec)
    want, got = codec.encode(samples), again.encode(samples)
    assert torch.equal(got.ids, want.ids)
    for a, b in zip(codec.decode(want), again.decode(got), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert again.errors(samples) == codec.errors(samples)
    with pytest.raises(UserError, match="a codec is fitted once"):
        again.fit(samples)


@EVERY
def test_a_checkpoint_carries_its_codec(name: str, tmp_path: Path) -> None:
    make, samples = CASES[name]
    codec, model = make(), zoo.create_model("gru", d_model=16, n_layers=1, vocab_size=257)
    zoo.save(model, tmp_path / "model", codec=codec)
    assert torch.equal(codecs.load(tmp_path / "model").encode(samples).ids, codec.encode(samples).ids)
    zoo.save(model, tmp_path / "model")  # an older checkpoint's codec goes with it
    assert not [path for path in (tmp_path / "model").iterdir() if "codec" in path.name or "tokenizer" in path.name]


def test_a_codec_of_text_is_its_tokenizer(tmp_path: Path) -> None:
    """The files are those of before, so that old checkpoints have a codec and new ones a tokenizer."""
    tokenizer = tokenizers.ByteTokenizer()
    codec = TextCodec(tokenizer)
    codec.save(tmp_path / "codec")
    tokenizer.save(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").iterdir():
        assert (tmp_path / "codec" / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in (tmp_path / "codec").iterdir()} == {
        p.name for p in (tmp_path / "tokenizer").iterdir()
    }
    assert codec.decode(codec.encode(TEXTS)) == TEXTS
    assert codec.errors(TEXTS) == {"changed": 0.0}


def test_a_tokenizer_is_trained_by_fit() -> None:
    texts = ["some words and more words and no others"] * 20
    codec = TextCodec(vocab_size=300)
    with pytest.raises(UserError, match="a codec is used after fit"):
        codec.encode(texts)
    assert codec.fit(texts) is codec
    assert codec.vocab_size == 300
    assert codec.encode(texts[:1]).lengths.item() < len(texts[0])
    assert codec.errors(texts + TEXTS[:2])["changed"] == 0
    with pytest.raises(UserError, match="a codec is fitted once"):
        codec.fit(texts)


@settings(deadline=None, max_examples=25)
@given(bins=st.integers(2, 300), cut=st.sampled_from([0.0, 0.01, 0.2]), seed=st.integers(0, 99))
def test_a_number_inside_comes_back_to_half_a_bin(bins: int, cut: float, seed: int) -> None:
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(seed)).double()
    codec = BinsCodec(bins, cut=cut).fit([x[:40], x[40:]])
    (back,) = codec.decode(codec.encode([x]))
    least, largest = x.quantile(torch.tensor([cut, 1 - cut], dtype=torch.float64), dim=0)
    inside = (x >= least) & (x <= largest)
    half = (largest - least) / bins / 2
    assert ((back - x).abs() <= half * (1 + 1e-9))[inside].all()
    assert_close(back[x > largest], (largest - half).expand_as(x)[x > largest])
    assert_close(back[x < least], (least + half).expand_as(x)[x < least])
    errors = codec.errors([x])
    assert errors["outside"] == pytest.approx(float((~inside).double().mean()))
    assert errors["rmse"] == pytest.approx(float((back - x).square().mean().sqrt()))


def test_what_codecs_refuse(tmp_path: Path) -> None:
    for wrong in ({"bins": 1}, {"cut": 0.5}, {"cut": -0.1}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} must be"):
            BinsCodec(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="bins are fitted on numbers"):
        BinsCodec().fit([])
    with pytest.raises(UserError, match="after fit; this BinsCodec has learnt nothing"):
        BinsCodec().save(tmp_path)
    with pytest.raises(UserError, match="a codec is used after fit"):
        BinsCodec().encode(series(3))
    with pytest.raises(ValueError, match="a codec's name is used once; 'text' is already"):
        register_codec("text")(BinsCodec)
    with pytest.raises(UserError, match=r"must hold .*tokenizer.json"):
        codecs.load(tmp_path)
    BinsCodec().fit(series(9)).save(tmp_path)
    path = tmp_path / "codec.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"kind": "bin"}))
    with pytest.raises(UserError, match="no codec 'bin'; did you mean 'bins'"):
        codecs.load(tmp_path)
    path.write_text(json.dumps(said | {"version": 9}))
    with pytest.raises(UserError, match="does not describe a codec of version 1; save the codec again"):
        codecs.load(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        codecs.load(tmp_path)
    path.write_text(json.dumps(said))
    (tmp_path / "codec.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match=r"holds no codec that can be read .*; take another copy"):
        codecs.load(tmp_path)
    assert padded([]).ids.shape == (0, 0)


def test_bins_refuse_what_has_no_bin() -> None:
    codec = BinsCodec().fit(series(9))
    with pytest.raises(UserError, match=r"numbers must be finite; series 1 has nan in channel 2: leave it out"):
        codec.encode([series(4)[0], torch.tensor([[0.0, 0.0, float("nan")]])])
    with pytest.raises(UserError, match=r"a series must be \(T, 3\), steps by channels; series 0 is \(4, 2\)"):
        codec.encode([series(4)[0][:, :2]])
    with pytest.raises(UserError, match="numbers must be finite"):
        BinsCodec().fit([torch.tensor([[float("inf")]])])
