"""`zoo bench` and `zoo profile`: settings to requests, records to tables and files."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zoo.bench.operators import operator_sizes
from zoo.bench.record import Record, read, write
from zoo.bench.report import markdown, plot
from zoo.bench.shapes import parse_request
from zoo.cli.runs import fresh_folder
from zoo.cli.status import StatusLine
from zoo.config import compose
from zoo.errors import UsageError, UserError

INTERRUPTED = 130
OWN_KEYS = ("out", "repeats", "steps")  # of zoo bench model=; everything else is the run's


def bench_command(settings: list[str], base: str | None, config_dir: Path | None) -> int:
    """Measure, print the table, keep it when `out=` is given; 1 when a side's numbers are wrong, 130 on Ctrl-C, after
    which the table holds what was measured until then."""
    first = settings[0] if settings else ""
    kind = first.partition("=")[0]
    kinds: dict[str, Callable[[], int]] = {
        "op": lambda: _operators(settings, base),
        "model": lambda: _model(settings, base, config_dir),
        "report": lambda: _report(settings, base),
        "cp": lambda: _context_parallel(settings[1:], base, config_dir),
    }
    if kind not in kinds:
        what = f"got {first!r}" if first else "nothing was named"
        raise UsageError(f"zoo bench begins with op=NAME, op=all, model=NAME, cp model=NAME or report=FILE; {what}")
    return kinds[kind]()


def profile_command(settings: list[str], config_dir: Path | None) -> int:
    """Profile a few training steps; the trace and the table go to the run's folder."""
    own, rest = _own(settings, ("steps",))
    config = _config(rest, config_dir, "zoo profile")
    folder = Path(config["run_dir"] or fresh_folder(f"profile-{config['model']['name']}"))
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"a profile needs an empty folder and {folder} holds files; give another run_dir=")
    from zoo.bench.models import check_request
    from zoo.bench.profile import profile_model
    from zoo.bench.steps import ModelRequest

    request = ModelRequest(config, steps=_whole("steps", own.get("steps", "3")))
    check_request(request)
    profiled = profile_model(request, folder / "trace.json")
    table = profiled.markdown()
    (folder / "table.md").write_text(table, encoding="utf-8")
    print(table)
    print(f"trace (chrome://tracing or ui.perfetto.dev): {folder / 'trace.json'}")
    return 0


def _operators(settings: list[str], base: str | None) -> int:
    from zoo.bench.run import compare_operators, run_operators

    request = parse_request(settings, operator_sizes(), "cuda" if torch.cuda.is_available() else "cpu")
    out = _out(settings)
    with StatusLine(sys.stderr) as say:
        record = run_operators(request, say) if base is None else compare_operators(request, base, say)
    names = dict.fromkeys(case.operator for case in request.cases)
    return _finish(record, "op-" + ("all" if "op=all" in settings else "-".join(names)), out)


def _model(settings: list[str], base: str | None, config_dir: Path | None) -> int:
    from zoo.bench.models import run_model
    from zoo.bench.run import compare_models
    from zoo.bench.steps import ModelRequest

    own, rest = _own(settings, OWN_KEYS)
    out = _out(settings)
    config = _config(rest, config_dir, "zoo bench")
    steps, repeats = (_whole(key, own.get(key, "10")) for key in ("steps", "repeats"))
    request = ModelRequest(config, steps, repeats)
    with StatusLine(sys.stderr) as say:
        record = run_model(request, say) if base is None else compare_models(request, base, say)
    return _finish(record, f"model-{config['model']['name']}", out)


