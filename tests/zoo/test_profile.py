"""zoo profile: every microsecond and byte belongs to somebody."""

import json
from pathlib import Path

import pytest

from zoo import cli
from zoo.bench.measure import peak_bytes
from zoo.bench.profile import Profile, Row, named_operators, percentages, profile_model
from zoo.bench.steps import ModelRequest, StepBench
from zoo.config import compose
from zoo.layers.mixers import delta_net

SETTINGS = ["model=deltanet", "model.n_layers=1", "data.batch_size=2", "data.seq_len=128"]


def test_a_step_is_divided_by_operator(tmp_path: Path) -> None:
    before = delta_net.delta_rule
    request = ModelRequest(compose(SETTINGS), steps=1)
    found = profile_model(request, tmp_path / "run" / "trace.json")
    assert delta_net.delta_rule is before
    groups = {row.group: row for row in found.rows}
    elementwise = "norms, convolutions, elementwise"
    ways = {f"{name}, {way}" for name in ("delta_rule", "causal_conv1d", "matmul", elementwise, "loss")
            for way in ("forward", "backward")}  # fmt: skip
    assert ways | {"optimizer", "other"} <= set(groups)
    for way in ways:
        assert groups[way].seconds > 0, way
    assert found.seconds == pytest.approx(sum(row.seconds for row in found.rows))
    assert found.peak_bytes == sum(row.bytes for row in found.rows)
    assert groups["causal_conv1d, forward"].bytes >= 3 * 4 * 2 * 128 * 128  # q, k and v are kept for the backward
    step = StepBench(request)
    step.step()
    batch = step.next_batch()
    assert found.peak_bytes == pytest.approx(peak_bytes(lambda: step.step(batch), request.device), rel=0.02)
    assert found.standing_bytes == step.standing_bytes()
    names = {event.get("name") for event in json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]}
    assert {"zoo.ops/delta_rule", "zoo.ops/causal_conv1d", "zoo.step/backward", "zoo.step/optimizer"} <= names


def test_a_loss_that_is_no_number_has_no_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", *SETTINGS, "steps=1", f"run_dir={tmp_path / 'p'}", "optim.lr=1e38", "optim.warmup_steps=0"]
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "zoo: a profile needs a finite loss, and after 3 steps it is nan; lower optim.lr\n")
    assert not (tmp_path / "p").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "p"
    words = ["profile", *SETTINGS, "steps=1", f"run_dir={folder}"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"trace.json", "table.md"}
    assert out.startswith((folder / "table.md").read_text())
    shares = [line.split("|")[3].strip() for line in out.splitlines() if "%" in line][:-1]
    assert sum(round(10 * float(share.rstrip("%"))) for share in shares) == 1000
    assert cli.main(words) == 1
    assert "a profile needs an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "zoo profile needs a model; add model=NAME, zoo list shows all"),
        (["model=gla", "steps=none"], "steps must be a whole number of at least 1, got 'none'"),
        (["model=gla", "model.d_modell=3"], "model 'gla' has no field 'd_modell'; did you mean 'd_model'?"),
    ],
)
def test_refusals(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", *words]) == 2
    assert capsys.readouterr().err.startswith(f"zoo: {sentence}")


def test_operators_keep_their_names_only_inside() -> None:
    before = delta_net.delta_rule
    with named_operators():
        assert delta_net.delta_rule is not before
        assert delta_net.delta_rule.__wrapped__ is before  # type: ignore[attr-defined]
    assert delta_net.delta_rule is before


def test_percentages_sum_to_100() -> None:
    for values in ([1.0, 1.0, 1.0], [1e-9, 5.0, 2.5, 2.5], [3.0] * 7):
        assert round(10 * sum(percentages(values))) == 1000
    assert percentages([0.0, 0.0]) == [0.0, 0.0]
    table = Profile("x", (Row("a", 2.0, 1), Row("b", 1.0, 2)), 3.0, 3, 4, "CPU").markdown()
    assert "| a " in table
    assert "66.7%" in table
