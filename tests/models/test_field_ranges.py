"""Numbers of a model's config: whatever is given makes a model or is refused in one sentence."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import zoo
from zoo.errors import UsageError, UserError
from zoo.ranges import Range
from zoo.registry import model_info

SMALL = {"d_model": 32, "n_layers": 1, "vocab_size": 16, "hidden_size": 16}
INTEGERS = (0, -1, -2, 10**12, 2**63, 10**30)  # the large ones fit in no machine
FLOATS = (0.0, 1e-12, -1.0, -2.0, 1e12, 1e38, 1e300, math.inf, -math.inf, math.nan)


def numeric_fields(name: str) -> Iterator[tuple[str, Any]]:
    """Every number of a config with every value that nobody means."""
    for field, known in model_info(name).fields.items():
        kinds = set(known["type"].split(" | "))
        values = INTEGERS if "int" in kinds else FLOATS if "float" in kinds else ()
        for value in values:
            yield field, value


@pytest.mark.parametrize("name", [name for name in zoo.list_models() if model_info(name).module.startswith("zoo.")])
def test_a_number_makes_a_model_or_is_refused_in_one_sentence(name: str) -> None:
    small = {key: value for key, value in SMALL.items() if key in model_info(name).fields}
    for field, known in model_info(name).fields.items():  # else the loop below would make them without end
        assert "layers" not in field or "most" in known.get("range", {}), f"{name}.{field}: write Range(1, 10_000)"
    for field, value in numeric_fields(name):
        try:
            model = zoo.create_model(name, **(small | {field: value}))
        except UserError as refusal:
            sentence = str(refusal)
            assert sentence.strip(), (field, value)
            assert "\n" not in sentence, (field, value, sentence)
            assert name in sentence, (field, value, sentence)
        else:
            assert math.isfinite(value), (field, value)
            assert all(parameter.numel() for parameter in model.parameters()), (field, value)


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("transformer", {"n_heads": 0}, "field 'n_heads' of model 'transformer' must be at least 1, got 0"),
        ("gla", {"expand_k": 0.0}, "field 'expand_k' of model 'gla' must be above 0, got 0.0"),
        ("mamba", {"d_state": 0}, "field 'd_state' of model 'mamba' must be at least 1, got 0"),
        ("deltanet", {"dropout": 1.0}, "field 'dropout' of model 'deltanet' must be in [0, 1), got 1.0"),
        ("s4", {"dt_min": math.nan}, "field 'dt_min' of model 's4' must be finite, got nan"),
        ("slstm", {"conv_size": -2}, "field 'conv_size' of model 'slstm' must be at least 1, got -2"),
    ],
)
def test_what_is_out_of_range_is_a_matter_of_words(name: str, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        zoo.create_model(name, **fields)
    assert str(refused.value) == sentence


def test_every_number_of_a_model_declares_its_range() -> None:
    for name in zoo.list_models():
        info = model_info(name)
        for field, known in info.fields.items():
            if info.module.startswith("zoo.") and {"int", "float"} & set(known["type"].split(" | ")):
                assert "range" in known, f"{name}.{field}: write Annotated[..., Range(...)]"


def test_a_subclass_that_changes_a_default_keeps_the_range() -> None:
    assert model_info("mamba").fields["hidden_size"] == {"type": "int | None", "default": 0, "range": {"least": 0}}


def test_parameters_that_do_not_fit_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    fill = torch.Tensor.normal_
    monkeypatch.setattr(
        torch.Tensor, "normal_", lambda x, *a, **k: (devices.append(x.device.type), fill(x, *a, **k))[1]
    )
    with pytest.raises(UserError, match=r"its parameters take [\d,]+\.\d GiB and this machine has [\d,.]+ GiB left"):
        zoo.create_model("deltanet", d_model=10_000_000)
    assert set(devices) == {"meta"}


def test_sizes_that_torch_cannot_count_are_refused_on_any_device() -> None:
    with torch.device("meta"), pytest.raises(UserError, match="its parameters are too many to be counted"):
        zoo.create_model("deltanet", d_model=10**12)


def test_the_count_before_a_large_model_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = zoo.create_model("mamba", **SMALL)
    monkeypatch.setattr("zoo.models._parameters.PER_SQUARE", 10**12)
    torch.manual_seed(0)
    counted = zoo.create_model("mamba", **SMALL)
    for (name, a), b in zip(plain.named_parameters(), counted.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", [name for name in zoo.list_models() if model_info(name).module.startswith("zoo.")])
def test_a_model_that_is_not_counted_is_smaller_than_its_bound(name: str) -> None:
    from zoo.models._parameters import _bound
    from zoo.registry import _find

    entry = _find(name)
    for size, values in entry.sizes.items():
        assert _bound(entry.config(**values)) >= model_info(name).params[size]


@pytest.mark.parametrize(
    ("range_", "text", "rule", "inside", "outside"),
    [
        (Range(1), "[1, inf)", "at least 1", (1, 10**30), (0, math.inf, math.nan)),
        (Range(above=0), "(0, inf)", "above 0", (1e-300,), (0, -1)),
        (Range(0, below=1), "[0, 1)", "in [0, 1)", (0, 0.999), (1, -1e-9)),
        (Range(most=0), "(-inf, 0]", "at most 0", (0, -5), (1e-9, -math.inf)),
        (Range(), "(-inf, inf)", "finite", (0, -1e300), (math.nan, math.inf)),
    ],
)
def test_ranges(range_: Range, text: str, rule: str, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert (str(range_), range_.rule) == (text, rule)
    assert all(number in range_ for number in inside)
    assert not any(number in range_ for number in outside)
    assert Range(**range_.as_plain()) == range_


def test_text_and_none_are_no_numbers() -> None:
    for value in (None, True, "0", [1, None]):
        Range(1).check("x", value)
    with pytest.raises(ValueError, match=r"^x must be at least 1, got \[1, 0\]$"):
        Range(1).check("x", [1, 0])
