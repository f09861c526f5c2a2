"""Types of configuration fields written as text, so that a value can be checked without importing the field's owner."""

import ast
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

OPAQUE = "object"  # a type that nobody can write on a command line: a module, a callback, a tensor

_SCALARS: dict[Any, str] = {int: "int", float: "float", bool: "bool", str: "str", Path: "Path", Any: "Any"}


def spell(annotation: Any) -> str:
    """Write an annotation in the small grammar that `fit` reads: int, str | None, tuple[int, ...], Literal['a'].

    Args:
        annotation: a resolved annotation, as `typing.get_type_hints` gives it.

    Returns:
        its text; classes outside the grammar become OPAQUE.
    """
    if annotation is None or annotation is type(None):
        return "None"
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if annotation in (dict, list, tuple):
        return str(annotation.__name__)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return spell(args[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(spell(a) for a in args))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, args))}]"
    if origin is tuple:
        return f"tuple[{', '.join('...' if a is Ellipsis else spell(a) for a in args)}]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"dict[{', '.join(map(spell, args))}]"
    if isinstance(origin, type) and issubclass(list, origin):
        item = spell(args[0])
        return OPAQUE if item == OPAQUE else f"list[{item}]"
    return OPAQUE


def is_opaque(spelled: str) -> bool:
    """Whether no plain value other than None has this type."""
    return {"None", OPAQUE} >= {s.strip() for s in spelled.split("|")} and OPAQUE in spelled


def fit(value: Any, spelled: str) -> Any:
    """Check a plain value against a type, converting only where nothing is lost.

    A whole float is an int, an int is a float, a list is a tuple; text is never a number.

    Args:
        value: what YAML or JSON can hold.
        spelled: a type as `spell` writes it.

    Returns:
        the value in that type.

    Raises:
        TypeError: the value has another type; the message is the type in the user's words.
    """
    node = ast.parse(spelled, mode="eval").body
    for exact in (True, False):
        try:
            return _fit(value, node, exact)
        except TypeError:
            continue
    raise TypeError(_describe(node))


def _fit(value: Any, node: ast.expr, exact: bool) -> Any:
    match node:
        case ast.BinOp(left=left, right=right):
            try:
                return _fit(value, left, exact)
            except TypeError:
                return _fit(value, right, exact)
        case ast.Constant(value=None):
            return _require(value, value is None)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return _require(value, any(value == c and type(value) is type(c) for c in _constants(choices)))
        case ast.Subscript(value=ast.Name(id=("list" | "tuple") as name), slice=inner):
            _require(value, isinstance(value, list | tuple))
            items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if (len(items) == 2 and isinstance(items[1], ast.Constant) and items[1].value is ...) or name == "list":
                items = items[:1] * len(value)
            _require(value, len(items) == len(value))
            fitted = [_fit(v, i, exact) for v, i in zip(value, items, strict=True)]
            return tuple(fitted) if name == "tuple" else fitted
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, inner])):
            _require(value, isinstance(value, dict))
            return {_fit(k, key, exact): _fit(v, inner, exact) for k, v in value.items()}
        case ast.Name(id=name):
            return _SCALAR_RULES[name](value, exact)
    raise TypeError(f"unreadable type {ast.unparse(node)}")


def _require(value: Any, holds: bool) -> Any:
    if not holds:
        raise TypeError
    return value


def _fit_int(value: Any, exact: bool) -> int:
    if not exact and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e4
    fitted: int = _require(value, isinstance(value, int) and not isinstance(value, bool))
    return fitted


def _fit_float(value: Any, exact: bool) -> float:
    if not exact and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fitted: float = _require(value, isinstance(value, float))
    return fitted


_SCALAR_RULES: dict[str, Callable[[Any, bool], Any]] = {
    "int": _fit_int,
    "float": _fit_float,
    "bool": lambda value, exact: _require(value, isinstance(value, bool)),
    "str": lambda value, exact: _require(value, isinstance(value, str)),
    "Path": lambda value, exact: _require(value, isinstance(value, str | Path)),
    "Any": lambda value, exact: value,
    "dict": lambda value, exact: _require(value, isinstance(value, dict)),
    "list": lambda value, exact: list(_require(value, isinstance(value, list | tuple))),
    "tuple": lambda value, exact: tuple(_require(value, isinstance(value, list | tuple))),
    OPAQUE: lambda value, exact: _require(value, False),
}


def _constants(node: ast.expr) -> list[Any]:
    return [ast.literal_eval(e) for e in (node.elts if isinstance(node, ast.Tuple) else [node])]


def _describe(node: ast.expr) -> str:
    match node:
        case ast.BinOp(left=left, right=right):
            parts = [p for p in (_describe(left), _describe(right)) if p]
            return " or ".join(parts)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return " or ".join(map(repr, _constants(choices)))
        case ast.Name(id=name) if name == OPAQUE:
            return ""
    return ast.unparse(node)
