"""From overrides such as model=deltanet optim.lr=1e-3 to one resolved, checked, plain config. The only user of Hydra.

A group's YAML names its class in `_target_` (a model: `name` and `size`) and holds only what differs from the defaults
of that class. So the keys that a group takes are the parameters of its class, and their defaults live in one place.
Which classes may be named is for `zoo.targets` to say. The folder of a run is read back through the same checks.
"""

import dataclasses
import itertools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo._types import fit
from zoo.configs import DECODER, GROUPS, ROOT, choices
from zoo.errors import UsageError, UserError, remedy
from zoo.overrides import check_choices, in_current_words, is_choice, parse, root, unlocked, without_file
from zoo.ranges import Range
from zoo.registry import check_fields, check_size, list_models, model_info
from zoo.settings import NO_DEFAULT, Setting, as_plain, indexed, is_plain, settings_of
from zoo.targets import KINDS, TARGET, current_target, first_line, load_class, refuse_nested

MISSING = "???"  # Hydra's mark for a value that the user must give
REQUIRES = (
    "_requires_"  # in a YAML file: the packages that its choice needs, any one of them; they are an extra of its name
)
NEEDED = ("data", "task", "optim", "trainer")  # groups that no run is without, besides the model
RUN_HAS = ("model", "data", "task", "optim", "trainer", "seed")  # what the config of every run has had
SEEDS = Range(0, 2**63 - 1)
DECAYS = Range(above=0, below=1)
LONGEST_NAME = 255  # bytes of a file's name, on the file systems in use


