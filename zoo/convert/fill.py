"""Stored tensors into a model, one at a time, and every difference between the two named."""

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.convert.format import Format, as_stored, same_shape
from zoo.convert.stored import Stored
from zoo.errors import UserError

WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes that models compute in
_SHOWN = 6  # groups of names in one sentence


def fill(
    model: nn.Module,
    stored: Stored,
    format: Format | None = None,
    *,
    dtype: torch.dtype | None = None,
    declared: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Give a model, which may be on the meta device, the stored tensors as its own.

    Memory: the model and one tensor more; nothing of the stored file stays mapped.

    Args:
        model: every parameter and persistent buffer is replaced.
        stored: where the tensors come from.
        format: how they are called and shaped there; as in the model when omitted.
        dtype: of the floating-point tensors. When omitted, that of the file; where a file mixes several, the declared
            one, else the widest of them, so that nothing is rounded.
        declared: the dtype that the file's config gives, if it gives one.
        device: the CPU when omitted.

    Raises:
        UserError: tensors are missing, unknown, of another shape (all are named, grouped by layers), or of another
            kind than the model's: integers where it has weights.
    """
    names = format.names if format else lambda name: name
    stands_for = format.stands_for if format else as_stored
    stored_shape = format.stored_shape if format else same_shape
    places = _places(model)
    ours = {names(name): name for same in places.values() for name in same}
    shapes = stored.shapes()
    held = {name: stands_for(name, shapes.keys()) for name in shapes}
    present = {part for parts in held.values() for part in parts}

    missing = [names(same[0]) for same in places.values() if not present & {names(name) for name in same}]
    unknown = [name for name, parts in held.items() if set(parts) - ours.keys()]
    what = f"{stored.source} does not hold the weights of model {getattr(model, 'name', type(model).__name__)!r}"
    if missing or unknown:
        counts = [f"{len(missing)} tensors are missing ({grouped(missing)})"] if missing else []
        counts += [f"{len(unknown)} are unknown ({grouped(unknown)})"] if unknown else []
        raise UserError(f"{what}: {' and '.join(counts)}")
    tensors = model.state_dict(keep_vars=True)
    for name, parts in held.items():
        if parts:
            wanted = stored_shape(ours[parts[0]], tuple(tensors[ours[parts[0]]].shape))
            wanted = (len(parts) * wanted[0], *wanted[1:]) if len(parts) > 1 else wanted
            if wanted != shapes[name]:
                raise UserError(f"{what}: {name!r} is {shapes[name]} in the file and must be {wanted}")
    dtypes = {name: kind for name, kind in stored.dtypes().items() if held[name]}
    for name, kind in dtypes.items():
        own_kind = tensors[ours[held[name][0]]].dtype
        if kind.is_floating_point != own_kind.is_floating_point or kind.is_complex != own_kind.is_complex:
            raise UserError(
                f"{what}: {name!r} is {_spelled(kind)} in the file and must be "
                f"{'floating-point numbers' if own_kind.is_floating_point else _spelled(own_kind)}; quantised weights "
                "must be stored as the numbers that they stand for"
            )
    if dtype is None:
        dtype = _common(dtypes, declared, what)

    done: dict[int, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in stored.tensors():
        piece = tensor
        for part, piece in zip(held[name], tensor.chunk(max(1, len(held[name]))), strict=False):
            own = tensors[ours[part]]
            kind = own.dtype if dtype is None or not piece.is_floating_point() else dtype
            new = _own_copy(piece.reshape(own.shape), kind, device, taken, mapped=stored.mapped)
            if id(own) not in done:
                done[id(own)] = new
                _replace(model, places[id(own)], own, new)
            elif not torch.equal(done[id(own)], new):
                raise UserError(f"{what}: {name!r} must equal the tensor that it is tied to, and does not")
        del tensor, piece  # what lies in a file must not outlive its turn


def _common(dtypes: Mapping[str, torch.dtype], declared: torch.dtype | None, what: str) -> torch.dtype | None:
    """One dtype for all floating-point tensors; None where there are none."""
    kinds = {kind: name for name, kind in dtypes.items() if kind.is_floating_point}
    for kind, name in kinds.items():
        if kind not in WEIGHTS and declared is None:
            raise UserError(
                f"{what}: {name!r} is {_spelled(kind)}, which no operator computes in; give the dtype to load it in, "
                "such as bfloat16"
            )
    if declared is not None and (len(kinds) > 1 or not kinds.keys() <= set(WEIGHTS)):
        return declared
    return functools.reduce(torch.promote_types, kinds) if kinds else None


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _places(model: nn.Module) -> dict[int, list[str]]:
    """The names of every tensor of the state dict; several for a shared one."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        places[id(tensor)].append(name)
    return places


def _own_copy(
    tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None, taken: set[int], *, mapped: bool
) -> Tensor:
    """The tensor in memory of its own: not that of a mapped file, nor memory that another parameter has a part of."""
    new = tensor.detach().to(device=device, dtype=dtype).contiguous()
    storage = new.untyped_storage()
    same = storage.data_ptr() == tensor.untyped_storage().data_ptr()
    if same and (mapped or storage.nbytes() != new.nbytes or storage.data_ptr() in taken):
        new = new.clone()
    taken.add(new.untyped_storage().data_ptr())
    return new


def _replace(model: nn.Module, names: Iterable[str], own: Tensor, new: Tensor) -> None:
    if isinstance(own, nn.Parameter):
        parameter = nn.Parameter(new, requires_grad=own.requires_grad and new.is_floating_point())
        parameter.__dict__.update(own.__dict__)  # marks such as _no_weight_decay
        new = parameter
    for name in names:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        kept: dict[str, Any] = module._parameters if last in module._parameters else module._buffers
        kept[last] = new


def grouped(names: Iterable[str]) -> str:
    """Names that differ only in numbers of layers as one: model.layers.{0-23}.mlp.up_proj.weight."""
    groups: dict[str, set[int]] = defaultdict(set)
    for name in names:
        layer = re.search(r"\.(\d+)\.", name)
        groups[name if layer is None else name[: layer.start()] + ".{}." + name[layer.end() :]] |= (
            set() if layer is None else {int(layer[1])}
        )
    shown = [
        pattern.replace("{}", next(iter(map(str, numbers))) if len(numbers) == 1 else "{" + _ranges(numbers) + "}", 1)
        for pattern, numbers in list(groups.items())[:_SHOWN]
    ]
    more = len(groups) - len(shown)
    return ", ".join(shown) + (f" and {more} more kinds" if more else "")


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> 0-2,5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
