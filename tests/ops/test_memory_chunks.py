"""Memories that learn at test time: what their maps do, chunks cut anywhere, refusals, and float32."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from memory_cases import (
    LOSSES,
    MLP,
    PLAIN,
    B,
    D,
    H,
    inputs_of,
    memory,
    randn,
    start_of,
)
from torch import Tensor
from torch.testing import assert_close

from zoo.ops import (
    DotProductLoss,
    ElasticRetention,
    GatedMLPMemory,
    HuberLoss,
    LpLoss,
    LqRetention,
    MemoryRule,
    MemoryState,
    MirrorRetention,
    MLPMemory,
    Momentum,
    Muon,
    RowNormRetention,
    SoftmaxRetention,
    WeightDecay,
    first_state,
)
from zoo.ops.core.spec import parity
from zoo.ops.core.table import OPERATORS

# -- what the maps do --------------------------------------------------------------------------------------------------


def test_the_map_of_moneta_is_an_inversion_at_q_4() -> None:
    """Twice gives back, half is double, and the start exposes the learnt weights."""
    gate, A = LqRetention(4), randn(2, H, 8, 5, seed=1)
    W = gate.weights(A)
    assert_close(gate.weights(W), A, rtol=0, atol=1e-14)
    assert_close(gate.weights(A / 2), 2 * W, rtol=0, atol=1e-14)
    assert_close(LqRetention(2.5).weights(3 * A), 3**0.5 * LqRetention(2.5).weights(A))  # of degree 3 - q
    for q in (2, 2.5, 4, 5):
        assert_close(LqRetention(q).weights(LqRetention(q).start(A)), A, rtol=0, atol=1e-12)
    assert LqRetention(4).weights(torch.zeros(3, 3)).isfinite().all()


def test_the_mirror_map_is_linear_at_2_and_its_start_is_its_inverse() -> None:
    A = randn(2, H, 8, 5, seed=1)
    assert_close(MirrorRetention(2).weights(A), A, rtol=0, atol=1e-14)
    gate = MirrorRetention(3, eps=1e-20)
    assert_close(gate.weights(gate.start(A)), A, rtol=1e-9, atol=1e-9)
    assert_close(gate.weights(2 * A), 2 * gate.weights(A), rtol=1e-9, atol=1e-9)


def test_weights_of_memora_stay_on_the_simplex() -> None:
    """And the sum of frozen gradients in log space is the nested softmax of logarithms."""
    gate = SoftmaxRetention(scale=3.0)
    L, steps, keep = randn(H, 6, 5, seed=1), randn(9, H, 6, 5, seed=2), 0.9
    W = gate.weights(L)
    for step in steps:
        L = keep * L - step
        W = 3 * torch.softmax(keep * (W / 3).log() - step, dim=-1)
    assert_close(gate.weights(L), W, rtol=0, atol=1e-14)
    assert (W > 0).all()
    assert_close(W.sum(-1), torch.full((H, 6), 3.0, dtype=torch.float64))
    assert_close(gate.weights(gate.start(W)), W)


def test_the_elastic_net_makes_zeros() -> None:
    rule = MemoryRule(memory=PLAIN, retention=ElasticRetention(0.05), chunk_size=4)
    _, last = memory(**inputs_of(rule, 24), rule=rule)
    share = (last.weights[0] == 0).double().mean()
    assert 0.05 < share < 0.95
    plain = dataclasses.replace(rule, retention=WeightDecay())
    assert (memory(**inputs_of(rule, 24), rule=plain)[1].weights[0] != 0).all()


def test_rows_keep_their_lengths_and_muon_brings_singular_values_near_one() -> None:
    inner = GatedMLPMemory(expansion=2, residual=False, norm=False)
    rule = MemoryRule(memory=inner, loss=DotProductLoss(), retention=RowNormRetention(), reads="chunk", chunk_size=4)
    start = start_of(rule)
    _, last = memory(**inputs_of(rule, 24), state=first_state(rule, start, B, D, D), rule=rule)
    for before, after in zip(start, last.weights, strict=True):
        assert_close(after.norm(dim=-1), before.norm(dim=-1).expand(B, *before.shape[:2]), rtol=1e-4, atol=0)
        assert (after - before).norm() > 0.01 * before.norm()
    values = torch.linalg.svdvals(Muon().update(randn(3, 20, 12, seed=1)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_gradient_of_huber_is_never_longer_than_its_threshold() -> None:
    y, v, delta = randn(50, D, seed=1), 5 * randn(50, D, seed=2), randn(50, 1, seed=3).abs() + 0.1
    assert (HuberLoss().gradient(y, v, delta).norm(dim=-1, keepdim=True) <= delta * (1 + 1e-12)).all()
    assert (HuberLoss("switch").gradient(y, v, delta).norm(dim=-1, keepdim=True) > delta).any()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_value(name: str) -> None:
    loss, y, v = LOSSES[name], randn(50, D, seed=1).requires_grad_(), randn(50, D, seed=2)
    delta = 2 + 2 * randn(50, 1, seed=3).abs()
    (want,) = torch.autograd.grad(loss.value(y, v, delta).sum(), y)
    assert_close(loss.gradient(y, v, delta), want, rtol=0, atol=1e-12)


# -- chunks ------------------------------------------------------------------------------------------------------------


RULES = {
    "yaad": MemoryRule(memory=MLP, loss=HuberLoss(), chunk_size=5),
    "moneta": MemoryRule(memory=MLP, loss=LpLoss(3), retention=LqRetention(4), chunk_size=5),
    "moneta, exact": MemoryRule(memory=MLP, loss=LpLoss(3), retention=LqRetention(4), reads="exact", chunk_size=5),
    "memora": MemoryRule(
        memory=MLPMemory(expansion=2, norm_eps=1e-2), retention=SoftmaxRetention(), reads="chunk", chunk_size=5
    ),
    "titans": MemoryRule(memory=MLP, algorithm=Momentum(), chunk_size=5),
    "lact": MemoryRule(
        memory=GatedMLPMemory(residual=False, norm=False),
        loss=DotProductLoss(), retention=RowNormRetention(), algorithm=Muon(), reads="chunk", chunk_size=5,
    ),
}  # fmt: skip


def parts(given: dict[str, Tensor], cut: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: x if name in ("gain", "offset") else cut(x) for name, x in given.items()}


@pytest.mark.parametrize("name", RULES)
def test_token_by_token_equals_the_whole_at_every_length(name: str) -> None:
    """Every prefix, ragged tails too: outputs, and the state behind it."""
    rule, T = RULES[name], 13
    given, start = inputs_of(rule, T), start_of(rule)
    state = first = first_state(rule, start, B, D, D)
    for t in range(T):
        y, state = memory(**parts(given, lambda x, t=t: x[:, t : t + 1]), state=state, rule=rule)
        want, after = memory(**parts(given, lambda x, t=t: x[:, : t + 1]), state=first, rule=rule)
        assert_close(y[:, 0], want[:, t], rtol=0, atol=1e-11)
        for a, b in zip(torch.utils._pytree.tree_leaves(state), torch.utils._pytree.tree_leaves(after), strict=True):
            assert_close(a, b, rtol=0, atol=1e-11)
        assert state.filled.tolist() == [(t + 1) % 5] * B


@pytest.mark.parametrize("name", RULES)
def test_rows_that_stand_at_different_places_of_their_chunks(name: str) -> None:
    rule = RULES[name]
    given, start = inputs_of(rule, 17), start_of(rule)
    begun = [memory(**parts(given, lambda x, n=n: x[:1, :n]), state=first_state(rule, start, 1, D, D), rule=rule)[1]
             for n in (1, 4, 10)]  # fmt: skip
    leaves = [torch.utils._pytree.tree_flatten(s) for s in begun]
    joined = torch.utils._pytree.tree_unflatten(
        [torch.cat(x) for x in zip(*(x for x, _ in leaves), strict=True)], leaves[0][1]
    )
    more = inputs_of(rule, 8, rows=3)
    y, last = memory(**more, state=joined, rule=rule)
    for i, state in enumerate(begun):
        want, after = memory(**parts(more, lambda x, i=i: x[i : i + 1]), state=state, rule=rule)
        assert_close(y[i : i + 1], want, rtol=0, atol=1e-11)
        assert torch.equal(last.filled[i : i + 1], after.filled)
        assert_close(last.chunk[i : i + 1], after.chunk)
        for a, b in zip(last.weights, after.weights, strict=True):
            assert_close(a[i : i + 1], b, rtol=0, atol=1e-11)


def test_the_chunk_is_part_of_the_model() -> None:
    rule = MemoryRule(memory=MLP, chunk_size=4)
    given, start = inputs_of(rule, 24), start_of(rule)
    ys = [
        memory(**given, state=first_state(one, start, B, D, D), rule=one)[0]
        for one in (rule, dataclasses.replace(rule, chunk_size=8))
    ]
    assert_close(ys[0][:, :4], ys[1][:, :4])
    assert (ys[0] - ys[1])[:, 4:].abs().max() > 1e-3


def test_every_sequence_has_weights_of_its_own() -> None:
    rule = MemoryRule(memory=MLP, chunk_size=4)
    given, start = inputs_of(rule, 12), start_of(rule)
    state = first_state(rule, start, B, D, D)
    y, _ = memory(**given, state=state, rule=rule)
    other = given | {"v": torch.cat([given["v"][:1], -given["v"][1:]])}
    assert torch.equal(memory(**other, state=state, rule=rule)[0][0], y[0])
    assert (memory(**other, state=state, rule=rule)[0][1] - y[1]).abs().max() > 1e-2


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"delta": None}, "this rule reads the gate delta; got None, pass delta"),
        ({"theta": torch.zeros(B, 6, H).double()}, "theta must be left out where nothing reads it"),
        (
            {"v": torch.zeros(B, 6, H, 5).double(), "gain": None, "offset": None},
            "so K and V must agree; got K = 12 and V = 5, use a memory with residual=False",
        ),
    ],
)  # fmt: skip
def test_refusals(change: dict[str, Tensor | None], words: str) -> None:
    rule = RULES["yaad"]
    with pytest.raises(ValueError, match=words):
        memory(**(inputs_of(rule, 6) | change), rule=rule)


def test_states_of_another_rule_are_refused() -> None:
    rule = RULES["yaad"]
    given = inputs_of(rule, 6)
    state = first_state(rule, start_of(rule), B, D, D)
    one = state._replace(weights=state.weights[:1])
    with pytest.raises(
        ValueError, match="has 2 matrices and 0 running sums; got 1 and 0, pass a state of the same rule"
    ):
        memory(**given, state=one, rule=rule)
    with pytest.raises(ValueError, match=r"filled must be \(n,\) int64 with n = 2; got \(2,\) torch.float32"):
        memory(**given, state=state._replace(filled=state.filled.float()), rule=rule)
    with pytest.raises(ValueError, match="gain and offset belong to the memory's norm; got a memory without a norm"):
        memory(**given, rule=dataclasses.replace(rule, memory=MLPMemory(norm=False)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: MemoryRule(chunk_size=0), lambda: MemoryRule(reads="never"), lambda: LpLoss(0.5),
        lambda: HuberLoss("vague"), lambda: LqRetention(1), lambda: MirrorRetention(0.5), lambda: Muon(0),
        lambda: SoftmaxRetention(0.0), lambda: ElasticRetention(-1),
    ],
)  # fmt: skip
def test_choices_have_ranges(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must be .*got"):
        build()


def test_free_slots_of_a_chunk_mean_nothing() -> None:
    rule = RULES["yaad"]
    given = inputs_of(rule, 6)
    _, state = memory(**given, state=first_state(rule, start_of(rule), B, D, D), rule=rule)
    assert state.filled.tolist() == [1, 1]
    dirty = MemoryState(state.weights, state.momentum, state.chunk.clone(), state.filled)
    dirty.chunk[:, :, 1:] = 7.0
    for a, b in itertools.zip_longest(*(memory(**given, state=s, rule=rule)[0] for s in (state, dirty))):
        assert torch.equal(a, b)


@pytest.mark.everything
@pytest.mark.parametrize("name", [name for name in OPERATORS if name.startswith("test_time_memory")])
def test_float32_gradients_are_as_exact_as_the_loops_on_average(name: str) -> None:
    """One ratio is chance, for memories magnify rounding; the mean over seeds, inputs and gates is not."""
    spec, logs = OPERATORS[name], []
    for seed in range(2):
        given = spec.inputs(2, 200, seed=seed)
        for inputs in (given, spec.extremes["no decay"](given)):
            ours, loop = (parity(spec, inputs, backend=form, dtype=torch.float32) for form in ("torch", "reference"))
            logs += [math.log(ours[key] / loop[key]) for key in ours if key.startswith("d ") and loop[key] > 1e-8]
    assert math.exp(statistics.mean(logs)) < 1.0
