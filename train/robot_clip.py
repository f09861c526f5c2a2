"""Episodes of a robot as a clip, one GIF."""

from pathlib import Path

from torch import Tensor

from zoo.errors import UserError

try:
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError:  # the extra "plots" is not installed
    Figure = None  # type: ignore[assignment,misc]

__all__ = ["draw_clip"]

COLUMNS = 4
EVERY = 2  # steps of a frame


def draw_clip(path: Path, places: Tensor, succeeded: list[bool], *, seconds: float = 0.05) -> None:
    """Write episodes as a clip, side by side.

    Args:
        path: of the GIF.
        places: (steps, N, n, 2) in [-1, 1]: the joints from the base to the tip, and then the target.
        succeeded: of each episode whether its target is green at the end; else it stays red.
        seconds: of a step.

    Raises:
        UserError: matplotlib is not installed.
        OSError: the file could not be written.
    """
    if Figure is None:
        raise UserError(f"{path.name} needs matplotlib, which is not installed; pip install 'seqzoo[plots]'")
    number, columns = places.shape[1], min(COLUMNS, places.shape[1])
    rows = -(-number // columns)
    figure = Figure(figsize=(1.6 * columns, 1.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    links, targets = [], []
    for i in range(number):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[])
        links += axes.plot([], [], "o-", color="black", linewidth=2, markersize=3)
        targets += axes.plot([], [], "o", color="red", markersize=6, alpha=0.7)
    shown = places[::EVERY].cpu().numpy()

    def draw(frame: int) -> list[object]:
        for i, (link, target) in enumerate(zip(links, targets, strict=True)):
            link.set_data(*shown[frame, i, :-1].T)
            target.set_data(*shown[frame, i, -1:].T)
            if frame == len(shown) - 1 and succeeded[i]:
                target.set_color("green")
        return [*links, *targets]

    clip = FuncAnimation(figure, draw, frames=len(shown), blit=False)  # type: ignore[arg-type]
    clip.save(path, writer=PillowWriter(fps=round(1 / (EVERY * seconds))), dpi=60)