def compose(overrides: Sequence[str] = (), *, config_dir: Path | None = None) -> dict[str, Any]:
    """Compose the groups, apply the overrides, fill in every default and check every key and type.

    Args:
        overrides: Hydra's grammar: key=value, +key=value, ~key, group=choice.
        config_dir: a folder of further YAML files, laid out as zoo's own configs.

    Returns:
        a plain nested dict. `model.vocab_size` is None unless it was given: the data decide it.

    Raises:
        UsageError: an unknown group, choice or key, a value of another type, or a missing one.
    """
    parsed = parse(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise UsageError(
                f"{override.input_line} gives several values, and one run takes one; "
                "zoo train -m runs them all, quotes make them one text: key='\"a,b\"'"
            )
    known = choices([config_dir] if config_dir else [])
    parsed = parse([word for override in parsed for word in in_current_words(override, known)])
    check_choices(parsed, known)
    words = [(o, without_file(o, known) or [unlocked(o)]) for o in parsed]
    choosing = [word for o, replaced in words if is_choice(o) for word in replaced]
    base = _compose(choosing, config_dir)
    own = _of_the_model(base, {o.key_or_group for o in parsed}, known)
    base = _compose([*choosing, *own], config_dir) if own else base
    config = _compose([*(word for _, replaced in words for word in replaced), *own], config_dir)
    extra = {root(o) for o in parsed if o.is_add() or o.is_force_add()}
    _check_keys(config, {*GROUPS, *base, *extra}, "", config)
    raw = {o.key_or_group: o.get_value_string() for o in parsed if not o.is_delete()}
    for group in GROUPS:
        section = config.get(group)
        if group != "model" and isinstance(section, dict) and TARGET not in section:
            _check_keys(section, base.get(group) or (), f"{group}.", config)
        elif isinstance(section, dict):
            _check_packages(group, section.pop(REQUIRES, []), parsed)
    return check(config, raw)


def compose_decoder(overrides: Sequence[str] = (), *, config_dir: Path | None = None) -> dict[str, Any]:
    """The settings of a decoder: its class in `_target_` and every field, checked.

    Args:
        overrides: decoder=NAME and decoder.KEY=VALUE.
        config_dir: a folder with further YAML files in decoder/.

    Raises:
        UsageError: another key, an unknown decoder or setting, or a value of another type or out of range.
    """
    parsed = parse(overrides)
    for override in parsed:
        if root(override) != DECODER or override.is_delete() or override.is_sweep_override():
            raise UsageError(
                f"zoo generate takes decoder=NAME and decoder.KEY=VALUE, one value each; got {override.input_line}"
            )
    check_choices(parsed, choices([config_dir] if config_dir else []))
    section = _compose([unlocked(o) for o in parsed], config_dir, root="generate")[DECODER]
    raw = {o.key_or_group: o.get_value_string() for o in parsed}
    return _fill(DECODER, section, raw, {DECODER: section})


def check(config: Mapping[str, Any], raw: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """A config with every default filled in and every class, key, type and range checked.

    Args:
        config: as `compose` or a run's folder has it.
        raw: {key: what the user typed}, for text that reads as a number.

    Raises:
        UsageError: a setting that cannot stand, or one that is missing.
    """
    config = dict(config)
    refuse_nested(config)
    config["seed"] = _fit("seed", config.get("seed"), "int", raw)
    SEEDS.check("seed", config["seed"])
    config["run_dir"] = _fit("run_dir", config.get("run_dir"), "str | None", raw)
    _check_path("run_dir", config["run_dir"])
    config["init_from"] = _fit("init_from", config.get("init_from"), "str | None", raw)
    config["ema"] = _fit("ema", config.get("ema"), "float | None", raw)
    DECAYS.check("ema", config["ema"])
    for group in GROUPS:
        section = config.get(group)
        if group == "model":
            config[group] = _fill_model(section)
        elif section is None and group in NEEDED:
            raise UsageError(f"a config needs {group}; add {group}=NAME, zoo config --groups lists them")
        elif isinstance(section, dict) and TARGET in section:
            section = {**section, TARGET: current_target(section[TARGET])}
            config[group] = _fill(group, section, raw, config)
            if "seed" in config[group] and "seed" not in section:
                config[group]["seed"] = config["seed"]  # the run's seed, unless the group has its own
        elif not isinstance(section, dict | None):
            raise UsageError(f"{group} must be a group of settings, got {section!r}; zoo config --groups lists them")
    _check_missing(config, "")
    for group, filled in config.items():
        if group in KINDS and isinstance(filled, dict) and TARGET in filled:
            _check_own_rules(group, filled)
    return config


def sweep(overrides: Sequence[str]) -> list[dict[str, str]]:
    """The product of all values of the overrides that give several, as {key: value} per run; [{}] when none does."""
    axes = []
    for override in parse(overrides):
        if override.value_type == ValueType.INTERVAL_SWEEP:
            raise UsageError(f"{override.input_line} is an interval; a sweep takes listed values or range(...)")
        if override.is_sweep_override():
            key = override.get_key_element()
            try:
                axes.append([(key, value) for value in override.sweep_string_iterator()])
            except HydraException as error:
                raise UsageError(f"{override.input_line} cannot be swept: {first_line(error)}") from error
    return [dict(values) for values in itertools.product(*axes)]


def fixed(overrides: Sequence[str]) -> list[str]:
    """The overrides that give one value only."""
    return [override.input_line or "" for override in parse(overrides) if not override.is_sweep_override()]


def parse_fields(settings: Sequence[str]) -> dict[str, Any]:
    """key=value words as plain values, for `zoo show`."""
    parsed = parse(settings)
    for override in parsed:
        if override.is_sweep_override() or override.is_delete():
            raise UsageError(f"a field takes one value, got {override.input_line}")
    return {override.key_or_group: override.value() for override in parsed}


def to_yaml(config: Mapping[str, Any]) -> str:
    """The config as YAML, in its own order, numbers written so that YAML reads them back as numbers."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(config)))


def read_yaml(path: Path) -> dict[str, Any]:
    """A config that `to_yaml` wrote.

    Raises:
        UsageError: the file does not hold a config.
    """
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a config: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not a config: it holds {type(config).__name__}, not settings by name")
    return {str(key): value for key, value in config.items()}


def read_run(path: Path) -> dict[str, Any]:
    """The config.yaml of a run's folder, which may be anybody's, checked like settings from a command line.

    Settings that are newer than the run have their defaults.

    Raises:
        UserError: it is not the config of a run, or it names what may not be made.
    """
    command = path.with_name("command.txt")
    again = f", or start a new run with the command in {command}" if command.is_file() else ", or start a new run"
    mend = f"put the run's own {path.name} back{again}"
    try:
        config = read_yaml(path)
    except UsageError as error:
        raise UserError(f"{error}; {mend}") from error
    lacking = [key for key in RUN_HAS if config.get(key) in (None, {}, [])]
    unnamed = [g for g in ("data", "task", "optim") if isinstance(config.get(g), dict) and TARGET not in config[g]]
    lacking += [f"{group}.{TARGET}" for group in unnamed if group not in lacking]
    if lacking:
        what = "is empty" if not config else f"is not the config of a run: it has no {', '.join(lacking)}"
        raise UserError(f"{path} {what}; {mend}")
    for group in ("trainer", "memory"):  # a section of either may leave out its class: there is one
        if isinstance(config.get(group), dict):
            config[group] = {TARGET: KINDS[group].base, **config[group]}
    try:
        return check(config)
    except UsageError as error:
        raise UserError(f"{path} does not describe a run that can be made here: {error}") from error


def parameters(group: str, target: object) -> dict[str, Setting]:
    """The settings that a group's class takes; from the index, or by importing a class that may be named there.

    Raises:
        UsageError: the class cannot be imported.
    """
    settings = indexed(group, target)
    return settings_of(load_class(group, target)) if settings is None else settings


def _fill(group: str, section: dict[str, Any], raw: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, Any]:
    known = parameters(group, section[TARGET])
    given = {key: value for key, value in section.items() if key != TARGET}
    if "**" not in known:
        _check_keys(given, known, f"{group}.", config)
    defaults = {name: p.default for name, p in known.items() if name != "**" and p.default is not NO_DEFAULT}
    filled = {TARGET: section[TARGET]} | {name: as_plain(value) for name, value in defaults.items() if is_plain(value)}
    for key, value in given.items():
        setting = known.get(key, Setting("Any"))
        filled[key] = value if value == MISSING else as_plain(_fit(f"{group}.{key}", value, setting.type, raw))
        if setting.range is not None:
            setting.range.check(f"{group}.{key}", filled[key])
    return filled


def _check_own_rules(group: str, filled: Mapping[str, Any]) -> None:
    """Let a dataclass that is in no index check its own values; the others say their ranges in the index."""
    if indexed(group, filled[TARGET]) is not None:
        return
    owner = load_class(group, filled[TARGET])
    if dataclasses.is_dataclass(owner):
        try:
            owner(**{key: value for key, value in filled.items() if key != TARGET})
        except UserError as error:
            raise UsageError(str(error)) from error


def _fill_model(section: Any) -> dict[str, Any]:
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise UsageError("a config needs a model; add model=NAME, zoo list shows all")
    info = model_info(section["name"])
    size = str(section.get("size", "tiny"))  # a size such as 340 reads as a number
    check_size(info.name, size, info.sizes)
    given = {key: value for key, value in section.items() if key not in ("name", "size")}
    fields = check_fields(info.name, {k: v for k, v in given.items() if (k, v) != ("vocab_size", None)}, info.fields)
    filled = {"name": info.name, "size": size, **info.config(size)}
    if "vocab_size" in filled:
        filled["vocab_size"] = None
    return filled | {name: as_plain(value) for name, value in fields.items()}


def _fit(key: str, value: Any, spelled: str, raw: Mapping[str, str]) -> Any:
    try:
        return fit(value, spelled)
    except TypeError as expected:
        if key in raw and isinstance(value, int | float) and {"str", "Path"} & set(spelled.split(" | ")):
            return raw[key]  # a folder named 2024 is text
        raise UsageError(f"{key} must be {expected}, got {value!r} ({type(value).__name__})") from expected


def _check_keys(given: Iterable[str], known: Iterable[str], prefix: str, config: Mapping[str, Any]) -> None:
    for key in given:
        if key not in known:
            otherwise = "zoo config prints all settings"
            homes = " or ".join(_homes(key, config))
            end = f"; did you mean {homes}? {otherwise}" if homes else ""
            end = end or remedy(f"{prefix}{key}", [f"{prefix}{k}" for k in known], otherwise)
            named = f"{prefix}{key}"
            raise UsageError(f"no setting {named!r}{end}")


def _homes(key: str, config: Mapping[str, Any]) -> list[str]:
    """The groups of a config that have a setting of this name, as group.key=."""
    keys: dict[str, Collection[str]] = {}
    for group in GROUPS:
        section = config.get(group)
        if group == "model" and isinstance(section, dict) and section.get("name") in list_models():
            keys[group] = {"size", *model_info(section["name"]).fields}
        elif isinstance(section, dict) and TARGET in section:
            keys[group] = parameters(group, section[TARGET])
    return [f"{group}.{key}=" for group, names in keys.items() if key in names]


def _check_path(key: str, path: str | None) -> None:
    """Refuse a path that no file system takes, before anything is made for it."""
    for name in Path(path or "").parts:
        size = len(os.fsencode(name))
        if size > LONGEST_NAME:
            raise UsageError(f"the names in {key} must have at most {LONGEST_NAME} bytes each, got one of {size}")


def _check_packages(group: str, packages: Sequence[str], parsed: Sequence[Override]) -> None:
    """Refuse a choice whose package is not installed; the extra of the choice's name brings it."""
    if packages and not any(map(find_spec, packages)):
        choice = next((o.value() for o in reversed(parsed) if o.key_or_group == group), packages[0])
        raise UsageError(
            f"{group}={choice} needs the package {' or '.join(packages)}, which is not installed; "
            f"pip install 'seqzoo[{choice}]'"
        )


def _check_missing(config: Mapping[str, Any], prefix: str) -> None:
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_missing(value, f"{prefix}{key}.")
        elif value == MISSING:
            raise UsageError(f"{prefix}{key} must be given; add {prefix}{key}=...")


def _of_the_model(base: Mapping[str, Any], chosen: Collection[str], known: Mapping[str, Sequence[str]]) -> list[str]:
    """task=NAME and data=NAME as the model was registered with, where nobody has chosen them."""
    section = base.get("model")
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        return []
    info = model_info(section["name"])
    own = {"task": info.task, "data": info.data}
    own = {key: value for key, value in own.items() if key not in chosen and TARGET not in (base.get(key) or {})}
    for group, choice in own.items():
        if choice not in known[group]:
            raise UsageError(
                f"model {info.name!r} asks for {group}={choice}, which no YAML file describes; give {group}="
            )
    return [f"{group}={choice}" for group, choice in own.items()]


def _compose(overrides: list[str], config_dir: Path | None, root: str = "config") -> dict[str, Any]:
    if config_dir is not None:
        if not config_dir.is_dir():
            raise UsageError(f"--config-dir must be a folder, {config_dir} is none")
        where = str(config_dir.resolve()).replace("\\", "\\\\").replace("'", "\\'")
        overrides = [f"hydra.searchpath=['file://{where}']", *overrides]
    try:
        with initialize_config_dir(str(ROOT.resolve()), version_base="1.3"):
            composed = hydra_compose(root, overrides)
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(f"the settings do not compose: {first_line(error)}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
