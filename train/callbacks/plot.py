"""loss.png from metrics.csv, when matplotlib is there."""

from pathlib import Path

from zoo.train.loggers import read_csv

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError:  # the extra "plots" is not installed
    Figure = None  # type: ignore[assignment,misc]

__all__ = ["plot_loss"]


def plot_loss(table: Path, image: Path) -> bool:
    """Draw training and validation loss over steps; False when matplotlib is not installed or there are no rows."""
    if Figure is None or not table.exists():
        return False
    rows = read_csv(table)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for column, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(row["step"], row[column]) for row in rows if column in row]
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], style, label=label, linewidth=1, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(image, dpi=120)
    return True
