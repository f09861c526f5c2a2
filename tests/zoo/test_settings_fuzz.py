"""Numbers of the settings classes: whatever is given makes an object or is refused in one sentence."""

import dataclasses
import math
from typing import Any

import pytest

from zoo.configs import ROOT
from zoo.errors import UserError
from zoo.registry import resolve
from zoo.settings import indexed

INTEGERS = (0, -1, -2, 10**30)
FLOATS = (0.0, -1.0, -2.0, 1e300, math.inf, -math.inf, math.nan)
CLASSES = sorted((path.parent.name, path.stem) for path in ROOT.glob("*/*.json"))
PLAIN = [(group, target) for group, target in CLASSES if dataclasses.is_dataclass(resolve(target))]


@pytest.mark.parametrize(("group", "target"), PLAIN)
def test_a_number_makes_settings_or_is_refused_in_one_sentence(group: str, target: str) -> None:
    settings, owner = indexed(group, target), resolve(target)
    assert settings
    for name, setting in settings.items():
        kinds = set(setting.type.split(" | "))
        values: tuple[Any, ...] = INTEGERS if "int" in kinds else FLOATS if "float" in kinds else ()
        if setting.type == "tuple[float, float]":
            values = tuple((0.5, value) for value in FLOATS)
        for value in values:
            sentence = refusal_of(owner, name, value)
            if sentence is not None:
                assert "\n" not in sentence, (name, value)
                assert name in sentence, (name, value)
                continue
            numbers = value if isinstance(value, tuple) else (value,)
            assert math.isfinite(numbers[-1]), (name, value)
            assert setting.range is None or all(number in setting.range for number in numbers), (name, value)


def refusal_of(owner: Any, name: str, value: Any) -> str | None:
    """The sentence with which a class refuses one setting; None when it takes it."""
    try:
        owner(**{name: value})
    except UserError as refusal:
        return str(refusal)
    return None
