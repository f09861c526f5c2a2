"""The encoder: padding on both sides, packing, heads, and what it refuses; causal backbones refuse its mixers."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from zoo.layers import Encoder, EncoderConfig, Hydra, Mamba2, SequenceConfig, SequenceModel

D, VOCAB = 16, 30


def make(**fields: object) -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig(d_model=D, n_layers=2, vocab_size=VOCAB, **fields)
    model = Encoder(config, lambda i: Hydra(D, d_state=4, head_dim=8)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


HEADS = {
    "tokens": {},
    "tokens, pre-norm": {"prenorm": True},
    "classes, first": {"n_classes": 3},
    "classes, mean": {"n_classes": 3, "pooling": "mean"},
}
EVERY = pytest.mark.parametrize("head", HEADS)


@EVERY
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padding_reaches_no_token(head: str, side: str) -> None:
    model, lengths = make(**HEADS[head]), (17, 5, 1, 9)
    x, mask = torch.full((4, 17), 3), torch.zeros(4, 17, dtype=torch.bool)
    rows, types = [tokens(1, 17)[:, :n] for n in lengths], torch.ones(4, 17, dtype=torch.long)
    for i, row in enumerate(rows):
        free = 17 - row.shape[1]
        first = {"left": free, "right": 0, "both": free // 2}[side]
        place = slice(first, first + row.shape[1])
        x[i, place], mask[i, place], types[i, place] = row[0], True, 0
    logits, state = model(x, mask=mask, token_types=types)
    assert state is None
    for i, row in enumerate(rows):
        alone, _ = model(row)
        assert_close(logits[i][mask[i]] if model.classifier is None else logits[i], alone[0])


@EVERY
@torch.no_grad()
def test_packed_documents_equal_separate_ones(head: str) -> None:
    model, x, bounds = make(**HEADS[head]), tokens(1, 30), [0, 11, 12, 30]
    logits, _ = model(x, cu_seqlens=torch.tensor(bounds))
    for i, (left, right) in enumerate(itertools.pairwise(bounds)):
        alone, _ = model(x[:, left:right])
        assert_close(logits[:, left:right] if model.classifier is None else logits[i : i + 1], alone)


@torch.no_grad()
def test_an_empty_sequence_counts_as_zeros() -> None:
    x = tokens(2, 6)
    for pooling in ("first", "mean"):
        model = make(n_classes=3, pooling=pooling)
        assert model.classifier is not None
        zeros = model.classifier(torch.zeros(1, 1, D, dtype=torch.float64), None, None)
        mask = torch.tensor([[True] * 6, [False] * 6])
        assert_close(model(x, mask=mask)[0], torch.cat([model(x[:1])[0], zeros]))
        packed, _ = model(x[:1], cu_seqlens=torch.tensor([0, 0, 6, 6]))
        assert_close(packed, torch.cat([zeros, model(x[:1])[0], zeros]))


@torch.no_grad()
def test_token_types_matter_and_zero_is_the_default() -> None:
    model, x = make(), tokens(2, 9)
    assert torch.equal(model(x)[0], model(x, token_types=torch.zeros_like(x))[0])
    assert not torch.allclose(model(x)[0], model(x, token_types=torch.ones_like(x))[0])


@torch.no_grad()
def test_layers_are_post_norm_or_pre_norm() -> None:
    x = tokens(1, 9)
    for prenorm in (False, True):
        model = make(prenorm=prenorm)
        h = model.embeddings(x, None)
        for block in model.blocks:
            h = h + block.mixer(block.norm(h))[0] if prenorm else block.norm(h + block.mixer(h)[0])
        h = model.norm(h) if prenorm else h
        assert (model.norm is None) != prenorm
        assert_close(model.encode(x)[0], h)


def test_the_loss_without_logits_is_that_of_the_logits() -> None:
    model, x = make(), tokens(2, 20)
    targets = x.masked_fill(torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.7, -100)
    found = []
    for loss in (
        model.head_loss(model.encode(x)[0], targets),
        torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), targets.flatten()),
    ):
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for ours, want in zip(*found, strict=True):
        assert_close(ours, want, rtol=1e-9, atol=1e-12)


def test_activation_checkpointing_changes_no_gradient() -> None:
    grads = []
    for on in (False, True):
        model = make(activation_checkpointing=on, dropout=0.2).train()
        torch.manual_seed(3)
        model(tokens(2, 20))[0].square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert_close(grads[0], grads[1])


def test_the_start_is_berts() -> None:
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(d_model=64, n_layers=1, vocab_size=500), lambda i: Hydra(64, head_dim=32))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and module.weight.numel() > 1000:
            assert 0.018 < module.weight.std() < 0.022
    assert (model.lm_head.decoder.bias == 0).all()
    assert (model.blocks[0].mixer.A_log == 0).all()
    assert model.lm_head.decoder.weight is model.embeddings.word.weight


def test_what_carries_no_state_takes_none() -> None:
    model = make()
    assert model.state_bytes(2, 100) == 0
    with pytest.raises(ValueError, match="Encoder sees both sides of every token and carries no state"):
        model(tokens(1, 5), ())


def test_causal_backbones_refuse_mixers_that_see_the_future() -> None:
    config = SequenceConfig(d_model=D, n_layers=2, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="mixers of a causal model must not see the future, and Hydra does"):
        SequenceModel(config, lambda i: Hydra(D, head_dim=8) if i else Mamba2(D, head_dim=8))


@pytest.mark.parametrize(("fields", "words"), [
    ({"n_layers": 0}, r"n_layers must be in \[1, 10000\], got 0"),
    ({"n_classes": 1}, "n_classes must be at least 2, got 1"),
    ({"pooling": "mean"}, "a head for tokens has none; got pooling='mean', give n_classes or leave it out"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1"),
])  # fmt: skip
def test_refusals(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EncoderConfig(**fields)


def test_a_model_of_classes_has_no_loss_of_tokens() -> None:
    model, x = make(n_classes=2), tokens(1, 5)
    with pytest.raises(ValueError, match="head_loss is that of a head for tokens, and this model has n_classes"):
        model.head_loss(model.encode(x)[0], x)
