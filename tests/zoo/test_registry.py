"""Names, fields and sizes of models."""

import importlib
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

import zoo
from zoo import _stubs, registry
from zoo._types import fit, is_opaque, spell
from zoo.configs import choices
from zoo.errors import UsageError, UserError

TINY = 11 * 8 + 2 * (8 * 8 + 8)  # embedding (shared with the head) and two linear layers


def test_the_index_is_fresh():
    written = {path.stem: path.read_text(encoding="utf-8") for path in registry.INDEX.glob("*.json")}
    assert registry.build_index() == written, "python -m zoo.registry writes it"


@pytest.mark.parametrize("name", _stubs.PACKAGES)
def test_the_stubs_are_fresh(name):
    package = importlib.import_module(name)
    written = _stubs.stub_of(package).read_text(encoding="utf-8")
    assert sorted(_stubs.build(package).splitlines()) == sorted(written.splitlines()), (
        "python -m zoo.registry writes it"
    )


def test_every_model_of_the_package_has_its_yaml():
    assert set(registry._index()) <= set(choices()["model"])


def test_list_by_pattern_tags_and_size():
    assert "toy" in zoo.list_models()
    assert zoo.list_models("t?y") == ["toy"]
    assert zoo.list_models("toy", tags={"recurrent", "toy"}) == ["toy"]
    assert zoo.list_models("toy", tags={"recurrent", "other"}) == []
    assert zoo.list_models("toy", max_params=TINY) == ["toy"]
    assert zoo.list_models("toy", max_params=TINY - 1) == []


def test_model_info():
    info = zoo.model_info("toy")
    assert info.params["tiny"] == TINY
    assert info.fields["d_model"] == {"type": "int", "default": 8}
    assert info.fields["dims"] == {"type": "tuple[int, ...]", "default": [1, 2]}
    assert info.fields["pattern"] == {"type": "str | None", "default": None}
    assert info.config("big")["d_model"] == 16
    assert info.tags == ("recurrent", "toy")


def test_create_model_knows_what_it_is():
    model = zoo.create_model("toy", "big", n_layers=1, dims=[5, 6])
    assert (model.name, model.size) == ("toy", "big")
    assert (model.config.d_model, model.config.n_layers, model.config.dims) == (16, 1, (5, 6))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: zoo.create_model("toi"), "no model 'toi'; did you mean 'toy'? zoo list shows all"),
        (lambda: zoo.create_model("qqqq"), "no model 'qqqq'; zoo list shows all"),
        (
            lambda: zoo.create_model("toy", "bigg"),
            "no size 'bigg' of model 'toy'; did you mean 'big'? it has tiny, big",
        ),
        (
            lambda: zoo.create_model("toy", d_modl=3),
            "model 'toy' has no field 'd_modl'; did you mean 'd_model'? zoo show toy lists them",
        ),
        (lambda: zoo.create_model("toy", d_model="3"), "field 'd_model' of model 'toy' must be int, got '3' (str)"),
        (lambda: zoo.create_model("toy", d_model=True), "field 'd_model' of model 'toy' must be int, got True (bool)"),
        (lambda: zoo.create_model("toy", pattern=2), "field 'pattern' of model 'toy' must be str or None, got 2 (int)"),
    ],
)
def test_wrong_words_are_refused_in_one_sentence(call, sentence):
    with pytest.raises(UsageError) as refused:
        call()
    assert str(refused.value) == sentence


def test_a_config_that_refuses_its_values_says_which_model():
    with pytest.raises(UserError, match=r"^model 'toy': n_layers must be at least 1, got 0$"):
        zoo.create_model("toy", n_layers=0)


