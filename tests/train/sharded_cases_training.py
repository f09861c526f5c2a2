"""What sharded_training.py trains, in which layouts (dp, cp) of ranks."""

from dataclasses import dataclass, field
from typing import Any

import torch
from sharded_data import CLASSES, V
from torch import Tensor, nn

from zoo.ops import causal_conv1d, gated_linear_attention
from zoo.ops.shard import ATTENTION

ALL = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4))
ALONG = ((1, 1), (1, 2), (1, 4))
SMALL = {"d_model": 16, "n_layers": 2, "hidden_size": 16}
ROWS = {"rows": 4, "length": 19}
PACKED = {"rows": 1, "length": 20, "documents": (0, 3, 5, 10, 18, 20)}  # borders inside stretches and at edges


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    model: str = "gla"
    task: str = "language_modelling"
    fields: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=lambda: ROWS)
    strategy: dict[str, Any] = field(default_factory=dict)
    layouts: tuple[tuple[int, int], ...] = ALONG
    accumulate: int = 1
    steps: int = 3
    double: bool = True
    precision: str = "32-true"
    fsdp: bool = False
    refused: str = ""  # part of the refusal on every rank
    like: str = ""  # the case whose one process it must equal; its own when empty
    resume: str = ""
    save: bool = False
    every: int = 1  # of the weights, how many are compared


class OwnMixer(nn.Module):
    """A user's own mixer over zoo.ops: no line in it knows of ranks."""

    def __init__(self, d: int = 16, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(d, 4 * d)
        self.taps = nn.Parameter(torch.randn(d, 3) * 0.3)
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = self.inputs(x).chunk(4, dim=-1)
        v, _ = causal_conv1d(v, self.taps, activation="silu")
        q, k, v, g = (z.unflatten(-1, (self.heads, -1)) for z in (q, k, v, g))
        o, _ = gated_linear_attention(q, k, v, nn.functional.logsigmoid(g))
        return self.out(o.flatten(2))


class OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mixer, self.head = nn.Embedding(V, 16), OwnMixer(), nn.Linear(16, V)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, None]:
        x = self.embedding(tokens)
        return self.head(x + self.mixer(x)), None


class Running(nn.Module):
    """A running mean in torch's own words: its stretch is all that it sees, and nothing tells."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, None]:
        x = self.embedding(tokens)
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.head(x.cumsum(1) / count), None


class Recurrent(nn.Module):
    """torch's LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(V, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, V)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, None]:
        return self.head(self.rnn(self.embedding(tokens))[0]), None


OWN: dict[str, type[nn.Module]] = {"own": OwnModel, "running": Running, "lstm": Recurrent}


def cases() -> list[Case]:
    gla = {**SMALL, "conv_size": 3}
    two, four = ((1, 2),), ((1, 4),)
    made = [
        Case(name="gla", fields=gla, layouts=ALL, accumulate=2, save=True),
        Case(name="longer", fields=gla, layouts=((1, 1),), accumulate=2, steps=5),
        Case(name="from 1x1", like="longer", fields=gla, layouts=((1, 2), (1, 4)), accumulate=2, steps=5,
             resume="gla-1x1"),
        Case(name="from 1x2", like="longer", fields=gla, layouts=((4, 1), (2, 2)), accumulate=2, steps=5,
             resume="gla-1x2"),
        Case(name="fsdp", like="gla", fields=gla, layouts=((1, 2), (2, 2)), accumulate=2, fsdp=True, save=True),
        Case(name="fsdp from ddp", like="longer", fields=gla, layouts=((2, 2),), accumulate=2, steps=5, fsdp=True,
             resume="gla-1x2"),
        Case(name="ddp from fsdp", like="longer", fields=gla, layouts=((4, 1),), accumulate=2, steps=5,
             resume="fsdp-1x2"),
        Case(name="own", model="own", layouts=ALL),
        Case(name="deltanet packed", model="deltanet", fields=SMALL, data=PACKED, strategy={"method": "lasp"}),
        Case(name="yaad packed", model="yaad", fields={**SMALL, "n_heads": 2, "chunk_size": 3}, data=PACKED),
        Case(name="mamba2 recomputed", model="mamba2", strategy={"method": "lasp2"},
             fields={"d_model": 16, "n_layers": 1, "head_dim": 8, "d_state": 4, "activation_checkpointing": True}),
        Case(name="bf16", fields=gla, double=False, precision="bf16-mixed", layouts=((1, 1), (1, 2))),
        Case(name="too many ranks", data={"rows": 4, "length": 3}, layouts=four,
             refused="each of the 4 ranks of a context-parallel group needs a token; got sequences of 3"),
        Case(name="odd zigzag", model="transformer", fields=SMALL, strategy={"attention": "zigzag"}, layouts=two,
             refused="a zigzag layout over 2 ranks needs a length that is a multiple of 4; got 19, pad the sequence"),
        Case(name="other samples", data={**ROWS, "differ": True}, layouts=((1, 2), (2, 2)),
             refused="ranks [1] of the group got another than rank 0: shard the data by the strategy's"),
        Case(name="zigzag states", strategy={"attention": "zigzag"}, layouts=two,
             refused="GatedLinearAttention need every rank to hold one contiguous stretch of time; got the zigzag"),
        Case(name="heads", fields={**SMALL, "n_heads": 2}, strategy={"method": "heads"}, layouts=four,
             refused="at least one head (dimension 2) for each of the 4 ranks"),
        Case(name="running", model="running", layouts=two, refused="this one sent nothing in its first step"),
        Case(name="lstm", model="lstm", layouts=two, refused="model.rnn (LSTM) goes along time and cannot go on"),
        Case(name="unknown part", data={**ROWS, "extra": True}, layouts=two,
             refused="which parts of a batch have time; got 'weights', give the strategy a schema"),
    ]  # fmt: skip
    made += encoders() + dropping()
    length = {"rows": 2, "length": 16}
    transformer = {**SMALL, "n_heads": 4}
    for method in ATTENTION:  # they run as soon as attention crosses ranks
        name = f"attention {method}"
        made.append(Case(name=name, model="transformer", fields=transformer, data=length, every=7,
                         strategy={"attention": method}))  # fmt: skip
    made.append(Case(name="hybrid", fields={**SMALL, "pattern": "gla, attention"}, data=length, every=7))
    return made


