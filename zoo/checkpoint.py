"""Models on disk: a folder with model.safetensors and config.json, written so that a crash leaves the old one whole.

Folders of other libraries are read too, and written (`export`); zoo.convert knows their formats. Nothing here runs
code from a file: weights are safetensors, and whatever is pickled is read with weights_only=True.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.convert import table
from zoo.convert.fields import Fields
from zoo.convert.fill import WEIGHTS as DTYPES
from zoo.convert.fill import fill
from zoo.convert.format import Format
from zoo.convert.stored import Held, first_line, load_pickle, open_folder, read_json
from zoo.errors import UsageError, UserError, remedy
from zoo.registry import DEFAULT_SIZE, create_model, model_info

FORMAT, VERSION = "zoo", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FINISHED = "checkpoint"  # in a run's folder: the final model
UNFINISHED = "checkpoints/last.ckpt"  # in a run's folder: the trainer's own
IN_TRAINER = "zoo_model"  # the entry of a trainer's .ckpt that describes the model
TASK_PREFIX = "model."  # the model's place inside the training task
_SHAPING = ("d_model", "n_layers", "n_heads", "n_v_heads", "head_dim", "pattern")  # what tells sizes apart
TEXT_FILES = (
    "zoo_tokenizer.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


class SavesItself(Protocol):
    """Whatever can write itself into a folder."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into the folder."""
        ...


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: SavesItself | None = None,
    *,
    codec: SavesItself | None = None,
) -> Path:
    """Write a model of the registry as model.safetensors + config.json (+ the files of the tokenizer or codec).

    Everything is first written beside the folder and only then renamed into it: when the disk is full or the process
    dies, the old checkpoint is still there and still whole.

    Args:
        model: built by `create_model`, so that it knows its name, size and config.
        folder: made when missing; an older checkpoint in it is replaced.
        tokenizer: saved next to the weights, for `zoo generate`.
        codec: in its place, of whatever the tokens are; see `zoo.codecs`. `zoo.codecs.load(folder)` reads either.

    Returns:
        the folder.

    Raises:
        UserError: the model is not from the registry, or the files cannot be written.
    """
    described = describe(model)

    def write(staged: Path) -> None:
        save_file(_unique_tensors(model), staged / WEIGHTS, metadata={"format": "pt"})
        for meaning in (tokenizer, codec):
            if meaning is not None:
                meaning.save(staged)
        names = sorted(path.name for path in staged.iterdir())
        _write(staged / CONFIG, json.dumps(described | {"files": names}, indent=2) + "\n")

    return _replace_folder(Path(folder), write)


