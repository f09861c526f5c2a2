"""The generated tasks: samples by number, exactly as published, the same in any company."""

import itertools
import re
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import UserError
from zoo.train.data.synthetic._philox import Draws, philox
from zoo.train.data.synthetic.base import TRAINING, VALIDATION, SyntheticData
from zoo.train.data.synthetic.copying import Copying
from zoo.train.data.synthetic.induction_heads import InductionHeads
from zoo.train.data.synthetic.mqar import MQAR
from zoo.train.data.synthetic.state_tracking import GROUPS, KeepNth, KHop, Parity, StateTracking, WordProblem, cayley

FAST = settings(deadline=None, max_examples=40)

KNOWN_ANSWERS = [  # Random123, kat_vectors: philox4x32, 10 rounds
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0_A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: list[int], key: int, want: list[int]) -> None:
    words = [np.array([word], np.uint64) for word in counter]
    assert philox(*words, key).tolist() == [want]


def draws(n: int = 4000, seed: int = 1) -> Draws:
    return Draws(seed, TRAINING, np.arange(n))


def test_draws_are_even() -> None:
    uniform = draws().uniform(10)
    assert abs(uniform.mean() - 0.5) < 0.005
    assert abs(uniform.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(uniform.T) - np.eye(10)).max() < 0.08
    counts = np.bincount(draws().integers(7, 10).ravel(), minlength=7)
    assert counts.shape == (7,)
    assert abs(counts / 40_000 - 1 / 7).max() < 0.01


def test_choice_is_without_replacement_and_in_any_order() -> None:
    chosen = draws().choice(6, 3)
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    _, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(counts) == 6 * 5 * 4
    assert abs(counts / 4000 - 1 / 120).max() < 0.008
    assert (np.sort(draws(50).choice(9, 9)) == np.arange(9)).all()


def test_weighted_choice_has_the_odds_of_drawing_one_after_another() -> None:
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    chosen = draws(20_000).weighted_choice(weights, 2)
    for first in range(4):
        assert abs((chosen[:, 0] == first).mean() - weights[first] / 8) < 0.012
        for second in set(range(4)) - {first}:
            want = weights[first] / 8 * weights[second] / (8 - weights[first])
            assert abs((chosen == (first, second)).all(axis=1).mean() - want) < 0.012


@FAST
@given(
    half_vocab=st.integers(20, 60),
    n_pairs=st.integers(1, 6),
    n_passes=st.integers(1, 2),
    filler=st.sampled_from(["zero", "random"]),
    seed=st.integers(0, 2**40),
)
def test_mqar_as_published(half_vocab: int, n_pairs: int, n_passes: int, filler: Any, seed: int) -> None:
    vocab_size = 2 * half_vocab
    data = MQAR(
        vocab_size=vocab_size, seq_len=36, n_pairs=n_pairs, n_passes=n_passes, filler=filler, batch_size=16, seed=seed
    )
    batch = data.samples(np.arange(16))
    first = 2 * n_pairs * n_passes
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        keys, values = tokens[0 : 2 * n_pairs : 2], tokens[1 : 2 * n_pairs : 2]
        assert len(set(keys)) == len(set(values)) == n_pairs
        assert all(1 <= key < half_vocab for key in keys)
        assert all(half_vocab <= value < vocab_size for value in values)
        assert tokens[:first] == tokens[: 2 * n_pairs] * n_passes
        places = [i for i, target in enumerate(targets) if target != -100]
        assert [tokens[i] for i in sorted(places, key=lambda i: keys.index(tokens[i]))] == keys  # each exactly once
        assert all(targets[i] == values[keys.index(tokens[i])] for i in places)
        assert all(i >= first and (i - first) % 2 == 0 for i in places)
        others = [tokens[i] for i in range(first, 36) if i not in places]
        assert all(token == 0 for token in others) if filler == "zero" else all(0 <= t < vocab_size for t in others)


