"""From overrides such as model=deltanet optim.lr=1e-3 to one resolved, checked, plain config. The only user of Hydra.

A group's YAML names its class in `_target_` (a model: `name` and `size`) and holds only what differs from the defaults
of that class. So the keys that a group takes are the parameters of its class, and their defaults live in one place.
Which classes may be named is for `zoo.targets` to say. The folder of a run is read back through the same checks.
"""

import dataclasses
import inspect
import itertools
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo._types import fit, is_opaque, spell
from zoo.configs import GROUPS, ROOT, choices
from zoo.errors import UsageError, UserError, remedy
from zoo.registry import check_fields, check_size, list_models, model_info
from zoo.targets import KINDS, TARGET, load_class, refuse_nested

MISSING = "???"  # Hydra's mark for a value that the user must give
RUN_HAS = ("model", "data", "task", "optim", "trainer", "seed")  # what the config of every run has had


@dataclass(frozen=True)
class Parameter:
    """One key that a group takes: its type as `zoo._types` spells it, and its default or NO_DEFAULT."""

    type: str
    default: Any


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
    parsed = _parse(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise UsageError(
                f"{override.input_line} gives several values, and one run takes one; "
                "zoo train -m runs them all, quotes make them one text: key='\"a,b\"'"
            )
    known = choices([config_dir] if config_dir else [])
    _check_choices(parsed, known)
    chosen = {o.key_or_group for o in parsed}
    words = [(o, _without_file(o, known, chosen) or [_unlocked(o)]) for o in parsed]
    config = _compose([word for _, replaced in words for word in replaced], config_dir)
    base = _compose([word for o, replaced in words if _is_choice(o) for word in replaced], config_dir)
    extra = {_root(o) for o in parsed if o.is_add() or o.is_force_add()}
    _check_keys(config, {*GROUPS, *base, *extra}, "")
    raw = {o.key_or_group: o.get_value_string() for o in parsed if not o.is_delete()}
    for group in GROUPS:
        section = config.get(group)
        if group != "model" and isinstance(section, dict) and TARGET not in section:
            _check_keys(section, base.get(group) or (), f"{group}.")
    return check(config, raw)


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
    config["run_dir"] = _fit("run_dir", config.get("run_dir"), "str | None", raw)
    for group in GROUPS:
        section = config.get(group)
        if group == "model":
            config[group] = _fill_model(section)
        elif isinstance(section, dict) and TARGET in section:
            config[group] = _fill(group, section, raw)
            if "seed" in config[group] and "seed" not in section:
                config[group]["seed"] = config["seed"]  # the run's seed, unless the group has its own
        elif not isinstance(section, dict | None):
            raise UsageError(f"{group} must be a group of settings, got {section!r}; zoo config --groups lists them")
    _check_missing(config, "")
    for group, filled in config.items():
        if group in KINDS and isinstance(filled, dict) and TARGET in filled:
            _check_ranges(group, filled)
    return config


def sweep(overrides: Sequence[str]) -> list[dict[str, str]]:
    """The product of all values of the overrides that give several, as {key: value} per run; [{}] when none does."""
    axes = []
    for override in _parse(overrides):
        if override.value_type == ValueType.INTERVAL_SWEEP:
            raise UsageError(f"{override.input_line} is an interval; a sweep takes listed values or range(...)")
        if override.is_sweep_override():
            key = override.get_key_element()
            try:
                axes.append([(key, value) for value in override.sweep_string_iterator()])
            except HydraException as error:
                raise UsageError(f"{override.input_line} cannot be swept: {_first_line(error)}") from error
    return [dict(values) for values in itertools.product(*axes)]


def fixed(overrides: Sequence[str]) -> list[str]:
    """The overrides that give one value only."""
    return [override.input_line or "" for override in _parse(overrides) if not override.is_sweep_override()]


def parse_fields(settings: Sequence[str]) -> dict[str, Any]:
    """key=value words as plain values, for `zoo show`."""
    parsed = _parse(settings)
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
        raise UsageError(f"{path} is not a config: {_first_line(error)}") from error
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


def parameters(owner: type) -> dict[str, Parameter]:
    """The keys that a class takes from a config: its constructor's parameters that plain values can fill.

    Parameters for objects (a module, a callback) are the run's to give, not the user's.
    """
    hints = _hints(owner)
    found = {}
    for name, parameter in inspect.signature(owner).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found["**"] = Parameter("Any", NO_DEFAULT)
        elif parameter.kind is not parameter.VAR_POSITIONAL and not is_opaque(hints.get(name, "Any")):
            default = NO_DEFAULT if parameter.default is parameter.empty else parameter.default
            found[name] = Parameter(hints.get(name, "Any"), default)
    return found


def _hints(owner: Any) -> dict[str, str]:
    """{parameter: its type}, as far as the annotations can be read."""
    init = inspect.unwrap(getattr(owner, "__init__") if isinstance(owner, type) else owner)  # noqa: B009 - may be inherited
    try:
        return {name: spell(hint) for name, hint in typing.get_type_hints(init).items()}
    except NameError:  # a name imported for type checkers only, as in Lightning's loggers
        return {}


def _fill(group: str, section: dict[str, Any], raw: Mapping[str, str]) -> dict[str, Any]:
    known = parameters(load_class(group, section[TARGET]))
    given = {key: value for key, value in section.items() if key != TARGET}
    if "**" not in known:
        _check_keys(given, known, f"{group}.")
    defaults = {name: p.default for name, p in known.items() if name != "**" and p.default is not NO_DEFAULT}
    filled = {TARGET: section[TARGET]} | {name: _plain(value) for name, value in defaults.items() if _is_plain(value)}
    for key, value in given.items():
        spelled = known[key].type if key in known else "Any"
        filled[key] = value if value == MISSING else _plain(_fit(f"{group}.{key}", value, spelled, raw))
    return filled


def _check_ranges(group: str, filled: Mapping[str, Any]) -> None:
    """Let a group's dataclass check its own values; a class that does more than hold them is made by the run."""
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
    return filled | {name: _plain(value) for name, value in fields.items()}


def _fit(key: str, value: Any, spelled: str, raw: Mapping[str, str]) -> Any:
    try:
        return fit(value, spelled)
    except TypeError as expected:
        if key in raw and isinstance(value, int | float) and {"str", "Path"} & set(spelled.split(" | ")):
            return raw[key]  # a folder named 2024 is text
        raise UsageError(f"{key} must be {expected}, got {value!r} ({type(value).__name__})") from expected


def _check_keys(given: Iterable[str], known: Iterable[str], prefix: str) -> None:
    for key in given:
        if key not in known:
            named = f"{prefix}{key}"
            end = remedy(named, [f"{prefix}{k}" for k in known], "zoo config prints all settings")
            raise UsageError(f"no setting {named!r}{end}")


def _check_missing(config: Mapping[str, Any], prefix: str) -> None:
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_missing(value, f"{prefix}{key}.")
        elif value == MISSING:
            raise UsageError(f"{prefix}{key} must be given; add {prefix}{key}=...")


def _check_choices(parsed: Sequence[Override], known: Mapping[str, Sequence[str]]) -> None:
    for override in parsed:
        choice = override.value() if _is_choice(override) and not override.is_delete() else None
        group = override.key_or_group
        if choice is None or choice in known[group]:
            continue
        if not isinstance(choice, str):
            raise UsageError(f"{group}= chooses by name, got {choice!r}; to change one setting write {group}.KEY=VALUE")
        if group == "model" and choice in list_models():
            continue  # another package's model, without a YAML file here: see _without_file
        names = sorted({*known[group], *(list_models() if group == "model" else ())})
        end = remedy(choice, names, f"{group} can be {', '.join(names) or 'nothing yet'}")
        raise UsageError(f"no {group} {choice!r}{end}")


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise UsageError(f"settings are written key=value, got {text!r}; zoo config prints all settings")
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            why = _first_line(error).removeprefix("HydraException while evaluating ")
            raise UsageError(f"{text!r} cannot be read: {why}; quote text with signs in it: key='\"text\"'") from error
    return parsed


def _root(override: Override) -> str:
    return override.key_or_group.partition(".")[0].partition("/")[0]


def _is_choice(override: Override) -> bool:
    return override.key_or_group in GROUPS


def _unlocked(override: Override) -> str:
    """A plain key=value as Hydra's ++key=value: which keys exist is for our own checks to say, in better words."""
    line = override.input_line or ""
    if _is_choice(override):
        return line.removeprefix("+").removeprefix("+") if override.is_add() or override.is_force_add() else line
    is_plain_change = not (override.is_add() or override.is_force_add() or override.is_delete())
    return f"++{line}" if is_plain_change and _root(override) != "hydra" else line


def _without_file(override: Override, known: Mapping[str, Sequence[str]], chosen: Collection[str]) -> list[str]:
    """model=NAME for a model that has no YAML file, written out, with the model's own task; else nothing."""
    if override.key_or_group != "model" or override.is_delete() or override.value() in known["model"]:
        return []
    task = model_info(str(override.value())).task
    own = [f"task={task}"] if "task" not in chosen and task in known["task"] else []
    return ["~model", f"++model.name={override.value()}", "++model.size=tiny", *own]


def _compose(overrides: list[str], config_dir: Path | None) -> dict[str, Any]:
    if config_dir is not None:
        if not config_dir.is_dir():
            raise UsageError(f"--config-dir must be a folder, {config_dir} is none")
        where = str(config_dir.resolve()).replace("\\", "\\\\").replace("'", "\\'")
        overrides = [f"hydra.searchpath=['file://{where}']", *overrides]
    try:
        with initialize_config_dir(str(ROOT.resolve()), version_base="1.3"):
            composed = hydra_compose("config", overrides)
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(f"the settings do not compose: {_first_line(error)}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str | Path)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value
