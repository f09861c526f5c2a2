"""Every registered model and mixer as a Python object: pickled, copied, sent to another process."""

import copy
import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import zoo
from zoo.layers.mixer import as_mixer
from zoo.layers.mixers.delta_net import FEATURES, NORMS, DeltaNet
from zoo.layers.model import as_model
from zoo.layers.pattern import MIXERS
from zoo.registry import list_models


def made(name: str) -> nn.Module:
    """The smallest size, in eval mode, after a call: what a call leaves on a module must be picklable, too."""
    torch.manual_seed(0)
    model = zoo.create_model(name, "tiny").eval()
    logits(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    outputs = tree_leaves(model(**as_model(model).example(2, 8))[0])  # a tensor, or a named tuple of tensors
    return torch.cat([each.flatten() for each in outputs])


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy, "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", list_models())
def test_a_copy_of_a_model_is_the_model_and_shares_nothing(name: str, how: str) -> None:
    model = made(name)
    want = logits(model)
    again = COPIES[how](model)
    assert (again.name, again.size, again.config) == (model.name, model.size, model.config)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(again), want)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(again), want)


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_pickles(name: str) -> None:
    mixer = MIXERS[name](32)
    again = pickle.loads(pickle.dumps(mixer))
    x = torch.randn(1, 6, 32)
    with torch.no_grad():
        assert torch.equal(again(x)[0], mixer(x)[0])


@pytest.mark.parametrize("conv_size", [None, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", FEATURES)
def test_every_setting_of_a_delta_net_pickles(activation: str, norm: str, conv_size: int | None) -> None:
    mixer = DeltaNet(16, n_heads=2, qk_activation=activation, qk_norm=norm, conv_size=conv_size)
    again = pickle.loads(pickle.dumps(mixer))
    x = torch.randn(1, 6, 16)
    with torch.no_grad():
        assert torch.equal(again(x)[0], mixer(x)[0])


def _answer(rank: int, models: dict[str, nn.Module], path: Path) -> None:
    torch.set_num_threads(1)
    torch.save({name: logits(model) for name, model in models.items()}, path)


def test_models_reach_a_spawned_process(tmp_path: Path) -> None:
    models = {name: made(name) for name in list_models()}
    want = {name: logits(model) for name, model in models.items()}
    mp.spawn(_answer, args=(models, tmp_path / "logits.pt"), nprocs=1)
    got = torch.load(tmp_path / "logits.pt")
    assert got.keys() == want.keys()
    for name, numbers in got.items():
        torch.testing.assert_close(numbers, want[name], msg=lambda text, name=name: f"{name}: {text}")


class Plain(nn.Module):
    """A model of another package: it says its vocabulary by its config and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=5)
        self.embedding = nn.Embedding(5, 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return self.embedding(tokens), None


class PlainMixer(nn.Module):
    """A mixer that does not inherit from Mixer."""

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return x, self.init_state(1)

    def init_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, 3)


@pytest.mark.parametrize("how", COPIES)
def test_plain_modules_are_copied_after_they_were_completed(how: str) -> None:
    model, mixer = Plain(), PlainMixer()
    want = as_model(model).example(2, 3)
    again = as_model(COPIES[how](model))
    assert torch.equal(again.example(2, 3)["tokens"], want["tokens"])
    assert again.example.args[0] is again, "it is completed by itself, not by the model it was copied from"
    as_mixer(mixer)
    assert as_mixer(COPIES[how](mixer)).state_bytes(2) == 24
