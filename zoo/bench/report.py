"""Tables and plots, made from records alone."""

import importlib
import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.bench.record import BARE, LIGHTNING, STEP, CaseResult, Phase, Record, SideResult
from zoo.errors import UserError

__all__ = ["align", "growth", "markdown", "mebibytes", "newest", "overhead", "plot", "ratio", "seconds"]

COLUMNS = (
    "side", "time, times {first}", "phase", "median", "quartiles", "{unit}s/s", "FLOP/s", "MFU", "peak memory",
    "first call",
)  # fmt: skip


def ratio(side: SideResult, first: SideResult, phase: str) -> float:
    """How many times the time of the first side this one takes: the median over the rounds that both took part in."""
    pairs = zip(side.phases[phase].times, first.phases[phase].times, strict=False)
    return statistics.median(a / b for a, b in pairs)


def markdown(record: Record) -> str:
    """The record as a page: what it was measured on, then a table per case."""
    parts = [_heading(record)]
    for case in record.cases:
        parts.append(_case(case, record.about))
    if lines := growth(record):
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def newest(case: CaseResult) -> str:
    """The medians so far of the last phase that was timed: "forward+backward: torch 62.1 ms, reference 1.22 s"."""
    timed = {name for side in case.sides for name, phase in side.phases.items() if phase.times}
    for phase in reversed([name for side in case.sides for name in side.phases if name in timed]):
        medians = {s.name: s.phases[phase] for s in case.sides if phase in s.phases and s.phases[phase].times}
        return f"{phase}: " + ", ".join(f"{name} {seconds(each.median)}" for name, each in medians.items())
    return ""


def growth(record: Record) -> list[str]:
    """How time and memory grow where cases differ in T only."""
    lines = []
    for i, short in enumerate(record.cases):
        for long in record.cases[i + 1 :]:
            if (short.name, short.dtype) != (long.name, long.dtype) or "T" not in short.sizes:
                continue
            if {**short.sizes, "T": 0} != {**long.sizes, "T": 0} or long.sizes["T"] <= short.sizes["T"]:
                continue
            for side in short.sides:
                lines += _growth_of(side, short, long)
    return lines


def _growth_of(side: SideResult, short: CaseResult, long: CaseResult) -> list[str]:
    other = next((s for s in long.sides if s.name == side.name), None)
    if other is None:
        return []
    lines = []
    for name in side.phases.keys() & other.phases.keys():
        a, b = side.phases[name], other.phases[name]
        if not (a.times and b.times):
            continue
        times = statistics.median(y / x for x, y in zip(a.times, b.times, strict=False))
        weight = f", memory times {b.peak_bytes / a.peak_bytes:.2f}" if a.peak_bytes and b.peak_bytes else ""
        lines.append(
            f"{short.name}, {side.name}, {name}: T times {long.sizes['T'] / short.sizes['T']:g} is time times "
            f"{times:.2f}{weight} (T = {short.sizes['T']} to {long.sizes['T']})"
        )
    return sorted(lines)


def _heading(record: Record) -> str:
    about = record.about
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
    commit = about.get("commit")
    code = f"commit {commit['revision'][:12]}{' with changes' if commit['dirty'] else ''}" if commit else "installed"
    lines = [
        f"`{about['command']}`, seed {about['seed']}",
        f"device: {about['device']}; CPU: {about['cpu']}, {about['cores']} cores, {about['threads']} threads",
        f"{versions}; {code}",
    ]
    if about.get("load"):
        after = f" before, {about['load_after'][0]:.2f} after" if about.get("load_after") else ""
        lines.append(f"load of the machine: {about['load'][0]:.2f}{after} (with others' work the numbers are noisy)")
    if peaks := about.get("matmul_peak"):
        shown = ", ".join(f"{name} {_si(v)}FLOP/s" for name, v in peaks.items())
        lines.append(f"matrix products reach {shown}: 100 % MFU")
    if record.is_interrupted:
        lines.append("**interrupted**: only what was measured until then")
    if about.get("memory_by"):
        lines.append(f"memory: {about['memory_by']}")
    return "  \n".join(lines)


