"""docs/adding_a_model.md, followed to the letter: its blocks become new files, and every proof must hold."""

import re

import pytest
import torch
from followed_page import ROOT, House, new_files

PAGE = (ROOT / "docs" / "adding_a_model.md").read_text(encoding="utf-8")
FILES = new_files("adding_a_model.md")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """A copy of the sources with the page's files."""
    house = House(tmp_path_factory.mktemp("house"))
    house.add(FILES)
    return house


@pytest.mark.everything
def test_the_page_adds_a_model_that_passes_every_proof(house: House) -> None:
    assert "retention.json" in house.write_indices()
    assert house.passes("-k", "retention", "tests/models", "tests/layers") >= 16


@pytest.mark.everything
def test_the_page_adds_a_model_that_trains_and_speaks(house: House) -> None:
    house.write_indices()
    assert "retention" in house.python("-m", "zoo", "list", "retention")
    folder = str(house.top / "run")
    house.python(
        "-m", "zoo", "train", "model=retention", "trainer.max_steps=3", "data.batch_size=2", f"run_dir={folder}"
    )
    house.python("-m", "zoo", "generate", folder, "--prompt", "The ", "--max-tokens", "3")


def test_it_costs_what_is_promised() -> None:
    """The model file is under 150 lines."""
    assert len(FILES["zoo/models/retention.py"].splitlines()) < 150


def test_the_pages_cell_is_solved_by_newtons_method() -> None:
    torch.manual_seed(0)
    space: dict[str, object] = {}
    (block,) = re.findall(r"^```python\n(import torch.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(block, "adding_a_model.md", "exec"), space)
    assert space["h"].shape == (2, 1000, 32)  # type: ignore[attr-defined]
    sizes = space["sizes"]
    assert isinstance(sizes, list)
    assert sizes[4] < 1e-4 < sizes[1] < sizes[0]
