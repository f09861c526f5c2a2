"""The dtypes of stored weights: a loaded model computes in one of them, and integers are no weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from zoo import checkpoint
from zoo.errors import UserError

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model("transformer", "tiny", vocab_size=50).to(dtype)


def trainers(model: nn.Module, folder: Path) -> Path:
    """A state as the trainer keeps it."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    path = folder / "last.ckpt"
    folder.mkdir()
    torch.save({"state_dict": weights, checkpoint.IN_TRAINER: checkpoint.describe(model)}, path)
    return path


def edited(path: Path, change: Callable[[str, Tensor], Tensor]) -> dict[str, torch.dtype]:
    """Change stored tensors by name; their dtypes now."""
    if path.suffix == ".ckpt":
        content = torch.load(path)
        content["state_dict"] = {name: change(name, tensor) for name, tensor in content["state_dict"].items()}
        torch.save(content, path)
        return {name: tensor.dtype for name, tensor in content["state_dict"].items()}
    tensors = {name: change(name, tensor) for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return {name: tensor.dtype for name, tensor in tensors.items()}


def as_pickle(path: Path) -> Path:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


WRITERS: dict[str, Callable[[nn.Module, Path], Path]] = {
    "ours": zoo.save, "foreign": checkpoint.export, "trainer": trainers,
}  # fmt: skip
EVERY = pytest.mark.parametrize("kind", WRITERS)


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in model.state_dict().values()}


def norms_in(dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    return lambda name, tensor: tensor.to(dtype) if tensor.ndim == 1 else tensor


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_dtype_is_kept(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert dtypes_of(zoo.load(WRITERS[kind](made(dtype), tmp_path / "m"))) == {dtype}


@pytest.mark.parametrize("kind", ["ours", "trainer"])
@pytest.mark.parametrize(
    ("most", "norms", "widest"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),  # neither holds the other
        (torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_a_mixture_is_read_in_the_widest_of_its_dtypes(
    kind: str, most: torch.dtype, norms: torch.dtype, widest: torch.dtype, tmp_path: Path
) -> None:
    path = WRITERS[kind](made(most), tmp_path / "m")
    assert set(edited(path, norms_in(norms)).values()) == {most, norms}
    model = zoo.load(path)
    assert dtypes_of(model) == {widest}
    with torch.no_grad():
        assert model(TOKENS)[0].isfinite().all()
    for name, tensor in made(most).state_dict().items():
        want = tensor.to(norms) if tensor.ndim == 1 else tensor
        assert torch.equal(model.state_dict()[name], want.to(widest))  # nothing is rounded
    assert dtypes_of(zoo.load(path, dtype=torch.float16)) == {torch.float16}


@pytest.mark.parametrize("field", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("declared", ["bfloat16", "float32", None])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_mixture_in_a_foreign_folder_is_read_in_the_declared_dtype(
    field: str, declared: str | None, pickled: bool, tmp_path: Path
) -> None:
    path = checkpoint.export(made(torch.bfloat16), tmp_path / "m")
    edited(path, norms_in(torch.float32))
    config = json.loads((path / "config.json").read_text())
    del config["torch_dtype"]
    (path / "config.json").write_text(json.dumps(config | {field: declared}))
    model = zoo.load(as_pickle(path) if pickled else path)
    assert dtypes_of(model) == {getattr(torch, declared or "float32")}
    with torch.no_grad():
        assert model(TOKENS)[0].isfinite().all()


def test_a_mixture_is_cast_as_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = checkpoint.export(made(torch.bfloat16), tmp_path / "m")
    edited(path, norms_in(torch.float32))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert dtypes_of(theirs) == dtypes_of(zoo.load(path)) == {torch.bfloat16}


@EVERY
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("wanted", [None, torch.float32], ids=str)
def test_a_weight_of_whole_numbers_is_refused_by_name(
    kind: str, dtype: torch.dtype, wanted: torch.dtype | None, tmp_path: Path
) -> None:
    path = WRITERS[kind](made(), tmp_path / "m")
    changed = [name for name, now in edited(path, norms_in(dtype)).items() if now == dtype]
    with pytest.raises(UserError, match="must be floating-point numbers") as error:
        zoo.load(path, dtype=wanted)
    message = str(error.value)
    assert "\n" not in message
    assert any(repr(name.removeprefix("model.") if kind == "trainer" else name) in message for name in changed)
    assert f"is {str(dtype).removeprefix('torch.')} in the file" in message


@EVERY
def test_eight_bit_floats_want_a_dtype(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](made(), tmp_path / "m")
    edited(path, lambda name, tensor: tensor.to(torch.float8_e5m2))
    if kind == "foreign":  # its config says float32
        assert dtypes_of(zoo.load(path)) == {torch.float32}
        return
    with pytest.raises(UserError, match="is float8_e5m2, which no operator computes in; give the dtype"):
        zoo.load(path)
    assert dtypes_of(zoo.load(path, dtype="bfloat16")) == {torch.bfloat16}
