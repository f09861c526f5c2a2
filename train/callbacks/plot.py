"""loss.png from metrics.csv, when matplotlib is there."""

import re
from collections.abc import Mapping
from typing import Any

from zoo.errors import UserError
from zoo.train.run.folder import RunFolder
from zoo.train.run.instantiate import class_of
from zoo.train.run.loggers import read_csv

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError:  # the extra "plots" is not installed
    Figure = None  # type: ignore[assignment,misc]

__all__ = ["plot_loss", "title"]

FEW = 30  # training points: so few are marked one by one
CURVES = (("loss", "training", "-"), ("val_loss", "validation", "o-"))


def plot_loss(folder: RunFolder) -> None:
    """Draw the training and validation loss of a run over its steps into `folder.plot`; nothing without any row.

    Raises:
        UserError: matplotlib is not installed.
        OSError: the image could not be written.
    """
    if Figure is None:
        raise UserError(
            f"{folder.plot.name} needs matplotlib, which is not installed; pip install 'seqzoo[plots]', "
            f"{folder.table.name} holds the numbers"
        )
    rows = read_csv(folder.table) if folder.table.exists() else []
    curves = {column: [(row["step"], row[column]) for row in rows if column in row] for column, _, _ in CURVES}
    if not any(curves.values()):
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for column, label, style in CURVES:
        points = curves[column]
        if points:
            steps, losses = zip(*points, strict=True)
            marked = "." if column == "loss" and len(points) < FEW else ""
            axes.plot(steps, losses, marked + style, label=label, linewidth=1, markersize=4)
    config = folder.read_config()
    axes.set_title(title(config), loc="left", fontsize=10)
    axes.set_xlabel("step (updates of the weights)")
    axes.set_ylabel(loss_label(config))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder.plot, dpi=120)


def loss_label(config: Mapping[str, Any]) -> str:
    """What the loss of a run is, by the word of its task."""
    kind = class_of("task", config["task"])
    return f"loss (weighted sum of {', '.join(kind.loss_names)})" if kind.loss_names else str(kind.loss_label)


def title(config: Mapping[str, Any]) -> str:
    """Model, task and data of a run: "deltanet tiny: language modelling on PyDocs, seed 0"."""
    task = config["task"]["_target_"].rpartition(".")[2]
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", task).lower()
    data = config["data"]["_target_"].rpartition(".")[2]
    return f"{config['model']['name']} {config['model']['size']}: {words} on {data}, seed {config['seed']}"
