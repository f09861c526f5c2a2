"""Every data group composes into settings that its class takes, and holds nothing but what differs."""

from pathlib import Path

import pytest
import yaml

import zoo.configs
from zoo.config import compose
from zoo.errors import UsageError
from zoo.registry import resolve
from zoo.train.data.core.base import DataModule

FOLDER = Path(str(zoo.configs.__file__)).parent / "data"
REQUIRED = {"text_files": {"path": str(Path(__file__).parent / "*.py")}, "hub": {"name": "owner/name"}}


def test_there_is_a_group_for_every_source() -> None:
    generated = {"mqar", "copying", "induction_heads", "parity", "word_problem", "k_hop", "keep_nth"}
    assert {file.stem for file in FOLDER.glob("*.yaml")} >= {"pydocs", "text_files", "hub"} | generated


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.yaml")))
def test_composes_and_builds(name: str) -> None:
    required = REQUIRED.get(name, {})
    written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert written.keys() == {"_target_", "seed", *required}
    assert written["seed"] == "${seed}"
    overrides = ["model=transformer", f"data={name}", "seed=5", *(f"data.{k}='{v}'" for k, v in required.items())]
    settings = compose(overrides)["data"]
    data = resolve(settings.pop("_target_"))(**settings)
    assert isinstance(data, DataModule)
    assert data.seed == 5
    if required:
        with pytest.raises(UsageError, match="must be given"):
            compose(overrides[:2])


def test_a_wrong_type_is_refused_before_anything_is_built() -> None:
    with pytest.raises(UsageError, match=r"data\.seq_len must be int, got 'long'"):
        compose(["model=transformer", "data=pydocs", "data.seq_len=long"])
    with pytest.raises(UsageError, match=r"data\.packing must be 'cut' or 'packed'"):
        compose(["model=transformer", "data=text_files", "data.path=x", "data.packing=loose"])
