"""zoo bench: what is wrong has no speed; results keep; the words of the command are checked."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import cli
from zoo.bench import flops, gate, operators, report, steps
from zoo.bench.implementations import choose_sides
from zoo.bench.measure import Clock, matmul_peak, peak_bytes
from zoo.bench.models import run_model
from zoo.bench.operators import OperatorBench, operator_sizes
from zoo.bench.record import CaseResult, Phase, Record, SideResult, read, write
from zoo.bench.run import run_operators
from zoo.bench.shapes import SETS, Case, parse_request
from zoo.bench.steps import ModelRequest, Products, StepBench
from zoo.config import compose
from zoo.errors import UserError
from zoo.ops.convolutions.causal_conv1d import causal_conv1d
from zoo.ops.core import dispatch
from zoo.ops.core.spec import TOLERANCE, convert
from zoo.ops.core.table import OPERATORS
from zoo.registry import INDEX

CPU = torch.device("cpu")
SMALL = ["op=causal_conv1d", "T=40", "B=1", "D=6", "repeats=2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed means nothing in a test."""
    monkeypatch.setattr(operators, "matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr("zoo.bench.models.matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr("zoo.bench.measure.SAMPLE", 1e-4)
    monkeypatch.setattr(operators, "peak_bytes", lambda call, _: 1000)
    monkeypatch.setattr(steps, "peak_bytes", lambda call, _: 1000)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def requested(*words: str) -> Any:
    return parse_request(words, operator_sizes(), "cpu")


# -- the words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, "zoo bench begins with op=NAME, op=all, model=NAME, cp model=NAME or report=FILE; nothing was named"),
        (["cp"], 2, "zoo bench cp needs a model; add model=NAME, zoo list shows all"),
        (["T=3"], 2, "zoo bench begins with op=NAME, op=all, model=NAME, cp model=NAME or report=FILE; got 'T=3'"),
        (["op=delta_rul"], 2, "no operator 'delta_rul'; did you mean 'delta_rule'? op can be all, "),
        (["op=delta_rule", "W=3"], 2, "zoo bench op= has no setting 'W'; "),
        (["op=delta_rule", "dtyp=float32"], 2, "zoo bench op= has no setting 'dtyp'; did you mean 'dtype'?"),
        (["op=delta_rule", "T=1e3"], 2, "T must be a whole number of at least 1, got '1e3'"),
        (["op=delta_rule", "T=0"], 2, "T must be a whole number of at least 1, got '0'"),
        (["op=delta_rule", "T=64", "T=65"], 2, "T= is given twice; several values are written T=A,B"),
        (["op=delta_rule", "T"], 2, "settings are written key=value, got 'T'"),
        (["op=delta_rule", "dtype=float23"], 2, "no dtype 'float23'; did you mean 'float32'?"),
        (["op=delta_rule", "shapes=fal"], 2, "no shapes 'fal'; did you mean 'fla'?"),
        (["op=delta_rule", "backends=torch,tritn"], 2, "no backends 'tritn'; did you mean 'triton'?"),
        (["op=delta_rule", "device=tpu9"], 2, "device must be cpu, cuda or cuda:N, got 'tpu9'"),
        (["op=delta_rule", "device=cuda:99"], 2, "device cuda:99 is not on this machine; there is cpu"),
        (["op=delta_rule", "device=cpu", "backends=triton"], 2, "backends=triton cannot run delta_rule here: kernels"),
        (["op=delta_rule", "device=cpu", "backends=fla"], 2, "backends=fla cannot run delta_rule here: its kernels"),
        (["op=causal_conv1d", "backends=sdpa"], 2, "backends=sdpa cannot run causal_conv1d here: it takes q, k and v"),
        (["op=delta_rule", "--base", "no-such-commit"], 1, "--base "),
        (["model=deltanett"], 2, "no model 'deltanett'; did you mean 'deltanet'? model can be "),
        (["model=gla", "steps=0"], 2, "steps must be a whole number of at least 1, got '0'"),
        (["model=gla", "trainer.accumulate_grad_batches=2"], 1, "a training step is measured on one batch; "),
        (["report=nowhere.json"], 1, "nowhere.json cannot be read (No such file or directory); zoo bench out=FILE"),
        (["report=x.json", "--base", "HEAD"], 2, "--base measures another commit; report= only reads"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], words: list[str], code: int, sentence: str) -> None:
    got, out, err = run(capsys, "bench", *words)
    assert (got, out) == (code, "")
    assert err.startswith(f"zoo: {sentence}")
    assert err.count("\n") == 1


