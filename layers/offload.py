"""Tensors that wait for the backward pass on the host: on CUDA copied beside the computation, on a CPU just copied.

The last tensor that was packed stays on the device: the backward pass begins with it. When a tensor is packed, the one
before it leaves; when one is unpacked, the one before it is fetched. So neither modules nor training loops say when.
"""

import weakref
from collections import defaultdict, deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

STAY = 1  # tensors that are never sent, since the backward pass asks for them at once
HOST_FRACTION = 0.6  # of the free memory of the host; a host that runs out kills the run without a word


class Handle:
    """A tensor that was packed: on the device, on its way, or on the host."""

    def __init__(self, source: Tensor, previous: "Handle | None"):
        self.layout = Layout(source)
        self.source: Tensor | None = source  # until it leaves
        self.host: Tensor | None = None
        self.fetched: Tensor | None = None  # on its way back
        self.ready: Any = None  # when the copy back is there
        self.previous = None if previous is None else weakref.ref(previous)


class Layout:
    """Shape and strides of a tensor, which must come back as they were: a matrix product takes another road for others,
    and recomputation would differ. Expanded dimensions (stride 0) are kept once."""

    def __init__(self, x: Tensor):
        self.size, self.stride, self.dtype, self.device = x.shape, x.stride(), x.dtype, x.device

    def compact(self, x: Tensor) -> Tensor:
        """The layout of the same numbers without what is stored more than once."""
        for dim, (size, stride) in enumerate(zip(self.size, self.stride, strict=True)):
            if stride == 0 and size > 1:
                x = x.narrow(dim, 0, 1)
        return x

    def empty(self) -> Tensor:
        """As the tensor was, without its numbers."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


class Host:
    """Memory of the host to copy into; pinned buffers are used again, since pinning is slow and never given back.

    Args:
        pinned: page-locked, which copies beside the computation need.
        limit: bytes; None for HOST_FRACTION of what is free when the first buffer is made.
    """

    def __init__(self, pinned: bool, limit: int | None = None):
        self.pinned, self.limit = pinned, limit
        self.bytes = 0  # of all buffers, in use or not
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer.

        Raises:
            MemoryError: it would pass the limit.
        """
        free = self._free[numel, dtype]
        if free:
            return free.pop()
        if self.limit is None:
            self.limit = int(HOST_FRACTION * free_host_memory())
        size = numel * dtype.itemsize
        if self.bytes + size > self.limit:
            raise MemoryError(
                f"offloading may take {self.limit:,} bytes of the host ({HOST_FRACTION:.0%} of what was free) and "
                f"needs {self.bytes + size:,}; take memory.offload=none, shorter sequences or more ranks"
            )
        self.bytes += size
        return torch.empty(numel, dtype=dtype, pin_memory=self.pinned)

    def give_back(self, buffer: Tensor) -> None:
        """For the next taker; memory that is not pinned goes back to the system."""
        if self.pinned:
            self._free[buffer.numel(), buffer.dtype].append(buffer)
        else:
            self.bytes -= buffer.numel() * buffer.element_size()


class Offload:
    """Packs tensors to the host and brings them back; one for each device, see `offload`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.host = Host(pinned=device.type == "cuda")
        self.side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.packed = 0  # bytes, in all
        self._waiting: deque[weakref.ref[Handle]] = deque()  # still on the device
        self._last: weakref.ref[Handle] | None = None

    def pack(self, x: Tensor) -> Handle:
        """Let a tensor go."""
        handle = Handle(x.detach(), None if self._last is None else self._last())
        self.packed += self.layout_bytes(handle)
        self._last = weakref.ref(handle)
        self._waiting.append(self._last)
        while len(self._waiting) > STAY:
            leaving = self._waiting.popleft()()
            if leaving is not None and leaving.source is not None:
                self._send(leaving)
        return handle

    def unpack(self, handle: Handle) -> Tensor:
        """The tensor again, and the one before it on its way."""
        if handle.source is not None:  # it never left
            return handle.source
        if handle.fetched is None:
            self._fetch(handle)
        x, handle.fetched = handle.fetched, None
        assert x is not None
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(handle.ready)
            before = None if handle.previous is None else handle.previous()
            if before is not None and before.source is None and before.fetched is None:
                self._fetch(before)
        return x

    @staticmethod
    def layout_bytes(handle: Handle) -> int:
        """What a handle takes on the host."""
        assert handle.source is not None
        return handle.layout.compact(handle.source).numel() * handle.layout.dtype.itemsize

    def _send(self, handle: Handle) -> None:
        assert handle.source is not None
        if self.device.type == "meta":  # nothing there has numbers: what is estimated takes no memory of the host
            handle.source = None
            return
        x = handle.layout.compact(handle.source)
        buffer = self.host.take(x.numel(), x.dtype)
        weakref.finalize(handle, self.host.give_back, buffer)
        handle.host = buffer.view(x.shape)
        if self.side is None:
            handle.host.copy_(x)
        else:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.side):
                handle.host.copy_(x, non_blocking=True)
            handle.source.record_stream(self.side)
        handle.source = None

    def _fetch(self, handle: Handle) -> None:
        x = handle.layout.empty()
        if handle.host is None:
            handle.fetched = x
            return
        target = handle.layout.compact(x)
        if self.side is None:
            target.copy_(handle.host)
        else:
            # a buffer is read and written on the side stream alone, so that its next use comes after this one
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.side):
                target.copy_(handle.host, non_blocking=True)
                handle.ready = self.side.record_event()
            x.record_stream(self.side)
        handle.fetched = x


_OFFLOADS: dict[torch.device, Offload] = {}


def offload(device: torch.device) -> Offload:
    """The device's own, with its pool of buffers."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _OFFLOADS:
        _OFFLOADS[device] = Offload(device)
    return _OFFLOADS[device]


def to_host(
    device: torch.device, stay: Iterable[Tensor] = (), tokens: int | None = None
) -> AbstractContextManager[Any]:
    """Saved tensors inside go to the host.

    Args:
        device: where the computation is.
        stay: parameters; what lies in their memory is on the device anyhow.
        tokens: only what has a dimension of this size; copies of parameters in another dtype have none.

    What is saved several times is sent once.
    """
    engine = offload(device)
    own = {x.untyped_storage()._cdata for x in stay}
    sent: dict[tuple[Any, ...], tuple[Tensor, Handle]] = {}  # with the tensors, so that no address is used twice

    def pack(x: Tensor) -> Tensor | Handle:
        if x.untyped_storage()._cdata in own or x.device != device or (tokens is not None and tokens not in x.shape):
            return x
        key = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype)
        if key not in sent:
            sent[key] = x, engine.pack(x)
        return sent[key][1]

    def unpack(packed: Tensor | Handle) -> Tensor:
        return engine.unpack(packed) if isinstance(packed, Handle) else packed

    return _Hooks(saved_tensors_hooks(pack, unpack), sent)


class _Hooks(AbstractContextManager[None]):
    """Hooks, and what they had to remember while they were set."""

    def __init__(self, hooks: saved_tensors_hooks, sent: dict[Any, Any]):
        self._hooks, self._sent = hooks, sent

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._sent.clear()


def free_host_memory() -> int:
    """Bytes that a process can still have, as the system sees it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**62  # no such file on this system: no guard
