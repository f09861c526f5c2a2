"""Names that say nothing are not used."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["ops", "layers", "zoo", "train"])
def test_no_variable_is_called_found(folder: str) -> None:
    """What was found has a name of its own: files, spans, versions."""
    vague = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Name) and node.id == "found") or (isinstance(node, ast.arg) and node.arg == "found")
    ]
    assert not vague, "\n".join(vague)
