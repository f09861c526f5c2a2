"""Generated tasks of few possible rows: what is validated was never trained on, whatever seeds, lengths and order."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from zoo.errors import UserError
from zoo.train.data.synthetic._philox import Draws
from zoo.train.data.synthetic.base import APART, HELD_OUT, SPLIT, TRAINING, VALIDATION, SyntheticData
from zoo.train.data.synthetic.copying import Copying
from zoo.train.data.synthetic.induction_heads import InductionHeads
from zoo.train.data.synthetic.mqar import MQAR
from zoo.train.data.synthetic.state_tracking import KeepNth, KHop, Parity, StateTracking, WordProblem
from zoo.train.data.text.pydocs import PyDocs

Row = tuple[int, ...]
Make = Callable[..., SyntheticData]
FEW: dict[str, Make] = {  # of 64 possible rows and more, so few that independent draws would meet
    "parity 7": lambda **kw: Parity(seq_len=7, **kw),
    "parity 16": lambda **kw: Parity(seq_len=16, **kw),
    "parity 6 to 14": lambda **kw: Parity(seq_len=14, min_len=6, **kw),
    "s3": lambda **kw: WordProblem(group="s3", seq_len=4, **kw),
    "s5": lambda **kw: WordProblem(seq_len=2, **kw),
    "k hop": lambda **kw: KHop(vocab_size=4, seq_len=6, **kw),
    "keep n": lambda **kw: KeepNth(vocab_size=8, n=2, seq_len=4, **kw),
    "copying": lambda **kw: Copying(vocab_size=6, n_tokens=3, seq_len=10, **kw),
    "copying, plain": lambda **kw: Copying(vocab_size=6, n_tokens=4, seq_len=10, variant="plain", **kw),
    "induction": lambda **kw: InductionHeads(vocab_size=3, seq_len=8, **kw),
    "mqar": lambda **kw: MQAR(vocab_size=12, n_pairs=2, seq_len=10, **kw),
    "mqar, filler": lambda **kw: MQAR(vocab_size=8, n_pairs=1, seq_len=6, filler="random", **kw),
}
MANY: dict[str, Make] = {  # of so many that nothing is split
    "parity": lambda **kw: Parity(seq_len=64, **kw),
    "s5": lambda **kw: WordProblem(seq_len=20, **kw),
    "k hop": KHop,
    "keep n": KeepNth,
    "copying": Copying,
    "induction": InductionHeads,
    "mqar": MQAR,
    "mqar, filler": lambda **kw: MQAR(filler="random", **kw),
}


def rows(data: SyntheticData, stream: int, n: int = 3000) -> set[Row]:
    """Rows without their filler."""
    numbers = np.arange(n)
    lengths = data.lengths(Draws(data.seed, stream, numbers))[:, 0].tolist()
    tokens = data.samples(numbers, stream)["tokens"].tolist()
    return {tuple(row[:length]) for row, length in zip(tokens, lengths, strict=True)}


@pytest.mark.parametrize("name", FEW)
def test_training_and_validation_have_no_row_in_common(name: str) -> None:
    assert SPLIT <= FEW[name]().variety() < APART
    training = set.union(*(rows(FEW[name](seed=seed), TRAINING) for seed in (0, 1)))
    validation = set.union(*(rows(FEW[name](seed=seed), VALIDATION, 600) for seed in (0, 1, 7)))
    assert training
    assert validation
    assert not training & validation


@pytest.mark.parametrize("name", FEW)
def test_independent_draws_would_meet(name: str) -> None:
    """What the split is for; else the test above would show nothing."""
    data = FEW[name](seed=0)
    numbers = np.arange(3000)
    tokens = [data.generate(Draws(0, stream, numbers), 3000)[0].tolist() for stream in (TRAINING, VALIDATION)]
    drawn = [set(map(tuple, part)) for part in tokens]
    assert drawn[0] & drawn[1]


COUNTED: list[tuple[SyntheticData, int]] = [  # rows there are, but for how the keys of mqar fall into their slots
    (Parity(seq_len=7), 1),
    (WordProblem(group="s3", seq_len=3), 1),
    (KHop(vocab_size=5, seq_len=4), 1),
    (Copying(vocab_size=5, n_tokens=2, seq_len=8), 1),
    (Copying(vocab_size=5, n_tokens=4, seq_len=10, variant="plain"), 1),
    (InductionHeads(vocab_size=3, seq_len=7), 1),
    (MQAR(vocab_size=10, n_pairs=2, seq_len=8), 2),  # both keys in the only two slots
    (MQAR(vocab_size=8, n_pairs=1, seq_len=6), 2),
    (MQAR(vocab_size=10, n_pairs=1, n_passes=2, seq_len=8), 2),
    (MQAR(vocab_size=6, n_pairs=1, seq_len=4, filler="random"), 1),
    (MQAR(vocab_size=8, n_pairs=1, n_passes=2, seq_len=6, filler="random"), 1),
]


@pytest.mark.parametrize(("data", "slots"), COUNTED)
def test_the_variety_of_a_task_is_the_number_of_its_rows(data: SyntheticData, slots: int) -> None:
    numbers = np.arange(30_000)
    drawn = set(map(tuple, data.generate(Draws(0, TRAINING, numbers), len(numbers))[0].tolist()))
    assert len(drawn) == slots * round(2 ** data.variety())


def test_every_row_is_on_one_side() -> None:
    """All 128 sequences of seven bits; about a quarter of them are validation's."""
    data = Parity(seq_len=7)
    training, validation = (rows(data, stream) for stream in (TRAINING, VALIDATION))
    assert len(training | validation) == len(training) + len(validation) == 128
    assert 16 < len(validation) < 52


