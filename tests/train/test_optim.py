"""Weight-decay groups, the schedule and the limits: pure functions."""

import itertools
import math
from typing import ClassVar

import pytest
import torch
from torch import nn

from zoo.errors import UserError
from zoo.train.optim import AdamW, Limits, learning_rate_factor, parameter_groups, set_lr
from zoo.train.run.trainer import DEFAULT_SECONDS, DEFAULT_STEPS, TrainerConfig


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.proj = nn.Linear(4, 4)
        self.unmarked = nn.Linear(4, 2, bias=False)
        self.marked = nn.Linear(4, 4, bias=False)
        self.marked.weight._no_weight_decay = True  # type: ignore[assignment]
        self.conv = nn.Conv1d(4, 4, 3, groups=4)
        self.norm = nn.RMSNorm(4)
        self.log_decay = nn.Parameter(torch.zeros(4))
        self.initial_state = nn.Parameter(torch.zeros(4, 4))
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight


def test_only_matrices_of_linear_and_embedding_decay() -> None:
    groups = parameter_groups(Mixer())
    assert [name for name, _ in groups["decay"]] == ["embedding.weight", "proj.weight", "unmarked.weight"]
    assert {name for name, _ in groups["no_decay"]} == {
        "log_decay", "initial_state", "proj.bias", "marked.weight", "conv.weight", "conv.bias", "norm.weight",
    }  # fmt: skip


def test_decay_alone_shrinks_only_the_decay_group() -> None:
    model = Mixer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in ("embedding.weight", "proj.weight", "unmarked.weight") else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


class Slow(nn.Module):
    max_learning_rates: ClassVar = {"rate": 1e-3, "other": 1.0, "absent": 1e-3}

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.other = (nn.Parameter(torch.zeros(2)) for _ in range(2))
        self.proj = nn.Linear(2, 2, bias=False)
        self.absent = None


@pytest.mark.parametrize(("lr", "own"), [(1e-2, 1e-3), (1e-4, 1e-4)])
def test_a_module_limits_the_learning_rate_of_its_parameters(lr: float, own: float) -> None:
    """At the peak, along the schedule, and only downwards."""
    model = Slow()
    optimizer = AdamW(lr=lr).build(model)

    def rates() -> dict[str, float]:
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert rates() == pytest.approx({"rate": own, "other": lr, "proj.weight": lr})
    set_lr(optimizer, lr / 2)
    assert rates() == pytest.approx({"rate": own / 2, "other": lr / 2, "proj.weight": lr / 2})
    saved = optimizer.state_dict()
    optimizer = AdamW(lr=lr).build(model)
    optimizer.load_state_dict(saved)
    assert rates()["rate"] == pytest.approx(own / 2)


def test_schedule_warms_up_and_ends_at_its_floor() -> None:
    factor = [learning_rate_factor(s, s / 100, warmup_steps=10, min_lr_ratio=0.1) for s in range(101)]
    assert factor[0] == pytest.approx(0.1 * (0.1 + 0.9 * 0.5 * 2))
    assert factor[9] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.09)))
    assert max(factor) == max(factor[8:12])
    assert factor[50] == pytest.approx(0.55)
    assert factor[100] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(factor[10:]))
    assert learning_rate_factor(0, 0.0, warmup_steps=0, min_lr_ratio=0.1) == 1.0


def test_progress_follows_the_nearer_limit() -> None:
    both = Limits(max_steps=100, max_seconds=10.0)
    assert both.progress(50, 1.0) == 0.5
    assert both.progress(10, 8.0) == 0.8
    assert both.progress(10, 80.0) == 1.0
    assert not both.reached(99, 9.9)
    assert both.reached(100, 0.0)
    assert both.reached(0, 10.0)
    assert Limits().progress(5, 5.0) == 0.0


def test_limits_from_the_trainer_options() -> None:
    assert TrainerConfig().limits(None) == Limits(max_steps=DEFAULT_STEPS, max_seconds=DEFAULT_SECONDS)
    assert TrainerConfig(max_steps=7).limits(None) == Limits(max_steps=7)
    assert TrainerConfig(max_time="01:30").limits(None) == Limits(max_seconds=90.0)
    assert TrainerConfig(max_time="01:00:00:05").limits(None) == Limits(max_seconds=86405.0)
    assert TrainerConfig(max_epochs=2, accumulate_grad_batches=3).limits(10) == Limits(max_steps=6)
    assert TrainerConfig(fast_dev_run=2).limits(None) == Limits(max_steps=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_time": "soon"}, "max_time must read like"),
        ({"max_time": "00:00"}, "longer than zero"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"precision": "16-mixed"}, "bf16-mixed"),
        ({"gradient_clip_algorithm": "value"}, "global norm"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TrainerConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("option", "value"), [("lr", 0.0), ("warmup_steps", -1), ("min_lr_ratio", 2.0)])
def test_recipes_that_cannot_be(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        AdamW(**{option: value})  # type: ignore[arg-type]
