"""One index of models: name -> config, builder, sizes, task, tags, paper. Imports no torch until a model is built.

Each model of this package is described by a generated file, zoo/models/index/NAME.json; `python -m zoo.registry` writes
them, and with them the index of settings and the stubs that tell type checkers what `zoo.ops` and `zoo.layers` hold.
Third parties register by importing a module that calls `register`, or by an entry point of the group zoo.models.
"""

import dataclasses
import functools
import importlib
import json
import pkgutil
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from zoo._deprecation import RENAMED_FROM, current_name
from zoo._types import fit, spell
from zoo.errors import UsageError, UserError, remedy
from zoo.files import write_text
from zoo.ranges import Range, ranges_of

if TYPE_CHECKING:
    from torch import nn

DEFAULT_SIZE = "tiny"
PRODUCTS = ("text", "classes", "audio", "actions", "image", "series")  # what a model may make
ENTRY_POINT_GROUP = "zoo.models"
INDEX = Path(__file__).parent / "models" / "index"  # a file for each model

Builder = TypeVar("Builder", bound=Callable[..., Any])


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without building it.

    Attributes:
        name: the name that `create_model` takes.
        module: where the model is registered, for example zoo.models.gla.
        task: what it is trained for, a choice of the group `task`.
        tags: what it is: recurrent, linear, hybrid, ...
        paper: the source, or None.
        fields: {field: {"type": text, "default": value}} of its config, with "range" where one is declared.
        sizes: {size: the fields in which it differs from the defaults}.
        params: {size: number of parameters}, shared ones counted once.
        data: what it is trained on unless told otherwise, a choice of the group `data`.
        decoder: how `zoo generate` draws from it, None where nothing can be drawn.
        produces: what it makes, one of PRODUCTS.
        renamed_from: names that the model had before, which keep working.
    """

    name: str
    module: str
    task: str
    tags: tuple[str, ...]
    paper: str | None
    fields: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, Mapping[str, Any]]
    params: Mapping[str, int]
    data: str = "pydocs"
    decoder: str | None = "sampling"
    produces: str = "text"
    renamed_from: tuple[str, ...] = ()

    def config(self, size: str = DEFAULT_SIZE) -> dict[str, Any]:
        """Every field of one size, as plain values."""
        check_size(self.name, size, self.sizes)
        return {name: field["default"] for name, field in self.fields.items()} | dict(self.sizes[size])


@dataclass(frozen=True)
class _Registered:
    name: str
    config: type
    build: Callable[[Any], "nn.Module"]
    sizes: Mapping[str, Mapping[str, Any]]
    task: str
    data: str
    decoder: str | None
    produces: str
    tags: tuple[str, ...]
    paper: str | None
    renamed_from: tuple[str, ...]


_registered: dict[str, _Registered] = {}


def register(
    name: str,
    *,
    config: type,
    sizes: Mapping[str, Mapping[str, Any]],
    task: str = "language_modelling",
    data: str = "pydocs",
    decoder: str | None = "sampling",
    produces: str = "text",
    tags: Iterable[str] = (),
    paper: str | None = None,
    renamed_from: Iterable[str] = (),
) -> Callable[[Builder], Builder]:
    """Give a model a name: a decorator on its builder, a function from its config to an nn.Module.

    Args:
        name: what users type.
        config: a frozen dataclass; its defaults are the only place where defaults live.
        sizes: {size: the fields that differ}; "tiny", the default size everywhere, must be one of them.
        task: what the model is trained for: `zoo train model=NAME` takes this choice of the group `task`.
        data: what it is trained on unless told otherwise, as a choice of the group `data`.
        decoder: how `zoo generate` draws from it; None for a model from which nothing is drawn.
        produces: what it makes: "text", "classes", "audio", "actions", "image" or "series".
        tags: what `list_models(tags=...)` selects by.
        paper: title, authors, arXiv number.
        renamed_from: names that the model had before; each keeps working and says once what to write.

    Raises:
        ValueError: the name is taken, "tiny" is missing, `produces` is none of these, or a size sets a
            field that the config does not have.
    """
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise ValueError(f"model {name!r}: config must be a dataclass, got {config!r}")
    if DEFAULT_SIZE not in sizes:
        raise ValueError(f"model {name!r}: sizes must contain {DEFAULT_SIZE!r}, the default size; got {sorted(sizes)}")
    if produces not in PRODUCTS:
        raise ValueError(f"model {name!r}: produces must be one of {', '.join(PRODUCTS)}; got {produces!r}")
    if isinstance(tags, str):
        raise ValueError(f"model {name!r}: tags must be several words, got the text {tags!r}; write ({tags!r},)")
    fields = _fields(config)
    checked = {size: check_fields(name, dict(values), fields) for size, values in sizes.items()}

    def decorate(build: Builder) -> Builder:
        homes = {_registered[name].build.__module__} if name in _registered else set()
        homes |= {_index()[name].module} if name in _index() else set()
        for home in homes - {build.__module__}:
            raise ValueError(f"a model's name must be unique: {name!r} in {build.__module__} is taken by {home}")
        _registered[name] = _Registered(
            name, config, build, checked, task, data, decoder, produces, tuple(sorted(tags)), paper, tuple(renamed_from)
        )
        _info_of_registered.cache_clear()
        return build

    return decorate


def list_models(pattern: str = "*", *, tags: Iterable[str] | None = None, max_params: float | None = None) -> list[str]:
    """Names of models, sorted.

    Args:
        pattern: a shell pattern on the name, for example "*delta*".
        tags: only models that carry all of these.
        max_params: only models whose smallest size has at most this many parameters.

    Models of other packages are listed by their entry point; they are imported only to be asked for tags or sizes.
    """
    names = sorted({*_index(), *_registered, *_entry_points()})
    names = [name for name in names if fnmatchcase(name, pattern)]
    if tags is not None:
        wanted = {tags} if isinstance(tags, str) else set(tags)
        names = [name for name in names if wanted <= set(model_info(name).tags)]
    if max_params is not None:
        names = [name for name in names if min(model_info(name).params.values()) <= max_params]
    return names


def model_info(name: str) -> ModelInfo:
    """What is known of one model; read from the index, so that no model is built or imported for it.

    Raises:
        UsageError: no model has this name.
    """
    name = current_model(name)
    if name in _index():
        return _index()[name]
    return _info_of_registered(_find(name).name)


def current_model(name: str) -> str:
    """The name of a model today. An old name gives the new one, with one warning a process; others come back as are."""
    if name in _index() or name in _registered:
        return name
    former = {old: info.name for info in _index().values() for old in info.renamed_from}
    former |= {old: entry.name for entry in _registered.values() for old in entry.renamed_from}
    return current_name("model", name, former)


def create_model(name: str, size: str = DEFAULT_SIZE, **fields: Any) -> "nn.Module":
    """Build a model with fresh weights.

    Args:
        name: one of `list_models()`.
        size: one of the model's sizes.
        **fields: any field of its config, over those of the size.

    Returns:
        the module, with `name`, `size` and `config` (the frozen dataclass) as attributes.

    Raises:
        UsageError: no such model, size or field, a value of another type or out of its field's range, or values that
            contradict each other.
        UserError: the parameters do not fit in the memory of the device.
    """
    entry = _find(name)
    name = entry.name
    check_size(name, size, entry.sizes)
    values = {**entry.sizes[size], **check_fields(name, fields, _fields(entry.config))}
    try:
        config = entry.config(**values)
        importlib.import_module("zoo.models._parameters").refuse_too_large(name, entry.build, config)
        model = entry.build(config)
    except UserError:
        raise
    except ValueError as error:
        raise UsageError(f"model {name!r}: {error}") from error
    for attribute, value in {"name": name, "size": size, "config": config}.items():
        setattr(model, attribute, value)
    return model


def check_size(name: str, size: str, sizes: Iterable[str]) -> None:
    """Refuse a size that a model does not have."""
    if size not in sizes:
        end = remedy(str(size), sizes, f"it has {', '.join(sizes)}")
        raise UsageError(f"no size {size!r} of model {name!r}{end}")


def check_fields(name: str, values: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The values in the types of a model's fields, numbers in their ranges.

    Raises:
        UsageError: the model has no such field, or a value has another type or lies outside the field's range.
    """
    checked = {}
    former = {old: new for new, entry in fields.items() for old in entry.get(RENAMED_FROM, ())}
    for given, value in values.items():
        field = current_name(f"field of model {name!r}", given, former)
        if field in checked or (field != given and field in values):
            raise UsageError(f"model {name!r} takes {field!r} once, and {given!r} is an old name of it; leave it out")
        if field not in fields:
            end = remedy(field, fields, f"zoo show {name} lists them")
            raise UsageError(f"model {name!r} has no field {field!r}{end}")
        what = f"field {field!r} of model {name!r}"
        try:
            checked[field] = fit(value, fields[field]["type"])
        except TypeError as expected:
            raise UsageError(f"{what} must be {expected}, got {value!r} ({type(value).__name__})") from expected
        Range(**fields[field].get("range", {})).check(what, checked[field])
    return checked