def test_mqar_asks_early_by_the_power_law() -> None:
    """The slot of the first key: odds proportional to i ** (power - 1), about 1 / i."""
    data = MQAR(vocab_size=128, seq_len=64, n_pairs=4, batch_size=16)
    batch = data.samples(np.arange(5000))
    is_first = (batch["tokens"] == batch["tokens"][:, :1]) & (batch["targets"] >= 0)
    slots = (is_first.int().argmax(dim=1).numpy() - 8) // 2 + 1
    weights = np.arange(1, 29) ** -0.99
    want = weights / weights.sum()
    got = np.bincount(slots, minlength=29)[1:] / 5000
    assert abs(got - want).max() < 0.02


def test_mqar_random_filler_is_everywhere() -> None:
    batch = MQAR(vocab_size=66, filler="random", n_pairs=2).samples(np.arange(300))
    assert len(batch["tokens"][:, 4:].unique()) == 66


@FAST
@given(
    vocab_size=st.integers(3, 20),
    n=st.integers(1, 8),
    seq_len=st.integers(17, 40),
    variant=st.sampled_from(["selective", "plain"]),
)
def test_copying_as_published(vocab_size: int, n: int, seq_len: int, variant: Any) -> None:
    data = Copying(vocab_size=vocab_size, seq_len=seq_len, n_tokens=n, variant=variant, batch_size=8)
    batch = data.samples(np.arange(8))
    blank, copy = vocab_size - 2, vocab_size - 1
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        content = [token for token in tokens[: seq_len - n - 1] if token != blank]
        assert len(content) == n
        assert targets == [-100] * (seq_len - n) + content
        assert tokens[-n - 1 :] == [copy] + [blank] * n
        assert all(token < blank for token in content)
        if variant == "plain":
            assert tokens[:n] == content


def test_selective_copying_spreads_its_tokens() -> None:
    batch = Copying(vocab_size=16, seq_len=41, n_tokens=8).samples(np.arange(4000))
    share = (batch["tokens"][:, :32] < 14).float().mean(dim=0)
    assert (share - 8 / 32).abs().max() < 0.04


@FAST
@given(vocab_size=st.integers(3, 20), seq_len=st.integers(3, 40), seed=st.integers(0, 2**40))
def test_induction_heads_as_published(vocab_size: int, seq_len: int, seed: int) -> None:
    data = InductionHeads(vocab_size=vocab_size, seq_len=seq_len, batch_size=8, seed=seed)
    batch = data.samples(np.arange(8))
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        assert tokens[-1] == vocab_size - 1
        first = tokens.index(vocab_size - 1)
        assert tokens.count(vocab_size - 1) == 2
        assert targets == [-100] * (seq_len - 1) + [tokens[first + 1]]
        assert 0 <= targets[-1] < vocab_size - 1


def test_induction_heads_ask_for_every_place_and_token_alike() -> None:
    batch = InductionHeads(vocab_size=6, seq_len=12).samples(np.arange(8000))
    places = (batch["tokens"] == 5).int().argmax(dim=1)
    assert (torch.bincount(places, minlength=12)[:10] / 8000 - 1 / 10).abs().max() < 0.015
    assert (torch.bincount(batch["targets"][:, -1], minlength=5) / 8000 - 1 / 5).abs().max() < 0.02


TASKS: list[SyntheticData] = [
    MQAR(seed=5), MQAR(seed=5, filler="random"), Copying(seed=5), InductionHeads(seed=5),
    Parity(seed=5), WordProblem(seed=5), KHop(seed=5), KeepNth(seed=5),
]  # fmt: skip
NAMES = ["mqar", "filler", "copying", "induction", "parity", "s5", "k_hop", "keep_nth"]


@pytest.mark.parametrize("data", TASKS, ids=NAMES)
def test_a_sample_is_the_same_in_any_company(data: SyntheticData) -> None:
    numbers = np.array([3, 70, 2**33 + 1, 4, 3])
    together = data.samples(numbers)
    for i, number in enumerate(numbers):
        alone = data.samples(np.array([number]))
        assert torch.equal(alone["tokens"][0], together["tokens"][i])
        assert torch.equal(alone["targets"][0], together["targets"][i])
    assert not torch.equal(together["tokens"][0], together["tokens"][3])


