"""Tasks in which every token changes a hidden state: parity, words of a group, and two of memory, at any length."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Literal, Self

import numpy as np

from zoo.errors import UserError
from zoo.train.data.core.base import LoaderSettings, Metric
from zoo.train.data.core.corpus import IGNORE
from zoo.train.data.core.loader import Source
from zoo.train.data.synthetic._philox import Draws
from zoo.train.data.synthetic.base import APART, SPLIT, SyntheticData, ValidationSets

Labels = Literal["all", "last"]


class StateTracking(SyntheticData):
    """Random sequences of min_len to seq_len tokens, filled up on the right; a subclass says what their labels are.

    Lengths are uniform; what fills a row up is token 0 and is not scored. To test at other lengths than are trained:
    `data.val_lengths=[32,100,500]` in training, which gives `val_accuracy_at_500` (all scored positions) and
    `val_last_accuracy_at_500` (the last scored one), or afterwards, on the same sequences,
    `zoo eval RUN data=parity data.seq_len=500 data.labels=last`.

    Args:
        vocab_size: number of tokens.
        seq_len: tokens of the longest sequence.
        min_len: tokens of the shortest; seq_len when None.
        labels: "all" scores every position that has a label, "last" the last one of a sequence.
        val_lengths: validate on val_samples sequences of each of these lengths; when empty, on lengths as in training.
        batch_size, train_samples, val_samples, num_workers, seed: as for the other generated tasks.
    """

    metrics: tuple[Metric, ...] = ("accuracy", "last_accuracy")

    def __init__(
        self,
        loading: LoaderSettings | None = None,
        *,
        vocab_size: int,
        seq_len: int,
        min_len: int | None,
        labels: Labels,
        val_lengths: tuple[int, ...],
        train_samples: int,
        val_samples: int,
        **each: int,
    ):
        super().__init__(
            loading,
            vocab_size=vocab_size,
            seq_len=seq_len,
            train_samples=train_samples,
            val_samples=val_samples,
            **each,
        )
        self.min_len = seq_len if min_len is None else min_len
        if not 1 <= self.min_len <= seq_len:
            raise UserError(
                f"data.min_len must be between 1 and data.seq_len={seq_len}; got {min_len}: change one of the two"
            )
        if labels not in ("all", "last"):
            raise UserError(f"data.labels must be all or last; got {labels!r}: choose one of the two")
        if any(length < 1 for length in val_lengths) or len(set(val_lengths)) < len(val_lengths):
            raise UserError(
                f"data.val_lengths must be different lengths of at least 1; got {list(val_lengths)}: give each once, "
                "such as [32,100]"
            )
        self.labels, self.val_lengths = labels, tuple(val_lengths)
        self.val_sets = tuple(map(str, val_lengths))

    def make_sources(self) -> tuple[Source, Source]:
        """Training, and validation at each length in turns."""
        training, validation = super().make_sources()
        if not self.val_lengths:
            return training, validation
        return training, ValidationSets([self._of_length(n).make_sources()[1] for n in self.val_lengths])

    def _of_length(self, length: int) -> Self:
        settings = self._settings()
        settings.seq_len = settings.min_len = length
        settings.val_lengths = ()
        return settings

    @abstractmethod
    def sequences(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of full length, both (count, seq_len); the label of a position looks at none after it."""

    def variety(self) -> float:
        """All sequences of the shortest length."""
        return self.min_len * math.log2(self.vocab_size)

    def lengths(self, draws: Draws) -> np.ndarray:
        """Uniform between min_len and seq_len, (count, 1)."""
        return self.min_len + draws.integers(self.seq_len - self.min_len + 1, 1)

    def splits(self, lengths: np.ndarray) -> np.ndarray:
        """By each length's own number of sequences: a sequence is on one side in training of any lengths."""
        variety = lengths * math.log2(self.vocab_size)
        return (variety >= SPLIT) & (variety < APART)

    def shared(self) -> float:
        """Share of the validated lengths that are trained and have too few sequences."""
        trained = range(self.min_len, self.seq_len + 1)
        validated = self.val_lengths or trained
        return sum(n in trained and n * math.log2(self.vocab_size) < SPLIT for n in validated) / len(validated)

    def again(self, draws: Draws, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Other sequences of the same lengths, so that lengths stay uniform."""
        return self._cut(draws, lengths)

    def generate(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences of random lengths, and their labels as targets."""
        return self._cut(draws, self.lengths(draws))

    def _cut(self, draws: Draws, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens, targets = self.sequences(draws)
        at = np.arange(self.seq_len)
        scored = at == lengths - 1 if self.labels == "last" else at < lengths
        return np.where(at < lengths, tokens, 0), np.where(scored, targets, IGNORE)


class Parity(StateTracking):
    """Bits; the label is the parity of all bits so far.

    With `labels=last` this is the task of arXiv 2411.12537 but for its answer token: there the bits of one sequence end
    in a position that asks, here the last bit asks. A guess is right half of the time.
    """

    def __init__(
        self,
        *,
        seq_len: int = 32,
        min_len: int | None = None,
        labels: Labels = "all",
        val_lengths: tuple[int, ...] = (),
        batch_size: int = 64,
        train_samples: int = 64_000,
        val_samples: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(
            LoaderSettings(batch_size=batch_size, num_workers=num_workers, seed=seed),
            vocab_size=2, seq_len=seq_len, min_len=min_len, labels=labels, val_lengths=val_lengths,
            train_samples=train_samples, val_samples=val_samples,
        )  # fmt: skip

    def sequences(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Bits (n, seq_len) and the parity of all bits so far, of the same shape."""
        bits = draws.integers(2, self.seq_len)
        return bits, bits.cumsum(axis=1) % 2


def _permutations(n: int, even: bool = False) -> list[tuple[int, ...]]:
    """All of n things in lexicographic order, or the even ones."""

    def odd(p: tuple[int, ...]) -> int:
        return sum(p[i] > p[j] for i, j in itertools.combinations(range(n), 2)) % 2

    return [p for p in itertools.permutations(range(n)) if not (even and odd(p))]


def _table(elements: list[tuple[int, ...]], product: Callable[..., tuple[int, ...]]) -> np.ndarray:
    """[i, j] -> the number of element i times element j."""
    number = {x: i for i, x in enumerate(elements)}
    return np.array([[number[product(x, y)] for y in elements] for x in elements], dtype=np.uint8)


def _after(x: tuple[int, ...], y: tuple[int, ...]) -> tuple[int, ...]:
    """First x, then y."""
    return tuple(y[i] for i in x)


def cayley(group: str) -> np.ndarray:
    """The multiplication table of a group, (order, order) uint8; element 0 is the identity.

    Args:
        group: "s3", "s4", "s5" (all permutations), "a5" (the even ones), "z60" (addition), or "a4xz5".
    """
    if group in ("s3", "s4", "s5", "a4", "a5"):
        return _table(_permutations(int(group[1]), even=group[0] == "a"), _after)
    if group == "z60":
        table: np.ndarray = ((np.arange(60)[:, None] + np.arange(60)) % 60).astype(np.uint8)
        return table
    four, five = cayley("a4").astype(int), (np.arange(5)[:, None] + np.arange(5)) % 5
    table = (four[:, None, :, None] * 5 + five[None, :, None, :]).reshape(60, 60).astype(np.uint8)
    return table


GROUPS = {"s3": 6, "s4": 24, "s5": 120, "a5": 60, "z60": 60, "a4xz5": 60}


class WordProblem(StateTracking):
    """Elements of a finite group; the label is the product of all elements so far, from left to right.

    Tokens and labels are the elements' numbers, in the lexicographic order of their permutations. A5 and S5 cannot be
    solved, S3, S4 and A4 x Z5 can, and Z60 is commutative: what a model must be able to do grows in this order
    (arXiv 2404.08819, whose generator has the same order of multiplication).
    """

    def __init__(
        self,
        *,
        group: Literal["s3", "s4", "s5", "a5", "z60", "a4xz5"] = "s5",
        seq_len: int = 20,
        min_len: int | None = None,
        labels: Labels = "all",
        val_lengths: tuple[int, ...] = (),
        batch_size: int = 64,
        train_samples: int = 64_000,
        val_samples: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ):
        if group not in GROUPS:
            raise UserError(f"data.group must be one of {', '.join(GROUPS)}; got {group!r}: choose one of them")
        super().__init__(
            LoaderSettings(batch_size=batch_size, num_workers=num_workers, seed=seed),
            vocab_size=GROUPS[group], seq_len=seq_len, min_len=min_len, labels=labels, val_lengths=val_lengths,
            train_samples=train_samples, val_samples=val_samples,
        )  # fmt: skip
        self.group, self.table = group, cayley(group)

    def sequences(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of group elements (n, seq_len) and of the products of all elements so far."""
        tokens = draws.integers(self.vocab_size, self.seq_len)
        products = tokens.copy()
        for t in range(1, self.seq_len):
            products[:, t] = self.table[products[:, t - 1], tokens[:, t]]
        return tokens, products


class KHop(StateTracking):
    """Random tokens; the label follows `hops` times what came after the token's last occurrence.

    From position i, one hop leads to the position after the last earlier one that holds the same token. The label is
    the token where the last hop ends; a position from which a hop leads nowhere has none. A token that follows itself
    leads to where it stands. Defined as the k-hop induction heads of arXiv 2402.09268; the ParaRNN paper (arXiv
    2510.21450) has 1 hop over 10 tokens and 2 over 5, at length 100, and prints no generator.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 10,
        hops: int = 1,
        seq_len: int = 100,
        min_len: int | None = None,
        labels: Labels = "all",
        val_lengths: tuple[int, ...] = (),
        batch_size: int = 64,
        train_samples: int = 64_000,
        val_samples: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(
            LoaderSettings(batch_size=batch_size, num_workers=num_workers, seed=seed),
            vocab_size=vocab_size, seq_len=seq_len, min_len=min_len, labels=labels, val_lengths=val_lengths,
            train_samples=train_samples, val_samples=val_samples,
        )  # fmt: skip
        if hops < 1 or vocab_size < 2:
            raise UserError(
                f"k-hop needs data.hops of at least 1 and data.vocab_size of at least 2; got {hops} and {vocab_size}: "
                "raise them"
            )
        self.hops = hops

    def sequences(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, seq_len) and the tokens where `hops` hops lead, IGNORE where they lead nowhere."""
        tokens = draws.integers(self.vocab_size, self.seq_len)
        rows = np.arange(len(tokens))
        seen = np.full((len(tokens), self.vocab_size), -1)  # the position after the last occurrence of each token
        one = np.empty_like(tokens)  # where one hop leads, -1 for nowhere
        for t in range(self.seq_len):
            one[:, t] = seen[rows, tokens[:, t]]
            seen[rows, tokens[:, t]] = t + 1
        place = np.broadcast_to(np.arange(self.seq_len), tokens.shape)
        for _ in range(self.hops):
            place = np.where(place < 0, -1, np.take_along_axis(one, np.maximum(place, 0), axis=1))
        labels = np.take_along_axis(tokens, np.maximum(place, 0), axis=1)
        return tokens, np.where(place < 0, IGNORE, labels)


class KeepNth(StateTracking):
    """Random tokens; from the n-th on the label is the n-th.

    The ParaRNN paper (arXiv 2510.21450) has the 5th of 128 tokens and prints no generator; here every position from the
    n-th on is scored, or with `labels=last` the last one.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 128,
        n: int = 5,
        seq_len: int = 100,
        min_len: int | None = None,
        labels: Labels = "last",
        val_lengths: tuple[int, ...] = (),
        batch_size: int = 64,
        train_samples: int = 64_000,
        val_samples: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(
            LoaderSettings(batch_size=batch_size, num_workers=num_workers, seed=seed),
            vocab_size=vocab_size, seq_len=seq_len, min_len=min_len, labels=labels, val_lengths=val_lengths,
            train_samples=train_samples, val_samples=val_samples,
        )  # fmt: skip
        shortest = min(self.min_len, *self.val_lengths) if self.val_lengths else self.min_len
        if not 1 <= n <= shortest:
            raise UserError(
                f"data.n must lie within the shortest sequence, 1 to {shortest}; got {n}: lower it or raise "
                "data.min_len and data.val_lengths"
            )
        self.n = n

    def sequences(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, seq_len) and the n-th of each row from there on, IGNORE before it."""
        tokens = draws.integers(self.vocab_size, self.seq_len)
        kept = np.broadcast_to(tokens[:, self.n - 1 : self.n], tokens.shape)
        return tokens, np.where(np.arange(self.seq_len) < self.n - 1, IGNORE, kept)
