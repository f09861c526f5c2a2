"""A model is registered with its task, its data, its decoder and what it makes, and every command keeps to that."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

import zoo
from zoo import cli, registry
from zoo.config import compose
from zoo.configs import choices
from zoo.errors import UsageError
from zoo.registry import PRODUCTS, list_models, model_info


@dataclass(frozen=True, kw_only=True)
class Config:
    d_model: int = 2


class Nothing(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Linear(config.d_model, config.d_model)


def build(config: Config) -> nn.Module:
    return Nothing(config)


def registered(name: str, **what: str | None) -> None:
    registry.register(name, config=Config, sizes={"tiny": {}}, **what)(build)  # type: ignore[arg-type]


def targets(*words: str) -> tuple[str, str]:
    config = compose(words)
    return tuple(config[group]["_target_"].rpartition(".")[2] for group in ("task", "data"))  # type: ignore[return-value]


def test_every_model_names_choices_that_exist() -> None:
    known = choices()
    for name in list_models():
        info = model_info(name)
        assert info.task in known["task"], name
        assert info.data in known["data"], name
        assert info.produces in PRODUCTS, name


def test_a_model_brings_its_task_and_its_data() -> None:
    registered("recaller", data="mqar")
    registered("filler", task="masked_language_modelling")
    assert targets("model=recaller") == ("LanguageModelling", "MQAR")
    assert targets("model=filler") == ("MaskedLanguageModelling", "PyDocs")
    assert targets("model=hydra") == ("MaskedLanguageModelling", "PyDocs")
    assert targets() == ("LanguageModelling", "PyDocs")


def test_what_the_user_or_an_experiment_chose_wins() -> None:
    registered("recaller", data="mqar", task="masked_language_modelling")
    assert targets("model=recaller", "data=copying") == ("MaskedLanguageModelling", "Copying")
    assert targets("task=classification", "model=recaller") == ("Classification", "MQAR")
    assert targets("model=gla", "experiment=parity")[1] == "Parity"
    config = compose(["model=recaller", "data.seq_len=96", "task.mask_rate=0.5"])
    assert (config["data"]["seq_len"], config["task"]["mask_rate"]) == (96, 0.5)


def test_a_choice_that_no_file_describes_is_refused() -> None:
    registered("speaker", task="speaking")
    with pytest.raises(UsageError, match="'speaker' asks for task=speaking, which no YAML file describes; give task="):
        compose(["model=speaker"])
    assert targets("model=speaker", "task=classification") == ("Classification", "PyDocs")
    with pytest.raises(
        ValueError, match="produces must be one of text, classes, audio, actions, image, series; got 'x'"
    ):
        registered("x", produces="x")


def test_list_and_show_say_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "hydra", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert {key: entry[key] for key in ("task", "data", "decoder", "produces")} == {
        "task": "masked_language_modelling", "data": "pydocs", "decoder": None, "produces": "text",
    }  # fmt: skip
    assert cli.main(["show", "gla"]) == 0
    assert (
        "zoo train takes task=language_modelling data=pydocs; it produces text, and zoo generate draws by sampling"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ({"produces": "classes", "decoder": None}, "zoo generate continues text, and seer makes classes; zoo eval"),
        ({"decoder": None}, "zoo generate draws by a model's decoder, and seer has none; zoo eval measures it"),
    ],
)
def test_generate_refuses_what_makes_no_text(
    what: dict[str, str | None], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registered("seer", **what)
    zoo.save(zoo.create_model("seer"), tmp_path / "seer")
    assert cli.main(["generate", str(tmp_path / "seer"), "--prompt", "a"]) == 1
    assert sentence in capsys.readouterr().err


def test_old_entries_of_the_index_can_be_read() -> None:
    """Else `python -m zoo.registry`, which reads the index, could not write it anew."""
    entry = json.loads((registry.INDEX / "gla.json").read_text(encoding="utf-8"))
    for key in ("data", "decoder", "produces"):
        del entry[key]
    assert registry.ModelInfo("gla", **entry).data == "pydocs"