def _context_parallel(settings: list[str], base: str | None, config_dir: Path | None) -> int:
    """Predict a step whose sequence is cut across many ranks."""
    from zoo.bench.context_parallel import STATES, predict_model
    from zoo.layers.pattern import parse_pattern
    from zoo.ops.shard import Link
    from zoo.registry import create_model

    if base is not None:
        raise UsageError("--base measures another commit; zoo bench cp predicts from this one")
    own, rest = _own(settings, ("ranks", "tokens", "latency", "bandwidth", "local", "methods", "repeats"))
    model = _config(rest, config_dir, "zoo bench cp")["model"]
    methods = own.get("methods", ",".join(STATES)).split(",")
    for method in methods:
        if method not in STATES:
            raise UsageError(f"methods can be {', '.join(STATES)}; got {method!r}")
    fields = {key: value for key, value in model.items() if key not in ("name", "size", "n_layers")}
    fields["vocab_size"] = fields.get("vocab_size") or 256
    period = len(parse_pattern(fields["pattern"])) if fields.get("pattern") else 1

    def build(layers: int) -> Any:
        return create_model(model["name"], model["size"], **fields, n_layers=layers)

    usual = Link()
    link = Link(_positive("latency", own, usual.latency), _positive("bandwidth", own, usual.bandwidth))
    tokens = _whole("tokens", own.get("tokens", "8192"))
    with StatusLine(sys.stderr) as say:
        predicted = predict_model(
            build, model["n_layers"], period, tokens=tokens, link=link, methods=methods,
            ranks=[_whole("ranks", word) for word in own.get("ranks", "2,8,64,256,1024").split(",")],
            local=_positive("local", own, None), repeats=_whole("repeats", own.get("repeats", "3")), say=say,
        )  # fmt: skip
    how = "given" if "local" in own else f"measured here, median of {own.get('repeats', '3')}"
    print(
        f"{model['name']} {model['size']}, {tokens:,} tokens a rank: {predicted.local:.4g} s a step by itself ({how}); "
        f"link {link.latency * 1e6:g} us, {link.bandwidth / 1e9:g} GB/s; nothing overlapped\n"
    )
    print(predicted.markdown(), end="")
    return 0


def _positive(key: str, own: dict[str, str], usual: float | None) -> Any:
    try:
        value = float(own[key]) if key in own else usual
    except ValueError:
        value = -1.0
    if value is not None and not value > 0:
        raise UsageError(f"{key} must be a number over 0 (seconds, or bytes a second), got {own[key]!r}")
    return value


def _report(settings: list[str], base: str | None) -> int:
    if base is not None:
        raise UsageError("--base measures another commit; report= only reads results that are there")
    out = _out(settings)
    words = [word.removeprefix("report=") for word in settings if not word.startswith("out=")]
    records = [read(Path(word)) for word in words]
    pages = "\n".join(markdown(record) for record in records)
    print(pages, end="")
    if out is not None:
        _write_text(out / "table.md", pages)
        plot(records, out / "plot.png")
    return 1 if any(record.is_red for record in records) else 0


def _finish(record: Record, name: str, out: Path | None) -> int:
    """Print the table; keep the results in out=FILE.json, or in out=FOLDER by device with a table and a plot."""
    page = markdown(record)
    print(page, end="")
    if record.is_interrupted:
        unwritten = "" if out is None else f", and nothing was written to {out}"
        print(f"zoo: interrupted; the table holds what was measured until then{unwritten}", file=sys.stderr)
        return INTERRUPTED
    if out is not None and out.suffix == ".json":
        write(record, out)
    elif out is not None:
        device = record.about["device"] if record.about["device"] != "cpu" else record.about["cpu"]
        stem = out / re.sub(r"\W+", "-", device).strip("-").lower() / name
        write(record, stem.with_suffix(".json"))
        kept = read(stem.with_suffix(".json"))  # the table and the plot are made from the file
        _write_text(stem.with_suffix(".md"), markdown(kept))
        if importlib.util.find_spec("matplotlib") is not None and not kept.is_red:
            plot([kept], stem.with_suffix(".png"))
        print(f"\nresults: {stem.with_suffix('.json')}")
    return 1 if record.is_red else 0


def _config(settings: list[str], config_dir: Path | None, verb: str) -> dict[str, Any]:
    if not any(word.startswith(("model=", "model.name=")) for word in settings):
        raise UsageError(f"{verb} needs a model; add model=NAME, zoo list shows all")
    return compose(settings, config_dir=config_dir)


def _own(settings: list[str], keys: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The verb's own settings, and the rest, which is Hydra's."""
    own = {key: value for key, sign, value in (word.partition("=") for word in settings) if sign and key in keys}
    return own, [word for word in settings if word.partition("=")[0] not in keys]


def _out(settings: list[str]) -> Path | None:
    given = [word.removeprefix("out=") for word in settings if word.startswith("out=")]
    return Path(given[-1]) if given else None


def _whole(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{key} must be a whole number of at least 1, got {text!r}")
    return int(text)


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error}); give another out=") from error
