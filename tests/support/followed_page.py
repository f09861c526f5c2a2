"""A page of docs/ whose blocks are new files, followed to the letter in a copy of the sources."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("ops", "layers", "train", "configs")  # they install inside zoo/
BLOCK = re.compile(r"^```\w+\n# (?P<path>[\w/]+\.\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def new_files(page: str) -> dict[str, str]:
    """{path: text} of the files that a page of docs/ makes: blocks whose first line is a comment with the path."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return {block["path"]: block["text"] for block in BLOCK.finditer(text)}


class House:
    """A copy of the sources, laid out as the checkout is, that runs in place of the installed package.

    top: its folder. `zoo/ops`, `zoo/layers` and so on are links to the folders beside `zoo`.
    """

    def __init__(self, top: Path):
        self.top = top
        for folder in ("zoo", "tests", "model_cards", *FOLDERS):
            shutil.copytree(ROOT / folder, top / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for folder in FOLDERS:
            (top / "zoo" / folder).symlink_to(Path("..") / folder, target_is_directory=True)
        shutil.copy(ROOT / "pyproject.toml", top)

    def add(self, files: dict[str, str]) -> None:
        """Write the files of a page; none may be there already."""
        for name, text in files.items():
            path = self.top / name
            assert not path.exists(), f"the page makes new files and edits none; {name} is there already"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def python(self, *command: str) -> str:
        """Run `python ...` with the copy as zoo; what it printed. It must end well."""
        return self.run(sys.executable, *command)

    def run(self, *command: str) -> str:
        """Run a command in the copy; what it printed. It must end well."""
        env = os.environ | {"PYTHONPATH": str(self.top), "OMP_NUM_THREADS": "1"}
        env.pop(
            "TRITON_INTERPRET", None
        )  # conftest.py has set it for this process; the copy's own sets it for its tests
        done = subprocess.run(
            command, cwd=self.top, env=env, capture_output=True, text=True, timeout=600, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def write_indices(self) -> str:
        """`python -m zoo.registry`: the paths that it wrote, all of the copy and none of the installed package."""
        written = self.python("-m", "zoo.registry")
        assert all(Path(line).is_relative_to(self.top) for line in written.splitlines()), written
        return written

    def passes(self, *tests: str) -> int:
        """How many of the chosen tests passed; none may fail."""
        said = self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
        passed = re.search(r"(\d+) passed", said)
        assert passed is not None, said
        return int(passed[1])
