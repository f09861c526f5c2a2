"""Any Unicode text through every tokenizer and back, with what tokenizers mean something else by."""

import io
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zoo.tokenizers import SPACE_MARK, ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

TEXTS = [topics[name] for name in ("assert", "if", "while", "with", "lambda", "strings")]
MARKED = ["a▁b c", "▁▁ ▁", "the▁\n▁the", "\ue000▁ is private"]
# Spaces and their mark, what SentencePiece and BPE write for other things, and characters of every length in UTF-8.
ODD = [SPACE_MARK, " ", "\n", "\r", "\t", "\0", "\ue000", "\ue001", "\uf8ff", "Ġ", "Ċ", "é", "漢", "🙂", "\ufffd",
       "<unk>", "<0xE2>", "<s>", "e\u0301", "ﬁ", "\u00a0", "\u2028", "the", "if "]  # fmt: skip
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from(ODD), max_size=15).map("".join),
)


def trained(folder: Path) -> Tokenizer:
    return SentencePieceTokenizer.train(TEXTS, 512)


def trained_on_marks(folder: Path) -> Tokenizer:
    """A corpus full of the mark, which the trainer takes for spaces."""
    return SentencePieceTokenizer.train([*TEXTS, *MARKED * 200], 512)


def foreign(**options: object) -> Callable[[Path], Tokenizer]:
    """A model as other libraries train them."""

    def make(folder: Path) -> Tokenizer:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(TEXTS).splitlines()), model_writer=model, vocab_size=400, model_type="bpe",
            normalization_rule_name="identity", remove_extra_whitespaces=False, eos_id=2, minloglevel=2, num_threads=1,
            hard_vocab_limit=False, **options,
        )  # fmt: skip
        return SentencePieceTokenizer(model.getvalue())

    return make


def byte_level(folder: Path) -> Tokenizer:
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(folder)


MAKERS: dict[str, Callable[[Path], Tokenizer]] = {
    "bytes": lambda folder: ByteTokenizer(),
    "trained": trained,
    "trained on marks": trained_on_marks,
    "as Llama's": foreign(byte_fallback=True),
    "no space put in front": foreign(byte_fallback=True, add_dummy_prefix=False),
    "spaces behind": foreign(byte_fallback=True, treat_whitespace_as_suffix=True, add_dummy_prefix=False),
    "byte-level BPE": byte_level,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(folder / "cache"))
        return {name: make(folder) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_any_text_reads_back_as_itself(made: dict[str, Tokenizer], name: str) -> None:
    tokenizer = made[name]

    @settings(deadline=None, max_examples=100)
    @given(text=ANY_TEXT)
    @example(SPACE_MARK)
    @example("a▁b c")
    @example(" ▁ \ue000▁▁")
    @example("\ufffd\ufffd\u0800")
    @example("\ufffd" * 12 + "\u0800\ufffd")
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_array(text).tolist() == ids
        assert tokenizer.eos_id not in ids
        stream = tokenizer.stream()
        assert "".join(stream.push(i) for i in ids) + stream.finish() == text

    check()


@pytest.mark.parametrize("name", ["trained", "trained on marks", "no space put in front"])
def test_the_mark_is_three_bytes_and_the_rest_as_it_was(made: dict[str, Tokenizer], name: str) -> None:
    tokenizer = made[name]
    mark = tokenizer.encode(SPACE_MARK)
    assert len(mark) == tokenizer.byte_lengths()[mark].sum() == len(SPACE_MARK.encode())
    assert tokenizer.encode(" the") != tokenizer.encode(f"{SPACE_MARK}the")
    text = TEXTS[0]
    assert tokenizer.encode(f"{text}\n{SPACE_MARK}\n{text}") == [
        *tokenizer.encode(f"{text}\n"),
        *mark,
        *tokenizer.encode(f"\n{text}"),
    ]


def test_without_byte_pieces_the_mark_is_an_unknown_character(tmp_path: Path) -> None:
    tokenizer = foreign(add_dummy_prefix=False)(tmp_path)
    assert tokenizer.encode(SPACE_MARK) == tokenizer.encode("漢") != tokenizer.encode(" ")