@pytest.mark.parametrize("data", TASKS, ids=NAMES)
def test_training_validation_and_seeds_do_not_meet(data: SyntheticData) -> None:
    def rows(seed: int, stream: int) -> set[tuple[int, ...]]:
        kwargs = {"filler": data.filler} if isinstance(data, MQAR) else {}
        return set(map(tuple, type(data)(seed=seed, **kwargs).samples(np.arange(500), stream)["tokens"].tolist()))

    parts = [rows(5, TRAINING), rows(5, VALIDATION), rows(6, TRAINING), rows(5 + 2**32, TRAINING)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 2000


def test_epochs_do_not_repeat_samples() -> None:
    loader = MQAR(train_samples=96).train_dataloader()
    rows = [tuple(row) for _ in range(3) for batch in loader for row in batch["tokens"].tolist()]
    assert len(rows) == len(set(rows)) == 288


def test_validation_has_every_sample_once_and_fills_up() -> None:
    data = MQAR(batch_size=32, val_samples=70)
    batches = list(data.val_dataloader())
    assert [batch["tokens"].shape for batch in batches] == [(32, 64)] * 3
    assert sum(int((batch["targets"] >= 0).sum()) for batch in batches) == 70 * 16
    again = list(data.val_dataloader())
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(batches, again, strict=True))


def test_says_what_it_is() -> None:
    for data in TASKS:
        assert data.metrics == (("accuracy", "last_accuracy") if isinstance(data, StateTracking) else ("accuracy",))
        assert data.tokenizer is None
        batch = next(iter(data.train_dataloader()))
        assert batch.keys() == {"tokens", "targets"}
        assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
        assert int(batch["tokens"].max()) < data.vocab_size


@pytest.mark.timing
@pytest.mark.parametrize(
    "data",
    [
        MQAR(vocab_size=8192, seq_len=128, n_pairs=32, batch_size=64),
        MQAR(vocab_size=256, seq_len=128, n_pairs=8, filler="random", batch_size=64),
        Copying(seq_len=128, batch_size=64),
        InductionHeads(seq_len=128, batch_size=64),
    ],
    ids=["mqar", "filler", "copying", "induction"],
)
def test_a_batch_takes_milliseconds(data: SyntheticData) -> None:
    """64 x 128 takes 1 to 2 ms on one core; the bound is for a busy machine, and the best of many counts."""
    source = data.sources[0]
    times = []
    for step in range(30):
        start = time.perf_counter()
        source.batch(0, step, 0, 1)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005


STATE_TRACKING: dict[str, Any] = {
    "parity": Parity,
    "s5": WordProblem,
    "z60": lambda **settings: WordProblem(group="z60", **settings),
    "k_hop": KHop,
    "keep_nth": lambda **settings: KeepNth(n=3, **settings),
}


def labels_by_hand(name: str, tokens: list[int]) -> list[int]:
    """The definition, one position at a time; -100 where there is none."""
    found = []
    for t in range(len(tokens)):
        so_far = tokens[: t + 1]
        if name == "parity":
            found.append(sum(so_far) % 2)
        elif name == "s5":
            elements = list(itertools.permutations(range(5)))
            product = tuple(range(5))
            for token in so_far:
                product = tuple(elements[token][i] for i in product)
            found.append(elements.index(product))
        elif name == "z60":
            found.append(sum(so_far) % 60)
        elif name == "k_hop":
            before = [i for i in range(t) if tokens[i] == tokens[t]]
            found.append(tokens[before[-1] + 1] if before else -100)
        else:
            found.append(tokens[2] if t >= 2 else -100)
    return found


