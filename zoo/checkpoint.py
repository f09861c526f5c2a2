"""Models on disk: a folder with model.safetensors and config.json, written so that a crash leaves the old one whole.

Nothing here runs code from a file: weights are safetensors, and a trainer's own .ckpt is read with weights_only=True.
"""

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.registry import create_model

FORMAT, VERSION = "zoo", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FINISHED = "checkpoint"  # in a run's folder: the final model
UNFINISHED = "checkpoints/last.ckpt"  # in a run's folder: the trainer's own
IN_TRAINER = "zoo_model"  # the entry of a trainer's .ckpt that describes the model
TASK_PREFIX = "model."  # the model's place inside the training task


class Tokenizer(Protocol):
    """Whatever can write itself into a folder."""

    def save(self, folder: Path) -> None: ...


def save(model: nn.Module, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> Path:
    """Write a model of the registry as model.safetensors + config.json (+ the tokenizer's files).

    Everything is first written beside the folder and only then renamed into it: when the disk is full or the process
    dies, the old checkpoint is still there and still whole.

    Args:
        model: built by `create_model`, so that it knows its name, size and config.
        folder: made when missing; an older checkpoint in it is replaced.
        tokenizer: saved next to the weights, for `zoo generate`.

    Returns:
        the folder.

    Raises:
        UserError: the model is not from the registry, or the files cannot be written.
    """
    folder, described = Path(folder), describe(model)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
            staged = Path(staging)
            save_file(_unique_tensors(model), staged / WEIGHTS, metadata={"format": "pt"})
            if tokenizer is not None:
                tokenizer.save(staged)
            names = sorted(path.name for path in staged.iterdir())
            _write(staged / CONFIG, json.dumps(described | {"files": names}, indent=2) + "\n")
            _move_in(staged, folder)
    except (OSError, SafetensorError) as error:
        kept = "the checkpoint that was there is kept" if (folder / CONFIG).exists() else "nothing was left behind"
        raise UserError(f"no checkpoint could be written to {folder} ({_first_line(error)}); {kept}") from error
    return folder


def describe(model: nn.Module) -> dict[str, Any]:
    """What config.json says of a model: enough to build it again. A trainer keeps it in its .ckpt under IN_TRAINER.

    Raises:
        UserError: the model is not from the registry.
    """
    for attribute in ("name", "size", "config"):
        if not hasattr(model, attribute):
            kind = type(model).__name__
            raise UserError(f"only models of zoo.create_model can be saved: this {kind} has no {attribute!r}")
    known = {"format": FORMAT, "version": VERSION, "model": model.name, "size": model.size}
    return known | {"config": asdict(cast(Any, model.config))}


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Read a model, in eval mode and in the dtype of its file.

    Args:
        path: a checkpoint folder; a run's folder (its final model, or the last state of an unfinished run); a .ckpt
            file of the trainer; or owner/name on the Hugging Face hub.

    Raises:
        UserError: nothing is there, or it is damaged, of another format, or not of the model that its config names.
    """
    found = locate(path)
    described, tensors = read_trainer(found) if found.suffix == ".ckpt" else read_folder(found)
    try:
        model = create_model(described["model"], described["size"], **described["config"])
    except UserError as error:
        raise UserError(f"{found} holds a model that cannot be built here: {error}") from error
    _fill(model, tensors, found)
    return model.eval()


def locate(path: str | os.PathLike[str]) -> Path:
    """The checkpoint folder or .ckpt file that a path means; owner/name is downloaded when no such path exists."""
    given = Path(path)
    if (given / CONFIG).is_file() or (given.suffix == ".ckpt" and given.is_file()):
        return given
    if (given / FINISHED / CONFIG).is_file():
        return given / FINISHED
    if (given / UNFINISHED).is_file():
        return given / UNFINISHED
    if (given / "config.yaml").is_file():
        raise UserError(f"the run {given} has not saved a model yet; zoo resume {given} continues it")
    if given.exists():
        raise UserError(f"{given} is no checkpoint: it has no {CONFIG}; give a run's folder or a checkpoint's")
    if len(given.parts) == 2 and not given.is_absolute() and "." not in given.parts[0]:
        return _download(str(path))
    raise UserError(f"no checkpoint at {given}: there is no such folder; give a run's folder or a checkpoint's")


def run_of(path: str | os.PathLike[str]) -> Path | None:
    """The folder of the run that a path is, or lies in."""
    given = Path(path).resolve()
    return next((folder for folder in (given, *given.parents) if (folder / "config.yaml").is_file()), None)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What config.json says, and the tensors beside it."""
    return read_config(folder), _read_weights(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json, with model, size and config.

    Raises:
        UserError: it is damaged or of another format.
    """
    path = folder / CONFIG
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({_first_line(error)}); take another copy of this checkpoint") from error
    return _checked(described, path)


def _checked(described: Any, source: Path) -> dict[str, Any]:
    """A description of a model, if it is one."""
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        kind = described.get("model_type") if isinstance(described, dict) else None
        says = f"it says model_type {kind!r}" if kind else f"it does not say format {FORMAT!r}"
        raise UserError(f"{source} does not describe a model of zoo: {says}; give a folder that zoo.save wrote")
    if described.get("version") != VERSION:
        version = described.get("version")
        raise UserError(f"{source} has version {version!r} of the format, and this zoo reads {VERSION}; update seqzoo")
    for key, kind in {"model": str, "size": str, "config": dict}.items():
        if not isinstance(described.get(key), kind):
            raise UserError(f"{source} is damaged: {key!r} must be {kind.__name__}; take another copy")
    return described


def read_trainer(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model inside a trainer's .ckpt.

    Raises:
        UserError: the file is damaged, or not from zoo train.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        described, weights = content.get(IN_TRAINER), content["state_dict"]
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or no trainer's checkpoint ({_first_line(error)}); try another") from error
    tensors = {
        name.removeprefix(TASK_PREFIX).removeprefix("_orig_mod."): tensor  # _orig_mod: a compiled model
        for name, tensor in weights.items()
        if name.startswith(TASK_PREFIX)
    }
    return _checked(described, path), tensors


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"no folder {name} here, and {name} cannot be had from the Hugging Face hub ({_first_line(error)})"
        ) from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        only = f", only {pickled[0]}, which zoo does not open because it can run code" if pickled else ""
        raise UserError(f"{folder} has no {WEIGHTS}{only}; take another copy of this checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or cut short ({_first_line(error)}); take another copy") from error


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU without second names of shared tensors."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Put the tensors into the model, whatever their dtype, and refuse any that is missing, too many or misshapen."""
    own = model.state_dict(keep_vars=True)
    wanted = _unique_tensors(model).keys()
    missing, foreign = sorted(wanted - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or foreign:
        counts = [f"{len(missing)} tensors of the model are missing, such as {missing[0]!r}"] if missing else []
        counts += [f"{len(foreign)} of its tensors are unknown, such as {foreign[0]!r}"] if foreign else []
        raise UserError(f"{source} does not hold the weights of model {model.name!r}: {' and '.join(counts)}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise UserError(
                f"{source} does not hold the weights of model {model.name!r}: {name!r} is {tuple(tensor.shape)} "
                f"in the file and must be {tuple(own[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].data = tensor.to(own[name].device, copy=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _move_in(staged: Path, folder: Path) -> None:
    """Rename the staged files into the folder, config.json last, and drop the older checkpoint's other files."""
    for path in staged.rglob("*"):
        if path.is_file():
            _sync(path)
    folder.mkdir(exist_ok=True)
    old = _listed_files(folder)
    new = sorted(staged.iterdir(), key=lambda path: path.name == CONFIG)
    for path in new:
        target = folder / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(path, target)
    for name in old - {path.name for path in new}:
        (folder / name).unlink(missing_ok=True)
    _sync(folder)


def _listed_files(folder: Path) -> set[str]:
    """The files that an older checkpoint in this folder consists of, by its own word."""
    try:
        files = read_config(folder).get("files", [])
    except UserError:
        return set()
    return {name for name in files if isinstance(name, str) and Path(name).name == name and (folder / name).is_file()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
