"""`zoo completion SHELL`: a script that completes verbs, options, models, choices and settings. No torch, no Hydra.

The words are written into the script, so that completing a word starts no Python; after an update, print it anew.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

from zoo.bench.shapes import DTYPES, SETS
from zoo.cli import VERBS, Parser
from zoo.configs import ROOT, choices
from zoo.registry import list_models, model_info, packages_of_models

SETTINGS_OF = ("train", "config", "eval", "bench", "profile")  # verbs that take settings
PATHS_OF = ("resume", "eval", "generate", "bench", "convert", "export")  # verbs that take the path of a run or a file


def completion_command(shell: str) -> int:
    """Print the completion script for a shell: bash, zsh or fish."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[shell](), end="")
    return 0


def settings_words() -> list[str]:
    """group=choice, model.FIELD=, and the settings of the other groups."""
    known = choices()
    known["model"] = sorted({*known["model"], *list_models()})
    words = [f"{group}={name}" for group, names in known.items() for name in names]
    words += ["seed=", "run_dir=", "init_from=", "ema="]
    indexed = [model_info(name) for name in list_models() if name not in packages_of_models()]
    words += [f"model.size={size}" for info in indexed for size in info.sizes]
    words += [f"model.{field}=" for info in indexed for field in info.fields]
    for path in sorted(ROOT.glob("*/*.yaml")):
        if path.parent.name not in ("model", "experiment"):
            keys = re.findall(r"^([a-z]\w*):", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            words += [f"{path.parent.name}.{key}=" for key in keys]
    for path in sorted(ROOT.glob("*/*.json")):  # the index of settings, see zoo.settings
        words += [f"{path.parent.name}.{key}=" for key in json.loads(path.read_text(encoding="utf-8"))]
    return list(dict.fromkeys(words))


def show_words() -> list[str]:
    """Models, size=SIZE and FIELD=."""
    indexed = [model_info(name) for name in list_models() if name not in packages_of_models()]
    words = [*list_models(), *(f"size={size}" for info in indexed for size in info.sizes)]
    return list(dict.fromkeys([*words, *(f"{field}=" for info in indexed for field in info.fields)]))


def bench_words() -> list[str]:
    """op=OPERATOR, by the folders that hold one, and the benchmark's own settings."""
    package = find_spec("zoo.ops")
    places = [Path(place) for place in (package.submodule_search_locations or [] if package else [])]
    operators = sorted(path.parent.name for place in places for path in place.glob("*/*/reference.py"))
    words = [f"op={name}" for name in ["all", *operators]] + [f"shapes={name}" for name in SETS]
    words += [f"dtype={name}" for name in DTYPES]
    return [*words, *(f"{key}=" for key in ("backends", "device", "repeats", "steps", "out", "report", "T", "B"))]


def options(verb: str) -> list[str]:
    """The options of a verb."""
    parser = Parser(prog=verb)
    VERBS[verb].arguments(parser)
    return [option for action in parser._actions for option in action.option_strings]


def words(verb: str) -> list[str]:
    """All that can follow a verb, besides files."""
    words = options(verb)
    if verb in SETTINGS_OF:
        words += settings_words()
    if verb == "bench":
        words += bench_words()
    if verb == "profile":
        words += ["steps="]
    if verb == "show":
        words += show_words()
    if verb == "list":
        words += list_models()
    if verb == "completion":
        words += ["bash", "zsh", "fish"]
    if verb == "export":
        words += ["hf"]
    return words


def bash() -> str:
    """Completes the word after the last blank, since bash itself cuts words at "="."""
    cases = "\n".join(f'    {verb}) words="{" ".join(words(verb))}" ;;' for verb in VERBS if verb != "show")
    return f"""\
# zoo completion for bash; to use it: source <(zoo completion bash)
_zoo() {{
  local line="${{COMP_LINE:0:COMP_POINT}}" word words verb reply
  word="${{line##*[[:blank:]]}}"
  verb="${{COMP_WORDS[1]}}"
  if [[ "$COMP_CWORD" -le 1 ]]; then verb=""; fi
  case "$verb" in
    "") words="{" ".join([*VERBS, "--help", "--version"])}" ;;
    show) words="{" ".join(list_models())}"
      if [[ "$COMP_CWORD" -gt 2 ]]; then words="{" ".join(words("show"))}"; fi ;;
{cases}
  esac
  COMPREPLY=()
  while IFS= read -r reply; do
    [[ -n "$reply" ]] && COMPREPLY+=("$reply")
  done < <(compgen -W "$words" -- "$word")
  case "$verb" in
    {"|".join(PATHS_OF)})
      while IFS= read -r reply; do COMPREPLY+=("$reply"); done < <(compgen -f -- "$word")
      compopt -o filenames 2> /dev/null ;;
  esac
  if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
    COMPREPLY=("${{COMPREPLY[@]#"${{word%"${{word##*=}}"}}"}}")
  fi
  if [[ "${{#COMPREPLY[@]}}" -eq 1 && "${{COMPREPLY[0]}}" == *= ]]; then compopt -o nospace 2> /dev/null; fi
}}
complete -F _zoo zoo
"""


def zsh() -> str:
    """Words that end in "=" get no blank after them."""
    lines = [f"{name}:{verb.line.replace(':', ',')}" for name, verb in VERBS.items()]  # _describe cuts at ":"
    verbs = "\n".join(f"    {_quote(line)}" for line in lines)
    cases = "\n".join(f"    {verb}) words_of=({' '.join(map(_quote, words(verb)))}) ;;" for verb in VERBS)
    return f"""\
#compdef zoo
# zoo completion for zsh; to use it: source <(zoo completion zsh)
_zoo() {{
  local -a verbs words_of
  verbs=(
{verbs}
  )
  if (( CURRENT == 2 )); then _describe verb verbs; return; fi
  case "$words[2]" in
{cases}
  esac
  compadd -S '' -- ${{(M)words_of:#*=}}
  compadd -- ${{words_of:#*=}}
  case "$words[2]" in
    {"|".join(PATHS_OF)}) _files ;;
  esac
}}
compdef _zoo zoo
"""


def fish() -> str:
    """One line per verb; fish adds no blank after "="."""
    lines = ["# zoo completion for fish; to use it: zoo completion fish | source", "complete -c zoo -f"]
    for name, verb in VERBS.items():
        lines.append(f"complete -c zoo -n __fish_use_subcommand -a {name} -d {_quote(verb.line)}")
    for verb_name in VERBS:
        seen = f"'__fish_seen_subcommand_from {verb_name}'"
        following = [word for word in words(verb_name) if not word.startswith("-")]
        if following:
            lines.append(f"complete -c zoo -n {seen} -a {_quote(' '.join(following))}")
        for option in options(verb_name):
            flag = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            lines.append(f"complete -c zoo -n {seen} {flag}")
        if verb_name in PATHS_OF:
            lines.append(f"complete -c zoo -n {seen} -F")
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