def _case(case: CaseResult, about: dict[str, Any]) -> str:
    sizes = " ".join(f"{key}={value}" for key, value in case.sizes.items())
    first = next((side for side in case.sides if side.phases), None)
    columns = [c.format(first=first.name if first else "-", unit=case.unit) for c in COLUMNS]
    rows = []
    peak = about.get("matmul_peak", {}).get(case.dtype)
    for phase in dict.fromkeys(name for side in case.sides for name in side.phases):
        for side in case.sides:
            if phase in side.phases and side.phases[phase].times:
                rows.append(_row(case, side, first, phase, peak))
    for side in case.sides:
        if side.is_red:
            rows.append([side.name, "**RED**", _why(side), *[""] * (len(columns) - 3)])
    table = [columns, ["---", "---:", "---", *["---:"] * (len(columns) - 3)], *rows]
    lines = align(table)
    green = [s.name for s in case.sides if not s.is_red and s.errors]
    proof = [f"values and gradients of {', '.join(green)} agree with {case.proved_by}"] if green else []
    if case.flops_by:
        proof.append(f"FLOPs by {case.flops_by}")
    share = overhead(case)
    if share is not None:
        proof.append(f"Lightning takes {share:+.1%} of the bare loop's time on top of it")
    notes = "; ".join([*proof, *case.notes])
    return f"**{case.name}** {sizes} {case.dtype}\n\n" + "\n".join(lines) + (f"\n\n{notes}" if notes else "")


def overhead(case: CaseResult) -> float | None:
    """Lightning's time over the bare loop's, as a share of that: 0.03 is 3 %; None where they did not both run."""
    sides = {side.name: side for side in case.sides if STEP in side.phases and side.phases[STEP].times}
    return ratio(sides[LIGHTNING], sides[BARE], STEP) - 1 if {BARE, LIGHTNING} <= sides.keys() else None


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown whose columns line up in a terminal, too; the second row says how to align."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [cell.endswith(":") for cell in rows[1]]
    lines = []
    for row in rows:
        cells = [c.rjust(w, " ") if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _row(case: CaseResult, side: SideResult, first: SideResult | None, phase: str, peak: float | None) -> list[str]:
    timed = side.phases[phase]
    low, high = timed.quartiles
    beside = f" ({side.computes})" if side.computes != case.name else ""
    comparable = first is not None and phase in first.phases and first.phases[phase].times
    times = f"{ratio(side, first, phase):.3f}" if comparable and first is not None else ""
    return [
        side.name + beside,
        times,
        phase,
        seconds(timed.median),
        f"{seconds(low)} to {seconds(high)}, n={len(timed.times)}",
        _si(timed.tokens / timed.median) if timed.tokens else "",
        _si(timed.flops / timed.median) if timed.flops else "",
        f"{timed.flops / timed.median / peak:.1%}" if timed.flops and peak else "",
        mebibytes(timed.peak_bytes),
        seconds(side.first_call) if side.first_call is not None else "",
    ]


def _why(side: SideResult) -> str:
    if side.failure is not None:
        return side.failure.replace("|", "/")
    return "wrong by " + ", ".join(f"{error:.1e} in {name}" for name, error in side.red.items())


def seconds(value: float) -> str:
    """Four digits with a unit."""
    for limit, unit, scale in ((1e-3, "us", 1e6), (1.0, "ms", 1e3)):
        if value < limit:
            return f"{value * scale:.4g} {unit}"
    return f"{value:.4g} s"


def mebibytes(n: int | None) -> str:
    """A number of bytes as "1.5 MiB"; an empty text for None."""
    return "" if n is None else f"{n / 2**20:.1f} MiB"


def _si(value: float) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g} "


def plot(records: Sequence[Record], path: Path) -> None:
    """Bars of the median time per side, one panel per case and phase, quartiles as whiskers.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("a plot needs matplotlib; pip install 'seqzoo[plots]', or read the table alone")
    figures: Any = importlib.import_module("matplotlib.figure")
    panels = [
        (case, phase)
        for record in records
        for case in record.cases
        for phase in dict.fromkeys(name for side in case.sides for name in side.phases)
    ]
    if not panels:
        raise UserError("there is nothing to draw: no side of these results was timed")
    height = sum(0.6 + 0.3 * len(case.sides) for case, _ in panels)
    figure = figures.Figure(figsize=(8, height + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[1 + len(case.sides) for case, _ in panels])
    for axis, (case, phase) in zip(axes[:, 0], panels, strict=True):
        timed: list[tuple[str, Phase]] = [
            (side.name, side.phases[phase]) for side in case.sides if phase in side.phases and side.phases[phase].times
        ]
        for place, (name, one) in enumerate(reversed(timed)):
            low, high = one.quartiles
            middle = 1e3 * one.median
            axis.barh(place, middle, xerr=[[middle - 1e3 * low], [1e3 * high - middle]], capsize=2, label=name)
            axis.text(middle, place + 0.42, f" {middle:.4g}", va="top", fontsize=7)
        axis.set_yticks(range(len(timed)), [name for name, _ in reversed(timed)])
        sizes = " ".join(f"{key}={value}" for key, value in case.sizes.items())
        axis.set_title(f"{case.name}, {phase}, {sizes}, {case.dtype}", fontsize=8, loc="left")
        axis.set_xlabel("ms", fontsize=8)
    figure.savefig(path, dpi=120)