def test_shapes_are_the_published_ones_and_lists_multiply() -> None:
    cases = requested("op=gated_linear_attention", "shapes=fla").cases
    assert [tuple(case.sizes[key] for key in "BTHK") for case in cases[:6]] == [
        (1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (4, 4096, 64, 128), (8, 1024, 8, 64),
        (8, 2048, 32, 256),
    ]  # fmt: skip
    assert [(c.sizes["B"] * c.sizes["T"], c.sizes["T"]) for c in cases[6:]] == [
        (32768, 2048), (32768, 8192), (32768, 32768),
    ]  # fmt: skip
    assert {case.dtype for case in cases} == {"bfloat16"}
    asked = requested("op=delta_rule,causal_conv1d", "T=8,16", "dtype=float32,float64", "H=2").cases
    assert len(asked) == 8
    assert asked[0].sizes == {"B": 2, "T": 8, "H": 2, "K": 64, "V": 64}
    assert asked[-1].sizes == {"B": 2, "T": 16, "D": 256, "W": 4}
    assert asked[-1].dtype == "float64"
    assert {case.operator for case in requested("op=all", "T=8").cases} == set(OPERATORS)
    assert SETS["cpu"][0] == "float32"


# -- the gate ----------------------------------------------------------------------------------------------------


@functools.wraps(causal_conv1d)
def wrong_value(*args: Tensor, backend: str, **kwargs: Any) -> tuple[Tensor, Tensor]:
    y, tail = causal_conv1d(*args, backend=backend, **kwargs)
    return (y * 1.001 if backend == "torch" else y), tail


@functools.wraps(causal_conv1d)
def wrong_gradient(*args: Tensor, backend: str, **kwargs: Any) -> tuple[Tensor, Tensor]:
    y, tail = causal_conv1d(*args, backend=backend, **kwargs)
    return (1.001 * y - 0.001 * y.detach() if backend == "torch" else y), tail


@functools.wraps(causal_conv1d)
def dies(*args: Tensor, backend: str, **kwargs: Any) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        raise RuntimeError("no such kernel\nin line 3")
    return causal_conv1d(*args, backend=backend, **kwargs)


@pytest.mark.parametrize("wrong", [wrong_value, wrong_gradient, dies])
def test_what_is_wrong_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, wrong: Callable[..., Any]
) -> None:
    spec = dataclasses.replace(OPERATORS["causal_conv1d"], function=wrong)
    if wrong is dies:
        monkeypatch.setattr(operators, "operator_flops", lambda *_: (1, 3, "nobody"))
    monkeypatch.setitem(OPERATORS, "causal_conv1d", spec)
    code, out, _ = run(capsys, "bench", *SMALL, f"out={tmp_path}/x.json")
    assert code == 1
    lines = [line for line in out.splitlines() if line.startswith("| torch ")]
    assert len(lines) == 1
    assert "**RED**" in lines[0]
    assert "RuntimeError: no such kernel" in lines[0] if wrong is dies else "wrong by " in lines[0]
    assert sum(line.startswith("| reference ") for line in out.splitlines()) == 2  # the loop is right and has its times
    record = read(tmp_path / "x.json")
    torch_side, loop = record.cases[0].sides
    assert (torch_side.phases, torch_side.first_call, record.is_red) == ({}, None, True)
    assert len(loop.phases["forward"].times) == 2
    assert run(capsys, "bench", f"report={tmp_path}/x.json")[0] == 1


def test_a_right_operator_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "peak_bytes", peak_bytes)
    code, out, err = run(capsys, "bench", *SMALL, f"out={tmp_path}/x.json")
    assert code == 0
    assert "zoo: " not in err
    record = read(tmp_path / "x.json")
    (case,) = record.cases
    assert case.proved_by == "the float64 loop"
    assert [side.name for side in case.sides] == ["torch", "reference"]
    for side in case.sides:
        assert set(side.errors) == {"output 0", "output 1", "d x", "d weight", "d bias"}
        assert max(side.errors.values()) <= TOLERANCE[torch.float32]
        assert side.first_call is not None
        for phase in side.phases.values():
            assert len(phase.times) == 2
            assert min(phase.times) > 0
            assert phase.tokens == 40
            assert phase.flops > 0
            assert phase.peak_bytes is not None
            assert phase.peak_bytes >= 4 * 40 * 6  # the output at least
    assert report.ratio(case.sides[0], case.sides[0], "forward") == 1.0
    about = record.about
    assert {"command", "seed", "device", "cpu", "cores", "threads", "versions", "commit", "matmul_peak"} <= set(about)
    assert set(about["versions"]) >= {"torch", "triton", "zoo", "flash-linear-attention"}
    assert "agree with the float64 loop" in out


