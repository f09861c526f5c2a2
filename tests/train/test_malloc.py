import subprocess
import sys

import pytest

from zoo.train.memory.malloc import keep_freed_arrays

FAULTS = """
import resource
import torch
from zoo.train.memory.malloc import keep_freed_arrays

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(24 << 20)  # 96 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults(), keep_freed_arrays(), [faults() for _ in range(4)][-1])
"""


@pytest.mark.everything
def test_freed_arrays_are_used_again() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("other systems keep freed arrays as they please; nothing is asked of them")
    out = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True).stdout.split()
    if out[1] != "True":
        pytest.skip("this C library is not glibc, and nothing is asked of it")
    before, after = int(out[0]), int(out[2])
    assert after < before / 20, "the pages of an array like an earlier one are there already"


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_arrays() is False
