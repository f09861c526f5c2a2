"""The folder of a run: what was asked, with which versions, what was said."""

import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

import zoo
from zoo.config import read_run, to_yaml
from zoo.errors import UserError
from zoo.ops.core.call import Choice
from zoo.train.callbacks.operators import describe_choices

__all__ = ["RunFolder", "is_main_process"]


def is_main_process() -> bool:
    """Whether this process speaks and writes for the run; known from the environment before there is a trainer."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


class RunFolder:
    """Paths of a run's files, and `say`, which prints a line and keeps it in log.txt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.versions = path / "versions.json"
        self.table = path / "metrics.csv"
        self.plot = path / "loss.png"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.final = path / "checkpoint"
        self.average = path / "checkpoint_ema"
        self.log = path / "log.txt"
        self._made: list[Path] = []  # the folders that `create` made, the innermost first
        self._fresh = False

    def check_free(self) -> None:
        """Refuse a folder that holds something already."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if self.config.is_file():
            raise UserError(
                f"a new run needs a folder of its own and {self.path} holds a run; zoo resume {self.path} goes on with "
                "that run, another run_dir= starts a new one"
            )
        raise UserError(f"a new run needs an empty folder and {self.path} holds other files; give another run_dir=")

    @rank_zero_only
    def create(self, config: Mapping[str, Any]) -> None:
        """Make the folder and write down what is about to run."""
        self._fresh = True
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "command.txt").write_text(command_line() + "\n", encoding="utf-8")
            self.versions.write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
            self.config.write_text(to_yaml(config), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"the run's folder {self.path} cannot be written ({error.strerror or error}); give another run_dir="
            ) from error

    @rank_zero_only
    def note_operators(self, choices: Mapping[str, Choice]) -> None:
        """Say which backend every operator takes, and why; versions.json keeps it."""
        self.say(f"operators: {describe_choices(choices)}")
        with contextlib.suppress(OSError, ValueError):  # a full disk does not end a run over this
            known = json.loads(self.versions.read_text(encoding="utf-8"))
            known["operators"] = {name: choice._asdict() for name, choice in sorted(choices.items())}
            self.versions.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

    @rank_zero_only
    def discard(self) -> None:
        """Take back what `create` made for a run that was refused; the folder of an earlier run is left alone."""
        if not self._fresh:
            return
        for path in self.path.iterdir():  # it was empty before `create`
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for folder in self._made:
            with contextlib.suppress(OSError):  # another run may have come to lie beside this one
                folder.rmdir()
        self._fresh = False

    @classmethod
    def existing(cls, path: Path) -> "RunFolder":
        """The folder of an earlier run."""
        folder = cls(path)
        if not folder.config.is_file():
            raise UserError(
                f"{path} is not the folder of a run: it has no config.yaml; zoo train prints where its run is"
            )
        return folder

    def read_config(self) -> dict[str, Any]:
        """What was asked; checked, since the folder may be anybody's."""
        return read_run(self.config)

    @property
    def finished(self) -> bool:
        """Whether the final model is there."""
        return (self.final / "config.json").is_file()

    @rank_zero_only
    def say(self, text: str) -> None:
        """Print a line and keep it; a reader that has left does not end a run."""
        with contextlib.suppress(OSError):
            print(text, flush=True)
        self.note(text)

    @rank_zero_only
    def note(self, text: str) -> None:
        """Keep a line, once there is a run to keep it for; a full disk does not end a run over its log."""
        if not self.config.is_file():
            return
        with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def command_line() -> str:
    """What the user typed, as far as it can be known."""
    program, *arguments = sys.argv
    return shlex.join([Path(program).name or program, *arguments])


def versions() -> dict[str, Any]:
    """What the run depends on: software, the commit in a git checkout, devices."""
    versions: dict[str, Any] = {"python": platform.python_version(), "zoo": zoo.__version__, "torch": torch.__version__}
    for name in ("lightning", "triton", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    versions["commit"] = commit()
    versions["platform"] = platform.platform()
    versions["cpu"] = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return versions


def commit() -> str | None:
    """The commit of zoo's own checkout, with "+" when files differ from it; None when zoo was installed."""
    root = Path(zoo.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
