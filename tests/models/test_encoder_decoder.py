"""Encoder-decoders: steps equal one pass, lengths of the source, states, memory plans; a reversal is learnt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from case_table import EncoderDecoderCase, make_model, models, parametrize
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from zoo.bench.context_parallel import pretended
from zoo.errors import UserError
from zoo.layers import EncoderDecoder, Hydra
from zoo.layers.memory import MemoryPlan
from zoo.layers.state import state_bytes
from zoo.ops import shard
from zoo.train.optim import AdamW, Limits, set_lr
from zoo.train.tasks.language_modelling import LanguageModelling

EVERY = parametrize("case", models(EncoderDecoderCase))


def made(case: str) -> EncoderDecoder:
    model = make_model(case).double()
    assert isinstance(model, EncoderDecoder)
    return model


@EVERY
@torch.no_grad()
def test_steps_equal_one_pass_and_the_source_is_read_once(case: str) -> None:
    model, reads = made(case), []
    batch, lengths = model.example(2, 9), torch.tensor([9, 4])
    whole, last = model(**batch, source_lengths=lengths)
    model.encoder[0].register_forward_hook(lambda *_: reads.append(1))
    logits, state = model(batch["tokens"][:, :4], source=batch["source"], source_lengths=lengths)
    parts = [logits]
    for t in range(4, 9):
        logits, state = model(batch["tokens"][:, t : t + 1], state)
        parts.append(logits)
    assert len(reads) == 1
    state = model.reserve(model.begin(batch["source"], lengths), 9)
    slots = []
    for t in range(9):
        logits, state = model(batch["tokens"][:, t : t + 1], state)
        slots.append(logits)
    assert_close(torch.cat(slots, dim=1), whole, rtol=1e-10, atol=1e-10)
    assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)
    assert state_bytes(last) == model.state_bytes(2, 9)


@EVERY
@torch.no_grad()
def test_a_state_can_read_the_source_before_the_first_token(case: str) -> None:
    model = made(case)
    batch, lengths = model.example(2, 7), torch.tensor([3, 7])
    whole, _ = model(**batch, source_lengths=lengths)
    assert_close(model(batch["tokens"], model.begin(batch["source"], lengths))[0], whole, rtol=1e-10, atol=1e-10)
    first = model(batch["tokens"], model.init_state(2), source=batch["source"], source_lengths=lengths)[0]
    assert_close(first, whole, rtol=1e-10, atol=1e-10)


@EVERY
@torch.no_grad()
def test_padding_of_the_source_is_never_seen(case: str) -> None:
    model = made(case)
    batch, lengths = model.example(3, 9), (9, 2, 5)
    logits, _ = model(**batch, source_lengths=torch.tensor(lengths))
    for i, length in enumerate(lengths):
        alone, _ = model(batch["tokens"][i : i + 1], source=batch["source"][i : i + 1, :length])
        assert_close(logits[i : i + 1], alone, rtol=1e-10, atol=1e-10)


@EVERY
@torch.no_grad()
def test_the_decoder_is_causal_and_sees_all_of_the_source(case: str) -> None:
    model = made(case)
    batch = model.example(1, 9)
    want = model(**batch)[0]
    changed = {**batch, "tokens": batch["tokens"].clone()}
    changed["tokens"][:, 5:] = (changed["tokens"][:, 5:] + 1) % 20
    got = model(**changed)[0]
    assert_close(got[:, :5], want[:, :5])
    assert not torch.allclose(got[:, 5:], want[:, 5:])
    changed = {**batch, "source": batch["source"].clone()}
    changed["source"][:, -1] = (changed["source"][:, -1] + 1) % 20
    assert not torch.allclose(model(**changed)[0][:, 0], want[:, 0])


@EVERY
def test_every_parameter_gets_a_gradient_and_memory_plans_change_none(case: str) -> None:
    model, grads = made(case).train(), []
    batch = model.example(2, 8)
    for plan in (MemoryPlan(), MemoryPlan(recompute="block"), MemoryPlan(recompute="mixer_saved", tile_mlp=3)):
        model.use_memory(plan)
        assert model.memory == model.encoder.memory == plan
        model.zero_grad()
        x, _ = model.encode(**batch, source_lengths=torch.tensor([8, 5]))
        model.head_loss(x, batch["tokens"].roll(-1, dims=1)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads[0].values())
    for other in grads[1:]:
        assert_close(grads[0], other, rtol=1e-9, atol=1e-12)


@EVERY
def test_the_loss_without_logits_is_that_of_the_logits(case: str) -> None:
    model = made(case)
    batch = model.example(2, 8)
    targets = batch["tokens"].roll(-1, dims=1)
    want = F.cross_entropy(model(**batch)[0].flatten(0, 1), targets.flatten())
    assert_close(model.head_loss(model.encode(**batch)[0], targets), want)


@EVERY
def test_save_and_load(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    zoo.save(model, tmp_path / "checkpoint")
    loaded = zoo.load(tmp_path / "checkpoint")
    batch = model.example(1, 6)
    assert loaded.config == model.config
    assert torch.equal(loaded(**batch)[0], model(**batch)[0])


def test_refusals() -> None:
    model = made("encoder_decoder")
    batch = model.example(2, 5)
    with pytest.raises(ValueError, match="needs its source in the first call; got neither"):
        model(batch["tokens"])
    with pytest.raises(ValueError, match="needs its source in the first call; got neither"):
        model(batch["tokens"], model.init_state(2))
    with pytest.raises(ValueError, match="the state has read its source already; leave source out"):
        model(batch["tokens"], model.begin(batch["source"]), source=batch["source"])
    with pytest.raises(ValueError, match=r"source must be \(B, S\)"):
        model(batch["tokens"], source=batch["source"][0])
    with pretended(2), shard.use(shard.SequenceShard()), pytest.raises(ValueError, match="An encoder-decoder"):
        model(**batch)
    with pytest.raises(ValueError, match="causal model must not see the future, and Hydra does"):
        EncoderDecoder(model.config, lambda i: Hydra(32), lambda i: Hydra(32), lambda i: model.blocks[0].cross)


def reversals(n: int, length: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Sequences of ragged lengths from 3 ... 10, and each backwards behind a start, 0."""
    lengths = torch.randint(2, length + 1, (n,), generator=draw)
    source = torch.randint(3, 11, (n, length), generator=draw)
    there = torch.arange(length) < lengths[:, None]
    backwards = source.gather(1, (lengths[:, None] - 1 - torch.arange(length)).clamp(min=0))
    targets = backwards.masked_fill(~there, -100)
    tokens = torch.cat([torch.zeros(n, 1, dtype=torch.long), backwards[:, :-1]], dim=1)
    return {"tokens": tokens, "source": source.masked_fill(~there, 1), "source_lengths": lengths, "targets": targets}