@pytest.mark.parametrize("name", FEW)
def test_what_was_on_its_side_is_as_drawn(name: str) -> None:
    """A training row in four is drawn again, and no other changes; its target is the new row's."""
    data = FEW[name](seed=3)
    numbers = np.arange(2000)
    tokens, targets = data.generate(Draws(3, TRAINING, numbers), 2000)
    batch = data.samples(numbers)
    same = (batch["tokens"].numpy() == tokens).all(axis=1)
    assert abs(same.mean() - (1 - HELD_OUT)) < 0.12  # of the rows' odds: there are as few as 64
    assert (batch["targets"].numpy() == targets)[same].all()


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("stream", [TRAINING, VALIDATION])
def test_where_rows_are_many_all_are_as_drawn(name: str, stream: int) -> None:
    data = MANY[name](seed=3)
    numbers = np.arange(300)
    tokens, targets = data.generate(Draws(3, stream, numbers), 300)
    batch = data.samples(numbers, stream)
    assert (batch["tokens"].numpy() == tokens).all()
    assert (batch["targets"].numpy() == targets).all()


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("stream", [TRAINING, VALIDATION])
def test_a_sample_is_the_same_in_any_company(name: str, stream: int) -> None:
    data = FEW[name](seed=5)
    numbers = np.array([3, 70, 2**33 + 1, 4, 3])
    together = data.samples(numbers, stream)
    for i, number in enumerate(numbers):
        alone = data.samples(np.array([number]), stream)
        assert torch.equal(alone["tokens"][0], together["tokens"][i])
        assert torch.equal(alone["targets"][0], together["targets"][i])


@pytest.mark.parametrize("stream", [TRAINING, VALIDATION])
def test_lengths_stay_uniform(stream: int) -> None:
    """From lengths that are not split (4, 5), over those that are, to those that need not be (56 and more)."""
    data = Parity(seq_len=70, min_len=4, seed=1)
    targets = data.samples(np.arange(6700), stream)["targets"]
    counts = torch.bincount((targets >= 0).sum(dim=1), minlength=71)[4:]
    assert (counts / 6700 - 1 / 67).abs().max() < 0.006


