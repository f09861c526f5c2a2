"""Decoders: each has its settings, and none changes the text that the model means."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from case_table import CausalCase, make_model, models
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import zoo
from zoo import decoding
from zoo.configs import ROOT
from zoo.decoding import (
    Piece,
    Prompt,
    Sampling,
    Speculative,
    decode,
    generate,
    generate_batch,
    probabilities,
    sample,
    sampling,
    speculative,
)  # fmt: skip
from zoo.decoding.decoder import DECODERS, Decoder, register_decoder, why_not
from zoo.decoding.decoders.speculative import accepts, residual
from zoo.decoding.drafters import NGram
from zoo.errors import UserError
from zoo.layers import SequenceModel
from zoo.settings import indexed
from zoo.targets import load_class

CAUSAL = models(CausalCase)
CHEAP = ("transformer", "deltanet", "slstm + window")
EVERY = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in CHEAP else pytest.mark.everything) for name in CAUSAL]
)
GREEDY = {"temperature": 0.0, "longest": 4, "shortest": 1}


def model_of(case: str) -> SequenceModel:
    model = make_model(case).double()
    assert isinstance(model, SequenceModel)
    return model


def prompts_of(n: int) -> list[list[int]]:
    """Ragged texts that repeat themselves, so that there is something to look up."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(n):
        motif = torch.randint(50, (1 + row % 5,), generator=generator).tolist()
        rows.append((motif * 30)[: 1 + (7 * row) % 23])
    return rows


def texts(pieces: Iterator[Piece]) -> tuple[list[list[int]], Counter[str]]:
    """What every row gained, and the sums of the numbers."""
    rows: list[list[int]] = []
    sums: Counter[str] = Counter()
    for piece in pieces:
        rows = rows or [[] for _ in piece.tokens]
        for row, new in zip(rows, piece.tokens, strict=True):
            row.extend(new)
        sums.update(piece.info)
    return rows, sums


class Oracle(NGram):
    """Drafts from what the model is known to say: right, wrong, or at random."""

    known: Callable[[list[int], int], list[int]]

    def draft(self, text: list[int], most: int) -> list[int]:  # type: ignore[override]
        return type(self).known(text, most)


@EVERY
def test_a_hundred_prompts_are_continued_as_greedy_decoding_does(case: str) -> None:
    """I10: token for token, ten ragged rows at a time, and in fewer forwards than tokens."""
    model, prompts = model_of(case), prompts_of(100)
    forwards = plain = 0
    for first in range(0, 100, 10):
        rows = prompts[first : first + 10]
        want, base = texts(sampling(model, rows, Sampling(max_tokens=12, temperature=0)))
        got, sums = texts(speculative(model, rows, Speculative(max_tokens=12, **GREEDY)))
        assert got == want
        forwards, plain = forwards + sums["forwards"], plain + base["forwards"]
        assert sums["accepted"] <= sums["proposed"]
    assert plain == 120
    assert forwards <= plain