def test_bad_registrations_are_refused(toy):
    @dataclass(frozen=True)
    class NoDefault:
        d_model: int

    @dataclass(frozen=True)
    class Fine:
        d_model: int = 1

    with pytest.raises(ValueError, match="must be a dataclass"):
        registry.register("x", config=int, sizes={"tiny": {}})
    with pytest.raises(ValueError, match="must contain 'tiny'"):
        registry.register("x", config=Fine, sizes={"big": {}})
    with pytest.raises(ValueError, match="no field 'd_modell'; did you mean 'd_model'"):
        registry.register("x", config=Fine, sizes={"tiny": {"d_modell": 3}})
    with pytest.raises(ValueError, match="must have a default"):
        registry.register("x", config=NoDefault, sizes={"tiny": {}})
    with pytest.raises(ValueError, match="several words"):
        registry.register("x", config=Fine, sizes={"tiny": {}}, tags="recurrent")

    def build(cfg: Fine) -> nn.Module:
        return nn.Identity()

    build.__module__ = "elsewhere"
    with pytest.raises(ValueError, match=r"must be unique: 'toy' in elsewhere is taken by .*conftest"):
        registry.register("toy", config=Fine, sizes={"tiny": {}})(build)


def test_an_entry_point_is_listed_without_an_import_and_built_by_name(tmp_path, monkeypatch):
    (tmp_path / "zoo_third_party.py").write_text(
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "import zoo\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    width: int = 3\n"
        "@zoo.register('theirs', config=Config, sizes={'tiny': {}})\n"
        "def build(cfg):\n"
        "    return nn.Linear(cfg.width, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("theirs", "zoo_third_party", registry.ENTRY_POINT_GROUP)
    broken = EntryPoint("broken", "no_such_module", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "_entry_points", lambda: {"theirs": point, "broken": broken})
    assert {"theirs", "broken"} <= set(zoo.list_models())
    assert "zoo_third_party" not in sys.modules
    try:
        assert zoo.create_model("theirs", width=5).in_features == 5
        assert zoo.model_info("theirs").params == {"tiny": 4}
    finally:
        sys.modules.pop("zoo_third_party", None)
    monkeypatch.setattr(registry, "packages_of_models", lambda: {"broken": "their-package"})
    with pytest.raises(UserError, match="model 'broken' of the package their-package cannot be imported: No module"):
        zoo.create_model("broken")


def test_naming_models_imports_no_torch():
    code = (
        "import sys, zoo; zoo.list_models(); import zoo.config; dir(zoo);"
        "assert not {'torch', 'lightning', 'layers', 'ops', 'train', 'configs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_the_package_says_what_it_lacks():
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        _ = zoo.creat_model
    assert set(zoo.__all__) <= set(dir(zoo))


@pytest.mark.parametrize(
    ("value", "spelled", "fitted"),
    [
        (3, "int", 3),
        (1e4, "int", 10_000),
        (3, "float", 3.0),
        (3, "int | float", 3),
        (3, "float | int", 3),
        (0.5, "int | float", 0.5),
        ([1, 2], "tuple[int, ...]", (1, 2)),
        ([0.9, 1], "tuple[float, float]", (0.9, 1.0)),
        (None, "str | None", None),
        ("a", "Literal['a', 'b'] | None", "a"),
        ({"a": 1}, "dict[str, float]", {"a": 1.0}),
        ([1], "list[int] | str", [1]),
    ],
)
def test_values_that_fit(value, spelled, fitted):
    got = fit(value, spelled)
    assert got == fitted
    assert type(got) is type(fitted)


@pytest.mark.parametrize(
    ("value", "spelled", "wanted"),
    [
        (1.5, "int", "int"),
        (True, "int", "int"),
        (True, "float", "float"),
        ("1", "int", "int"),
        (1, "str", "str"),
        ("c", "Literal['a', 'b']", "'a' or 'b'"),
        ([1.5], "tuple[int, ...]", "tuple[int, ...]"),
        ([1], "tuple[int, int]", "tuple[int, int]"),
        ("x", "object | int", "int"),
        (None, "int", "int"),
    ],
)
def test_values_that_do_not_fit(value, spelled, wanted):
    with pytest.raises(TypeError) as refused:
        fit(value, spelled)
    assert str(refused.value) == wanted


def test_annotations_are_spelled_in_the_grammar():
    assert spell(int | None) == "int | None"
    assert spell(tuple[float, float]) == "tuple[float, float]"
    assert spell(torch.device) == "object"
    assert is_opaque(spell(list[nn.Module] | nn.Module | None))
    assert not is_opaque(spell(str | nn.Module))
    assert not is_opaque("None")
