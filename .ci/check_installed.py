"""Run in an environment that has only the wheel: every module imports, and none of them comes from a checkout."""

import importlib
import pkgutil
import sys
from pathlib import Path

import zoo

HOME = Path(zoo.__file__).parent
assert "site-packages" in HOME.parts, f"zoo must come from the installed wheel; it comes from {HOME}"

names = ["zoo", *(info.name for info in pkgutil.walk_packages(zoo.__path__, "zoo."))]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
folders = {path.parent for path in HOME.rglob("*.py")}
packages = {Path(sys.modules[name].__file__ or "").parent for name in names if name in sys.modules}
missed = sorted(str(folder.relative_to(HOME)) for folder in folders - packages)
assert not missed, f"folders that no import reaches: {', '.join(missed)}"
print(f"{len(names)} modules of {HOME} import")
