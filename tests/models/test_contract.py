"""The contract of every registered model: its inputs, examples of them, and a forward pass of such a batch."""

import pytest
import torch
from case_table import make_model, models, parametrize
from torch import Tensor, nn

import zoo
from zoo.layers import Input, Model
from zoo.layers.model import as_model

EVERY = parametrize("case", models())


@EVERY
@torch.no_grad()
def test_an_example_is_what_forward_takes(case: str) -> None:
    model = make_model(case)
    assert isinstance(model, Model)
    batch = model.example(3, 12)
    assert batch.keys() == {each.name for each in model.inputs if not each.optional}
    sizes = model.sizes(3, 12)
    for each in model.inputs:
        if each.name in batch:
            assert batch[each.name].dtype == each.dtype
            assert list(batch[each.name].shape) == [sizes[dim] for dim in each.shape.split()]
            assert not each.below or (batch[each.name].min() >= 0 and batch[each.name].max() < each.below)
    outputs, state = model(**batch)
    leaves = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    assert all(len(x) == 3 and torch.isfinite(x).all() for x in leaves)
    assert (state is None) == (model.init_state(3) is None)


@EVERY
def test_a_seed_says_which_example(case: str) -> None:
    model = make_model(case)
    one, again, other = model.example(2, 9), model.example(2, 9), model.example(2, 9, seed=1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    draw = torch.Generator().manual_seed(0)
    first, second = model.example(2, 9, seed=draw), model.example(2, 9, seed=draw)
    assert all(torch.equal(first[name], one[name]) for name in one)
    assert any(not torch.equal(first[name], second[name]) for name in one)


@EVERY
def test_shapes_alone_on_the_meta_device(case: str) -> None:
    model = make_model(case).to("meta")
    assert all(x.is_meta for x in model.example().values())


@EVERY
def test_a_batch_of_data_gives_the_arguments(case: str) -> None:
    model = make_model(case)
    batch = model.example(2, 9)
    assert model.arguments(batch | {"targets": torch.zeros(2, 9), "n_bytes": torch.ones(())}).keys() == batch.keys()
    assert model.units(batch) in (2, 18)
    with pytest.raises(ValueError, match=f"and the batch has targets; choose data with .*{model.inputs[0].name}"):
        model.arguments({"targets": torch.zeros(2)})


def test_a_plain_module_of_tokens_gets_an_example() -> None:
    class Config:
        def __init__(self) -> None:
            self.vocab_size = 7

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.table = Config(), nn.Embedding(7, 7)

        def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
            return self.table(tokens), None

    model = as_model(Plain())
    assert model.causal
    assert model(**model.example(2, 5))[0].shape == (2, 5, 7)
    with pytest.raises(ValueError, match="says what goes in by `inputs`, and Linear does not"):
        as_model(nn.Linear(2, 2))


def test_inputs_of_every_type() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = {"B": 2, "F": 3}
    x = Input("audio", "B F 5", torch.float32).sample(sizes, draw, torch.device("cpu"))
    assert x.shape == (2, 3, 5)
    assert x.std() > 0
    assert Input("mask", "B F", torch.bool).sample(sizes, draw, torch.device("cpu")).all()
    with pytest.raises(NotImplementedError, match="Model must say its inputs"):
        Model().example()
    assert zoo.create_model("gla", vocab_size=11).example(device="meta")["tokens"].is_meta
