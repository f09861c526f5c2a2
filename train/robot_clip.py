"""Episodes of a robot as a clip, one GIF."""

from pathlib import Path

import torch
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
SIDE = 2.2  # of the square of an episode, whose coordinates reach from -1 to 1
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
    figure = Figure(figsize=(1.6 * columns, 1.6 * rows))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, SIDE * columns), ylim=(0, SIDE * rows), xticks=[], yticks=[])
    at = torch.arange(number)
    corner = torch.stack([at % columns, rows - 1 - at // columns], 1) * SIDE + SIDE / 2  # all in one pair of axes
    shown = (places.cpu() + corner[:, None])[::EVERY].numpy()
    links = [axes.plot([], [], "o-", color="black", linewidth=2, markersize=3)[0] for _ in range(number)]
    targets = axes.scatter(shown[0, :, -1, 0], shown[0, :, -1, 1], s=40, color="red", alpha=0.7)
    colours = ["green" if good else "red" for good in succeeded]

    def draw(frame: int) -> list[object]:
        for link, joints in zip(links, shown[frame], strict=True):
            link.set_data(*joints[:-1].T)
        targets.set_offsets(shown[frame, :, -1])
        if frame == len(shown) - 1:
            targets.set_color(colours)
        return [*links, targets]

    clip = FuncAnimation(figure, draw, frames=len(shown), blit=False)  # type: ignore[arg-type]
    clip.save(path, writer=PillowWriter(fps=round(1 / (EVERY * seconds))), dpi=60)
