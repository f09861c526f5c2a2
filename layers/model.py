"""The contract of a model: what goes in, an example of it, `forward(**batch) -> (outputs, state)`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from zoo.ops.core.call import Operators

__all__ = ["Input", "Model", "SaysInputs", "as_model"]

Device = torch.device | str | None


class Input(NamedTuple):
    """One input of a model.

    name: the keyword of `forward`, and the key in a batch of data.
    shape: names of the dimensions, as "B T" or "B C H W"; a number stands for itself.
    dtype: integers, bool or a float dtype.
    below: the bound of integers, which lie in [0, below).
    optional: it may be left out, and `example` does so.
    """

    name: str
    shape: str
    dtype: torch.dtype
    below: int = 0
    optional: bool = False

    def sample(self, sizes: Mapping[str, int], generator: torch.Generator, device: torch.device) -> Tensor:
        """Random but valid: integers uniform, bools true, floats normal."""
        shape = tuple(int(each) if each.isdigit() else sizes[each] for each in self.shape.split())
        if device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device=device)
        if self.dtype == torch.bool:
            return torch.ones(shape, dtype=torch.bool, device=device)
        if self.dtype.is_floating_point:
            return torch.randn(shape, dtype=self.dtype, generator=generator).to(device)
        return torch.randint(self.below, shape, dtype=self.dtype, generator=generator).to(device)


@runtime_checkable
class SaysInputs(Protocol):
    """An embedding, or a whole model, that says what it takes."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What `forward` takes besides a state."""


class Model(nn.Module):
    """A model of any kind: `outputs, state = model(**batch)`, with `outputs` a tensor or a named tuple of tensors.

    A subclass gives `inputs` and `forward`, and says what differs from these defaults:
        causal: True where no output sees a later input of its own sequence.
        unit: what its throughput counts, "token", "image", "frame", "action".
        operators: the public operators that its own code calls.

    `config` is the frozen dataclass that it was made of.
    """

    causal: bool = True
    unit: str = "token"
    operators: Operators = ()
    config: Any

    forward: Callable[..., tuple[Any, Any]]
    __call__: Callable[..., tuple[Any, Any]]

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What `forward` takes besides a state."""
        raise NotImplementedError(f"{type(self).__name__} must say its inputs, (Input(name, shape, dtype), ...)")

    def sizes(self, batch: int, length: int) -> dict[str, int]:
        """The size of every dimension that `inputs` names, for an example of these."""
        return {"B": batch, "T": length}

    def example(
        self, batch: int = 1, length: int = 16, *, seed: int | torch.Generator = 0, device: Device = None
    ) -> dict[str, Tensor]:
        """A random but valid batch, the same for the same seed: `model(**model.example())` runs.

        Args:
            batch: B.
            length: T of what is a sequence; inputs of one size ignore it.
            seed: or a generator on the CPU, which moves on.
            device: of the tensors; the model's own when omitted. On "meta" they have no numbers.
        """
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        if device is None:
            device = next((p.device for p in self.parameters()), torch.device("cpu"))
        sizes, where = self.sizes(batch, length), torch.device(device)
        return {each.name: each.sample(sizes, generator, where) for each in self.inputs if not each.optional}

    def arguments(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Those entries of a batch of data that `forward` takes; targets and counts are left out.

        Raises:
            ValueError: an input is missing.
        """
        missing = [each.name for each in self.inputs if not each.optional and each.name not in batch]
        if missing:
            raise ValueError(
                f"{type(self).__name__} takes {', '.join(each.name for each in self.inputs)}, and the batch has "
                f"{', '.join(batch)}; choose data with {', '.join(missing)}"
            )
        return {each.name: batch[each.name] for each in self.inputs if batch.get(each.name) is not None}

    def units(self, batch: Mapping[str, Any]) -> int:
        """How many tokens (images, frames, ...) a batch holds: the size of its first input's first two dimensions."""
        rows, columns, *_ = batch[self.inputs[0].name].shape
        return int(rows) * int(columns)

    def block_shape(self, batch: Mapping[str, Any]) -> tuple[int, int]:
        """B and T of what the blocks see of a batch, for estimates of memory."""
        rows, length, *_ = batch[self.inputs[0].name].shape
        return int(rows), int(length)

    def init_state(self, batch: int) -> Any:
        """The state before the first token: what `state=None` stands for; None for a model that carries none."""
        return None

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state after `length` tokens."""
        return 0


def as_model(module: nn.Module) -> Model:
    """A Model as it is; a plain module of tokens gets `inputs`, `example` and what else it lacks.

    Modules that do not inherit from Model are deprecated: write `class MyModel(Model)`.

    Raises:
        ValueError: nothing says what goes in.
    """
    if isinstance(module, Model):
        return module
    plain: Any = module
    own = {name for kind in type(module).__mro__ for name in vars(kind)} | set(vars(module))
    if "inputs" not in own:
        vocabulary = vars(plain.config).get("vocab_size") if "config" in own else None
        if vocabulary is None:
            raise ValueError(
                f"a model says what goes in by `inputs`, and {type(module).__name__} does not; inherit from "
                "zoo.layers.Model"
            )
        plain.inputs = (Input("tokens", "B T", torch.int64, vocabulary),)
    for name in ("causal", "unit", "operators"):
        if name not in own:
            setattr(module, name, vars(Model)[name])
    for name in ("sizes", "example", "arguments", "units", "block_shape", "init_state", "state_bytes"):
        if name not in own:
            setattr(module, name, partial(vars(Model)[name], module))  # a bound method would not be pickled
    return cast(Model, module)
