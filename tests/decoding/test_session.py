"""A session's invariants, on every causal model and hybrid: ragged windows, rows with nothing, rows that move."""

import copy
from pathlib import Path

import pytest
import torch
from case_table import CausalCase, make_model, models
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from zoo.decoding import Session
from zoo.errors import UserError
from zoo.layers import SequenceModel
from zoo.layers.kv_cache import AttentionSlots, AttentionState
from zoo.layers.state import State, flatten

CAUSAL = models(CausalCase)
CHEAP = ("transformer", "deltanet", "mamba", "slstm + window")  # crop, a matrix, a scan, and a hybrid with a window
EVERY = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in CHEAP else pytest.mark.everything) for name in CAUSAL]
)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8], [9], [10, 11, 12], [13, 14]]
WINDOWS = [[20, 21, 22, 23, 24, 25, 26], [30, 31, 32], [], [40, 41, 42, 43, 44]]


def model_of(case: str) -> SequenceModel:
    model = make_model(case).double()
    assert isinstance(model, SequenceModel)
    return model


def begun(model: SequenceModel, prompts: list[list[int]] = PROMPTS) -> Session:
    session = Session(model)
    session.begin(prompts)
    return session


def next_logits(session: Session) -> Tensor:
    """Behind one more token, of a copy: the session itself stays."""
    other = copy.copy(session)
    other.tokens = [list(row) for row in session.tokens]
    other.newest, other._state = [None] * len(other.tokens), session.state
    return other.extend([[7]] * len(other.tokens))[:, -1]


def fresh_logits(model: SequenceModel, rows: list[list[int]]) -> Tensor:
    """The same by one forward a row, without any state."""
    return torch.cat([model(torch.tensor([[*row, 7]]))[0][:, -1] for row in rows]).detach()


def in_use(state: State) -> list[Tensor]:
    """All numbers of a state that count: of a cache those before each row's length."""
    if isinstance(state, AttentionState | AttentionSlots):
        M = state.k.shape[1]
        used = torch.arange(M) < state.length.clamp(max=M)[:, None]
        return [state.k[used], state.v[used], state.length]
    if isinstance(state, Tensor):
        return [state]
    return [x for part in state for x in in_use(part)]


def copied(state: State) -> list[Tensor]:
    return [x.clone() for x in in_use(state)]


def assert_identical(ours: list[Tensor], want: list[Tensor]) -> None:
    assert len(ours) == len(want)
    assert all(map(torch.equal, ours, want))


@EVERY
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_a_commit_is_a_fresh_run_over_the_prefix(case: str, data: st.DataObject) -> None:
    """I1: any ragged prefix, none and all of it among them, some rows without a window."""
    model = model_of(case)
    session = begun(model)
    n = [data.draw(st.integers(0, len(window))) for window in WINDOWS]
    logits = session.propose(WINDOWS)
    for row, window in enumerate(WINDOWS):
        want = model(torch.tensor([[*PROMPTS[row], *window]]))[0][0, len(PROMPTS[row]) :]
        assert_close(logits[row, : len(window)], want, rtol=1e-9, atol=1e-9)
    session.commit(n)
    rows = [prompt + window[:m] for prompt, window, m in zip(PROMPTS, WINDOWS, n, strict=True)]
    assert session.tokens == rows
    assert_close(next_logits(session), fresh_logits(model, rows), rtol=1e-9, atol=1e-9)


@EVERY
def test_extend_is_propose_and_commit(case: str) -> None:
    model = model_of(case)
    one, other = begun(model), begun(model)
    a = one.extend(WINDOWS)
    b = other.propose(WINDOWS)
    other.commit([len(window) for window in WINDOWS])
    for row, window in enumerate(WINDOWS):
        assert_close(a[row, : len(window)], b[row, : len(window)])
    assert one.tokens == other.tokens
    assert_close(next_logits(one), next_logits(other))


def test_the_state_is_one_token_behind_the_text() -> None:
    """I2: the drawn token is in the text, and in the state only after its window."""
    session = begun(model_of("transformer"))
    for round_ in range(3):
        session.draw([20 + round_, 30, None, 40])
        session.propose([[20 + round_, 1], [30], [], [40, 2, 3]])
        session.commit([2, 1, 0, 2])
        lengths = session.state[0].length.tolist()
        assert lengths == [len(row) for row in session.tokens]
        session.draw([20 + round_ + 1, 30, None, 40])
        assert [len(session.text(row)) for row in (0, 1, 3)] == [lengths[row] + 1 for row in (0, 1, 3)]
        with pytest.raises(ValueError, match="begins with the token that was drawn before it; row 1 has 5 for 30"):
            session.propose([[20 + round_ + 1], [5], [], [40]])