def export(model: nn.Module, folder: str | os.PathLike[str], tokenizer: SavesItself | None = None) -> Path:
    """Write a model as `transformers` (the transformer, as Llama or Mistral) or `flash-linear-attention` loads it.

    Args:
        model: of the registry.
        folder: as for `save`: replaced as a whole or not at all.
        tokenizer: its files are written beside the weights.

    Returns:
        the folder.

    Raises:
        UserError: the other library has no such model, or the files cannot be written.
    """
    name = describe(model)["model"]
    format = table.writer(name)
    assert format.undescribe is not None
    config = format.undescribe(model)
    tensors = _unique_tensors(model)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    scales = format.scales(model)
    if scales and not dtypes <= {torch.float32, torch.float64}:
        raise UserError(
            f"{format.kind} has one eps for all norms, so this model's weights must be scaled, which half precision "
            "would round; add --dtype float32, or train with model.output_norm_eps equal to model.norm_eps"
        )
    stored = {
        format.names(ours): (tensor * scales[ours] if ours in scales else tensor).reshape(
            format.stored_shape(ours, tuple(tensor.shape))
        )
        for ours, tensor in tensors.items()
    }
    dtype = str(next(iter(dtypes)) if len(dtypes) == 1 else torch.float32).removeprefix("torch.")
    eos = getattr(tokenizer, "eos_id", None)
    config |= {"torch_dtype": dtype, "bos_token_id": None, "eos_token_id": eos, "pad_token_id": None}

    def write(staged: Path) -> None:
        save_file(stored, staged / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(staged)
        _write(staged / CONFIG, json.dumps(config, indent=2) + "\n")

    return _replace_folder(Path(folder), write)


def _replace_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a folder beside this one, then rename its files into it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
            write(Path(staging))
            _move_in(Path(staging), folder)
    except (OSError, SafetensorError) as error:
        kept = "the checkpoint that was there is kept" if (folder / CONFIG).exists() else "nothing was left behind"
        raise UserError(f"no checkpoint could be written to {folder} ({first_line(error)}); {kept}") from error
    return folder


class TextFiles:
    """The tokenizer of a checkpoint, as the files that it consists of; saving copies them as they are.

    eos_id: of the tokenizer, for an exported config; None when nobody said.
    """

    def __init__(self, folder: Path, eos_id: int | None = None):
        self.paths = [folder / name for name in TEXT_FILES if (folder / name).is_file()]
        self.eos_id = eos_id

    def save(self, folder: Path) -> None:
        """Copy the files into the folder, byte by byte."""
        for path in self.paths:
            shutil.copyfile(path, folder / path.name)


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


def load(
    path: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """Read a model, in eval mode. Folders of other libraries are recognised and converted.

    The weights are read one tensor at a time into a model without memory of its own, so that loading needs little
    more than the weights.

    Args:
        path: a checkpoint folder; a run's folder (its final model, or the last state of an unfinished run); a .ckpt
            file of the trainer; a folder of transformers or flash-linear-attention; or owner/name on the Hugging
            Face hub.
        dtype: of the floating-point tensors, such as torch.bfloat16 or "bfloat16"; that of the file when omitted. A
            file that mixes several is read in one: the dtype that its config declares (transformers does the same),
            else the widest of them.
        device: the CPU when omitted.

    Raises:
        UserError: nothing is there, or it is damaged, of an unknown format, or not of the model that its config names;
            or a weight is stored as integers.
    """
    kind, place = _dtype(dtype), None if device is None else torch.device(device)
    source = locate(path)
    format: Format | None = None
    declared: torch.dtype | None = None
    if source.suffix == ".ckpt":
        described, tensors = read_trainer(source)
        stored: Any = Held(tensors, str(source))
    else:
        described, format, declared = _read_description(source)
        stored = open_folder(source)
    try:
        model = _without_memory(described)
    except UserError as error:
        raise UserError(f"{source} holds a model that cannot be built here: {error}") from error
    fill(model, stored, format, dtype=kind, declared=declared, device=place)
    return model.to(place).eval() if place is not None else model.eval()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {str(d).removeprefix("torch."): d for d in DTYPES}
    if dtype not in known:
        end = remedy(dtype, known, f"known are {', '.join(known)}")
        raise UsageError(f"no dtype {dtype!r}{end}")
    return known[dtype]


def _without_memory(described: dict[str, Any]) -> nn.Module:
    """The model on the meta device; with memory where it makes tensors that are in no checkpoint."""
    with torch.device("meta"):
        model = create_model(described["model"], described["size"], **described["config"])
    kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for module in model.modules():
        made = [*module._buffers.values(), *(v for v in vars(module).values() if isinstance(v, Tensor))]
        if any(tensor is not None and id(tensor) not in kept for tensor in made):
            return create_model(described["model"], described["size"], **described["config"])
    return model


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


def _read_description(folder: Path) -> tuple[dict[str, Any], Format | None, torch.dtype | None]:
    """Model, size and config; the foreign format that they were read from, and the dtype that it declares."""
    path = folder / CONFIG
    values = read_json(path)
    if not isinstance(values, dict) or "format" in values:
        return _checked(values, path), None, None
    format = table.recognise(values, str(path))
    model, config = format.describe(Fields(values, str(path)))
    described = {"model": model, "size": _size_of(model, config), "config": config}
    return described, format, _declared(values)


def _declared(values: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a foreign config names, under the present name of the field or the older one."""
    name = values.get("dtype") or values.get("torch_dtype")
    return next((dtype for dtype in DTYPES if str(dtype).removeprefix("torch.") == name), None)


def _size_of(model: str, config: dict[str, Any]) -> str:
    """The size of the registry that a config is, vocabulary aside; the default's name for any other."""
    info = model_info(model)
    for size in info.sizes:
        if all(info.config(size)[name] == value for name, value in config.items() if name in _SHAPING):
            return size
    return DEFAULT_SIZE


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


def read_trainer_state(path: Path) -> dict[str, Any]:
    """All that a trainer's .ckpt holds: tensors and plain values; no code of the file is run.

    Raises:
        UserError: the file is damaged, holds other objects, or is not from zoo train.
    """
    content = load_pickle(path)
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} is no trainer's checkpoint: it has no state_dict of tensors; take another copy")
    state: dict[str, Any] = content
    return state


def read_trainer(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model inside a trainer's .ckpt.

    Raises:
        UserError: the file is damaged, or not from zoo train.
    """
    content = read_trainer_state(path)
    described, weights = content.get(IN_TRAINER), content["state_dict"]
    tensors = {
        name.removeprefix(TASK_PREFIX).removeprefix("_orig_mod."): tensor  # _orig_mod: a compiled model
        for name, tensor in weights.items()
        if name.startswith(TASK_PREFIX)
    }
    return _checked(described, path), tensors


def _download(name: str) -> Path:
    """A snapshot of a repository: its configuration, its tokenizer, and its weights, as safetensors when it has any."""
    texts = ["*.json", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*texts, "model*.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*texts, "pytorch_model*.bin"]))
    except HFValidationError as error:
        raise UserError(f"no folder {name} here, and {name!r} is no name of the hub either; check the path") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error).partition(". ")[0].rstrip(".")
        raise UserError(
            f"no folder {name} here, and {name} cannot be had from the Hugging Face hub ({reason}); "
            f"fetch it where there is a network (hf download {name} --local-dir FOLDER) and give that folder"
        ) from error
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name} on the Hugging Face hub is no checkpoint: it has no {CONFIG}; check the name")
    return folder


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU without second names of shared tensors."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


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
        files = _checked(read_json(folder / CONFIG), folder / CONFIG).get("files", [])
    except UserError:
        return set()
    return {name for name in files if isinstance(name, str) and Path(name).name == name and (folder / name).is_file()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
