"""The tensors of a checkpoint folder: safetensors or pickled, in one file or many, read one at a time."""

import json
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.errors import UserError

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
# Pages of a mapped file count as memory in use until it is closed: closing it this often bounds them.
MAPPED_BYTES = 16 << 20

Shape = tuple[int, ...]


class Stored(Protocol):
    """The tensors of a checkpoint by their names, read one at a time."""

    source: str

    @property
    def mapped(self) -> bool:
        """Whether the tensors lie in a mapped file, which must not outlive the reading."""
        ...

    def shapes(self) -> dict[str, Shape]:
        """Every name and shape, without reading the tensors."""
        ...

    def dtypes(self) -> dict[str, torch.dtype]:
        """Every name and dtype, without reading the tensors."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once; keep none longer than until the next, or copy it."""
        ...


def open_folder(folder: Path) -> Stored:
    """The weights in a checkpoint folder.

    Raises:
        UserError: there are none, they are damaged or incomplete, or a pickle holds more than tensors.
    """
    for name, kind in ((SAFETENSORS, _Safetensors), (PICKLED, _Pickled)):
        if (folder / name).is_file():
            return kind([folder / name])
        if (folder / (name + INDEX)).is_file():
            return _Indexed(folder, folder / (name + INDEX), kind)
    raise UserError(
        f"{folder} has no {SAFETENSORS}, {PICKLED} or index of several; take another copy of this checkpoint"
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_hook=_infinity)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); take another copy of this checkpoint") from error


def _infinity(values: dict[str, Any]) -> Any:
    """transformers writes numbers that JSON lacks as {"__float__": "Infinity"}."""
    return float(values["__float__"]) if values.keys() == {"__float__"} else values


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_pickle(path: Path, *, device: str = "cpu") -> Any:
    """What a torch file holds; nothing but tensors and plain containers is unpickled, and no code is run.

    Raises:
        UserError: the file is damaged, or holds anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Detected pickle protocol")  # the file is refused or it is not
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch's unpickler has no common base for what a damaged file does to it
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and ("Unsupported" in text or "GLOBAL" in text):
            named = re.search(r"GLOBAL ([\w.]+)", text)
            what = f" ({named[1]})" if named else ""
            raise UserError(
                f"{path} holds objects other than tensors{what}, which could run code; it was refused and nothing "
                "of it was run: ask its author for safetensors"
            ) from error
        raise UserError(f"{path} is damaged or cut short{_reason(text)}; take another copy") from error


def _reason(text: str) -> str:
    """What torch says of a damaged file, in brackets, but never its advice to load the file without the safety."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "").partition(". ")[0]
    return f" ({first})" if first and "weights" not in first.lower() else ""


class Held:
    """Tensors already in memory, given away one by one."""

    mapped = False

    def __init__(self, tensors: dict[str, Tensor], source: str):
        self._tensors, self.source = tensors, source

    def shapes(self) -> dict[str, Shape]:
        """The shapes of the tensors that are still held, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of the tensors that are still held, by name."""
        return {name: tensor.dtype for name, tensor in self._tensors.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, the last one first; each is forgotten as it is given."""
        while self._tensors:
            yield self._tensors.popitem()


class _Safetensors:
    mapped = True

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self.source = str(paths[0])

    def shapes(self) -> dict[str, Shape]:
        return {name: shape for path in self._paths for name, shape in self.file_shapes(path).items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: dtype for path in self._paths for name, dtype in self.file_dtypes(path).items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path in self._paths:
            yield from self.file_tensors(path)

    @staticmethod
    def file_shapes(path: Path) -> dict[str, Shape]:
        with _reading(path), safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict

    @staticmethod
    def file_dtypes(path: Path) -> dict[str, torch.dtype]:
        with _reading(path), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - no dict

    @staticmethod
    def file_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
        with _reading(path):
            with safe_open(path, framework="pt") as file:
                left = list(file.keys())[::-1]
            while left:
                mapped = 0
                with safe_open(path, framework="pt") as file:
                    while left:
                        tensor = file.get_tensor(left[-1])  # mapped; its pages are read when they are used
                        if mapped and mapped + tensor.nbytes > MAPPED_BYTES:
                            break
                        mapped += tensor.nbytes
                        yield left.pop(), tensor
                        del tensor
                tensor = None


class _reading:
    """Turns what safetensors raises for a damaged file into one sentence."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SafetensorError | OSError):
            sentence = f"{self._path} is damaged or cut short ({first_line(error)}); take another copy"
            raise UserError(sentence) from error


class _Pickled(_Safetensors):
    mapped = False

    @staticmethod
    def file_shapes(path: Path) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in _tensors_of(path, "meta").items()}

    @staticmethod
    def file_dtypes(path: Path) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in _tensors_of(path, "meta").items()}

    @staticmethod
    def file_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
        yield from Held(_tensors_of(path, "cpu"), str(path)).tensors()


def _tensors_of(path: Path, device: str) -> dict[str, Tensor]:
    content = load_pickle(path, device=device)
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} must hold named tensors and nothing else; it is another kind of file")
    return dict(content)


class _Indexed:
    """Several files and an index that says which tensor is in which."""

    def __init__(self, folder: Path, index: Path, kind: type[_Safetensors]):
        self.source, self._kind, self.mapped = str(index), kind, kind.mapped
        content = read_json(index)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
            raise UserError(f"{index} has no weight_map from tensors to files; take another copy of this checkpoint")
        files = sorted(set(places.values()))
        foreign = [name for name in files if Path(name).name != name]
        if foreign:
            raise UserError(f"{index} names {foreign[0]!r}, which is not a file beside it; take another copy")
        gone = [name for name in files if not (folder / name).is_file()]
        if gone:
            raise UserError(
                f"{index} names {len(files)} files and {len(gone)} of them are not there ({', '.join(gone[:3])}"
                f"{', ...' if len(gone) > 3 else ''}); copy or download them into the same folder"
            )
        self._paths = {folder / name: {t for t, f in places.items() if f == name} for name in files}

    def shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for path, listed in self._paths.items():
            inside = self._kind.file_shapes(path)
            if odd := sorted(listed ^ inside.keys()):
                says = "lists" if odd[0] in listed else "does not list"
                raise UserError(
                    f"{self.source} {says} {odd[0]!r} in {path.name}, which says otherwise; take another copy"
                )
            shapes |= inside
        return shapes

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: dtype for path in self._paths for name, dtype in self._kind.file_dtypes(path).items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path in self._paths:
            yield from self._kind.file_tensors(path)
