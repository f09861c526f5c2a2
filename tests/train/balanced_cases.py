"""What balanced_training.py trains, on how many ranks."""

from dataclasses import dataclass, field
from typing import Any

SMALL = {"d_model": 16, "n_layers": 2, "hidden_size": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deltanet": ("deltanet", {**SMALL, "n_heads": 2}),
    "gla": ("gla", {**SMALL, "conv_size": 3}),
    "transformer": ("transformer", SMALL),
    "hybrid": ("gla", {**SMALL, "pattern": "gla, attention"}),
    "dropping": ("gla", {**SMALL, "dropout": 0.1}),
    "running": ("", {}),
}
# Tokens on a rank: the longest document, of 52 inputs, takes as many ranks as may share one, but for the one that runs
# alone. Of three ranks two may share one where groups are powers of two.
ROOM = {1: 64, 2: 30, 3: 20, 4: 16}
ALONE = {"global_tokens": 1}  # every document is a batch


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    model: str
    worlds: tuple[int, ...]
    strategy: str = "balanced"  # or another name of Lightning's registry, "auto" for none
    settings: dict[str, Any] = field(default_factory=dict)  # of the strategy
    data: dict[str, Any] = field(default_factory=dict)
    ordinary: bool = False  # data that make ordinary batches
    steps: int = 3
    double: bool = True
    like: str = ""  # the case of one process that it must equal; the model's when empty
    resume: str = ""
    save: bool = False
    refused: str = ""  # part of the refusal on every rank
    broken: str = ""  # what is wrong on purpose
    killed: bool = False  # the last rank, on the way


def cases() -> list[Case]:
    made = [Case(name=model, model=model, worlds=(1,), strategy="auto") for model in ("deltanet", "gla", "transformer")]
    made += [
        Case(name="hybrid", model="hybrid", worlds=(1,), strategy="auto"),
        Case(name="longer", model="hybrid", worlds=(1,), strategy="auto", steps=6),
        Case(name="alone", model="hybrid", worlds=(1,), strategy="auto", data=ALONE),
    ]
    for model in ("deltanet", "transformer", "hybrid"):
        made += [
            Case(name=f"{model} balanced", model=model, worlds=(1, 2, 3, 4), save=model == "hybrid"),
            Case(name=f"{model} fsdp", model=model, worlds=(2, 4), strategy="balanced_fsdp", save=model == "hybrid"),
        ]
    made += [
        Case(name="three ranks fsdp", model="hybrid", worlds=(3,), strategy="balanced_fsdp",
             settings={"capacity": 30}),
        Case(name="idle", model="hybrid", worlds=(4,), like="alone", data=ALONE),
        Case(name="idle fsdp", model="hybrid", worlds=(2,), strategy="balanced_fsdp", like="alone", data=ALONE),
        Case(name="chunks", model="gla", worlds=(3,), settings={"chunk": 4}),
        Case(name="lasp", model="hybrid", worlds=(3,), settings={"method": "lasp", "attention": "ring"}),
        Case(name="lasp2", model="hybrid", worlds=(3,), settings={"method": "lasp2", "attention": "allgather"}),
        Case(name="zeco", model="hybrid", worlds=(3,), settings={"method": "zeco", "attention": "tokenring"}),
        Case(name="uniform", model="transformer", worlds=(4,), settings={"planner": "uniform"}),
        Case(name="packed attention", model="transformer", worlds=(3,), settings={"planner": "packed"}),
        Case(name="hybrid planner without attention", model="gla", worlds=(4,), settings={"planner": "hybrid"}),
        Case(name="workers", model="transformer", worlds=(2,), data={"num_workers": 1}),
        Case(name="bf16", model="hybrid", worlds=(2,), double=False),
        # the same documents where nobody plans
        Case(name="ddp", model="hybrid", worlds=(2,), strategy="ddp"),
        Case(name="lightseq", model="hybrid", worlds=(2,), strategy="lightseq"),
        # from three updates on, under another strategy or number of ranks
        Case(name="on", model="hybrid", worlds=(2, 3), like="longer", steps=6, resume="hybrid balanced-2"),
        Case(name="on fsdp", model="hybrid", worlds=(2,), like="longer", steps=6, strategy="balanced_fsdp",
             resume="hybrid balanced-2"),
        Case(name="from fsdp", model="hybrid", worlds=(3,), like="longer", steps=6, resume="hybrid fsdp-2"),
        Case(name="on ddp", model="hybrid", worlds=(2,), like="longer", steps=6, strategy="ddp",
             resume="hybrid balanced-2"),
        Case(name="dropout", model="dropping", worlds=(3,), settings={"planner": "hybrid", "chunk": 4}),
        # what must not come out alike
        Case(name="dropped", model="deltanet", worlds=(2,), broken="dropped"),
        Case(name="turned round", model="deltanet", worlds=(3,), broken="turned round"),
        Case(name="another document", model="hybrid", worlds=(3,), broken="another document",
             refused="ranks [1] made another than rank 0"),
        Case(name="other settings", model="gla", worlds=(2,), broken="other settings",
             refused="ranks [1] made another than rank 0"),
        Case(name="ordinary", model="gla", worlds=(2,), ordinary=True, refused="use data=documents"),
        Case(name="zigzag", model="transformer", worlds=(2,), strategy="zigzag", refused="use strategy=balanced"),
        Case(name="silent", model="running", worlds=(2,), refused="this one sent nothing in its first step"),
        Case(name="chunks of attention", model="hybrid", worlds=(2,), settings={"chunk": 4}, refused="use 1"),
        Case(name="no room", model="hybrid", worlds=(2,), settings={"capacity": 20},
             refused="2 ranks x 20 tokens = 40; one of 52 came"),
        Case(name="killed", model="hybrid", worlds=(3,), killed=True, refused="lost another rank"),
    ]  # fmt: skip
    return made


CASES = cases()
