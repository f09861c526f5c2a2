"""Every file of examples/ runs as its own text says, in a process of its own, and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMISED = {
    "train": r"final validation  loss [\d.]+.*\n.*\n?'The ",
    "own_mixer": r"layers: \['Leaky', 'GatedLinearAttention', 'Leaky', 'GatedLinearAttention'\]",
    "own_operator": r"one element sums up the whole stretch of time",
    "context_parallel_without_lightning": r"relative difference of the weights after 8 updates \d\.\de-1\d",
    "context_parallel": r"relative difference of the gradients \d\.\de-1\d",
    "load_checkpoint": r"transformer: logits differ from transformers' by at most \d\.\de-0\d",
    "own_vision_model": r"3\d\d of 360 digits by other writers are right\nmaps of two stages: \[\(16, 12, 20\), ",
    "speculative_decoding": r"[1-9]\d* forwards saved, [1-9]\d* of \d+ drafted tokens accepted\na session took back",
}


def run(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    if name == "load_checkpoint":
        pytest.importorskip("transformers", reason="needs transformers; install the extra test")
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(PROMISED[name], done.stdout), done.stdout
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"


def test_an_example_is_a_page() -> None:
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert f"python examples/{path.name}" in text, "the first lines say how to run it"
        assert len(text.splitlines()) <= 130, path.name