def test_long_shapes_are_proved_by_the_torch_form_that_the_loop_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, sizes = OPERATORS["gated_linear_attention"], {"B": 1, "T": 150, "H": 1, "K": 8, "V": 8}
    by_loop = gate.exact_numbers(spec, sizes, torch.float32, CPU, 0)
    monkeypatch.setattr(gate, "LOOP_BYTES", 0)
    by_torch = gate.exact_numbers(spec, sizes, torch.float32, CPU, 0)
    assert by_torch.by == "the float64 torch form, within 1e-10 of the loop at T=130"
    for name, numbers in by_loop.numbers.items():
        assert torch.allclose(numbers, by_torch.numbers[name], rtol=1e-9, atol=1e-9), name
    assert by_torch.red(by_torch.errors(spec, torch.float32, CPU, "torch"), torch.float32) == {}

    @functools.wraps(spec.function)
    def wrong(q: Tensor, *args: Tensor, backend: str, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return spec.function(q * (1.001 if backend == "torch" else 1.0), *args, backend=backend, **kwargs)

    broken = dataclasses.replace(spec, function=wrong)
    exact = gate.exact_numbers(broken, sizes, torch.float32, CPU, 0)
    red = exact.red(exact.errors(broken, torch.float32, CPU, "torch"), torch.float32)
    assert "float64 torch form, output 0" in red  # it would agree with itself

    monkeypatch.setattr(gate, "SHARE", 0.0)
    short = gate.exact_numbers(spec, sizes, torch.float32, CPU, 0)
    assert short.by.startswith("the float64 loop at B=1, T=130 only")
    assert short.inputs["q"].shape[1] == 130


def test_the_loop_sits_out_where_it_is_too_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.bench.implementations.LOOP_BYTES", 0)
    bench = OperatorBench(requested("op=delta_rule", "T=40", "B=1", "H=1", "K=8", "V=8"))
    case = bench.prepare(bench.request.cases[0])
    assert [side.name for side in case.sides] == ["torch", "sdpa"]
    assert case.sides[1].computes == "attention"
    assert any("the loop is left out" in note for note in case.notes)
    assert not case.sides[1].is_red
    monkeypatch.setattr("zoo.bench.implementations.DEAR", 0)
    sides, notes = choose_sides(OPERATORS["delta_rule"], bench.request.cases[0], CPU, ())
    assert [side.name for side in sides] == ["torch"]
    assert any("SDPA is left out" in note for note in notes)
    assert [s.name for s in choose_sides(OPERATORS["delta_rule"], bench.request.cases[0], CPU, ("sdpa",))[0]] == [
        "sdpa"
    ]


def test_slow_sides_sit_out_the_later_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "BUDGET", 0.0)
    bench = OperatorBench(requested(*SMALL, "backends=torch"))
    bench.prepare(bench.request.cases[0])
    for _ in range(5):
        bench.round()
    assert {len(p.times) for p in bench.results()[0].sides[0].phases.values()} == {operators.FEW}


# -- measuring ---------------------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_live_tensors() -> None:
    def call() -> Tensor:
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        return torch.cat([b, b])  # 4 MB and 8 MB, after 4 MB and 4 MB

    assert peak_bytes(call, CPU) == 12_000_000


def test_the_clock_counts_calls() -> None:
    calls: list[int] = []
    clock = Clock(CPU)
    assert clock.seconds(lambda: calls.append(1), 5) > 0
    assert len(calls) == 5
    assert clock.calls_per_sample(lambda: calls.append(1)) >= 1
    assert matmul_peak(torch.float32, CPU, repeats=1) > 1e6


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["gated_linear_attention", "delta_rule", "causal_conv1d"])
def test_flops_are_the_kernels_formula_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    spec = OPERATORS[name]
    inputs = convert(spec.make(2, 128, spec.sizes[0], torch.Generator().manual_seed(0)), torch.float32)
    forward, total, by = flops.operator_flops(spec, inputs)
    assert by == "the operator's formula"
    assert 2 * forward < total < 5 * forward
    monkeypatch.setattr(spec.operator, "forms", ("torch",))
    assert flops.operator_flops(spec, inputs)[2] == "the torch form's products"


