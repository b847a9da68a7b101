"""How long files and functions are. A report, not a law: `python -m tests.house.sizes`.

Lines are lines of code: blank lines, comments and docstrings are not counted.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable
from typing import NamedTuple

from tests.house.source import Module, functions, product

NOT_CODE = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
    | {tokenize.ENDMARKER}
)
SHOWN = 15  # functions


class Size(NamedTuple):
    """A file, or a function in one."""

    num_lines: int
    where: str


def code_lines(module: Module) -> set[int]:
    """Numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(module.source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and ast.get_docstring(node) is not None:
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def file_sizes(modules: Iterable[Module]) -> list[Size]:
    """Longest first."""
    return sorted((Size(len(code_lines(module)), module.path) for module in modules), reverse=True)


def function_sizes(modules: Iterable[Module]) -> list[Size]:
    """Longest first."""
    sizes = []
    for module in modules:
        lines = code_lines(module)
        for function in functions(module.tree):
            inside = lines & set(range(function.lineno, (function.end_lineno or function.lineno) + 1))
            sizes.append(Size(len(inside), f"{module.path}:{function.lineno} {function.name}"))
    return sorted(sizes, reverse=True)


def report(modules: Iterable[Module]) -> str:
    """All files, and the longest functions."""
    modules = list(modules)
    files, longest = file_sizes(modules), function_sizes(modules)
    lines = [f"{size.num_lines:6d}  {size.where}" for size in files]
    lines += ["", f"the {min(SHOWN, len(longest))} longest of {len(longest)} functions:"]
    lines += [f"{size.num_lines:6d}  {size.where}" for size in longest[:SHOWN]]
    total = sum(size.num_lines for size in files)
    return "\n".join(
        [f"lines of code in {len(files)} files: {total}, on average {total // max(1, len(files))}", "", *lines]
    )


if __name__ == "__main__":
    print(report(product()))
