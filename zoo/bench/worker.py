"""A process that measures one tree of the sources: run as a script with the tree and this folder as arguments.

The operators and models are the tree's, the code that measures is this folder's, whatever commit the tree is of. It
reads requests from its standard input, one JSON line each, and answers on what was its standard output.
"""

import importlib
import importlib.util
import json
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class OnlyThisTree(MetaPathFinder):
    """Finds zoo in a tree of sources or nowhere: what an older tree lacks must not come from the installed zoo."""

    def __init__(self, tree: Path) -> None:
        self.tree = str(tree)

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """As the import system asks."""
        if name != "zoo" and not name.startswith("zoo."):
            return None
        spec = PathFinder.find_spec(name, [self.tree] if path is None else path)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec


def adopt(tree: Path, bench: Path) -> None:
    """Make `zoo` the package of a tree of sources, and `zoo.bench` the one in `bench`."""
    sys.meta_path.insert(0, OnlyThisTree(tree))
    zoo = importlib.import_module("zoo")
    zoo.__path__.append(str(tree))  # ops/ is zoo.ops, and so on, as in an installation
    spec = importlib.util.spec_from_file_location(
        "zoo.bench", bench / "__init__.py", submodule_search_locations=[str(bench)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo.bench"] = module
    spec.loader.exec_module(module)


def main(tree: Path, bench: Path) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed must not look like an answer
    try:
        adopt(tree, bench)
        serve = importlib.import_module("zoo.bench.measure_requests")
    except (ImportError, AttributeError) as error:
        print(json.dumps({"error": f"its code is too old for this benchmark ({error})"}), file=answers, flush=True)
        return
    server = serve.Server()
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
