"""What the README and the model cards say is run or composed, so that it cannot go stale."""

import os
import re
import shlex
from pathlib import Path

import pytest
from followed_page import new_files

from zoo.config import compose
from zoo.ops import newton_scan
from zoo.ops.core.table import OPERATORS
from zoo.ops.scans.newton_scan import WIDE
from zoo.registry import INDEX, list_models, model_info

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARDS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "model_cards").glob("*.md")}
TRAIN = re.compile(r"zoo train ([^\n`#]+)")


def commands(text: str) -> list[list[str]]:
    """The settings of every `zoo train` in a text; flags and sweeps left out."""
    found = [[word for word in shlex.split(line) if not word.startswith("-")] for line in TRAIN.findall(text)]
    return [words for words in found if not any(re.match(r"[\w.]+=[^'\[({]*,", word) for word in words)]


def test_the_readmes_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "readme"}
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    assert len(capsys.readouterr().out.split()) == 20  # the tokens of the generation example
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
    model, torch = space["MyModel"](), space["torch"]
    x = torch.randn(1, 10, 128)
    y, states = model(x[:, :6])
    assert torch.allclose(torch.cat([y, model(x[:, 6:], states)[0]], dim=1), model(x)[0], atol=1e-5)
    assert space["S"].shape == (2, 4, 32, 64)


def test_what_the_readme_says_of_the_forms_of_operators() -> None:
    assert "fast form in torch" in README
    assert all("torch" in spec.forms for spec in OPERATORS.values())
    assert "Most have Triton kernels too" in README
    assert sum("triton" in spec.forms for spec in OPERATORS.values()) > len(OPERATORS) / 2


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words)) for words in commands(README)])
def test_the_readmes_commands_compose(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose(words)["model"]["name"] in list_models()


@pytest.mark.parametrize("name", sorted(path.stem for path in INDEX.glob("*.json")))  # not what other tests registered
def test_every_model_has_a_card_with_commands_that_compose(name: str) -> None:
    card = CARDS[name]
    paper = re.search(r"arXiv (\d{4}\.\d{5})", model_info(name).paper or "")
    if paper is not None:
        assert paper[1] in card
    found = commands(card)
    assert any(f"model={name}" in words for words in found)
    for words in found:
        compose(words)
    for size, count in model_info(name).params.items():
        if size != "tiny":
            assert f"{count:,}" in card, f"{size} of {name} has {count:,} parameters"


def test_links_between_documents_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "model_cards").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert os.path.exists(path.parent / target), f"{path.name} links to {target}"


FOLDERS = ("ops", "layers", "zoo", "train", "configs", "tests", "benchmarks", "examples")
NAMED_FILE = re.compile(r"`([\w./*]+\.(?:py|yaml))`")
OF_A_RUN = {"config.yaml"}


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PAGES_OF_NEW_FILES = ("adding_a_model.md", "adding_a_task.md", "adding_an_operator.md")
MADE_BY_PAGES = {name for page in PAGES_OF_NEW_FILES for path in new_files(page) for name in (path, Path(path).name)}
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def missing(text: str) -> list[str]:
    """Files that a text names and nobody has. `NAME` stands for any name; `s4/convolved.py` may lie anywhere."""
    names = {name for name in NAMED_FILE.findall(text) if "NAME" not in name} - OF_A_RUN - MADE_BY_PAGES
    anywhere = {f"/{path.relative_to(ROOT).as_posix()}" for path in SOURCES}
    return [
        name
        for name in sorted(names)
        if not any(path.endswith(f"/{name}") for path in anywhere) and not any(ROOT.glob(name))
    ]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_documents_name_are_there(page: str) -> None:
    assert missing((ROOT / page).read_text(encoding="utf-8")) == []


def test_files_that_docstrings_name_are_there() -> None:
    named = {path.relative_to(ROOT).as_posix(): missing(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: names for path, names in named.items() if names} == {}


def test_a_missing_file_is_seen() -> None:
    tick, name = "`", "nowhere.py"  # apart, since this file is read as well
    assert missing(f"{tick}{name}{tick}, `ops/NAME/spec.py` and `ops/core/spec.py`") == [name]


def test_the_docstring_says_from_which_width_newton_walks() -> None:
    assert f"wide ({WIDE} numbers of state)" in (newton_scan.__doc__ or "")
