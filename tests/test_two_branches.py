"""Two people who each add an operator, a layer and a model, on branches of their own, meet no conflict."""

import re
import shutil
from pathlib import Path

import pytest
from followed_page import ROOT, House, new_files

GIT = (
    "git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false",
    "-c", "core.hooksPath=/dev/null",
)  # fmt: skip
FRESH = ("tests/zoo/test_registry.py", "tests/test_architecture.py", "-k", "fresh or yaml or cycles or proofs")
needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".gitattributes").is_file(), reason="needs git and a checkout"
)


def renamed(letter: str) -> dict[str, str]:
    """The files of both pages, with the operator, the layer and the model under names of their own."""
    files = new_files("adding_an_operator.md") | new_files("adding_a_model.md")

    def rename(text: str) -> str:
        text = re.sub(r"leaky_scan|retention", rf"\g<0>_{letter}", text)
        return re.sub(r"Retention", rf"Retention{letter.upper()}", text)

    return {rename(path): rename(text) for path, text in files.items()}


@pytest.mark.everything
@needs_git
def test_two_branches_that_add_the_same_kinds_of_things_merge(tmp_path: Path) -> None:
    house = House(tmp_path)
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    links = "".join(f"/zoo/{path.name}\n" for path in (tmp_path / "zoo").iterdir() if path.is_symlink())
    (tmp_path / ".gitignore").write_text(f"__pycache__\n{links}", encoding="utf-8")
    house.run(*GIT, "init", "-q", "-b", "main")

    def commit(message: str) -> None:
        house.run(*GIT, "add", "-A")
        house.run(*GIT, "commit", "-q", "-m", message)

    commit("The sources")
    for letter in "ab":
        house.run(*GIT, "checkout", "-q", "-b", letter, "main")
        house.add(renamed(letter))
        house.write_indices()
        commit(f"Add what the pages say, as {letter}")
        changed = house.run(*GIT, "diff", "--name-status", "main", letter).split("\n")
        edited = {line.split("\t")[1] for line in changed if line and not line.startswith("A")}
        assert edited == {"ops/__init__.pyi", "layers/__init__.pyi"}, "what is edited besides was not generated"
    house.run(*GIT, "checkout", "-q", "main")
    house.run(*GIT, "merge", "-q", "-m", "Merge a", "a")
    house.run(*GIT, "merge", "-q", "-m", "Merge b", "b")  # ends with an error on a conflict
    for name in (*renamed("a"), *renamed("b")):
        assert (tmp_path / name).is_file()
    for package in ("ops", "layers"):
        stub = (tmp_path / package / "__init__.pyi").read_text(encoding="utf-8")
        assert not re.search("^[<=>]{7}", stub, re.MULTILINE)
    assert house.passes(*FRESH) > 20
