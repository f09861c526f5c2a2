"""Tokenizers: exact round trips, streams that never split a character, files that load again."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo import tokenizers
from zoo.errors import UserError
from zoo.tokenizers import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

TEXTS = [topics[name] for name in ("assert", "if", "while", "with", "lambda", "strings")]
CHARACTERS = st.characters(exclude_categories=["Cs"])  # a lone surrogate is no text
ANY_TEXT = st.text(CHARACTERS, max_size=40)


def byte_level(folder: Path, *, end: str = "<|endoftext|>", declared: object = None) -> Path:
    """A small byte-level BPE folder as GPT-2's; real byte-level tokens split characters."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", end], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if declared is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(folder / "cache"))
        pieces = SentencePieceTokenizer.train(TEXTS, 512)
    return {"bytes": ByteTokenizer(), "pieces": pieces, "folder": HuggingFaceTokenizer(byte_level(folder))}


KINDS = ["bytes", "pieces", "folder"]
SLOW_FIXTURE = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", KINDS)
@SLOW_FIXTURE
@given(text=ANY_TEXT)
def test_round_trip_is_exact(made: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = made[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.eos_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", KINDS)
@SLOW_FIXTURE
@given(text=ANY_TEXT)
def test_stream_gives_whole_characters_early(made: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = made[kind]
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(parts)
        assert stream.finish() == ""  # nothing was held back longer than needed
        assert "".join(parts) == text
    else:
        assert "".join(parts) + stream.finish() == text


@pytest.mark.parametrize("kind", KINDS)
@SLOW_FIXTURE
@given(data=st.data())
def test_stream_of_any_ids_is_their_text(made: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    """Whatever a model samples, end symbols and broken characters included."""
    tokenizer = made[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))
    if kind == "folder":  # its decoder replaces broken characters by other rules when it sees more of the text
        ids = [i for i in ids if i >= tokenizer.vocab_size or tokenizer.decode([i]).isascii()]
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) + stream.finish() == tokenizer.decode(ids)


def test_a_character_appears_with_its_last_byte(made: dict[str, Tokenizer]) -> None:
    for tokenizer in made.values():
        stream = tokenizer.stream()
        parts = [stream.push(i) for i in tokenizer.encode("a漢b")]
        assert parts.count("漢") == 1
        assert parts.count("") >= 2  # three bytes at least, or byte pieces


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@SLOW_FIXTURE
@given(text=ANY_TEXT)
def test_lengths_in_bytes_add_up(made: dict[str, Tokenizer], kind: str, text: str) -> None:
    lengths = made[kind].byte_lengths()
    assert lengths[made[kind].encode(text)].sum() == len(text.encode())
    assert lengths.shape == (made[kind].vocab_size,)
    assert lengths[made[kind].eos_id] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loads_again(made: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    made[kind].save(tmp_path / "new")
    again = tokenizers.load(tmp_path / "new")
    assert type(again) is type(made[kind])
    assert (again.vocab_size, again.eos_id) == (made[kind].vocab_size, made[kind].eos_id)
    assert again.encode(TEXTS[0]) == made[kind].encode(TEXTS[0])
    assert not [file for file in (tmp_path / "new").iterdir() if file.name.startswith(".")]  # no temporary files


def test_bytes_are_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.decode([104, 256, 105]) == "hi"


def test_sentencepiece_is_trained_once_and_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, Tokenizer]
) -> None:
    models = []
    for cache in ("one", "two"):
        monkeypatch.setenv("ZOO_CACHE", str(tmp_path / cache))
        SentencePieceTokenizer.train(TEXTS, 512)
        models += [file.read_bytes() for file in (tmp_path / cache).rglob("*.model")]
    assert len(models) == 2
    assert models[0] == models[1]

    def never(**_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("sentencepiece.SentencePieceTrainer.train", never)
    assert SentencePieceTokenizer.train(TEXTS, 512).vocab_size == 512
    with pytest.raises(AssertionError, match="trained again"):  # another corpus or size is another model
        SentencePieceTokenizer.train(TEXTS[:-1], 512)
    with pytest.raises(AssertionError, match="trained again"):
        SentencePieceTokenizer.train(TEXTS, 500)


def test_a_piece_of_its_own_for_line_feeds(made: dict[str, Tokenizer]) -> None:
    assert len(made["pieces"].encode("\n\n")) == 2
    assert len(TEXTS[-1].encode()) / len(made["pieces"].encode(TEXTS[-1])) > 2


def test_end_symbol_is_the_declared_one(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "a", end="<done>", declared={"content": "<done>"})
    assert tokenizers.load(folder).eos_id == hf.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(
        "<done>"
    )
    tokenizers.load(folder).save(tmp_path / "b")  # without tokenizer_config.json, which only names it
    assert tokenizers.load(tmp_path / "b").eos_id == tokenizers.load(folder).eos_id


def test_foreign_sentencepiece_model_with_a_leading_space(tmp_path: Path) -> None:
    """As Llama's: encoding puts a space in front, decoding and streaming take it away."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].splitlines()), model_writer=model, vocab_size=320, model_type="bpe",
        byte_fallback=True, eos_id=2, minloglevel=2, num_threads=1, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = tokenizers.load(tmp_path)
    ids = tokenizer.encode("an assert statement")
    stream = tokenizer.stream()
    assert tokenizer.decode(ids) == "".join(stream.push(i) for i in ids) + stream.finish() == "an assert statement"
    assert tokenizer.eos_id == 2


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: None, "must hold"),
    "kind": (lambda folder: (folder / tokenizers.DESCRIPTION).write_text('{"kind": "runes"}'), "runes"),
    "json": (lambda folder: (folder / tokenizers.DESCRIPTION).write_text("{"), "must be JSON"),
    "hf": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "format of the `tokenizers` package"),
    "no end": (lambda folder: byte_level(folder, end="<finish>"), "needs an end symbol"),
    "sp": (lambda folder: (folder / "tokenizer.model").write_bytes(b"not a model"), "SentencePiece model"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_in_one_sentence(case: str, tmp_path: Path) -> None:
    prepare, words = BAD[case]
    prepare(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        tokenizers.load(tmp_path)
    assert "\n" not in str(error.value)


def test_refuses_a_vocabulary_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    for texts, size in ((TEXTS, 100), (TEXTS[:1], 100_000), ([], 512)):
        with pytest.raises(UserError, match=r"must fit its corpus.*choose another data\.vocab_size") as error:
            SentencePieceTokenizer.train(texts, size)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*"))


def test_arrays_are_small() -> None:
    assert ByteTokenizer().encode_array("x").dtype == np.uint8


def test_what_a_generated_document_starts_with(tmp_path: Path) -> None:
    """eos_id where zoo trained; what the template of a foreign tokenizer.json puts before a text elsewhere."""
    folder = byte_level(tmp_path / "foreign")
    plain = HuggingFaceTokenizer(folder)
    assert plain.start_id == plain.eos_id
    spec = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    spec.add_special_tokens(["<s>"])
    start = spec.token_to_id("<s>")
    spec.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    spec.save(str(folder / "tokenizer.json"))
    templated = HuggingFaceTokenizer(folder)
    assert templated.start_id == start != templated.eos_id
    assert start not in templated.encode("a text")
    (tmp_path / "trained").mkdir()
    templated.save(tmp_path / "trained")  # beside a model of zoo
    again = tokenizers.load(tmp_path / "trained")
    assert again.start_id == again.eos_id == templated.eos_id
    assert ByteTokenizer().start_id == ByteTokenizer().eos_id
