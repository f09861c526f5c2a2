"""docs/adding_a_model.md, followed to the letter: its blocks become new files, and every proof must hold."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_model.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```\w+\n# (?P<path>[\w/.]+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, laid out as the package installs, with the page's files and rows added."""
    top = tmp_path_factory.mktemp("house")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "zoo", top / "zoo", ignore=ignore)
    homes = {"zoo": top / "zoo", "tests": top / "tests", "model_cards": top / "model_cards"}
    for folder in ("ops", "layers", "train", "configs"):
        homes[folder] = top / "zoo" / folder
        shutil.copytree(ROOT / folder, homes[folder], ignore=ignore)
    for folder in ("tests", "model_cards"):
        shutil.copytree(ROOT / folder, homes[folder], ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", top)
    for block in BLOCK.finditer(PAGE):
        first, _, rest = block["path"].partition("/")
        path = homes[first] / rest
        assert not path.exists(), f"the page makes new files and edits none; {path} is there already"
        path.write_text(block["text"], encoding="utf-8")
    return top


def run(house: Path, *command: str) -> str:
    env = os.environ | {"PYTHONPATH": str(house), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=house, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.everything
def test_the_page_adds_a_model_that_passes_every_proof(house: Path) -> None:
    assert str(house) in run(house, "-m", "zoo.registry")  # the copy is what runs, not the installed package
    tests = run(
        house, "-m", "pytest", "-q", "-k", "retention", "tests/models", "tests/layers", "-p", "no:cacheprovider"
    )
    assert int(re.search(r"(\d+) passed", tests)[1]) >= 16, tests


@pytest.mark.everything
def test_the_page_adds_a_model_that_trains_and_speaks(house: Path) -> None:
    run(house, "-m", "zoo.registry")
    said = run(house, "-m", "zoo", "list", "retention")
    assert "retention" in said
    folder = str(house / "run")
    run(house, "-m", "zoo", "train", "model=retention", "trainer.max_steps=3", "data.batch_size=2", f"run_dir={folder}")
    run(house, "-m", "zoo", "generate", folder, "--prompt", "The ", "--max-tokens", "3")


def test_it_costs_what_is_promised() -> None:
    """The model file is under 150 lines."""
    model = next(block for block in BLOCK.finditer(PAGE) if block["path"] == "zoo/models/retention.py")
    assert len(model["text"].splitlines()) < 150


def test_the_pages_cell_is_solved_by_newtons_method() -> None:
    space: dict[str, object] = {}
    (block,) = re.findall(r"^```python\n(import torch.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(block, "adding_a_model.md", "exec"), space)
    assert space["h"].shape == (2, 1000, 32)  # type: ignore[attr-defined]
    sizes = space["sizes"]
    assert isinstance(sizes, list)
    assert sizes[4] < 1e-4 < sizes[1] < sizes[0]
