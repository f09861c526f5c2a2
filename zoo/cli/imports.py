"""Importing much at once without stopping for Python's garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, cyclic garbage stays. An import makes next to none, and millions of objects that live on.

    The collector walks them again and again, for a sixth of the CPU time of `zoo show`. Afterwards it is on again where
    it was on before.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
