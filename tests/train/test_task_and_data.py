"""A task and data that do not belong together are refused in one sentence, for tasks of one's own as well."""

from pathlib import Path
from typing import Any

import pytest

from zoo.config import compose
from zoo.errors import UserError
from zoo.train.data.core.base import DataModule
from zoo.train.run import fit
from zoo.train.run.build import build_model, fields_of
from zoo.train.tasks.task import Task


class Voice(Task):
    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        return {"n_phones": data.n_phones}


class Wrong(Task):
    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        return {"n_phones": cls.n_phones}  # type: ignore[attr-defined]


class Data:
    n_phones = 10


def test_data_without_what_a_task_asks_for() -> None:
    assert fields_of(Voice, Data()) == {"n_phones": 10}
    with pytest.raises(UserError, match="Voice asks its data for n_phones, and object has none; choose other data"):
        fields_of(Voice, object())
    with pytest.raises(AttributeError):  # a mistake of the task's own is no matter of data
        fields_of(Wrong, Data())


def test_a_model_without_the_field_names_those_that_have_it() -> None:
    section = {"name": "gla", "size": "tiny"}
    with pytest.raises(UserError, match="with the field n_phones, and gla has none; no model can be trained by it"):
        build_model(section, Data(), Voice)
    with pytest.raises(UserError, match=r"and gla has none; .*vit.* can be trained by it"):
        fit.run(compose(["model=gla", "task=image_classification", "data=digits_images"]), Path("never-made"))
    assert not Path("never-made").exists()


def test_data_without_tokens() -> None:
    with pytest.raises(UserError, match="a vocabulary is that of tokens, and DataModule has none; choose the task"):
        _ = DataModule(batch_size=1).vocab_size
