"""A model that takes a plan for memory has both members that say so, or is refused in a sentence."""

import pytest
from torch import nn

from zoo.errors import UserError
from zoo.layers.memory import MemoryPlan
from zoo.train.contracts import TakesMemoryPlan
from zoo.train.run.fit import _memory
from zoo.train.run.folder import RunFolder


class Half(nn.Module):
    def use_memory(self, plan: MemoryPlan) -> None:
        """Keep this much from now on."""


class Whole(Half):
    memory = MemoryPlan()


def test_a_model_without_both_members_is_refused_in_a_sentence(tmp_path: pytest.TempPathFactory) -> None:
    section = {"recompute": "block"}
    with pytest.raises(UserError, match="with members memory and use_memory, and Half has not both; memory=none"):
        _memory(section, Half(), RunFolder(tmp_path))  # type: ignore[arg-type]
    assert not isinstance(Half(), TakesMemoryPlan)
    assert len(_memory(section, Whole(), RunFolder(tmp_path))) == 1  # type: ignore[arg-type]