@pytest.mark.parametrize("name", STATE_TRACKING)
@pytest.mark.parametrize("labels", ["all", "last"])
def test_labels_of_state_tracking_are_the_definitions(name: str, labels: str) -> None:
    data = STATE_TRACKING[name](seq_len=24, min_len=4, labels=labels, seed=3)
    batch = data.samples(np.arange(60))
    lengths = set()
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        exact = labels_by_hand(name, tokens)
        scored = [t for t, target in enumerate(targets) if target != -100]
        if labels == "last":
            assert len(scored) <= 1
        if scored:  # the first occurrence of a token has no hop
            lengths.add(scored[-1] + 1)
        assert all(targets[t] == exact[t] for t in scored)
        if labels == "all" and name != "k_hop":
            first = 2 if name == "keep_nth" else 0
            assert scored == list(range(first, scored[-1] + 1))
            assert tokens[scored[-1] + 1 :] == [0] * (24 - scored[-1] - 1)
    assert min(lengths) >= (1 if name == "k_hop" else 4)  # where the last tokens of a sequence are all new
    assert max(lengths) == 24
    assert len(lengths) > 10


@pytest.mark.parametrize(
    ("group", "order"), [("s3", 6), ("s4", 24), ("s5", 120), ("a5", 60), ("z60", 60), ("a4xz5", 60)]
)
def test_groups_are_groups(group: str, order: int) -> None:
    table = cayley(group).astype(int)
    assert table.shape == (order, order)
    everything = np.arange(order)
    assert (table[0] == everything).all()  # element 0 is the identity
    assert (table[:, 0] == everything).all()
    assert (np.sort(table, axis=0) == everything[:, None]).all()  # a Latin square
    assert (np.sort(table, axis=1) == everything).all()
    assert (table[table] == table[everything[:, None, None], table[None]]).all()  # (xy)z = x(yz)
    assert (table == table.T).all() == (group == "z60")
    if group in ("a5", "a4xz5"):  # of A5 nothing but the identity commutes with everything; of A4 x Z5 five do
        centre = (table == table.T).all(axis=1).sum()
        assert centre == {"a5": 1, "a4xz5": 5}[group]


def test_two_hops_are_a_hop_from_where_the_first_one_ends() -> None:
    one, two = (KHop(hops=n, vocab_size=4, seq_len=40, seed=1).samples(np.arange(20)) for n in (1, 2))
    assert torch.equal(one["tokens"], two["tokens"])
    for tokens, targets in zip(two["tokens"].tolist(), two["targets"].tolist(), strict=True):
        for t, target in enumerate(targets):
            place = t
            for _ in range(2):
                earlier = [i for i in range(place) if tokens[i] == tokens[place]] if place >= 0 else []
                place = earlier[-1] + 1 if earlier else -1
            assert target == (tokens[place] if place >= 0 else -100)


@pytest.mark.parametrize("name", STATE_TRACKING)
def test_validation_at_several_lengths_is_that_of_each_alone(name: str) -> None:
    """In turns, labelled, and the very sequences that `data.seq_len=T` validates on, whatever the training lengths."""
    lengths = (30, 5, 100)
    common = {"batch_size": 8, "val_samples": 20, "seed": 7}
    data = STATE_TRACKING[name](seq_len=12, min_len=4, val_lengths=lengths, **common)
    assert data.val_sets == ("30", "5", "100")
    batches = list(data.val_dataloader())
    assert [int(batch["val_set"]) for batch in batches] == [0, 1, 2] * 3
    for i, length in enumerate(lengths):
        alone = list(STATE_TRACKING[name](seq_len=length, **common).val_dataloader())
        assert "val_set" not in alone[0]
        for ours, want in zip(batches[i::3], alone, strict=True):
            assert ours["tokens"].shape == (8, length)
            assert torch.equal(ours["tokens"], want["tokens"])
            assert torch.equal(ours["targets"], want["targets"])
    training = next(iter(data.train_dataloader()))
    assert training.keys() == {"tokens", "targets"}
    assert training["tokens"].shape == (8, 12)


