"""Random numbers of tasks that hide part of a batch: the same after a resume, and on ranks that share a sample."""

import numpy as np
import torch

__all__ = ["draws"]

TRAINING, VALIDATION = 0, 1  # streams of one seed that never meet


def draws(
    seed: int, index: int, sampler: dict[str, int] | None, device: torch.device, *, training: bool
) -> torch.Generator:
    """A generator that is a pure function of its arguments.

    Args:
        seed: of the task.
        index: the batch's number.
        sampler: the trainer's `distributed_sampler_kwargs`, whose "rank" counts groups of ranks that share a sample;
            None for one process.
        device: of the numbers.
        training: whether the batch trains; validation has a stream of its own.
    """
    rank = 0 if sampler is None else int(sampler["rank"])
    words = np.random.SeedSequence([seed, TRAINING if training else VALIDATION, index, rank])
    generator = torch.Generator(device)
    return generator.manual_seed(int(words.generate_state(1, np.uint64)[0] >> np.uint64(1)))