@EVERY
def test_rounds_without_a_draft_change_nothing(case: str) -> None:
    """I3: windows of one token, in some rows or all of them, between windows of several."""
    model = model_of(case)
    session, plain = begun(model), begun(model)
    for n, windows in (
        ([1, 1, 1, 1], [[3], [4], [5], [6]]),
        ([2, 1, 1, 3], [[3, 1, 9], [4], [5, 1, 9], [6, 1, 2, 9]]),
        ([1, 1, 0, 1], [[3], [4], [], [6]]),
        ([0, 1, 1, 2], [[3, 9], [4, 8], [5], [6, 1, 7]]),
    ):
        session.propose(windows)
        session.commit(n)
        for step in range(max(n)):
            plain.extend([w[step : step + 1] if step < m else [] for w, m in zip(windows, n, strict=True)])
    assert session.tokens == plain.tokens
    assert_close(next_logits(session), next_logits(plain), rtol=1e-9, atol=1e-9)


@EVERY
def test_rejected_tokens_leave_no_trace(case: str) -> None:
    """I4: what lies behind a row's length is made enormous, and no number changes."""
    model = model_of(case)
    session = begun(model)
    session.propose(WINDOWS)
    session.commit([3, 0, 0, 2])
    want = next_logits(session)

    def poisoned(state: State) -> State:
        if isinstance(state, AttentionState | AttentionSlots):
            M = state.k.shape[1]
            free = (torch.arange(M) >= state.length.clamp(max=M)[:, None])[..., None, None]
            return type(state)(state.k.masked_fill(free, 1e30), state.v.masked_fill(free, 1e30), state.length)
        if isinstance(state, Tensor):
            return state
        parts = [poisoned(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)

    session._state = poisoned(session._state)
    assert torch.equal(next_logits(session), want)


@EVERY
def test_finished_rows_do_not_move_and_kept_states_are_values(case: str) -> None:
    """I5 and I6: bitwise, while other rows propose, commit, extend by one or by several, and roll back."""
    model = model_of(case)
    session = begun(model)
    session.extend([[3], [4], [5], [6]])
    kept, before = session.state, copied(session.state)
    finished = Session(model)
    finished.tokens, finished.newest, finished._state = session.tokens, session.newest, session._state
    session.extend([[1], [], [2], []])
    session.propose([[1, 2, 3], [], [4, 5], []])
    session.commit([2, 0, 0, 0])
    session.extend([[1, 2, 3], [], [], []])
    session.propose([[9, 9], [], [9], []])
    session.rollback()
    assert_identical(in_use(kept), before)
    session.select([1, 3])
    other = begun(model)
    other.extend([[3], [4], [5], [6]])
    other.select([1, 3])
    assert_identical(in_use(session.state), in_use(other.state))


@EVERY
def test_rows_are_alone(case: str) -> None:
    """I7: a row's logits depend neither on its neighbours nor on their order and lengths."""
    model = model_of(case)
    together = begun(model)
    together.propose(WINDOWS)
    together.commit([3, 1, 0, 4])
    order = [3, 1]
    apart = begun(model, [PROMPTS[row] for row in order])
    apart.propose([WINDOWS[row] for row in order])
    apart.commit([4, 1])
    assert_close(next_logits(apart), next_logits(together)[order], rtol=1e-9, atol=1e-9)


@EVERY
def test_rows_are_reordered_dropped_and_forked(case: str) -> None:
    """I8: every tensor of the state moves; select after select is one select; a fork that is dropped never was."""
    model = model_of(case)
    first, p, q = begun(model), [2, 0, 0, 3], [3, 1, 1]
    want = next_logits(first)
    twice, once = begun(model), begun(model)
    twice.select(p)
    assert_close(next_logits(twice), want[p])
    twice.select(q)
    once.select([p[row] for row in q])
    assert twice.tokens == once.tokens
    assert_identical(in_use(twice.state), in_use(once.state))
    forked = begun(model)
    assert forked.fork(1, 3) == [4, 5, 6]
    forked.extend([[3], [4], [5], [6], [7], [8], [4]])
    logits = next_logits(forked)
    assert_close(logits[6], logits[1])
    assert not torch.allclose(logits[4], logits[1])
    forked.select([0, 1, 2, 3])
    plain = begun(model)
    plain.extend([[3], [4], [5], [6]])
    assert_close(next_logits(forked), next_logits(plain), rtol=1e-9, atol=1e-9)


def beams(model: SequenceModel, width: int, steps: int) -> tuple[Session, Tensor, list[list[int]]]:
    """Beam search by rows of a session that are reordered at every step: the totals and the texts."""
    session = Session(model)
    totals, choice = session.begin([[5, 6, 7]])[0].log_softmax(-1).topk(width)
    session.select([0] * width)
    for _ in range(steps):
        logits = session.extend([[token] for token in choice.tolist()])[:, -1].log_softmax(-1)
        totals, best = (totals[:, None] + logits).flatten().topk(width)
        session.select((best // logits.shape[1]).tolist())
        choice = best % logits.shape[1]
    return session, totals, [[*row, token] for row, token in zip(session.tokens, choice.tolist(), strict=True)]


@EVERY
def test_beams_reorder_all_states(case: str) -> None:
    """I8: a beam of one is greedy decoding; of three, every row's state is that of its own text."""
    model = model_of(case)
    greedy = [5, 6, 7]
    for _ in range(5):
        greedy.append(int(model(torch.tensor([greedy]))[0][0, -1].argmax()))
    assert beams(model, 1, 4)[2] == [greedy]
    session, totals, texts = beams(model, 3, 4)
    assert_close(next_logits(session), fresh_logits(model, session.tokens), rtol=1e-9, atol=1e-9)
    for total, text in zip(totals, texts, strict=True):
        scores = model(torch.tensor([text]))[0][0].log_softmax(-1)
        assert_close(total, sum(scores[i - 1, text[i]] for i in range(3, len(text))), rtol=1e-9, atol=1e-9)


@EVERY
def test_a_saved_session_goes_on_to_the_bit(case: str, tmp_path: Path) -> None:
    """I9; and no other weights may go on from it."""
    model = model_of(case)
    session = begun(model)
    session.propose(WINDOWS)
    session.commit([3, 1, 0, 4])
    session.draw([1, 2, 3, 4])
    session.save(tmp_path / "state")
    loaded = Session.load(tmp_path / "state", model)
    assert (loaded.tokens, loaded.newest) == (session.tokens, session.newest)
    assert_identical(in_use(loaded.state), in_use(session.state))
    assert torch.equal(loaded.extend([[1], [2], [3], [4]]), session.extend([[1], [2], [3], [4]]))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(UserError, match=r"made by other weights \(.*; prefill again"):
        Session.load(tmp_path / "state", model)


@EVERY
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_any_cut_of_a_prompt(case: str, chunk: int) -> None:
    """I13: a prompt in chunks is the prompt at once."""
    model = model_of(case)
    prompts = [[(7 * i + row) % 50 for i in range(n)] for row, n in enumerate((70, 9, 33))]
    want = begun(model, prompts)
    session = begun(model, [prompt[:chunk] for prompt in prompts])
    for at in range(chunk, 70, chunk):
        session.extend([prompt[at : at + chunk] for prompt in prompts])
    assert session.tokens == want.tokens
    assert_close(next_logits(session), next_logits(want), rtol=1e-9, atol=1e-9)


def test_a_windowed_layer_keeps_bounded_memory() -> None:
    session = begun(model_of("slstm + window"))
    sizes = set()
    for step in range(40):
        session.extend([[step]] * 4)
        sizes.add(session.nbytes())
    assert len(sizes) <= 2


def test_what_a_session_refuses(tmp_path: Path) -> None:
    session = Session(model_of("transformer"))
    with pytest.raises(ValueError, match="after begin; call it first"):
        session.extend([])
    with pytest.raises(UserError, match="begin it first"):
        session.save(tmp_path / "state")
    with pytest.raises(ValueError, match="at least one token"):
        session.begin([[1], []])
    session.begin(PROMPTS)
    with pytest.raises(ValueError, match="has 4; use extend"):
        session.begin(PROMPTS)
    with pytest.raises(ValueError, match="none is open; propose comes first"):
        session.commit([0] * 4)
    session.propose(WINDOWS)
    for call in (lambda: session.propose(WINDOWS), lambda: session.select([0]), lambda: session.save(tmp_path / "a")):
        with pytest.raises(ValueError, match=r"still open \(rows 0, 1, 3\); commit or roll it back first"):
            call()
    with pytest.raises(ValueError, match=r"commit takes 0 to \[7, 3, 0, 5\] tokens .*; got \[8, 0, 0, 0\]"):
        session.commit([8, 0, 0, 0])
    session.rollback()
    with pytest.raises(ValueError, match="given for every row, 4; got 1"):
        session.extend([[1]])
    with pytest.raises(ValueError, match="rows are 0 to 3; got"):
        session.select([4])
    with pytest.raises(UserError, match="no state can be read from"):
        Session.load(tmp_path / "none", session.model)
    (tmp_path / "other").write_text("no state")
    with pytest.raises(UserError, match="no state can be read from"):
        Session.load(tmp_path / "other", session.model)
    with pytest.raises(UserError, match="sees both sides of every token"):
        Session(make_model("hydra"))  # type: ignore[arg-type]


def test_a_round_without_any_token() -> None:
    session = begun(model_of("deltanet"))
    want = next_logits(session)
    assert session.propose([[]] * 4).shape == (4, 0, 50)
    session.commit([0] * 4)
    assert session.extend([[]] * 4).shape == (4, 0, 50)
    assert torch.equal(next_logits(session), want)
    assert flatten(session.state)