# -- results -----------------------------------------------------------------------------------------------------


def record() -> Record:
    """Two lengths, two sides, made up."""
    cases = []
    for T, scale in ((64, 1.0), (512, 8.5)):
        sides = [SideResult(name, "delta_rule", {"output 0": 1e-7}, first_call=0.5) for name in ("torch", "reference")]
        for side, slower in zip(sides, (1.0, 20.0), strict=True):
            times = [scale * slower * t for t in (1e-3, 1.1e-3, 1.2e-3)]
            side.phases["forward"] = Phase(times, tokens=T, flops=1e6 * T, peak_bytes=2**20 * T // 64)
        cases.append(CaseResult("delta_rule", {"B": 1, "T": T}, "float32", "the loop", "formula", sides))
    about = {
        "command": "zoo bench", "seed": 0, "device": "cpu", "cpu": "abacus", "cores": 2, "threads": 1, "load": [0.1],
        "versions": {"torch": "2", "cuda": None}, "commit": {"revision": "a" * 40, "dirty": True},
        "matmul_peak": {"float32": 1e11}, "memory_by": "counting",
    }  # fmt: skip
    return Record("operators", about, cases)


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write(record(), path)
    assert read(path) == record()
    data = json.loads(path.read_text())
    assert (data["format"], data["version"]) == ("zoo-bench", 1)
    assert data["cases"][1]["sides"][0]["phases"]["forward"]["times"][0] == 8.5e-3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "x.json is not JSON"),
        ("[]", "x.json holds no results of zoo bench"),
        ('{"format": "zoo-bench", "version": 9}', "x.json has version 9 of the format and this zoo reads 1"),
        ('{"format": "zoo-bench", "version": 1, "kind": "model"}', "x.json is damaged (KeyError('about'))"),
        ('{"format": "zoo-bench", "version": 1, "kind": "", "about": {}, "cases": [{"sides": [{}]}]}', "x.json is dam"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text(text)
    with pytest.raises(UserError) as refusal:
        read(Path("x.json"))
    assert str(refusal.value).startswith(sentence)


def test_the_table_is_made_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(record(), tmp_path / "x.json")
    code, out, _ = run(capsys, "bench", f"report={tmp_path}/x.json", f"out={tmp_path}/page")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("| reference"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "reference", "20.000", "forward", "22 ms", "21 ms to 23 ms, n=3", "2.91 k", "2.91 G", "2.9%", "1.0 MiB",
        "500 ms",
    ]  # fmt: skip
    assert "- delta_rule, torch, forward: T times 8 is time times 8.50, memory times 8.00 (T = 64 to 512)" in out
    assert "commit aaaaaaaaaaaa with changes" in out
    assert (tmp_path / "page" / "table.md").read_text() == out
    assert (tmp_path / "page" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_gets_results_by_device(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "bench", *SMALL, "backends=torch", f"out={tmp_path}/results")
    assert code == 0
    (path,) = (tmp_path / "results").glob("*/op-causal_conv1d.json")
    assert f"results: {path}" in out
    assert path.with_suffix(".md").read_text() == report.markdown(read(path))
    assert path.with_suffix(".png").is_file()


def test_nothing_is_written_unasked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "bench", *SMALL, "backends=torch")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_quietly(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: OperatorBench) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OperatorBench, "round", interrupted)
    code, out, err = run(capsys, "bench", *SMALL)
    assert (code, out) == (130, "")
    assert err.endswith("\nzoo: interrupted\n")


# -- models ------------------------------------------------------------------------------------------------------

DATA = ["data=pydocs", "data.batch_size=2", "data.seq_len=48"]


INDEXED = {path.stem: json.loads(path.read_text()) for path in INDEX.glob("*.json")}  # not what other tests registered


CONTINUING = [name for name, info in INDEXED.items() if info["task"] == "language_modelling" and info["decoder"]]


