"""`zoo convert` and `zoo export`: checkpoints between zoo and other libraries."""

from pathlib import Path

from torch import nn

from zoo import checkpoint, tokenizers
from zoo.cli.models import short_count
from zoo.errors import UserError


def convert_command(source: str, folder: Path, dtype: str | None) -> int:
    """Write any checkpoint that zoo reads as one of its own, with its tokenizer."""
    located = _other(checkpoint.locate(source), folder)
    model = checkpoint.load(located, dtype=dtype)
    files = checkpoint.TextFiles(located)
    checkpoint.save(model, folder, files)
    _say(model, folder, files.paths)
    return 0


def export_command(path: str, folder: Path, dtype: str | None) -> int:
    """Write a checkpoint as transformers or flash-linear-attention loads it, with its tokenizer."""
    located = _other(checkpoint.locate(path), folder)
    model = checkpoint.load(located, dtype=dtype)
    has_text = any((located / name).is_file() for name in tokenizers.FILES)
    files = checkpoint.TextFiles(located, tokenizers.load(located).eos_id if has_text else None)
    checkpoint.export(model, folder, files)
    _say(model, folder, files.paths)
    return 0


def _other(located: Path, folder: Path) -> Path:
    """The source, when it is not also the place to write, and that place holds nothing yet."""
    if located.resolve() == folder.resolve():
        raise UserError(f"{folder} cannot be read and written at once; give another folder to write")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"a checkpoint is written into a folder, and {folder} is a file; give another folder")
    if folder.is_dir() and any(folder.iterdir()):
        what = "a run" if (folder / "config.yaml").is_file() else "other files"
        raise UserError(f"a checkpoint is written into an empty folder, and {folder} holds {what}; give another folder")
    return located


def _say(model: nn.Module, folder: Path, texts: list[Path]) -> None:
    parameters = list(model.parameters())
    kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    text = ", ".join(path.name for path in texts) or "none came with it"
    count = short_count(sum(p.numel() for p in parameters))
    print(f"{folder}: {model.name}, {count} parameters in {kinds}; tokenizer: {text}")
