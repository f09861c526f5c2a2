"""The bytes of every batch are those of its own targets, not of a neighbour's."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.tokenizers import ByteTokenizer
from zoo.train.data.core.corpus import IGNORE, Corpus, CutSource, PackedSource
from zoo.train.data.core.planned import FromCorpus

TEXTS = st.lists(st.text(st.sampled_from("abé漢\n"), max_size=9), min_size=1, max_size=8).filter(any)
FAST = settings(deadline=None, max_examples=60)


class Lossy(ByteTokenizer):
    """Says three bytes for every byte, so that the end symbol of each document must make up for it."""

    def byte_lengths(self) -> np.ndarray:
        return np.array([3] * 256 + [0])


LENGTHS = Lossy().byte_lengths()


def counts(corpus: Corpus, texts: list[str]) -> np.ndarray:
    """Bytes counted at each token: three a byte, and at an end symbol what they were too many."""
    there = LENGTHS[corpus.tokens]
    there[corpus.starts[1:]] = [-2 * len(text.encode()) for text in texts if text]
    return there


@FAST
@given(texts=TEXTS)
def test_any_stretch_has_its_own_bytes(texts: list[str]) -> None:
    corpus = Corpus.of(texts, Lossy())
    there = counts(corpus, texts)
    for first in range(1, len(corpus.tokens)):
        for last in range(first, len(corpus.tokens) + 1):
            assert corpus.n_bytes(LENGTHS, first, last) == there[first:last].sum()


@FAST
@given(texts=TEXTS, seq_len=st.integers(1, 6), batch_size=st.integers(1, 3), seed=st.sampled_from([None, 1]))
def test_a_row_that_ends_with_a_document_has_its_bytes_and_no_others(
    texts: list[str], seq_len: int, batch_size: int, seed: int | None
) -> None:
    corpus = Corpus.of(texts, Lossy())
    kinds: list[Any] = [CutSource, PackedSource]
    for kind in kinds:
        source = kind(corpus, LENGTHS, seq_len=seq_len, batch_size=batch_size, seed=seed)
        for step in range(source.steps(1)):
            batch = source.batch(0, step, 0, 1)
            scored = batch["targets"][batch["targets"] != IGNORE].numpy()
            ends = int((scored == Lossy.eos_id).sum())
            if not ends:  # nothing to make up for
                assert int(batch["n_bytes"]) == 3 * len(scored)
    if seed is None:  # in order, so the places are known
        source = CutSource(corpus, LENGTHS, seq_len=seq_len, batch_size=batch_size, seed=None)
        there, row = counts(corpus, texts), seq_len * batch_size
        for step in range(source.steps(1)):
            assert int(source.batch(0, step, 0, 1)["n_bytes"]) == there[1:][step * row : (step + 1) * row].sum()


@FAST
@given(texts=TEXTS)
def test_the_bytes_of_whole_documents(texts: list[str]) -> None:
    documents = FromCorpus(Corpus.of(texts, Lossy()), LENGTHS)
    for i, text in enumerate(text for text in texts if text):
        size = len(text.encode())
        assert documents.lengths[i] == size + 1
        assert documents.n_bytes(i, 0, size + 1) == size
        assert documents.n_bytes(i, 0, size) == 3 * size  # all but the end symbol
        assert documents.n_bytes(i, size, size + 1) == -2 * size


@pytest.mark.parametrize("kind", [CutSource, PackedSource])
def test_an_end_symbol_counts_in_the_row_that_it_begins(kind: Any) -> None:
    """Rows of two targets: "ab", its end and "c", "d" and its end."""
    source = kind(Corpus.of(["ab", "cd"], Lossy()), LENGTHS, seq_len=2, batch_size=1, seed=None)
    assert [int(source.batch(0, step, 0, 1)["n_bytes"]) for step in range(source.steps(1))] == [6, 3 - 4, 3 - 4]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_tokens_are_as_small_as_their_vocabulary_allows_and_no_smaller(vocab_size: int, dtype: Any) -> None:
    class Wide(ByteTokenizer):
        """Its last id ends a document."""

        def byte_lengths(self) -> np.ndarray:
            return np.array([1] * 256 + [0] * (vocab_size - 256))

    Wide.vocab_size, Wide.eos_id = vocab_size, vocab_size - 1
    tokens = Corpus.of(["ab"], Wide()).tokens
    assert tokens.dtype == dtype
    assert tokens.tolist() == [vocab_size - 1, 97, 98, vocab_size - 1]
