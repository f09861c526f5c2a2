"""Bytes that are live while something runs, counted tensor by tensor; on the meta device, without having them."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoo.ops.core.autograd import apply

__all__ = ["LiveBytes", "flash_on_meta"]


class LiveBytes(TorchDispatchMode):
    """Counts storages from the operation that makes them until nobody holds them, the backward pass included.

    Attributes: live, peak: bytes now and at most since the start or `reset`. What existed before the `with` does not
    count, nor what a kernel takes and gives back inside.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)  # by name: `super().__init__` has no types
        self.live = self.peak = 0
        self._storages: dict[int, tuple[Any, int]] = {}

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for x in tree_leaves(result):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            if storage._cdata in self._storages:
                continue
            if given is None:  # an alias of what was there before
                tensors = (y for y in tree_leaves((args, kwargs)) if isinstance(y, Tensor))
                given = {y.untyped_storage()._cdata for y in tensors}
            if storage._cdata not in given:
                self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        alone = weakref.ref(self)

        def gone(_: Any) -> None:
            mode = alone()
            if mode is not None and mode._storages.pop(key, None) is not None:
                mode.live -= size

        self._storages[key] = weakref.ref(storage, gone), size
        self.live += size
        self.peak = max(self.peak, self.live)

    def __enter__(self) -> Self:
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._storages.clear()
        TorchDispatchMode.__exit__(self, kind, error, trace)


@contextmanager
def flash_on_meta() -> Iterator[None]:
    """Attention on the meta device keeps what it keeps elsewhere; torch's own takes the form that makes a T x S matrix.

    A mode for torch functions would not do: it is off while torch.autograd.grad runs, where blocks are recomputed.
    """
    real = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return apply(_Flash, q, k, v) if q.is_meta else real(q, k, v, *args, **kwargs)

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _Flash(torch.autograd.Function):
    """(B, H, T, K), (B, Hk, S, K), (B, Hk, S, V) -> (B, H, T, V): the shapes of a blockwise attention, no numbers."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = q.new_empty(*q.shape[:3], v.shape[-1])
        sums = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        ctx.save_for_backward(q, k, v, o, sums)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
