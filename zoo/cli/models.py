"""`zoo list` and `zoo config --groups`: what there is, from the index and the file names. No torch, no Hydra."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from zoo.configs import choices
from zoo.errors import UsageError, UserError
from zoo.registry import list_models, model_info, packages_of_models

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def parse_count(text: str) -> float:
    """200M -> 2e8, 1.3B -> 1.3e9, 200e6 -> 2e8.

    Raises:
        UsageError: the text is no such number.
    """
    match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*([kmbgt]?)", text.strip().lower())
    if match is None:
        raise UsageError(f"--max-params must be a number such as 200M, 1.3B or 200e6, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def short_count(n: float) -> str:
    """374475776 -> 374M, three digits."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= 0.9995 * limit:
            return f"{n / limit:.3g}{unit}"
    return f"{n:.3g}"


def list_command(pattern: str, tags: Sequence[str], max_params: str | None, *, as_json: bool) -> int:
    """Print one line per model: name, sizes with their parameters, tags."""
    limit = None if max_params is None else parse_count(max_params)
    names = list_models(pattern, tags=tags or None, max_params=limit)
    elsewhere = packages_of_models()
    if as_json:
        print(json.dumps([asdict(model_info(name)) for name in names], indent=1, ensure_ascii=False))
        return 0
    rows = [(n, f"from the package {elsewhere[n]}", "") if n in elsewhere else _row(n) for n in names]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not rows:
        raise UserError(f"no model matches {pattern!r} with these limits; zoo list shows all")
    return 0


def _row(name: str) -> tuple[str, str, str]:
    info = model_info(name)
    sizes = ", ".join(f"{size} {short_count(n)}" for size, n in info.params.items())
    return name, sizes, " ".join(info.tags)


def groups_command(config_dir: Path | None) -> int:
    """Print each group and what it can be set to."""
    known = choices([config_dir] if config_dir else [])
    known["model"] = sorted({*known["model"], *list_models()})
    width = max(map(len, known))
    for group, names in known.items():
        print(f"{group:<{width}}  {', '.join(names) or '-'}")
    return 0
