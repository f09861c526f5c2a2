"""A sheet of small pictures with a line of text below each, as one PNG."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from zoo.errors import UserError

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError:  # the extra "plots" is not installed
    Figure = None  # type: ignore[assignment,misc]

__all__ = ["draw_sheet"]

COLUMNS = 8


def draw_sheet(path: Path, images: Tensor, titles: Sequence[str], right: Sequence[bool]) -> None:
    """Write pictures as a sheet.

    Args:
        path: of the PNG.
        images: (N, C, H, W) in [0, 1]; one channel is shown in grey, of several the first three as colours.
        titles: N texts.
        right: of each picture whether its text is black; else it is red.

    Raises:
        UserError: matplotlib is not installed.
        OSError: the file could not be written.
    """
    if Figure is None:
        raise UserError(f"{path.name} needs matplotlib, which is not installed; pip install 'seqzoo[plots]'")
    rows = -(-len(images) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * 1.1, rows * 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (image, title, good) in enumerate(zip(images, titles, right, strict=True)):
        axes = figure.add_subplot(rows, COLUMNS, i + 1)
        shown = image[0] if len(image) == 1 else image[:3].movedim(0, -1)
        axes.imshow(shown.clamp(0, 1).numpy(), cmap="gray_r" if len(image) == 1 else None, vmin=0, vmax=1)
        axes.set_title(title, fontsize=8, color="black" if good else "red")
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