@pytest.mark.parametrize("name", STATE_TRACKING)
def test_what_is_trained_and_what_is_tested_at_another_length_never_meet(name: str) -> None:
    data = STATE_TRACKING[name](seq_len=40, val_lengths=(40, 90), batch_size=50, val_samples=500, seed=2)
    seen = {tuple(row) for row in data.samples(np.arange(2000))["tokens"].tolist()}
    for batch in data.val_dataloader():
        rows = batch["tokens"].tolist()
        assert not any(tuple(row[at : at + 40]) in seen for row in rows for at in range(len(row) - 39))


def test_ranks_and_workers_share_the_validation_of_several_lengths() -> None:
    settings: dict[str, Any] = {"batch_size": 4, "val_samples": 16, "val_lengths": (3, 9), "seed": 1}
    data = Parity(**settings)
    source = data.sources[1]
    assert (source.steps(1), source.steps(2)) == (8, 4)
    for length in (3, 9):
        alone = Parity(seq_len=length, batch_size=16, val_samples=16, seed=1).sources[1].batch(0, 0, 0, 1)["tokens"]
        parts = [[source.batch(0, step, rank, 2) for step in range(4)] for rank in range(2)]
        of_length = [[b["tokens"] for b in part if b["tokens"].shape[1] == length] for part in parts]
        dealt = torch.stack([torch.cat(tokens) for tokens in of_length], dim=1).flatten(0, 1)
        assert torch.equal(dealt, alone)
    for here, there in zip(data.val_dataloader(), Parity(num_workers=1, **settings).val_dataloader(), strict=True):
        assert all(torch.equal(here[key], there[key]) for key in here)


def test_lengths_and_labels_are_even() -> None:
    batch = Parity(seq_len=11, min_len=4).samples(np.arange(8000))
    lengths = (batch["targets"] >= 0).sum(dim=1)
    assert (torch.bincount(lengths, minlength=12)[4:] / 8000 - 1 / 8).abs().max() < 0.015
    products = WordProblem(group="s3", seq_len=6).samples(np.arange(8000))["targets"]
    for t in range(6):
        assert (torch.bincount(products[:, t], minlength=6) / 8000 - 1 / 6).abs().max() < 0.02
    kept = KeepNth(vocab_size=8, n=3, seq_len=6).samples(np.arange(8000))["targets"][:, -1]
    assert (torch.bincount(kept, minlength=8) / 8000 - 1 / 8).abs().max() < 0.015


def test_parity_is_balanced_and_its_streams_never_meet() -> None:
    data = Parity(seq_len=40, seed=0)
    training, held_out = (data.samples(np.arange(2000), stream) for stream in (TRAINING, VALIDATION))
    assert abs(training["targets"].double().mean() - 0.5) < 0.01
    seen = {tuple(row) for row in training["tokens"].tolist()}
    assert not seen & {tuple(row) for row in held_out["tokens"].tolist()}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Parity(seq_len=8, min_len=9), "data.min_len must be between 1 and data.seq_len=8; got 9"),
        (lambda: Parity(labels="some"), "data.labels must be all or last; got 'some'"),
        (lambda: WordProblem(group="s6"), "data.group must be one of s3, s4, s5, a5, z60, a4xz5; got 's6'"),
        (lambda: KHop(hops=0), "k-hop needs data.hops of at least 1"),
        (lambda: KeepNth(n=7, seq_len=9, min_len=6), "data.n must lie within the shortest sequence, 1 to 6; got 7"),
        (lambda: KeepNth(n=7, val_lengths=(9, 5)), "data.n must lie within the shortest sequence, 1 to 5; got 7"),
        (lambda: Parity(val_lengths=(9, 0)), "data.val_lengths must be different lengths of at least 1; got [9, 0]"),
        (lambda: Parity(val_lengths=(9, 9)), "data.val_lengths must be different lengths of at least 1; got [9, 9]"),
    ],
)
def test_state_tracking_refuses_what_makes_no_task(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        make()


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_as_many_tokens_as_elements(group: str) -> None:
    table = cayley(group)
    assert table.shape == (GROUPS[group],) * 2
    assert set(table[0].tolist()) == set(range(GROUPS[group]))
