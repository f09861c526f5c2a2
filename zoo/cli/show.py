"""`zoo show`: one model without its weights: config, parameters by module, work per token, size of the state."""

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from zoo.bench.flops import LENGTH, forward_flops
from zoo.cli.models import short_count
from zoo.layers.model import as_model
from zoo.ranges import Range
from zoo.registry import ModelInfo, create_model, model_info


def show_command(name: str, settings: Sequence[str]) -> int:
    """Print what is known of a model."""
    info = model_info(name)
    fields = {}
    if settings:
        from zoo.config import parse_fields  # Hydra, which nothing else here needs

        fields = parse_fields(settings)
    size = str(fields.pop("size", "tiny"))
    with torch.device("meta"):
        model = create_model(name, size, **fields)
    out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    out.print(f"{name}, size {size} (of {', '.join(info.sizes)}); {info.task}; tags: {', '.join(info.tags) or '-'}")
    out.print(trained_by(info), markup=False)
    if info.paper:
        out.print(info.paper, markup=False)
    out.print()
    out.print(_config_table(model, info.fields))
    out.print()
    out.print(parameter_table(model))
    out.print()
    out.print(_work(model), markup=False)
    out.print(_state(model), markup=False)
    return 0


def trained_by(info: ModelInfo) -> str:
    """What `zoo train` takes for a model of itself, and what the model makes."""
    draws = f"zoo generate draws by {info.decoder}" if info.decoder else "zoo generate draws nothing from it"
    return f"zoo train takes task={info.task} data={info.data}; it produces {info.produces}, and {draws}"


def parameter_rows(model: nn.Module) -> list[tuple[str, str, int, int]]:
    """(module, class, copies, parameters of all copies), blocks of the same kind together, shared weights once."""
    modules = dict(model.named_modules())
    totals: dict[tuple[str, str], int] = defaultdict(int)
    owners: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters():
        parts = name.split(".")[:-1]
        depth = 3 if len(parts) > 1 and parts[1].isdigit() else 1  # blocks.0.mixer, but embedding
        owner = ".".join(parts[:depth])
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", owner, count=1), type(modules[owner]).__name__)
        totals[key] += parameter.numel()
        owners[key].add(owner)
    return [(module, kind, len(owners[module, kind]), n) for (module, kind), n in totals.items()]


def parameter_table(model: nn.Module) -> Table:
    """A table of modules: how many copies, how many parameters, and their share of all."""
    rows = parameter_rows(model)
    total = sum(n for *_, n in rows)
    table = Table("module", "class", box=None, pad_edge=False, show_footer=True)
    table.columns[0].footer = "total"
    table.add_column("copies", justify="right")
    table.add_column("parameters", justify="right", footer=f"{total:,}")
    table.add_column("share", justify="right")
    for module, kind, copies, n in rows:
        table.add_row(module or "(root)", kind, str(copies), f"{n:,}", f"{n / max(total, 1):.1%}")
    return table


def _config_table(model: nn.Module, fields: Any) -> Table:
    table = Table("field", "value", "type", "range", box=None, pad_edge=False)
    for field, known in fields.items():
        value = getattr(model.config, field)
        plain = list(value) if isinstance(value, tuple) else value
        shown = f"{value}" if plain == known["default"] else f"{value}  (default {known['default']})"
        allowed = str(Range(**known["range"])) if "range" in known else ""
        table.add_row(field, shown, known["type"].replace("[", r"\["), allowed.replace("[", r"\["))
    return table


def _work(model: nn.Module) -> str:
    flops, _ = forward_flops(model)
    known = as_model(model)
    unit = known.unit
    at = f" at T = {LENGTH}" if any("T" in each.shape.split() for each in known.inputs) else ""
    return (
        f"FLOPs per {unit}{at}: {short_count(flops)} forward, {short_count(3 * flops)} in training "
        "(forward + backward, the backward counted as twice the forward)"
    )


def _state(model: nn.Module) -> str:
    known = as_model(model)
    short, long = known.state_bytes(1, LENGTH), known.state_bytes(1, 2 * LENGTH)
    if not long:
        return "state: none, the whole input goes in at once"
    grows = "the same at any length" if short == long else f"{long:,} at T = {2 * LENGTH}: it grows with the context"
    return f"state bytes per sequence: {short:,} at T = {LENGTH}, {grows}"
