"""The words of a command line: Hydra's overrides, in zoo's current names and with refusals in its own words."""

from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from zoo._deprecation import current_name
from zoo.configs import DECODER, GROUPS, RENAMED, variants
from zoo.errors import UsageError, remedy
from zoo.registry import current_model, list_models
from zoo.targets import first_line

__all__ = ["check_choices", "in_current_words", "is_choice", "parse", "root", "unlocked", "without_file"]


def check_choices(parsed: Sequence[Override], known: Mapping[str, Sequence[str]]) -> None:
    """Refuse group=NAME where the group has no such choice.

    Raises:
        UsageError: it has none; the sentence names those that it has.
    """
    for override in parsed:
        choice = override.value() if is_choice(override) and not override.is_delete() else None
        group = override.key_or_group
        if choice is None or choice in known[group]:
            continue
        if not isinstance(choice, str):
            raise UsageError(f"{group}= chooses by name, got {choice!r}; to change one setting write {group}.KEY=VALUE")
        if group == "model" and choice in list_models():
            continue  # another package's model, without a YAML file here: see without_file
        names = sorted({*known[group], *(list_models() if group == "model" else ())})
        end = remedy(choice, names, f"{group} can be {', '.join(names) or 'nothing yet'}")
        raise UsageError(f"no {group} {choice!r}{end}")


def in_current_words(override: Override, known: Mapping[str, Sequence[str]]) -> list[str]:
    """The override as it was written, with a choice that has another name today under that name.

    A variant, such as strategy=zeco_fsdp, is written out: strategy=zeco strategy.weights=fsdp.
    """
    line, group, choice = override.input_line or "", override.key_or_group, override.value()
    if not is_choice(override) or override.is_delete() or not isinstance(choice, str) or choice in known[group]:
        return [line]
    today = current_name(group, choice, RENAMED.get(group, {}))
    today = current_model(today) if group == "model" else today
    written = variants(group).get(today)
    if written is not None:
        return [f"{key}={value}" for key, value in written.items()]
    return [line if today == choice else f"{line.partition('=')[0]}={today}"]


def parse(overrides: Sequence[str]) -> list[Override]:
    """The words of a command line as Hydra reads them.

    Raises:
        UsageError: a word is no key=value, or cannot be read.
    """
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise UsageError(f"settings are written key=value, got {text!r}; zoo config prints all settings")
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            why = first_line(error).removeprefix("HydraException while evaluating ")
            raise UsageError(f"{text!r} cannot be read: {why}; quote text with signs in it: key='\"text\"'") from error
    return parsed


def root(override: Override) -> str:
    """The group of a key: model of model.n_layers."""
    return override.key_or_group.partition(".")[0].partition("/")[0]


def is_choice(override: Override) -> bool:
    """Whether the override chooses a file of a group, as optim=adamw."""
    return override.key_or_group in (*GROUPS, DECODER)


def unlocked(override: Override) -> str:
    """A plain key=value as Hydra's ++key=value: which keys exist is for our own checks to say, in better words."""
    line = override.input_line or ""
    if is_choice(override):
        return line.removeprefix("+").removeprefix("+") if override.is_add() or override.is_force_add() else line
    is_plain_change = not (override.is_add() or override.is_force_add() or override.is_delete())
    return f"++{line}" if is_plain_change and root(override) != "hydra" else line


def without_file(override: Override, known: Mapping[str, Sequence[str]]) -> list[str]:
    """model=NAME for a model that has no YAML file, written out; else nothing."""
    if override.key_or_group != "model" or override.is_delete() or override.value() in known["model"]:
        return []
    return ["~model", f"++model.name={override.value()}", "++model.size=tiny"]
