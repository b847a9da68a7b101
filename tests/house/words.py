"""What a reader finds beside the code: docstrings, twins in vLLM, shapes. And honest asserts and tolerances."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

from tests.house.source import Function, Module, dotted, functions

TWIN = re.compile(r"\b[Tt]wins?\b[^.]*?\bin\s+vLLM\b")
TRIVIAL_LINES = 30  # a module so short needs no twin; the implementations of an operation name theirs in the contract
OBVIOUS_LINES = 6  # a function or class so short, with a name of the house, may speak for itself


# ------------------------------------------------------------------ docstrings
def undocumented_modules(modules: Iterable[Module]) -> list[str]:
    """Every file starts by saying what it is; an empty __init__.py says nothing."""
    return [
        f"{module.path}:1: no module docstring"
        for module in modules
        if module.source.strip() and not ast.get_docstring(module.tree)
    ]


def twinless_modules(modules: Iterable[Module]) -> list[str]:
    """Every module that is more than a few lines names its twin in vLLM (or says that there is none)."""
    return [
        f"{module.path}:1: no twin in vLLM named"
        for module in modules
        if len(module.lines) > TRIVIAL_LINES and not TWIN.search(ast.get_docstring(module.tree) or "")
    ]


def undocumented_names(modules: Iterable[Module]) -> list[str]:
    """Public functions and classes of a module have a docstring, or the module's own names them, or they are a few
    lines. (What overrides or implements something documented is a method, and methods are not asked here.)"""
    complaints = []
    for module in modules:
        said = ast.get_docstring(module.tree) or ""
        for node in module.tree.body:
            if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_") or is_overload(node):
                continue
            short = (node.end_lineno or node.lineno) - node.lineno + 1 <= OBVIOUS_LINES
            if not (ast.get_docstring(node) or short or re.search(rf"\b{node.name}\b", said)):
                complaints.append(module.at(node, f"{node.name} has no docstring"))
    return complaints


def undocumented_api(modules: Iterable[Module], exported: Iterable[str]) -> list[str]:
    """Public methods of what minivllm exports have a docstring, unless they are one statement."""
    exported = set(exported)
    return [
        module.at(method, f"{node.name}.{method.name} is public API without a docstring")
        for module in modules
        for node in module.tree.body
        if isinstance(node, ast.ClassDef) and node.name in exported
        for method in node.body
        if isinstance(method, Function) and not method.name.startswith("_")
        if not ast.get_docstring(method) and len(method.body) > 1
    ]


def is_overload(node: ast.ClassDef | Function) -> bool:
    """A signature for type checkers only."""
    return any(dotted(decorator).split(".")[-1] == "overload" for decorator in node.decorator_list)


# ------------------------------------------------------------------ shapes
# A stream of tensors of any shape (the weights of a checkpoint) has none to write.
SHAPELESS = re.compile(r"Callable|Iterable|Iterator|[Dd]ict|Mapping")
COMMENT = re.compile(r"#.*(\[|\b(as|any shape|same shape)\b)")


def shapeless_tensors(modules: Iterable[Module]) -> list[str]:
    """Every parameter and every dataclass field that is a torch.Tensor has its shape written.

    In a comment on its line, or in the docstring of its function or class, on the line that names it
    (`name, other: [...]`; `All arguments [...]`).
    """
    complaints = []
    for module in modules:
        for function in functions(module.tree):
            if is_overload(function):
                continue
            said = ast.get_docstring(function) or ""
            for parameter in _parameters(function):
                if _is_tensor(parameter.annotation) and not _shape_is_written(module, parameter, parameter.arg, said):
                    complaints.append(module.at(parameter, f"{function.name}({parameter.arg}) has no shape"))
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                said = ast.get_docstring(node) or ""
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and _is_tensor(field.annotation):
                        name = ast.unparse(field.target)
                        if not _shape_is_written(module, field, name, said):
                            complaints.append(module.at(field, f"{node.name}.{name} has no shape"))
    return complaints


def _parameters(function: Function) -> Iterator[ast.arg]:
    yield from function.args.posonlyargs
    yield from function.args.args
    yield from function.args.kwonlyargs
    yield from (extra for extra in (function.args.vararg, function.args.kwarg) if extra)


def _is_tensor(annotation: ast.expr | None) -> bool:
    text = ast.unparse(annotation) if annotation else ""
    return bool(re.search(r"\btorch\.Tensor\b|\bnp\.ndarray\b", text)) and not SHAPELESS.search(text)


def _shape_is_written(module: Module, node: ast.arg | ast.AnnAssign, name: str, docstring: str) -> bool:
    if COMMENT.search(module.lines[(node.end_lineno or node.lineno) - 1]):
        return True
    return bool(re.search(rf"\b(All|{name})\b.*(\[|any shape)", docstring))


# ------------------------------------------------------------------ asserts
HARMLESS_CALLS = frozenset({"isinstance", "issubclass", "len", "all", "any", "min", "max", "sorted", "set", "type"})


def asserts_that_act(modules: Iterable[Module]) -> list[str]:
    """Under python -O an assert is not evaluated: it may look, it must not do."""
    complaints = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Assert):
                acting = [
                    child
                    for child in ast.walk(node.test)
                    if isinstance(child, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom)
                    or (isinstance(child, ast.Call) and dotted(child.func) not in HARMLESS_CALLS)
                ]
                if acting:
                    complaints.append(module.at(node, f"the assert does something: {ast.unparse(acting[0])}"))
    return complaints


def asserts_as_checks(modules: Iterable[Module]) -> list[str]:
    """An `assert` about a parameter of a public function guards input: it must be an exception.

    An assert about a field of a parameter may stand: it tells the type checker what the record's maker made sure of.
    """
    complaints = []
    for module in modules:
        for function in functions(module.tree):
            if function.name.startswith("_"):
                continue
            parameters = {parameter.arg for parameter in _parameters(function)} - {"self", "cls"}
            for node in ast.walk(function):
                if isinstance(node, ast.Assert):
                    fields = {n.value for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
                    names = {n for n in ast.walk(node.test) if isinstance(n, ast.Name)} - fields
                    guarded = {n.id for n in names} & parameters
                    complaints += [module.at(node, f"assert guards the argument {name}") for name in sorted(guarded)]
    return complaints


# ------------------------------------------------------------------ tolerances
TOLERANCE_WORDS = frozenset({"atol", "rtol", "abs", "rel", "abs_tol", "rel_tol", "delta"})
SMALL = 0.01  # a float literal up to this size in a comparison with a difference is a tolerance


def literal_tolerances(modules: Iterable[Module]) -> list[str]:
    """A number where a name from tests/tolerances.py belongs."""
    complaints = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                complaints += [
                    module.at(keyword.value, f"{keyword.arg}={ast.unparse(keyword.value)} is a literal tolerance")
                    for keyword in node.keywords
                    if keyword.arg in TOLERANCE_WORDS and _has_number(keyword.value)
                ]
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                small = [side for side in sides if isinstance(side, ast.Constant) and _is_small(side.value)]
                if small and any(_is_difference(side) for side in sides):
                    complaints.append(module.at(node, f"{ast.unparse(node)} has a literal tolerance"))
    return complaints


def _has_number(value: ast.expr) -> bool:
    """Any number but zero, also inside `2 * 1e-6`; factors of a named tolerance are whole numbers."""
    numbers = [child.value for child in ast.walk(value) if isinstance(child, ast.Constant)]
    named = any(isinstance(child, ast.Name) for child in ast.walk(value))
    return any(isinstance(n, float if named else int | float) and not isinstance(n, bool) and n != 0 for n in numbers)


def _is_small(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= SMALL


def _is_difference(side: ast.expr) -> bool:
    calls = [dotted(child.func) for child in ast.walk(side) if isinstance(child, ast.Call)]
    methods = [child.attr for child in ast.walk(side) if isinstance(child, ast.Attribute)]
    return any(name.split(".")[-1] in ("abs", "fabs", "dist", "norm") for name in [*calls, *methods])