def packages_of_models() -> dict[str, str]:
    """Models that other installed packages offer: {name: package}. Imports none of them."""
    return {name: point.dist.name if point.dist else point.module for name, point in _entry_points().items()}


def packages_with_models() -> set[str]:
    """Top-level packages that have registered a model in this process or offer one by an entry point."""
    registered = {entry.build.__module__ for entry in _registered.values()}
    offered = {point.module for point in entry_points(group=ENTRY_POINT_GROUP)}
    return {module.partition(".")[0] for module in registered | offered}


def resolve(target: str) -> Any:
    """The object that "module:attribute" or "module.attribute" or "module" names."""
    module, _, attribute = target.partition(":")
    if attribute:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        head, _, last = target.rpartition(".")
        if not head or error.name is None or not f"{target}.".startswith(f"{error.name}."):
            raise
        return getattr(importlib.import_module(head), last)


@functools.cache
def _index() -> Mapping[str, ModelInfo]:
    entries = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(INDEX.glob("*.json"))}
    words = ("tags", "renamed_from")
    return MappingProxyType(
        {name: ModelInfo(name, **e | {key: tuple(e.get(key, ())) for key in words}) for name, e in entries.items()}
    )


@functools.cache
def _entry_points() -> Mapping[str, EntryPoint]:
    points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    return MappingProxyType({name: point for name, point in points.items() if name not in _index()})


