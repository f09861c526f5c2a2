"""docs/decoding.md: its Python runs, and its decoder, added to the letter, works like those of the house."""

import re
from pathlib import Path

import pytest
from case_table import make_model
from followed_page import ROOT, House, new_files

FILES = new_files("decoding.md")
PAGE = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")


@pytest.mark.everything
def test_the_page_adds_a_decoder(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.add(FILES)
    written = house.write_indices()
    assert "configs/decoder/zoo.decoding.decoders.unused.Unused.json" in written
    assert "unused as unused" in (house.top / "zoo" / "decoding" / "__init__.pyi").read_text("utf-8")
    assert house.passes("tests/decoding/test_unused.py") == 2
    assert house.passes("tests/decoding/test_decoders.py", "-k", "file_and_a_name or refuse") == 2
    assert "unused " in house.python("-m", "zoo", "list", "--decoders")


def test_the_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(from .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "decoding.md", "exec"), {"model": make_model("deltanet"), "prompts": [[1, 2], [3]]})
    assert (tmp_path / "text.state").is_file()
