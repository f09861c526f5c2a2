"""Modules of torch's own that look along time: each would take its stretch for the whole sequence.

A convolution of zoo asks its neighbour for the rows beyond the edge. torch.nn.Conv2d cannot, and would pad the edge of
every strip with zeros instead. The dimension that is cut is the first one after the channels: time of a Conv1d, rows of
a Conv2d, frames of a Conv3d. Windows that do not overlap, as those of a patch embedding, stay within a stretch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.padding import _ConstantPadNd, _ReflectionPadNd, _ReplicationPadNd
from torch.nn.modules.pooling import (
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
    _AvgPoolNd,
    _LPPoolNd,
    _MaxPoolNd,
    _MaxUnpoolNd,
)

# these see all tokens, whatever their settings are
_EVERYTHING = (
    nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
    nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, _MaxUnpoolNd, nn.Unfold, nn.Fold,
)  # fmt: skip
_WINDOWS = (_ConvNd, _MaxPoolNd, _AvgPoolNd, _LPPoolNd)
_LINES = (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d, nn.LPPool1d)
_VOLUMES = (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d, nn.LPPool3d)
_PADS = (_ConstantPadNd, _ReflectionPadNd, _ReplicationPadNd, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)


def looks_along_time(module: nn.Module) -> bool:
    """Whether a module of torch sees more than its own token, or window of tokens, along the dimension that is cut.

    Norms over a batch are judged by `refuse_call`, when it is known whether they train and on what.
    """
    if isinstance(module, _EVERYTHING):
        return True
    if isinstance(module, _InstanceNorm):
        return module.training or not module.track_running_stats
    if isinstance(module, nn.Upsample):
        return module.mode not in ("nearest", "nearest-exact")
    if isinstance(module, _PADS):
        return any(module.padding[-2:])
    if isinstance(module, _ConvTransposeNd):  # what a token makes must be a step, else the parts are not the whole
        window, stride, padding = _window(module)
        return window + _first(module.output_padding) != stride or padding != 0
    if isinstance(module, _WINDOWS):
        window, stride, padding = _window(module)
        return window > stride or padding != 0
    return False


def refuse_call(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise where a module is called on a stretch that it would take for the whole sequence.

    Raises:
        ValueError: it looks along time, takes statistics of a batch, or its windows do not fill the stretch.
    """
    what, x = "", inputs[0] if inputs else None
    if looks_along_time(module):
        what = "goes along time and cannot go on from another rank's stretch"
    elif isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
        if module.training or not module.track_running_stats:
            what = "takes the statistics of its own stretch for those of the whole sequence"
    elif isinstance(module, nn.GroupNorm) and isinstance(x, Tensor) and x.ndim > 2:
        what = "takes the statistics of its own stretch for those of the whole sequence"
    elif isinstance(module, _WINDOWS) and not isinstance(module, _ConvTransposeNd) and isinstance(x, Tensor):
        _, stride, _ = _window(module)
        length = x.shape[-1 if isinstance(module, _LINES) else -3 if isinstance(module, _VOLUMES) else -2]
        if length % stride:
            raise ValueError(
                f"{type(module).__name__} takes {stride} steps at a time, so that a rank's stretch must be a multiple "
                f"of {stride}; got {length}, cut at multiples of it (SequenceShard(chunk={stride}))"
            )
    if what:
        raise ValueError(
            f"{type(module).__name__} {what}; build it from zoo.ops, or run it outside zoo.ops.shard.use(...)"
        )


@contextmanager
def watched(cut: Callable[[], bool]) -> Iterator[None]:
    """Inside, every call of a module is held against `refuse_call` where time is cut."""

    def check(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if cut():
            refuse_call(module, inputs)

    handle = hooks.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _window(module: Any) -> tuple[int, int, int]:
    """Along the dimension that is cut: tokens that a window spans, tokens between windows, and padding."""
    kernel, stride = _first(module.kernel_size), _first(module.stride)
    dilation = 1 if isinstance(module, _AvgPoolNd | _LPPoolNd) else _first(module.dilation)
    padding = 0 if isinstance(module, _LPPoolNd) else module.padding
    window = dilation * (kernel - 1) + 1
    if isinstance(padding, str):
        padding = 0 if padding == "valid" else window - 1
    return window, stride or kernel, _first(padding)


def _first(value: Any) -> int:
    """Of a number for all dimensions, or one for each; 0 for a stride that was left out."""
    return int((value[0] if isinstance(value, tuple | list) else value) or 0)
