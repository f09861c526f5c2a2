"""Pages of the site that lie elsewhere in the repository, and those that are made: examples and the API."""

import importlib
import posixpath
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Literal

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "build" / "package" / "zoo"  # the folders as they install, for mkdocstrings to read
FOLDERS = ("ops", "layers", "train", "configs")
MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "examples": "examples.md",
    "model_cards": "model_cards/README.md",
}
LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(\))")
# Files that a page names and the site does not have: the words stay, the link goes.
BARE = re.compile(r"\[([^\]]*)\]\((?:\.\./)*(CITATION\.cff)\)")


def on_startup(command: Literal["build", "gh-deploy", "serve"], dirty: bool) -> None:
    """Lay the sources out as the package installs, before mkdocstrings looks for them; it follows no links."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "zoo", PACKAGE, ignore=ignored)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, PACKAGE / folder, ignore=ignored)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    made = {new: (ROOT / old).read_text(encoding="utf-8") for old, new in MOVED.items() if old.endswith(".md")}
    made |= {
        f"model_cards/{card.name}": card.read_text(encoding="utf-8") for card in (ROOT / "model_cards").glob("*.md")
    }
    made["model_cards/README.md"] += "\n## Cards\n\n" + "\n".join(
        f"- [{card.stem}]({card.name})" for card in sorted((ROOT / "model_cards").glob("*.md")) if card.stem != "README"
    )
    made |= {"examples.md": examples()}
    made |= {f"api/{name}.md": text for name, text in api().items()}
    home = {new: old for old, new in MOVED.items()}
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=with_links(text, home.get(uri, uri), uri)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of docs/ that lead out of it."""
    if page.file.generated_by is not None:
        return markdown
    return with_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def with_links(text: str, old: str, new: str) -> str:
    """The links of a file of the repository, as they lead from its page of the site.

    Args:
        text: its Markdown.
        old: where it lies in the repository.
        new: where its page lies in the site's sources.
    """

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(old), match[2]))
        anchor = match[3] or ""
        if target in MOVED:
            to = MOVED[target]
        elif target.startswith("examples/"):
            to, anchor = "examples.md", f"#{posixpath.basename(target).removesuffix('.py')}"
        elif target.startswith(("docs/", "model_cards/")):
            to = target.removeprefix("docs/")
        else:
            return match[0]
        return f"]({posixpath.relpath(to, posixpath.dirname(new) or '.')}{anchor})"

    return LINK.sub(moved, BARE.sub(r"\1", text))


def examples() -> str:
    """Every example on one page, under its name."""
    text = ["# Examples", "", "Each is a page that runs as it is, and a test runs it.", ""]
    for path in sorted((ROOT / "examples").glob("*.py")):
        text += [f"## {path.stem}", "", "```python", path.read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(text)


def api() -> dict[str, str]:
    """The pages of the API: what each package names in `__all__`, so that no name is listed by hand."""
    pages = {
        "zoo": {"zoo": "zoo", "Decoding": "zoo.decoding", "Codecs": "zoo.codecs"},
        "ops": {"Operators": "zoo.ops", "Time cut across ranks": "zoo.ops.shard"},
        "layers": {"Layers": "zoo.layers"},
        "train": {"Strategies": "zoo.train.strategies", "Runs": "zoo.train.fit"},
    }
    return {
        name: "\n".join(
            f"{'##' if i else '#'} {title}\n\n{entries(module)}" for i, (title, module) in enumerate(page.items())
        )
        for name, page in pages.items()
    }


def entries(name: str) -> str:
    """An entry of mkdocstrings for each public function or class of a module."""
    module: ModuleType = importlib.import_module(name)
    public = [(each, getattr(module, each)) for each in module.__all__]
    return "\n".join(
        f"::: {value.__module__}.{value.__name__}\n"
        for _, value in sorted(public, key=lambda pair: pair[0].lower())
        if callable(value) and hasattr(value, "__module__")
    )