def encoders() -> list[Case]:
    """Hydra, which sees both sides: masked tokens, also of padded rows and of packed documents, and classes.

    What is masked is drawn by the rank of the data, so only groups of one are like one process.
    """
    small = {"d_model": 16, "n_layers": 2, "d_state": 4, "head_dim": 8, "vocab_size": V + 1, "dropout": 0.0}
    masked = {"model": "hydra", "task": "masked_language_modelling"}
    whole, packed = {"rows": 4, "length": 19, "holes": False}, {**PACKED, "holes": False}
    made = [
        Case(name="hydra", **masked, fields=small, data=whole, accumulate=2),
        Case(name="hydra fsdp", **masked, like="hydra", fields=small, data=whole, layouts=((1, 2), (1, 4)),
             accumulate=2, fsdp=True),
        Case(name="hydra groups", **masked, fields=small, data=whole, layouts=((2, 1), (2, 2))),
        Case(name="hydra groups fsdp", **masked, like="hydra groups", fields=small, data=whole, layouts=((2, 2),),
             fsdp=True),
        Case(name="hydra packed", **masked, fields=small | {"activation_checkpointing": True}, data=packed,
             strategy={"method": "lasp2"}),
        Case(name="hydra heads", **masked, fields=small, data=packed, strategy={"method": "heads"}),
    ]  # fmt: skip
    for pooling in ("first", "mean"):
        made.append(Case(name=f"hydra classes, {pooling}", model="hydra", task="classification",
                         fields=small | {"n_classes": CLASSES, "pooling": pooling},
                         data={"rows": 4, "length": 19, "labels": True}, layouts=ALL))  # fmt: skip
    return made


def dropping() -> list[Case]:
    """Dropout: masks by position, so that stretches drop what the whole drops; groups have streams of their own."""
    gla, packed = {**SMALL, "conv_size": 3, "dropout": 0.1}, {**PACKED, "holes": False}
    hydra = {"d_model": 16, "n_layers": 2, "d_state": 4, "head_dim": 8, "vocab_size": V + 1, "dropout": 0.1}
    s4 = {"d_model": 16, "n_layers": 2, "hidden_size": 16, "d_state": 4, "dropout": 0.1}
    recomputed = {"activation_checkpointing": True}
    return [
        Case(name="dropout", fields=gla, accumulate=2),
        Case(name="dropout recomputed", like="dropout", fields=gla | recomputed, accumulate=2),
        Case(name="dropout fsdp", like="dropout", fields=gla, layouts=((1, 2), (1, 4)), accumulate=2, fsdp=True),
        Case(name="dropout groups", fields=gla, layouts=((2, 1), (2, 2))),
        Case(name="dropout packed", fields=gla, data=PACKED),
        Case(name="dropout s4", model="s4", fields=s4, data=PACKED),
        Case(name="dropout hydra", model="hydra", task="masked_language_modelling", fields=hydra,
             data={"rows": 4, "length": 19, "holes": False}),
        Case(name="dropout hydra packed", model="hydra", task="masked_language_modelling", fields=hydra | recomputed,
             data=packed),
        Case(name="dropout classes", model="hydra", task="classification", fields=hydra | {"n_classes": CLASSES},
             data={"rows": 4, "length": 19, "labels": True}),
    ]  # fmt: skip


CASES = cases()
