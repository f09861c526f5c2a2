"""loss.png says what it shows, and what to install where it cannot be drawn."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from tiny import config

from zoo.train.callbacks import plot
from zoo.train.run import fit
from zoo.train.run.folder import RunFolder

TABLE = """\
step,loss,lr,val_loss
1,5.5,0.001,
2,5.25,0.001,
4,5.0,0.001,
4,,,5.125
20,3.5,0.001,
20,,,3.75
"""


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are made."""
    figures: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            figures.append(self)

    monkeypatch.setattr(plot, "Figure", Kept)
    return figures


def test_the_plot_names_model_task_data_axes_and_curves(tmp_path: Path, drawn: list[Figure]) -> None:
    folder = RunFolder(tmp_path)
    folder.create(config())
    folder.table.write_text(TABLE)
    plot.plot_loss(folder)
    assert folder.plot.stat().st_size > 1000
    (axes,) = drawn[0].axes
    assert axes.get_title(loc="left") == "tiny-test tiny: language modelling on TinyData, seed 0"
    assert axes.get_xlabel() == "step (updates of the weights)"
    assert axes.get_ylabel() == "loss (cross entropy, nats per target)"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["training", "validation"]
    training, validation = axes.get_lines()
    assert training.get_xydata().tolist() == [[1, 5.5], [2, 5.25], [4, 5.0], [20, 3.5]]  # type: ignore[union-attr]
    assert validation.get_xydata().tolist() == [[4, 5.125], [20, 3.75]]  # type: ignore[union-attr]
    assert training.get_marker() == "."


def test_a_first_run_has_a_curve(tmp_path: Path, drawn: list[Figure]) -> None:
    settings = config(trainer__max_steps=40, trainer__log_every=20, trainer__val_every=200)
    assert fit.run(settings, tmp_path / "run") == 0
    training, validation = drawn[0].axes[0].get_lines()
    assert len(training.get_xdata()) >= 10  # type: ignore[arg-type]
    assert len(validation.get_xdata()) == 1  # type: ignore[arg-type]


def test_without_matplotlib_the_run_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot, "Figure", None)
    assert fit.run(config(), tmp_path / "run") == 0
    assert not (tmp_path / "run" / "loss.png").exists()
    said = [line for line in capsys.readouterr().out.splitlines() if "loss.png" in line]
    assert said == [
        "loss.png needs matplotlib, which is not installed; pip install 'seqzoo[plots]', metrics.csv holds the numbers"
    ]


def test_a_run_without_rows_has_no_plot(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create(config())
    plot.plot_loss(folder)
    assert not folder.plot.exists()