@pytest.mark.parametrize("name", CONTINUING)
def test_every_language_model_is_measured(name: str) -> None:
    request = ModelRequest(compose([f"model={name}", "model.n_layers=1", *DATA]), steps=1, repeats=1)
    bench = StepBench(request)
    case = bench.prepare()
    assert set(bench.sides[steps.BARE].errors) == {"loss", "gradient"}
    assert not bench.sides[steps.BARE].is_red
    bench.round()
    assert case.sizes == {"B": 2, "T": 48}
    for side in case.sides:
        phase = side.phases["training step"]
        assert len(phase.times) == 1
        assert phase.flops > 0
        assert phase.tokens == 96
    products, linear = bench.sides[steps.PRODUCTS].phases, bench.sides[steps.LINEAR].phases
    assert products["training step"].flops >= linear["training step"].flops > 0


def test_a_model_runs_bare_and_under_lightning_with_the_same_losses() -> None:
    request = ModelRequest(compose(["model=gla", "model.n_layers=1", "model.d_model=32", *DATA]), steps=2, repeats=2)
    said: list[str] = []
    found = run_model(request, said.append)
    training, decoding = found.cases
    assert [side.name for side in training.sides[:2]] == ["bare loop", "lightning"]
    lightning = training.sides[1]
    assert list(lightning.errors) == [f"loss of step {i}" for i in (1, 2, 3)]
    assert max(lightning.errors.values()) < 1e-6
    assert not found.is_red
    assert {len(side.phases["training step"].times) for side in training.sides} == {2}
    assert report.overhead(training) is not None
    assert decoding.sides[0].phases["one token"].tokens == 1
    assert len(decoding.sides[0].phases["one token"].times) == 2
    page = report.markdown(found)
    assert "Lightning takes " in page
    assert [re.sub(r"[\d.]+ [um]?s\b", "TIME", words) for words in said] == [
        "gla: 2 rounds of 2 steps, by a bare loop and by Lightning",
        "gla: checking a step against float64, warming up",
        "gla: round 1 of 2",
        "gla: round 2 of 2; training step: bare loop TIME, linear layers alone TIME, all products alone TIME",
        "gla: decoding",
    ]


def test_a_wrong_model_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = StepBench.loss_of

    def wrong(self: StepBench, logits: Tensor, targets: Tensor) -> Tensor:
        loss = right(self, logits, targets)
        return loss if logits.dtype == torch.float64 else loss * 1.01

    monkeypatch.setattr(StepBench, "loss_of", wrong)
    request = ModelRequest(compose(["model=gla", "model.n_layers=1", "model.d_model=32", *DATA]), steps=1, repeats=1)
    found = run_model(request, lambda _: None)
    assert found.is_red
    assert [(side.name, side.phases) for side in found.cases[0].sides] == [("bare loop", {})]
    assert "**RED**" in report.markdown(found)


def test_the_products_of_a_step_are_replayed() -> None:
    layer, x = torch.nn.Linear(6, 10, bias=False), torch.randn(4, 3, 6, requires_grad=True)
    found = Products.of(lambda: (layer(x) @ torch.randn(4, 10, 2)).sum().backward())
    assert found.count(linear=True) == 3  # forward, and backward by the input and by the weight
    assert found.count(linear=False) == 3 + 2  # the random factor takes no gradient
    assert found.flops(linear=True) == 3 * 2 * 12 * 6 * 10
    found.run(linear=False)


def test_operators_run_of_several_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    found = run_operators(requested("op=causal_conv1d", "T=8,64", "B=1", "D=4", "repeats=2"), said.append)
    assert [case.sizes["T"] for case in found.cases] == [8, 64]
    assert any("T times 8 is time times" in line for line in report.growth(found))
    assert "round 1 of 2" in said[-2]
    assert said[-1].startswith("causal_conv1d: round 2 of 2; causal_conv1d ")
    assert "forward+backward: torch " in said[-1], "the first times are said after the first round"


@pytest.mark.parametrize("name", ["gated_linear_attention", "plstm", "plstm_grid", "swiglu"])
def test_attention_competes_with_operators_on_queries(name: str) -> None:
    spec = OPERATORS[name]
    sizes = {"B": 1, "T": 16, **spec.sizes[0]}
    sides, _ = choose_sides(spec, Case(name, sizes, "float32"), CPU, ())
    attends = name in ("gated_linear_attention", "plstm")
    assert ("sdpa" in [side.name for side in sides]) == attends
    for side in sides:
        assert side.spec.operator.name == ("attention" if side.name == "sdpa" else name)