def _find(name: str) -> _Registered:
    name = current_model(name)
    if name not in _registered and name in _index():
        importlib.import_module(_index()[name].module)
    if name not in _registered and name in _entry_points():
        try:
            _entry_points()[name].load()
        except (ImportError, AttributeError) as error:
            package = packages_of_models()[name]
            raise UserError(f"model {name!r} of the package {package} cannot be imported: {error}") from error
    if name in _registered:
        return _registered[name]
    if (INDEX.parent / f"{name}.py").exists() and not name.startswith("_"):
        raise UsageError(f"model {name!r} is not in the index yet; python -m zoo.registry writes it")
    raise UsageError(f"no model {name!r}{remedy(name, list_models(), 'zoo list shows all')}")


def _fields(config: type) -> dict[str, dict[str, Any]]:
    hints, ranges = typing.get_type_hints(config), ranges_of(config)
    return {
        field.name: {"type": spell(hints[field.name]), "default": _plain(_default(field))}
        | ({"range": ranges[field.name].as_plain()} if field.name in ranges else {})
        | _former(field)
        for field in dataclasses.fields(config)
    }


def _former(field: "dataclasses.Field[Any]") -> dict[str, list[str]]:
    """The entry for a field's old names; nothing for a field that has none."""
    return {RENAMED_FROM: list(field.metadata[RENAMED_FROM])} if RENAMED_FROM in field.metadata else {}


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if field.default is dataclasses.MISSING:
        raise ValueError(f"every field of a model's config must have a default; {field.name!r} has none")
    return field.default


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON keeps them."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


@functools.cache
def _info_of_registered(name: str) -> ModelInfo:
    entry = _registered[name]
    count = resolve("zoo.models._parameters:count_parameters")
    return ModelInfo(
        name=name,
        module=entry.build.__module__,
        task=entry.task,
        data=entry.data,
        decoder=entry.decoder,
        produces=entry.produces,
        tags=entry.tags,
        paper=entry.paper,
        fields=_fields(entry.config),
        sizes={size: _plain(values) for size, values in entry.sizes.items()},
        params={size: count(entry.build, entry.config(**values)) for size, values in entry.sizes.items()},
        renamed_from=entry.renamed_from,
    )


def build_index() -> dict[str, str]:
    """{name: the text of its file in zoo/models/index}, from importing every model of this package."""
    for module in pkgutil.iter_modules([str(INDEX.parent)]):
        if not module.name.startswith("_") and not module.ispkg:
            importlib.import_module(f"zoo.models.{module.name}")
    ours = sorted(name for name, entry in _registered.items() if entry.build.__module__.startswith("zoo.models."))
    entries = {name: dataclasses.asdict(_info_of_registered(name)) for name in ours}
    for entry in entries.values():
        del entry["name"]
        if not entry["renamed_from"]:
            del entry["renamed_from"]
    return {name: json.dumps(entry, indent=1, ensure_ascii=False) + "\n" for name, entry in entries.items()}


def write_index() -> list[Path]:
    """Write the files of zoo/models/index that are not up to date, and remove those of models that are gone."""
    texts = build_index()
    changed = [path for path in INDEX.glob("*.json") if path.stem not in texts]
    for path in changed:
        path.unlink()
    return changed + [path for name, text in texts.items() if write_text(path := INDEX / f"{name}.json", text)]


if __name__ == "__main__":
    # The models register with `zoo.registry`, which is another module object than the `__main__` running here.
    _paths = importlib.import_module("zoo.registry").write_index()
    for _writer in ("zoo.settings:write_index", "zoo._stubs:write"):
        _paths += resolve(_writer)()
    for _path in _paths:
        print(_path)
