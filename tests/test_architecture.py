"""The floors of the house: imports point one way, and none hides in a function."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"zoo": "zoo", "ops": "zoo.ops", "layers": "zoo.layers", "train": "zoo.train", "configs": "zoo.configs"}
# Who may import whom, from the ground up. A module belongs to the longest prefix that names it.
FLOORS = {
    "zoo.errors": set(),
    "zoo._discover": set(),
    "zoo._deprecation": set(),
    "zoo.ranges": {"zoo.errors"},
    "zoo.files": {"zoo.errors"},
    "zoo._types": {"zoo.errors"},
    "zoo._stubs": {"zoo.files"},
    "zoo.ops": {"zoo.errors", "zoo._discover"},
    "zoo.layers": {"zoo.ops", "zoo.errors", "zoo._discover", "zoo.ranges"},
    "zoo.registry": {"zoo.errors", "zoo._types", "zoo.files", "zoo.ranges", "zoo._deprecation"},
    "zoo.tokenizers": {"zoo.errors", "zoo.files"},
    "zoo.codecs": {"zoo.tokenizers", "zoo.errors", "zoo.files", "zoo._discover"},
    "zoo.configs": set(),
    "zoo.targets": {"zoo.errors", "zoo.registry", "zoo.configs", "zoo._deprecation"},
    "zoo.settings": {"zoo._types", "zoo.configs", "zoo.files", "zoo.ranges", "zoo.registry", "zoo.targets"},
    "zoo.overrides": {"zoo.errors", "zoo.registry", "zoo.configs", "zoo.targets", "zoo._deprecation"},
    "zoo.config": {
        "zoo.errors", "zoo._types", "zoo.registry", "zoo.configs", "zoo.settings", "zoo.ranges", "zoo.targets",
        "zoo.overrides",
    },
    "zoo.models": {"zoo.layers", "zoo.ops", "zoo.registry", "zoo.errors", "zoo.ranges", "zoo._deprecation"},
    "zoo.convert": {"zoo.models", "zoo.layers", "zoo.registry", "zoo.errors", "zoo.files", "zoo._discover"},
    "zoo.checkpoint": {"zoo.models", "zoo.convert", "zoo.layers", "zoo.registry", "zoo.errors", "zoo.files"},
    "zoo.decoding": {
        "zoo.models", "zoo.layers", "zoo.ops", "zoo.errors", "zoo.files", "zoo.ranges", "zoo._discover", "zoo.codecs",
    },
    "zoo.train": {
        "zoo.decoding", "zoo.codecs", "zoo.checkpoint", "zoo.models", "zoo.layers", "zoo.ops", "zoo.registry",
        "zoo.config",
        "zoo.tokenizers", "zoo.errors", "zoo.files", "zoo._types", "zoo.ranges", "zoo.configs", "zoo._deprecation",
        "zoo.targets", "zoo._discover", "zoo",
    },
    "zoo.bench": {
        "zoo.train", "zoo.decoding", "zoo.layers", "zoo.ops", "zoo.registry", "zoo.errors", "zoo.files", "zoo",
    },
}  # fmt: skip
ANYTHING = ("zoo.cli", "zoo.__main__")
OPERATOR = re.compile(r"zoo\.ops\.(?!core\b|shard\b)\w+\.\w+")  # zoo.ops.FAMILY.NAME
NO_TORCH = ("zoo", "zoo.registry", "zoo.targets", "zoo.config", "zoo.settings", "zoo.errors")


def modules() -> dict[str, ast.Module]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in inner if part != "__init__")))
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def floor(name: str) -> str | None:
    """The floor of a module; None for those that may import anything."""
    if name.startswith(ANYTHING):
        return None
    fits = [known for known in (*FLOORS, "zoo") if name == known or name.startswith(known + ".")]
    return max(fits, key=len)


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.Module) -> set[str]:
    """Modules of zoo that this one imports when it is loaded; `from package import module` names the module."""
    names: set[str] = set()
    stack: list[ast.AST] = [node for node in tree.body if not is_type_checking(node)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import zoo.…, not relative"
            assert node.module is not None
            names |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names
            }
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):  # what a function imports, it imports later
            stack += ast.iter_child_nodes(node)
    return {name for name in names if name.split(".")[0] == "zoo"}


@pytest.mark.parametrize("name", MODULES)
def test_arrows_point_down(name: str) -> None:
    own = floor(name)
    if own is None:
        return
    allowed = FLOORS.get(own, {"zoo.errors"}) | {own}
    for imported in imports(MODULES[name]):
        assert floor(imported) in allowed, f"{name} ({own}) must not import {imported} ({floor(imported)})"


def test_no_cycles() -> None:
    graph = {name: {i for i in imports(tree) if i in MODULES and i != name} for name, tree in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(ANYTHING)])
def test_no_import_hides_in_a_function(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            hidden = [inner for inner in ast.walk(node) if isinstance(inner, ast.Import | ast.ImportFrom)]
            assert not hidden, f"{name}, line {hidden[0].lineno}: imports belong to the top"


def test_ops_know_only_torch_triton_and_the_standard_library() -> None:
    allowed = {"torch", "triton", "zoo", *sys.stdlib_module_names}
    for name, tree in MODULES.items():
        if name.startswith("zoo.ops"):
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
                elif isinstance(node, ast.ImportFrom):
                    assert node.module is not None
                    assert node.module.split(".")[0] in allowed, (name, node.module)


def test_light_modules_import_no_torch_and_nothing_has_a_bare_name() -> None:
    light = "; ".join(f"import {name}" for name in NO_TORCH)
    heavy = "import zoo.train.run.fit, zoo.decoding, zoo.ops.core.table"
    code = (
        f"import sys; {light}; zoo.list_models(); assert 'torch' not in sys.modules, 'torch'; {heavy}; "
        "bare = {'ops', 'layers', 'train', 'configs'} & set(sys.modules); assert not bare, bare"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def weights_of_others(tree: ast.Module) -> list[int]:
    """Lines in which a product is given the matrix of a layer that is not called: an adapter there would do nothing."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            taken = [*node.args, *(keyword.value for keyword in node.keywords)]
            if function in ("linear", "linear_cross_entropy", "matmul"):
                lines += [
                    each.lineno
                    for each in taken
                    if isinstance(each, ast.Attribute) and each.attr == "weight" and ast.unparse(each) != "self.weight"
                ]
    return lines


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("zoo.layers")))
def test_no_layer_takes_the_weight_of_a_linear_layer_that_it_does_not_call(name: str) -> None:
    if name != "zoo.layers.head_loss":  # which asks first whether the layer is plain
        assert not weights_of_others(MODULES[name])


@pytest.mark.parametrize("line", [
    "dt = F.linear(dt, self.dt_proj.weight).to(wide) + self.dt_proj.bias.to(wide)",
    "return linear_cross_entropy(x, self.lm_head.weight, targets, ignore_index=ignore_index)",
    "linear_cross_entropy(self.lm_head.transform(x), decoder.weight, targets, bias=decoder.bias)",
    "F.linear(x, weight=self.proj.weight)",
])  # fmt: skip
def test_what_layers_once_did_is_seen(line: str) -> None:
    assert weights_of_others(ast.parse(line)) == [1]
    assert not weights_of_others(ast.parse("F.linear(x, self.weight)"))


@pytest.mark.parametrize("name", sorted(name for name in MODULES if OPERATOR.fullmatch(name)))
def test_every_operators_folder_has_its_proofs(name: str) -> None:
    """A spec.py, or a reason in NO_SPEC; and what it offers is named in __all__."""
    names = {
        target.id
        for node in MODULES[name].body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    has_spec = f"{name}.spec" in MODULES
    assert has_spec != ("NO_SPEC" in names), f"{name} owes a spec.py, or a reason in NO_SPEC"
    assert has_spec == ("__all__" in names), f"{name} names its public functions in __all__"
