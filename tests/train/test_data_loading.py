"""How batches are dealt out is one frozen value, the same for every data module."""

from dataclasses import FrozenInstanceError

import pytest

from zoo.config import compose
from zoo.configs import choices
from zoo.errors import UserError
from zoo.train.data.core.base import DataModule, LoaderSettings
from zoo.train.run.instantiate import instantiate

OFFLINE = [name for name in choices()["data"] if name not in ("hub", "text_files")]  # these want a path or a network


@pytest.mark.parametrize("name", OFFLINE)
def test_every_module_keeps_what_it_was_told(name: str) -> None:
    section = compose([f"data={name}", "seed=3"])["data"]
    data = instantiate("data", section)
    assert isinstance(data, DataModule)
    assert isinstance(data.loading, LoaderSettings)
    assert (data.loading.num_workers, data.loading.seed) == (section["num_workers"], 3)
    if "batch_size" in section:
        assert data.batch_size == data.loading.batch_size == section["batch_size"]


def test_the_value_is_frozen_and_checked() -> None:
    loading = LoaderSettings(batch_size=2)
    with pytest.raises(FrozenInstanceError):
        loading.batch_size = 3  # type: ignore[misc]
    for field, value in (("batch_size", 0), ("num_workers", -1), ("seed", -1)):
        with pytest.raises(UserError, match=f"data.{field} must be at least"):
            LoaderSettings(**{"batch_size": 1, field: value})


def test_fields_may_be_given_by_keyword() -> None:
    loading = LoaderSettings(batch_size=2, num_workers=1, seed=4)
    assert DataModule(batch_size=2, num_workers=1, seed=4).loading == DataModule(loading).loading == loading
    assert DataModule(loading, batch_size=5).loading == LoaderSettings(batch_size=5, num_workers=1, seed=4)
    with pytest.raises(TypeError, match="workers"):
        DataModule(batch_size=2, workers=1)
