"""Training checkpoints on disk: written whole or not at all, read without running code."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from zoo.checkpoint import IN_TRAINER, read_trainer_state
from zoo.errors import UserError

LIGHTNING_HAS = ("epoch", "global_step", "loops", "optimizer_states", "lr_schedulers", "callbacks")
HAS = (IN_TRAINER, "zoo")  # what zoo.train.tasks.task adds

__all__ = ["AtomicCheckpointIO", "link_over"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """torch.save to a temporary file that is then renamed; torch.load with `weights_only=True`.

    A save that fails is kept in `error` instead of raised: the other ranks wait for this one after a save.
    """

    def __init__(self) -> None:
        super().__init__()
        self.error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `path`; when that fails the file that was there stays, and `error` says why."""
        path = Path(path)
        self.error = None
        temporary = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            self.error = error
        except RuntimeError as error:  # torch's zip writer puts its own error on top of a failed write
            cause = error.__cause__ or error.__context__
            if not isinstance(cause, OSError) and "failed writing" not in str(error):
                raise
            self.error = cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0])
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain values only, whatever the caller asks for."""
        place = Path(path)
        best = place.with_name("best.ckpt")
        other = f"copy {best.name} over it" if best != place and best.is_file() else "put another copy in its place"
        try:
            checkpoint = read_trainer_state(place)
        except UserError as error:
            raise UserError(f"the run cannot go on: {error}, or {other}, or start a new run") from error
        lacking = [name for name in (*LIGHTNING_HAS, *HAS) if name not in checkpoint]
        if lacking:
            raise UserError(
                f"the run cannot go on: {place} is not a checkpoint of zoo train, it has no {', '.join(lacking)}; "
                f"{other}, or start a new run"
            )
        return checkpoint


def link_over(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` in one step; both names survive a later replacement of the other."""
    temporary = target.with_name(f".{target.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        temporary.write_bytes(source.read_bytes())
    temporary.replace(target)
