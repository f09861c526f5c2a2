"""What the package says of itself: one version, and extras that let the tests run without other libraries' models."""

import ast
import re
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import zoo

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_written_once() -> None:
    assert "version" in PROJECT["dynamic"]
    assert version("seqzoo") == zoo.__version__
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is None, "CITATION.cff would say it a second time"
    assert f"## {zoo.__version__.partition('.dev')[0]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_tests_do_not_ask_for_flash_linear_attention() -> None:
    extras = PROJECT["optional-dependencies"]
    assert any(name.startswith("flash-linear-attention") for name in extras["parity"])
    assert not any(name.startswith(("flash-linear-attention", "fla-core")) for name in extras["test"])
    assert any("flash-linear-attention" in wanted and "parity" in wanted for wanted in requires("seqzoo") or ())


def test_a_test_without_flash_linear_attention_says_what_to_install() -> None:
    seen = 0
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(name.split(".")[0] == "fla" for name in names), f"{path.name}: use pytest.importorskip"
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip"):
                name = ast.unparse(node.args[0]).strip("\"'")
                if name in ("fla", "fla.models") or name.startswith("fla.ops"):
                    reasons = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "reason"]
                    after_the_first = path.name == "test_convert_fla.py" and name != "fla.models"
                    assert after_the_first or any("parity" in r or r == "NEEDS" for r in reasons), (
                        f"{path.name}: {name}"
                    )
                    seen += 1
    assert seen >= 6


def test_what_the_makefile_installs_is_pinned() -> None:
    """constraints.txt names what pyproject.toml asks for there, and what those bring that has to stand still."""

    def names(lines: list[str]) -> set[str]:
        return {re.split(r"[\[<>=!; ]", line)[0].lower() for line in lines}

    extras = PROJECT["optional-dependencies"]
    installed = re.search(r"^EXTRAS \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert installed is not None
    asked = names(PROJECT["dependencies"]).union(*(names(extras[extra]) for extra in installed[1].split(",")))
    brought = {"omegaconf", "fla-core", "mkdocs", "mkdocstrings-python", "griffelib"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert asked <= pinned
    assert pinned <= asked.union(brought, *(names(extra) for extra in extras.values()))
