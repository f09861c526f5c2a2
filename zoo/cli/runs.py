"""`zoo train`, `resume`, `eval`, `config`: composing settings and handing them to zoo.train."""

import re
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from zoo.config import compose, to_yaml
from zoo.errors import UserError


def config_command(settings: list[str], config_dir: Path | None) -> int:
    """Print what the settings compose to, as YAML."""
    print(to_yaml(compose(settings, config_dir=config_dir)), end="")
    return 0


def train_command(settings: list[str], config_dir: Path | None, *, spins_long: bool = False) -> int:
    """Train; the exit code is that of the run. spins_long: what `limit_spinning` has answered."""
    config = compose(settings, config_dir=config_dir)
    config["run_dir"] = config["run_dir"] or str(fresh_folder(config["model"]["name"]))
    from zoo.train.run import fit

    _prepare_process()
    with _spinning_less_beside_others(spins_long):
        return fit.run(config, Path(config["run_dir"]))


def resume_command(run: Path, *, spins_long: bool = False) -> int:
    """Continue the run of a folder from its last checkpoint. spins_long: what `limit_spinning` has answered."""
    check_run(run)
    from zoo.train.run import fit

    _prepare_process()
    with _spinning_less_beside_others(spins_long):
        return fit.resume(run)


def _spinning_less_beside_others(spins_long: bool) -> AbstractContextManager[object]:
    from zoo.cli.spins import SpinWatch

    return SpinWatch() if spins_long and SpinWatch.works() else nullcontext()


def _prepare_process() -> None:
    """What a program that trains may set for its whole process, and a library may not."""
    import torch

    from zoo.train.memory.malloc import keep_freed_arrays

    if not torch.cuda.is_available():
        keep_freed_arrays()


def eval_command(path: str, settings: list[str]) -> int:
    """Measure a model; prints one line per metric."""
    from zoo.train.run.evaluate import evaluate
    from zoo.train.run.folder import is_main_process

    measured = evaluate(path, settings)
    if is_main_process():
        for name, value in measured.items():
            print(f"{name} {value:.6g}")
    return 0


def check_run(run: Path) -> None:
    """Refuse a path that is not a run's folder."""
    if run.exists() and not run.is_dir():
        own = next((folder for folder in run.resolve().parents if (folder / "config.yaml").is_file()), None)
        mend = f"zoo resume {own}" if own else "zoo train prints the folder of each run"
        raise UserError(f"a run is a folder, and {run} is a file; {mend}")
    if not run.is_dir():
        raise UserError(f"no run at {run}: there is no such folder; zoo train prints the folder of each run")
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} is not the folder of a run: it has no config.yaml; zoo train prints the folder of each run"
        )


def fresh_folder(name: str, root: Path = Path("runs")) -> Path:
    """runs/NAME-TIME, with a number when two runs start in the same second."""
    stem = re.sub(r"[^\w.-]+", "_", name) + time.strftime("-%Y%m%d-%H%M%S")
    folder, n = root / stem, 1
    while folder.exists():
        n += 1
        folder = root / f"{stem}-{n}"
    return folder


def finished(run: Path) -> bool:
    """Whether a run has written its final model."""
    return (run / "checkpoint" / "config.json").is_file()


def model_of(config: dict[str, Any]) -> str:
    """The model's name in a composed config."""
    return str(config["model"]["name"])