@EVERY
@pytest.mark.parametrize("gamma", [1, 4, 8])
@pytest.mark.parametrize("drafts", ["perfect", "random", "none", "sometimes"])
def test_any_drafter_gives_the_same_text(case: str, gamma: int, drafts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = model_of(case), prompts_of(6)
    want, _ = texts(sampling(model, prompts, Sampling(max_tokens=17, temperature=0)))
    whole = [[*prompt, *row] for prompt, row in zip(prompts, want, strict=True)]
    generator = torch.Generator().manual_seed(2)

    def known(text: list[int], most: int) -> list[int]:
        if drafts == "none" or (drafts == "sometimes" and len(text) % 3):
            return []
        if drafts == "random":
            return torch.randint(50, (most,), generator=generator).tolist()
        (row, *_) = [row for row in whole if row[: len(text)] == text]
        return row[len(text) : len(text) + most]

    monkeypatch.setattr(Oracle, "known", staticmethod(known), raising=False)
    monkeypatch.setattr("zoo.decoding.decoders.speculative.NGram", Oracle)
    config = Speculative(max_tokens=17, temperature=0, gamma=gamma)
    got, sums = texts(speculative(model, prompts, config))
    assert got == want
    assert texts(speculative(model, prompts[2:3], config))[0] == want[2:3]
    if drafts == "perfect":
        assert sums["forwards"] == 1 + -(-16 // (gamma + 1))
        assert sums["accepted"] == sums["proposed"]
    if drafts == "none":
        assert (sums["forwards"], sums["proposed"]) == (17, 0)


@EVERY
def test_nothing_stands_behind_a_stop_token(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I12: the text ends with it, though it came inside a window, and the state knows of nothing behind it."""
    model, prompts = model_of(case), prompts_of(5)
    want, _ = texts(sampling(model, prompts, Sampling(max_tokens=15, temperature=0)))
    stops = (want[0][4], want[1][6], want[2][0])
    cut = [row[: next((i + 1 for i, token in enumerate(row) if token in stops), 15)] for row in want]
    whole = [[*prompt, *row] for prompt, row in zip(prompts, want, strict=True)]

    def known(text: list[int], most: int) -> list[int]:
        (row, *_) = [row for row in whole if row[: len(text)] == text]
        return row[len(text) : len(text) + most]

    monkeypatch.setattr(Oracle, "known", staticmethod(known), raising=False)
    monkeypatch.setattr("zoo.decoding.decoders.speculative.NGram", Oracle)
    for config in (Speculative(max_tokens=15, temperature=0, gamma=8), Sampling(max_tokens=15, temperature=0)):
        prompt = Prompt(prompts, stop_ids=stops)
        assert texts(decode(config, model, prompt))[0] == cut
        assert prompt.session is not None
        assert [prompt.session.text(row) for row in range(5)] == [[*a, *b] for a, b in zip(prompts, cut, strict=True)]
        assert [len(row) + 1 for row in prompt.session.tokens] == [
            len(a) + len(b) for a, b in zip(prompts, cut, strict=True)
        ]


def rule(p: Tensor, q: Tensor, draft: tuple[int, int]) -> dict[tuple[int, int], float]:
    """The law of two tokens when a draft of two is decided on: p of the first, q (V, V) of the second behind each."""
    law: dict[tuple[int, int], float] = {}

    def add(pair: tuple[int, int], probability: float) -> None:
        law[pair] = law.get(pair, 0.0) + probability

    V, first = len(p), accepts(p, draft[0])
    for x in range(V):  # the first draft falls: another token, and the second is drawn behind it in the next round
        for y in range(V):
            add((x, y), (1 - first) * float(residual(p, draft[0])[x] * q[x, y]))
    behind = q[draft[0]]
    add(draft, first * accepts(behind, draft[1]))
    for y in range(V):
        add((draft[0], y), first * (1 - accepts(behind, draft[1])) * float(residual(behind, draft[1])[y]))
    return law


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), V=st.integers(2, 6), peak=st.sampled_from([0.3, 1.0, 2.5, 40.0]))
def test_the_rule_leaves_the_distribution_as_it_is(seed: int, V: int, peak: float) -> None:
    """I11 by exact enumeration, for every draft of two tokens."""
    generator = torch.Generator().manual_seed(seed)
    p = (peak * torch.randn(V, dtype=torch.float64, generator=generator)).softmax(-1)
    q = (peak * torch.randn(V, V, dtype=torch.float64, generator=generator)).softmax(-1)
    for draft in itertools.product(range(V), repeat=2):
        law = rule(p, q, draft)
        for x, y in itertools.product(range(V), repeat=2):
            assert abs(law.get((x, y), 0.0) - float(p[x] * q[x, y])) < 1e-10


@torch.no_grad()
def chi_square(model: SequenceModel, draws: int) -> float:
    """How far the counts of sampled texts of three tokens are from the model's distribution, over their freedom.

    Rows are ragged in one batch, and drafts (lookup of single tokens) fall and stand.
    """
    V, prompts = 6, [[1, 2, 1, 2, 1], [3, 3]]
    config = Speculative(max_tokens=3, temperature=1.3, top_k=5, gamma=2, longest=2, shortest=1, seed=1)
    got, sums = texts(speculative(model, [prompts[i % 2] for i in range(draws)], config))
    assert 0.02 < sums["accepted"] / sums["proposed"] < 0.98
    worst = 0.0
    for which, prompt in enumerate(prompts):
        counts = Counter(map(tuple, got[which::2]))
        statistic = freedom = 0.0
        for text in itertools.product(range(V), repeat=3):
            scores = model(torch.tensor([[*prompt, *text]]))[0][0, len(prompt) - 1 : -1]
            p = probabilities(scores, temperature=1.3, top_k=5)
            want = float(p[range(3), text].prod()) * draws / 2
            if want < 5:
                assert want or not counts[text]
                continue
            statistic, freedom = statistic + (counts[text] - want) ** 2 / want, freedom + 1
        worst = max(worst, (statistic - freedom) / (2 * freedom) ** 0.5)
    return worst


@pytest.mark.parametrize("draws", [4000, pytest.param(100_000, marks=pytest.mark.everything)])
def test_sampled_texts_have_the_models_distribution(draws: int) -> None:
    """I11: chi-square, five standard deviations; a rule that draws again from p itself is seen."""
    torch.manual_seed(4)
    model = zoo.create_model("deltanet", d_model=16, n_layers=1, vocab_size=6, hidden_size=16, n_heads=2)
    model = model.double().eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    assert isinstance(model, SequenceModel)
    assert chi_square(model, draws) < 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.decoding.decoders.speculative.residual", lambda p, token: p)
        assert chi_square(model, draws) > 5


@pytest.mark.parametrize("case", ["transformer", "slstm + window"])
def test_a_rows_random_text_does_not_depend_on_its_neighbours(case: str) -> None:
    """I7 with sampling: each row has random numbers of its own."""
    model, prompts = model_of(case), prompts_of(5)
    config = Speculative(max_tokens=9, temperature=0.8, shortest=1, seed=4)
    together, _ = texts(speculative(model, prompts, config))
    assert texts(speculative(model, prompts[:2], config))[0] == together[:2]
    assert texts(speculative(model, [*prompts[:1], *prompts[3:]], config))[0][0] == together[0]
    assert (
        texts(speculative(model, prompts, Speculative(max_tokens=9, temperature=0.8, shortest=1, seed=5)))[0]
        != together
    )


def test_the_plain_functions_are_the_sampling_decoder() -> None:
    model, prompts = model_of("deltanet"), prompts_of(3)
    config = Sampling(max_tokens=6, temperature=0.7, top_k=9, top_p=0.9, seed=3)
    rows, sums = texts(sampling(model, prompts, config))
    batch = list(generate_batch(model, prompts, max_tokens=6, temperature=0.7, top_k=9, top_p=0.9, seed=3))
    assert [list(row) for row in zip(*batch, strict=True)] == rows
    assert sums == {"forwards": 6}
    one, _ = texts(sampling(model, prompts[:1], config))
    assert list(generate(model, prompts[0], max_tokens=6, temperature=0.7, top_k=9, top_p=0.9, seed=3)) == one[0]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 0.5, 2.0]), top_k=st.sampled_from([None, 1, 3]),
    top_p=st.sampled_from([None, 0.4, 0.9]),
)  # fmt: skip
def test_probabilities_are_those_that_sample_draws_from(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(seed))
    cut = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    p = probabilities(logits[None], **cut)[0]  # type: ignore[arg-type]
    assert_close(p.sum(), torch.tensor(1.0))
    drawn = sample(logits.expand(2000, -1), generator=torch.Generator().manual_seed(1), **cut)  # type: ignore[arg-type]
    share = torch.bincount(drawn, minlength=5) / 2000
    assert ((share - p).abs() < 5 * (p * (1 - p) / 2000).sqrt() + 1e-6).all()


def looked_up(text: list[int], most: int, longest: int, shortest: int) -> list[int]:
    """The definition: the newest earlier occurrence of the longest match, and what follows, itself included."""
    for size in range(longest, shortest - 1, -1):
        for start in range(len(text) - 1, size - 1, -1):
            if len(text) >= size and text[start - size : start] == text[len(text) - size :]:
                grown = list(text)
                for i in range(most):
                    grown.append(grown[start + i])
                return grown[len(text) :]
    return []


@settings(deadline=None, max_examples=60)
@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=30), cuts=st.lists(st.integers(1, 30)), most=st.integers(0, 5)
)
def test_the_lookup_is_its_definition(text: list[int], cuts: list[int], most: int) -> None:
    drafter = NGram(4, 2)
    for cut in sorted({*[cut for cut in cuts if cut < len(text)], len(text)}):
        assert drafter.draft(text[:cut], most) == looked_up(text[:cut], most, 4, 2)


# -- the registry ----------------------------------------------------------------------------------------------------


def test_every_decoder_has_a_file_and_a_name() -> None:
    """configs/decoder/NAME.yaml names the class that @register_decoder("NAME") registered; its function is public."""
    ours = {name: kind for name, kind in DECODERS.items() if kind.__module__.startswith("zoo.")}
    files = {
        path.stem: path.read_text(encoding="utf-8").split("_target_:")[1].split()[0]
        for path in (ROOT / "decoder").glob("*.yaml")
    }
    assert set(files) == set(ours) == {kind.__module__.rpartition(".")[2] for kind in ours.values()}
    for name, target in files.items():
        assert load_class("decoder", target) is ours[name]
        assert callable(getattr(decoding, name))
        assert name in decoding.__all__
        known = indexed("decoder", target)
        assert known is not None
        assert known["top_p"].range is not None


def test_a_name_is_used_once() -> None:
    with pytest.raises(ValueError, match="a decoder's name is used once; 'sampling' is already"):
        register_decoder("sampling")(Speculative)


def test_what_decoders_refuse() -> None:
    encoder = make_model("hydra")
    for kind in DECODERS.values():
        assert "sees both sides of every token" in str(why_not(kind, encoder))
        by_blocks = "needs attention over the whole past in every layer, and GRU is none; take decoder=sampling"
        refusal = why_not(kind, make_model("gru"))
        assert refusal is None or (kind is DECODERS["block_diffusion"] and by_blocks in refusal)
    assert why_not(DECODERS["block_diffusion"], make_model("gru")) is not None
    with pytest.raises(UserError, match="Linear has no encode or head; zoo"):
        Sampling().refuse(torch.nn.Linear(1, 1))

    class Forward(torch.nn.Module):
        """A third party's, without the way back."""

        encode = head = torch.nn.Module.forward

    assert why_not(Sampling, Forward()) is None
    with pytest.raises(UserError, match="Forward has no look_ahead; take decoder=sampling"):
        Speculative().refuse(Forward())
    for wrong in ({"gamma": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"max_tokens": 0}, {"shortest": 9}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} must be"):
            Speculative(**wrong)  # type: ignore[arg-type]
    assert issubclass(Sampling, Decoder)
