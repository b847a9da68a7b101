"""No module-level mutable state: nothing that one request could leave behind for the next.

Allowed at module level: values that cannot change, and tables named in UPPER_CASE (or annotated Final, Mapping,
Sequence) that nobody in the code base changes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.house.source import Function, Module, dotted

CONSTANT_NAME = re.compile(r"_{0,2}[A-Z][A-Z0-9_]*|__all__")
READ_ONLY_ANNOTATION = re.compile(r"\b(Final|Mapping|Sequence|Collection|Set|frozenset|tuple)\b")
DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
# Calls whose results cannot change, by the last part of their name.
IMMUTABLE_CALLS = frozenset(
    {"frozenset", "tuple", "MappingProxyType", "compile", "TypeVar", "ParamSpec", "NewType", "digest", "Path", "field"}
    | {"constexpr"}  # triton's
    | {"int", "float", "str", "bytes", "bool", "len", "min", "max", "sum", "range", "property", "cached_property"}
)
# Objects that are mutable by nature, with the reason why they may live at module level.
EXCEPTIONS = frozenset(
    {
        ("minivllm.cli", "app"),  # typer's table of commands, filled by decorators while the module is imported
        # arrays of no values
        *[("minivllm.kernels.jit", name) for name in ("BFLOAT16", "FLOAT32", "INT64", "BYTE", "WORD")],
        ("minivllm.kernels.amx", "TILE_SHAPE"),  # an array that cannot be written to
        ("minivllm.engine.llm_engine", "logger"),  # the logging module's own registry
    }
)
# Settings of other packages that have no other place, each set once before it is read.
SETTINGS = frozenset({("minivllm.kernels.jit", "numba.config.CPU_FEATURES")})
MUTATORS = frozenset(
    {"append", "extend", "insert", "remove", "pop", "popitem", "clear", "sort", "reverse", "add", "discard", "update"}
    | {"setdefault", "move_to_end", "appendleft", "popleft", "intersection_update", "difference_update"}
)
CACHES = frozenset({"cache", "lru_cache"})


class Binding(NamedTuple):
    """name = value, at the top of a module or of a class."""

    name: str
    annotation: str
    value: ast.expr
    node: ast.stmt


def bindings(body: Iterable[ast.stmt]) -> Iterator[Binding]:
    """The assignments of a body, also under if, try and with; tuples are taken apart."""
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=True)
                    yield from (Binding(ast.unparse(name), "", value, node) for name, value in pairs)
                else:
                    yield Binding(ast.unparse(target), "", node.value, node)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield Binding(ast.unparse(node.target), ast.unparse(node.annotation), node.value, node)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            for part in ("body", "orelse", "finalbody", "handlers"):
                for child in getattr(node, part, []):
                    yield from bindings(child.body if isinstance(child, ast.ExceptHandler) else [child])


def is_mutable(value: ast.expr, immutable_classes: frozenset[str] = frozenset()) -> bool:
    """A display, a call that is not known to give something immutable, or a tuple with one of them in it."""
    if isinstance(value, ast.Tuple):
        return any(is_mutable(element, immutable_classes) for element in value.elts)
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else dotted(value.func)
        return name not in IMMUTABLE_CALLS and name not in immutable_classes
    return isinstance(value, DISPLAYS)


def frozen_classes(modules: Iterable[Module]) -> frozenset[str]:
    """Classes of ours whose objects cannot change: named tuples, enums, frozen dataclasses."""
    names = set()
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                bases = {dotted(base).split(".")[-1] for base in node.bases}
                frozen = any("frozen=True" in ast.unparse(decorator) for decorator in node.decorator_list)
                if frozen or bases & {"NamedTuple", "Enum", "StrEnum", "IntEnum"}:
                    names.add(node.name)
    return frozenset(names)


def mutable_state(modules: Iterable[Module]) -> list[str]:
    """Mutable values at module level, or at class level, under a name that does not promise to leave them alone."""
    modules = list(modules)
    immutable = frozen_classes(modules)
    complaints = []
    for module in modules:
        for binding in bindings(module.tree.body):
            promised = CONSTANT_NAME.fullmatch(binding.name) and isinstance(binding.value, DISPLAYS)
            allowed = promised or READ_ONLY_ANNOTATION.search(binding.annotation)
            excepted = (module.name, binding.name) in EXCEPTIONS
            if is_mutable(binding.value, immutable) and not allowed and not excepted:
                complaints.append(module.at(binding.node, f"{binding.name} is mutable state of the module"))
        for node in ast.walk(module.tree):
            for binding in bindings(node.body) if isinstance(node, ast.ClassDef) else ():
                if isinstance(binding.value, DISPLAYS) and not CONSTANT_NAME.fullmatch(binding.name):
                    complaints.append(module.at(binding.node, f"{binding.name} is shared by all objects of the class"))
    return complaints


def changed_constants(modules: Iterable[Module]) -> list[str]:
    """Tables of module or class level that somebody, anywhere, changes."""
    modules = list(modules)
    immutable = frozen_classes(modules)
    tables = set()
    for module in modules:
        bodies = [module.tree.body, *(n.body for n in ast.walk(module.tree) if isinstance(n, ast.ClassDef))]
        for binding in (binding for body in bodies for binding in bindings(body)):
            if is_mutable(binding.value, immutable) and (CONSTANT_NAME.fullmatch(binding.name) or binding.annotation):
                tables.add(binding.name)
    complaints = []
    for module in modules:
        for node, changed in _changes(module.tree):
            name = dotted(changed).split(".")[-1]
            if name in tables:
                complaints.append(module.at(node, f"{name} is changed"))
    return complaints


def _changes(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.expr]]:
    """(where, what) for every x[...] = ..., del x[...], x += ... and x.append(...) inside and outside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node, node.value
        elif isinstance(node, ast.AugAssign):
            yield node, node.target
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            yield node, node.func.value


def hidden_globals(modules: Iterable[Module]) -> list[str]:
    """`global`, a memo of a function, and assignments to attributes of modules, functions and classes."""
    complaints = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                complaints.append(module.at(node, f"global {', '.join(node.names)}"))
            if isinstance(node, Function):
                for decorator in node.decorator_list:
                    called = decorator.func if isinstance(decorator, ast.Call) else decorator
                    if dotted(called).split(".")[-1] in CACHES:
                        complaints.append(module.at(node, f"{node.name} keeps a memo for the life of the process"))
        shared = _shared_names(module)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                owner = dotted(node.value)
                if owner.split(".")[0] in shared and (module.name, f"{owner}.{node.attr}") not in SETTINGS:
                    complaints.append(module.at(node, f"{owner}.{node.attr} is set on a module, function or class"))
            if isinstance(node, ast.Call) and dotted(node.func) == "setattr" and dotted(node.args[0]) in shared:
                complaints.append(module.at(node, f"setattr on {dotted(node.args[0])}"))
    return complaints


def _shared_names(module: Module) -> set[str]:
    """Names that stand for a module, or for a function or class of this module."""
    names = {node.name for node in module.tree.body if isinstance(node, ast.ClassDef | Function)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names
