"""Costs that others have published: a transformer on GPUs whose sequences are cut by heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from zoo.train.balance import CostModel

MIB = 2.0**20


@dataclass(frozen=True)
class AllToAll:
    """Ulysses: every rank exchanges its share of the activations with the others.

    Args:
        mib_per_token: what one token adds to all exchanges of a step, forward and backward.
        bandwidth: (degree, GB/s) pairs, ascending; a degree between two of them runs at the larger one's speed.
    """

    mib_per_token: float
    bandwidth: tuple[tuple[int, float], ...]

    def per_sequence(self, tokens: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """mib_per_token s / (d v_d); GB/s are MB per ms."""
        degrees, speeds = (np.asarray(column, float) for column in zip(*self.bandwidth, strict=True))
        degree = np.asarray(degree)
        if degree.max(initial=1) > degrees[-1]:
            raise ValueError(
                f"AllToAll: the bandwidth is known up to degree {int(degrees[-1])}; got degree {int(degree.max())}, "
                "measure it and add it"
            )
        speed = speeds[np.searchsorted(degrees, degree)]
        return np.where(degree > 1, self.mib_per_token * np.asarray(tokens) / (degree * speed), 0.0)

    def fixed(self, degree: int) -> float:
        """Nothing."""
        return 0.0


def capacity(*, mib_per_token: float, parameters: float, ranks: int, mib: float, zero: int = 3) -> int:
    """Tokens that fit on a rank beside weights, gradients and Adam's states in mixed precision (16 bytes a parameter).

    Args:
        mib_per_token: activations of one token.
        parameters: of the model.
        ranks: among which ZeRO divides.
        mib: memory that may be used.
        zero: ZeRO's stage: 1 divides the optimiser's 12 bytes, 2 the gradients too, 3 everything.
    """
    shared = {0: 0 / 8, 1: 6 / 8, 2: 7 / 8, 3: 8 / 8}[zero]
    states = 16 * parameters / 1e9 * (shared / ranks + 1 - shared) * 1024  # FlexSP counts 10^9 bytes as 1024 MiB
    return int((mib - states) / mib_per_token)


class Published(NamedTuple):
    """Coefficients that FlexSP's authors profiled on 64 A100-40G in nodes of 8, 30 GB in use (its public code)."""

    a1: float
    a2: float
    b1: float
    mib_per_token: float
    width: int
    layers: int
    parameters: float

    def cost(self, ranks: int = 64, parameters: float | None = None) -> CostModel:
        """The cost model on `ranks` GPUs; `parameters` where the position table differs from that of 192K tokens."""
        room = capacity(
            mib_per_token=self.mib_per_token, parameters=parameters or self.parameters, ranks=ranks, mib=30 * 1024
        )
        # four all-to-alls, forward and backward, of bf16 activations in every layer
        exchange = AllToAll(4 * 2 * self.layers * self.width * 2 / MIB, A100_BANDWIDTH)
        return CostModel(a1=self.a1, a2=self.a2, b1=self.b1, capacity=room, communication=exchange)


A100_BANDWIDTH = ((1, 1.0), (2, 119.54), (4, 104.07), (8, 96.5), (16, 10.33), (32, 5.94), (64, 4.87))

PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "7b": Published(5.128e-6, 0.1839576, 629.3563, 4.48, 4096, 32, 7.117e9),
        "13b": Published(9.2852e-6, 0.3060189, 1132.56, 4.22, 5120, 40, 13e9),
        "30b": Published(15.4262e-6, 0.8035742, 2789.36, 3.417, 6656, 60, 30e9),
    }
)
PARAMETERS_7B_384K = 7.850e9  # with the position table of 384K tokens