@pytest.mark.everything
def test_a_reversal_is_learnt() -> None:
    """Of eight symbols: chance is 0.125."""
    torch.manual_seed(0)
    model: Any = zoo.create_model("encoder_decoder", d_model=32, n_layers=1, hidden_size=64, vocab_size=11)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    for step in range(250):
        set_lr(optimiser, 1e-2 * min(1, (step + 1) / 20) * (1 - step / 250))
        batch = reversals(64, 5, draw)
        loss = model.head_loss(model.encode(**model.arguments(batch))[0], batch["targets"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    batch = reversals(200, 5, draw)
    with torch.no_grad():
        guessed = model.eval()(**model.arguments(batch))[0].argmax(dim=-1)
        scored = batch["targets"] != -100
        right = (guessed == batch["targets"])[scored].float().mean().item()
        assert right > 0.9, right
        state, token, drawn = model.begin(batch["source"], batch["source_lengths"]), batch["tokens"][:, :1], []
        for _ in range(5):  # greedily, from the state alone
            logits, state = model(token, state)
            token = logits.argmax(dim=-1)
            drawn.append(token)
    whole = (torch.cat(drawn, dim=1) == batch["targets"]) | ~scored
    assert whole.all(dim=1).float().mean().item() > 0.75


def test_the_task_of_one_sequence_refuses_it() -> None:
    class Data:
        metrics = ()

    with pytest.raises(UserError, match="task=language_modelling has tokens alone, and encoder_decoder takes source"):
        LanguageModelling(make_model("encoder_decoder"), AdamW(), Limits(), Data())  # type: ignore[arg-type]
