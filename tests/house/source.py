"""The source files as syntax trees, and the imports in them, inside functions too.

Every checker of this folder is a function from modules (or text) to a list of complaints `path:line: what is wrong`,
so that a test can hand it a few lines of bad source and see it complain.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = {"minivllm": "minivllm", "kernels/ops": "minivllm.kernels"}  # folder -> package, as in setup.cfg

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file. `path` is relative to the repository."""

    name: str
    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.source, self.path)

    @cached_property
    def lines(self) -> list[str]:
        """Its lines; line 1 is lines[0]."""
        return self.source.splitlines()

    @property
    def is_package(self) -> bool:
        """Whether this is an __init__.py."""
        return self.path.endswith("__init__.py")

    @property
    def stem(self) -> str:
        """The last part of the file's name, without .py."""
        return Path(self.path).stem

    def at(self, node: ast.AST, message: str) -> str:
        """A complaint about this place."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


class Import(NamedTuple):
    """One imported thing. `target` is the module where it is one of ours, else the full dotted name."""

    importer: Module
    target: str
    node: ast.AST
    in_function: bool

    def at(self, message: str) -> str:
        """A complaint about this import."""
        return self.importer.at(self.node, message)

    def is_of(self, name: str) -> bool:
        """Whether the target is `name` or lies in it."""
        return f"{self.target}.".startswith(f"{name}.")


Checker = Callable[[Iterable[Module]], list[str]]


def module(name: str, source: str, *, package: bool = False) -> Module:
    """A module of made-up source, at the path where it would live."""
    for folder, root in sorted(SOURCE_ROOTS.items(), key=lambda item: -len(item[1])):
        if f"{name}.".startswith(f"{root}."):
            path = f"{folder}/{name[len(root) + 1 :].replace('.', '/')}".rstrip("/")
            return Module(name, f"{path}/__init__.py" if package else f"{path}.py", source)
    return Module(name, f"{name.replace('.', '/')}.py", source)


def load(folder: str, package: str) -> list[Module]:
    """Every .py file below a folder of the repository."""
    modules = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        if "node_modules" in file.parts:  # others' packages, for tests/sdk
            continue
        if "node_modules" in file.parts:  # Node's packages bring Python files too
            continue
        parts = file.relative_to(ROOT / folder).with_suffix("").parts
        name = ".".join([package, *(part for part in parts if part != "__init__")])
        modules.append(Module(name, file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")))
    return modules


def product() -> list[Module]:
    """Everything that is installed."""
    return [module for folder, package in SOURCE_ROOTS.items() for module in load(folder, package)]


def imports(modules: Iterable[Module]) -> list[Import]:
    """All imports of these modules, those inside functions and under TYPE_CHECKING too."""
    modules = list(modules)
    names = {module.name for module in modules}
    return [found for module in modules for found in _imports_of(module, names)]


def _imports_of(module: Module, names: set[str]) -> Iterator[Import]:
    inside = {id(child) for function in functions(module.tree) for child in ast.walk(function)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node, id(node) in inside)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                ours = f"{base}.".startswith("minivllm.")
                yield Import(module, base if ours and full not in names else full, node, id(node) in inside)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """What `from . import x` means."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + (1 if module.is_package else 0)]
    return ".".join([*parts, node.module] if node.module else parts)


def functions(tree: ast.AST) -> list[Function]:
    """Every def below a node."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of attributes on a name, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return ""
