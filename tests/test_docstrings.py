"""Everything public says what it is for, in more than three words."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FEWEST = 4  # words


def public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, str | None]]:
    """(name, docstring) of public functions, classes and methods; overloads have that of their function."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list):
            yield owner + node.name, ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{owner}{node.name}.")


@pytest.mark.parametrize("folder", ["ops", "layers", "zoo", "train"])
def test_everything_public_has_a_sentence(folder: str) -> None:
    bare = [
        f"{path.relative_to(ROOT)} {name}: {text}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, text in public(ast.parse(path.read_text(encoding="utf-8")).body)
        if text is None or len(text.split()) < FEWEST
    ]
    assert not bare, "\n".join(bare)
