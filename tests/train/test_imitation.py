"""Imitation: the arm and its expert, data as a function of the position, tokens, and policies that act."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from zoo.codecs import BinsCodec, Codes
from zoo.errors import UsageError, UserError
from zoo.layers.policy import Policy
from zoo.train.data.images.digits_images import DigitsImages
from zoo.train.data.robots.action_tokens import ActionTokens
from zoo.train.data.robots.arm import LINK, TOLERANCE, Arm, ArmState
from zoo.train.data.robots.reaching import STARTS, Reaching
from zoo.train.optim import AdamW, Limits
from zoo.train.tasks.imitation import Imitation
from zoo.train.tasks.trials import border_jerk, run_trials

CODECS = ("bspline", "fast", "bins")


def small(codec: str = "bspline", **settings: Any) -> Reaching:
    return Reaching(codec=codec, **{"episodes": 12, "val_episodes": 3, "batch_size": 16} | settings)


def seen_state(observations: Tensor) -> ArmState:
    """The state of an arm from what is observed of it; nothing is held."""
    x = observations[:, 0]
    elbow = torch.atan2(x[:, 1], x[:, 0])
    angles = torch.stack([torch.zeros_like(elbow), elbow], 1)
    return ArmState(angles, 2 * x[:, 2:4], x[:, 4], x[:, 5:7], torch.zeros(len(x), dtype=torch.bool))


def planned(state: ArmState, steps: int) -> Tensor:
    """What the expert does in the next steps, (B, steps, 3)."""
    arm, chunk = Arm(), []
    for _ in range(steps):
        chunk.append(arm.expert(state))
        state = arm.step(state, chunk[-1])
    return torch.stack(chunk, 1)


# -- the arm ----------------------------------------------------------------------------------------------------


def test_the_tip_is_where_two_links_lead() -> None:
    arm = Arm()
    state = arm.begin(np.random.default_rng(0).random((6, 8)))
    for i in range(6):
        a, b = state.angles[i].tolist()
        want = [LINK * np.cos(a) + LINK * np.cos(a + b), LINK * np.sin(a) + LINK * np.sin(a + b)]
        assert_close(arm.tip(state)[i].double(), torch.tensor(want), atol=1e-6, rtol=0)
    back, way = seen_state(arm.observe(state).unsqueeze(1)), state.target - arm.tip(state)
    for seen, true in ((back.target, state.target), (back.target - arm.tip(back), way)):
        assert_close(seen.norm(dim=1), true.norm(dim=1), atol=1e-5, rtol=0)
    assert_close(back.angles[:, 1], state.angles[:, 1], atol=1e-5, rtol=0)
    turned = state._replace(
        angles=state.angles + torch.tensor([1.0, 0.0]),
        target=state.target @ torch.tensor([[np.cos(1), np.sin(1)], [-np.sin(1), np.cos(1)]]).float(),
    )
    assert_close(arm.observe(turned), arm.observe(state), atol=1e-5, rtol=0)
    assert not torch.allclose(arm.tip(turned), arm.tip(state), atol=0.1)


def test_the_expert_always_succeeds_and_others_do_not() -> None:
    arm, data = Arm(), small()
    still = closing = shaken = expert = arm.begin(data.trial_beginnings(300))
    generator = torch.Generator().manual_seed(0)
    for _ in range(arm.horizon):
        expert = arm.step(expert, arm.expert(expert))
        still = arm.step(still, torch.zeros(300, 3))
        early = arm.expert(closing)
        early[:, 2] = 1.0
        closing = arm.step(closing, early)  # goes there, with the gripper closed from the beginning
        shaken = arm.step(shaken, torch.rand(300, 3, generator=generator) * 2 - 1)
    assert arm.succeeded(expert).all()
    assert not arm.succeeded(still).any()
    assert arm.succeeded(closing).float().mean() < 0.05  # those that begin at the target
    assert arm.succeeded(shaken).float().mean() < 0.2
    near = (arm.tip(closing) - closing.target).norm(dim=1) < TOLERANCE
    assert near.all()


# -- data and tokens --------------------------------------------------------------------------------------------


def test_a_chunk_is_what_the_expert_does_from_there_on() -> None:
    data = small()
    batch = data.sources[1].batch(0, 0, 0, 1)
    state = seen_state(batch["observations"])
    before = state.grip < 0.25  # what is held is not seen: an expert that holds something is left out
    assert before.sum() > 3
    assert_close(planned(state, 20)[before], batch["actions"][before], atol=1e-4, rtol=0)
    assert torch.equal(data.tokens.targets(list(batch["actions"])), batch["targets"])
    assert batch["targets"].shape == (16, 15)


def test_a_batch_is_a_function_of_its_number() -> None:
    one, other = small(seed=1).sources, small(seed=1, batch_size=8).sources
    whole = one[0].batch(1, 2, 0, 1)
    parts = [other[0].batch(1, 2, rank, 2) for rank in (0, 1)]
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.stack([part[name] for part in parts], 1).flatten(0, 1))
    assert not torch.equal(whole["actions"], one[0].batch(2, 2, 0, 1)["actions"])
    assert not torch.equal(whole["actions"], small(seed=2).sources[0].batch(1, 2, 0, 1)["actions"])
    scored = sum((one[1].batch(0, step, 0, 1)["targets"] != -100).any(1).sum() for step in range(one[1].steps(1)))
    assert scored == 3 * STARTS


@pytest.mark.parametrize("codec", CODECS)
def test_rows_of_tokens_come_back_as_chunks(codec: str) -> None:
    data = small(codec)
    batch = data.sources[0].batch(0, 0, 0, 1)
    tokens, targets = data.tokens, batch["targets"]
    assert targets.shape == (16, tokens.n_slots)
    assert targets.max() < tokens.vocab_size
    assert tokens.ends == (codec == "fast")
    back = tokens.decode(torch.where(targets < 0, 0, targets))  # what lies behind the end does not matter
    assert not back.malformed.any()
    want = torch.stack(data.codec.decode(data.codec.encode(list(batch["actions"]))))
    assert_close(back.actions, want)
    if tokens.ends:
        lengths = data.codec.encode(list(batch["actions"])).lengths
        assert torch.equal((targets >= 0).sum(1), lengths + 1)
        assert (targets.gather(1, lengths[:, None]) == tokens.vocab_size - 1).all()


def test_malformed_rows_are_seen_in_fast_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    for codec in CODECS:
        tokens = small(codec).tokens
        ids = torch.randint(tokens.vocab_size, (40, tokens.n_slots), generator=generator)
        decoded = tokens.decode(ids)
        assert decoded.actions.shape == (40, 20, 3)
        assert bool(decoded.malformed.any()) == (codec == "fast")
        assert not decoded.actions[decoded.malformed].any()


def test_channels_of_one_number_are_rows_as_well() -> None:
    samples = [torch.rand(5, 1) for _ in range(9)]
    codec = BinsCodec(8).fit(samples)
    tokens = ActionTokens(codec, samples)
    targets = tokens.targets(samples)
    assert targets.shape == (9, 5)
    want = torch.stack(codec.decode(Codes(targets.unsqueeze(2), torch.full((9,), 5))))  # (9, 5, 1)
    assert_close(tokens.decode(targets).actions, want)


# -- policies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_the_experts_tokens_succeed_in_the_closed_loop(codec: str) -> None:
    data = small(codec, episodes=60)

    def act(observations: Tensor) -> Tensor:
        return data.tokens.targets(list(planned(seen_state(observations), 20))).clamp(min=0)

    tried = run_trials(act, data.world, data.tokens, data.trial_beginnings(60), 10)
    assert tried.succeeded.float().mean() >= 0.95
    assert (tried.malformed, tried.chunks) == (0, 8 * 60)
    assert tried.places.shape == (81, 60, 4, 2)
    nothing = run_trials(lambda seen: act(0 * seen), data.world, data.tokens, data.trial_beginnings(60), 10)
    assert nothing.succeeded.float().mean() < 0.1


def test_jerk_is_counted_at_borders_alone() -> None:
    actions = torch.zeros(1, 9, 2)
    actions[0, 3:, 0] = 2.0  # a jump at the border between the chunks 0 1 2 | 3 4 5 | 6 7 8
    actions[0, 4, 1] = 7.0  # a gripper's
    total, number = border_jerk(actions, (1,), 3)
    assert (total, number) == (4.0, 4)  # second differences 2 and -2 at one border, none at the other
    inside = torch.zeros(1, 9, 2)
    inside[0, 4, 0] = 1.0  # reaches over both borders, as 0 0 1 and 1 0 0 and nothing else
    assert border_jerk(inside, (1,), 3) == (2.0, 4)


def policy(name: str, **fields: Any) -> Policy:
    torch.manual_seed(0)
    model = zoo.create_model(name, d_model=16, n_layers=2, n_heads=2, n_slots=6, vocab_size=9, **fields)
    assert isinstance(model, Policy)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["", "deltanet(n_heads=2)"])
def test_an_autoregressive_policy_acts_by_the_likeliest_tokens(pattern: str) -> None:
    model = policy("autoregressive_policy", pattern=pattern)
    observations = torch.randn(7, 2, 9)
    chosen = model.act(observations)
    tokens = torch.zeros(7, 6, dtype=torch.long)
    for i in range(6):
        tokens[:, i] = model(observations, tokens=tokens)[0][:, i].argmax(-1)
    assert torch.equal(chosen, tokens)
    assert len(chosen.unique(dim=0)) > 1
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 9
    before, after = (model(observations, tokens=each)[0] for each in (tokens, changed))
    assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@torch.no_grad()
def test_behind_an_end_comes_the_end() -> None:
    model = policy("autoregressive_policy", ends=True)
    plain = policy("autoregressive_policy")
    observations = 3 * torch.randn(64, 1, 9, generator=torch.Generator().manual_seed(0))
    chosen, free = model.act(observations), plain.act(observations)
    ended = (chosen == 8).long().cumsum(1) > 0
    assert ended.any(dim=1).sum() > 2
    assert torch.equal(chosen[~ended], free[~ended])
    assert (chosen[ended] == 8).all()
    rows = observations[ended[:, -1]][:1]
    assert torch.equal(model.act(rows), chosen[ended[:, -1]][:1])  # stops early, padded to all slots


@torch.no_grad()
def test_slots_see_each_other_and_the_observations() -> None:
    model = policy("beast")
    observations = torch.randn(3, 2, 9)
    logits = model(observations)[0]
    assert logits.shape == (3, 6, 9)
    assert torch.equal(model.act(observations), logits.argmax(-1))
    assert not torch.allclose(logits[0], logits[1])
    model.get_parameter("slots.weight")[5] += torch.arange(16)
    assert not torch.allclose(model(observations)[0][:, 0], logits[:, 0])


# -- the task ---------------------------------------------------------------------------------------------------


def task_of(name: str, data: Any, **settings: Any) -> Imitation:
    torch.manual_seed(0)
    fields = Imitation.fields(data)
    model = zoo.create_model(name, d_model=16, n_layers=1, n_heads=2, **fields)
    return Imitation(model, AdamW(), Limits(max_steps=1), data, **settings)


@torch.no_grad()
@pytest.mark.parametrize(("name", "codec"), [("beast", "bspline"), ("autoregressive_policy", "fast")])
def test_the_loss_is_that_of_each_token(name: str, codec: str) -> None:
    data = small(codec, val_episodes=1, batch_size=32)
    task = task_of(name, data, trials=5, execute=20)
    batch = data.sources[1].batch(0, 1, 0, 1)  # 8 rows of 40 are there
    prepared = task.prepared(batch, 0, training=False)
    logits = task(prepared)
    by_hand = [
        F.cross_entropy(logits[i, j], batch["targets"][i, j])
        for i in range(32)
        for j in range(data.tokens.n_slots)
        if batch["targets"][i, j] >= 0
    ]
    (loss,) = task.losses_of(logits, prepared).values()
    assert_close(loss.total, torch.stack(by_hand).sum())
    assert int(loss.number) == len(by_hand)
    task.eval()
    task.validation_step(batch, 0)
    row = task.validation_row()
    assert row["val_loss"] == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-5)
    assert row["val_tokens_per_chunk"] == pytest.approx(len(by_hand) / 8)
    assert 0 <= row["val_success_rate"] <= 1
    assert (row["val_malformed_chunks"] > 0) == (codec == "fast")  # an untrained policy spells no chunk


def test_what_imitation_refuses() -> None:
    data = small()
    with pytest.raises(UserError, match="task=imitation needs a policy, and gru is none; use model=beast"):
        Imitation(zoo.create_model("gru"), AdamW(), Limits(max_steps=1), data)
    with pytest.raises(UserError, match=r"whose n_slots is 15; got model.n_slots=6: leave it out"):
        Imitation(policy("beast"), AdamW(), Limits(max_steps=1), data)
    with pytest.raises(UserError, match=r"task.execute must be between 1 and data.chunk=20"):
        task_of("beast", data, execute=21)
    with pytest.raises(UserError, match="task=imitation needs an expert's observations and actions, and DigitsImages"):
        Imitation.fields(DigitsImages())
    with pytest.raises(UsageError, match=r"data.codec is bspline, fast, bins or a folder .* did you mean 'bspline'"):
        small("bsplin")
    with pytest.raises(ValueError, match=r"observations must be \(B, S, 9\); got \(2, 9\)"):
        policy("beast")(torch.zeros(2, 9))


def test_a_stored_codec_is_taken_as_it_is(tmp_path: Any) -> None:
    data = small(n_controls=6)
    assert data.tokens.n_slots == 18
    data.codec.save(tmp_path)
    again = small(str(tmp_path), seed=5)
    samples = list(data.sources[1].batch(0, 0, 0, 1)["actions"])
    assert torch.equal(again.tokens.targets(samples), data.tokens.targets(samples))
    with pytest.raises(UserError, match=r"the codec in data.codec is of other actions: a chunk must be \(20, 3\)"):
        _ = small(str(tmp_path), chunk=10).tokens
