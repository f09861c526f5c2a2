"""What layers say of the operators that their code calls, and whether that is all."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoo.layers
from zoo.layers.mixer_registry import MIXERS
from zoo.layers.model import as_model
from zoo.ops import rms_norm, swiglu
from zoo.ops.core.call import Choice, Operator, declared, watched
from zoo.registry import create_model, list_models


def test_layers_import_operators_and_none_of_their_forms() -> None:
    for path in Path(zoo.layers.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("zoo.ops."):
                inner = node.module.split(".")[2:]
                assert inner[0] in ("core", "shard") or len(inner) <= 2, f"{path.name}: {node.module}"


def _undeclared(model: nn.Module, run: Callable[[], object]) -> set[tuple[str, str]]:
    """(layer, operator) of calls of operators that the running layer does not declare, nor a layer just inside it."""
    running: list[nn.Module] = [model]
    wrong: set[tuple[str, str]] = set()
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda m, _: running.append(m)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))

    def watch(operator: Operator, choice: Choice, outermost: bool) -> None:
        near = (running[-1], *running[-1].children())
        if outermost and not any(operator in declared(module) for module in near):
            wrong.add((type(running[-1]).__name__, operator.name))

    with watched(watch):
        run()
    for hook in hooks:
        hook.remove()
    return wrong


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_a_mixer_calls_no_operator_that_it_does_not_declare(name: str) -> None:
    mixer = MIXERS[name](64)
    assert declared(mixer), f"{name}: add operators = (...) to its class"
    for length in (1, 6):
        assert not _undeclared(mixer, lambda length=length: mixer(torch.randn(1, length, 64)))


@pytest.mark.parametrize("name", list_models())
def test_a_model_calls_no_operator_that_no_layer_declares(name: str) -> None:
    model = as_model(create_model(name, "tiny"))
    assert not _undeclared(model, lambda: model(**model.example(1, 6)))


def test_a_mixer_that_hides_an_operator_is_seen() -> None:
    class Hiding(nn.Module):
        operators = (rms_norm,)

        def forward(self, x: Tensor) -> Tensor:
            return swiglu(rms_norm(x), x)

    assert _undeclared(Hiding(), lambda: None) == set()
    hiding = Hiding()
    assert _undeclared(hiding, lambda: hiding(torch.ones(1, 2, 4))) == {("Hiding", "swiglu")}
