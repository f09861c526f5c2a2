"""Sound as a WAV file that any player opens: 16-bit PCM, mono or stereo."""

import warnings
import wave
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.files import write_atomically

__all__ = ["write_wav"]

FULL = 32_767  # the integer of a sample of 1.0
LARGEST = 2**32 - 1  # bytes, and bytes a second, that the header can say
HEADER = 36  # bytes that the file's size counts besides the samples


def write_wav(path: Path, samples: Tensor, rate: int) -> None:
    """Write sound to a WAV file of 16-bit samples, in full or not at all.

    A sample of 1.0 is the largest that the file can say. What lies outside of [-1, 1] is cut off there, and a warning
    says how many samples that were.

    Args:
        path: of the file; folders that are missing are made.
        samples: (T,) or (1, T) for mono, (2, T) for stereo, left first; of any float dtype, on any device.
        rate: samples a second.

    Raises:
        UserError: another shape or dtype, a number that is not finite, or a rate or a size that a WAV file cannot say.
        OSError: the file could not be written.
    """
    sound = samples.detach()
    sound = sound[None] if sound.ndim == 1 else sound
    if sound.ndim != 2 or len(sound) not in (1, 2) or not sound.is_floating_point():
        raise UserError(
            f"{path.name} takes samples of a float dtype, (T,), (1, T) or (2, T); got {tuple(samples.shape)} of "
            f"{samples.dtype}, give one sound at a time"
        )
    wide = sound.to("cpu", torch.float64)
    if not bool(torch.isfinite(wide).all()):
        bad = int((~torch.isfinite(wide)).sum())
        raise UserError(
            f"{path.name} takes finite samples, and {bad:,} of {wide.numel():,} are not; look at what made them"
        )
    channels = len(wide)
    if not 1 <= rate <= LARGEST // (2 * channels):
        raise UserError(f"{path.name} needs a rate of 1 to {LARGEST // (2 * channels):,} samples a second; got {rate}")
    if 2 * wide.numel() + HEADER > LARGEST:
        raise UserError(f"{path.name} can hold 4 GiB, and {wide.numel():,} samples are more; write several files")
    _say_clipping(path, wide)
    integers = (wide.clamp(-1.0, 1.0) * FULL).round().to(torch.int16)

    def write(file: BinaryIO) -> None:
        with wave.open(file, "wb") as out:
            out.setnchannels(channels)
            out.setsampwidth(2)
            out.setframerate(rate)
            out.writeframes(integers.T.contiguous().numpy().astype("<i2").tobytes())

    write_atomically(path, write)


def _say_clipping(path: Path, samples: Tensor) -> None:
    beyond = int((samples.abs() > 1).sum())
    if beyond:
        warnings.warn(
            f"{path.name}: {beyond:,} of {samples.numel():,} samples lie outside of [-1, 1] and are cut off there, the "
            f"largest is {float(samples.abs().max()):.3g}; scale the sound down",
            stacklevel=3,
        )
