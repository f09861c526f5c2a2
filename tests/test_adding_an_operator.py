"""docs/adding_an_operator.md, followed to the letter: its blocks become new files, and every proof must hold."""

import re
import textwrap
from pathlib import Path

import pytest
from followed_page import ROOT, House, new_files

FILES = new_files("adding_an_operator.md")
DOUBLING = "ops/scans/leaky_scan/doubling.py"
PROOFS = ("-k", "leaky", "tests/ops/test_operators.py", "tests/test_architecture.py")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """A copy of the sources with the page's files."""
    house = House(tmp_path_factory.mktemp("house"))
    house.add(FILES)
    return house


@pytest.mark.everything
def test_the_page_adds_an_operator_that_passes_every_proof(house: House) -> None:
    assert str(house.top / "zoo" / "ops" / "__init__.pyi") in house.write_indices()
    assert "leaky_scan_summary as leaky_scan_summary" in (house.top / "ops" / "__init__.pyi").read_text("utf-8")
    assert house.passes(*PROOFS) >= 40


@pytest.mark.everything
def test_zoo_doctor_knows_the_pages_operator(house: House) -> None:
    said = house.python("-m", "zoo", "doctor", "--device", "cpu")
    assert any(line.split()[:1] == ["leaky_scan"] for line in said.splitlines()), said


@pytest.mark.everything
def test_the_pages_mistake_is_seen(tmp_path: Path) -> None:
    """The negative control that the page proposes."""
    wrong = FILES[DOUBLING].replace("a[:, reach:] * a[:, :-reach]", "a[:, reach:] + a[:, :-reach]")
    assert wrong != FILES[DOUBLING]
    house = House(tmp_path)
    house.add(FILES | {DOUBLING: wrong})
    with pytest.raises(AssertionError, match="failed"):
        house.passes(*PROOFS, "-x")


def test_the_excerpts_are_of_the_operator_that_the_tests_prove() -> None:
    """Blocks without a path show parts of tests/ops/running_average.py; each must still stand there."""
    page = (ROOT / "docs" / "adding_an_operator.md").read_text(encoding="utf-8")
    source = (ROOT / "tests" / "ops" / "running_average.py").read_text(encoding="utf-8")
    excerpts = re.findall(r"^```python\n(?!# ops/)(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(excerpts) == 2
    for excerpt in excerpts:
        assert textwrap.indent(excerpt, "    ") in source


def test_the_page_makes_one_folder() -> None:
    assert {str(Path(name).parent) for name in FILES} == {"ops/scans/leaky_scan"}
    assert sum(len(text.splitlines()) for text in FILES.values()) < 200