def test_other_lengths_are_split_alike() -> None:
    """Training of 6 to 40 bits, and validation of seven of them alone, from the same side."""
    data = Parity(seq_len=40, min_len=6, val_lengths=(7, 12), val_samples=500, seed=2)
    training = rows(data, TRAINING, 20_000)
    assert len([row for row in training if len(row) == 7]) > 40
    for batch in data.val_dataloader():
        scored = (batch["targets"] >= 0).any(dim=1)
        assert not {tuple(row) for row in batch["tokens"][scored].tolist()} & training


SHARED: list[tuple[Callable[[], SyntheticData], str]] = [
    (lambda: Parity(seq_len=8, min_len=4), "40% of its rows"),  # 4 and 5 of 4, 5, 6, 7, 8
    (lambda: Parity(seq_len=8, min_len=4, val_lengths=(4, 8, 90)), "33% of its rows"),
    (lambda: Parity(seq_len=5), "100% of its rows"),
    (lambda: Copying(vocab_size=3, n_tokens=2, seq_len=5, variant="plain"), "100% of its rows"),
    (lambda: InductionHeads(vocab_size=3, seq_len=3), "100% of its rows"),
]


@pytest.mark.parametrize(("make", "words"), SHARED)
def test_what_cannot_be_split_is_said(make: Callable[[], SyntheticData], words: str) -> None:
    with pytest.warns(UserWarning, match="validation should have no row of training") as said:
        make().setup("fit")
    assert words in str(said[0].message)


@pytest.mark.parametrize("name", [*FEW, *MANY])
def test_what_is_split_or_need_not_be_says_nothing(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (FEW | MANY)[name]().setup("fit")
        Parity(seq_len=8, min_len=6, val_lengths=(3, 8)).setup("fit")  # nothing of length 3 is trained


def repeated(train: list[str], held_out: list[str], run: int) -> float:
    """Share of the held-out words that lie in a run of so many words that training has, too."""
    parts = [text.split() for text in train]
    known = {tuple(words[at : at + run]) for words in parts for at in range(len(words) - run + 1)}
    marked = []
    for words in map(str.split, held_out):
        marks = np.zeros(len(words), bool)
        for at in range(len(words) - run + 1):
            marks[at : at + run] |= tuple(words[at : at + run]) in known
        marked.append(marks)
    return float(np.concatenate(marked).mean())


def test_what_the_embedded_text_repeats_is_what_it_says() -> None:
    """The class says 0.8 % in runs of twelve words, none of thirty; the text differs from one Python to the next."""
    train, held_out = PyDocs().split
    assert "0.8 % lie in a run of twelve" in str(PyDocs.__doc__)
    assert 0 < repeated(train, held_out, 12) < 0.015
    assert repeated(train, held_out, 30) == 0
    if sys.version_info[:2] == (3, 11):
        assert repeated(train, held_out, 12) == pytest.approx(0.008, abs=0.0005)


class Same(StateTracking):
    """Claims many sequences, and has one."""

    def __init__(self, **settings: Any):
        super().__init__(
            vocab_size=4, seq_len=6, min_len=None, labels="all", val_lengths=(), batch_size=4, train_samples=8,
            val_samples=8, num_workers=0, **settings,
        )  # fmt: skip

    def sequences(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        ones = np.ones((draws.count, self.seq_len), np.int64)
        return ones, ones


def test_a_side_without_rows_is_refused() -> None:
    """The only row is training's, for its hash says so."""
    data, numbers = Same(seed=0), np.arange(4)
    assert data.samples(numbers, TRAINING)["tokens"].tolist() == [[1] * 6] * 4
    with pytest.raises(UserError, match="allow so few that none was found for one of them: make sequences longer"):
        data.samples(numbers, VALIDATION)
