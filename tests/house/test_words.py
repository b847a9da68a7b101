"""Docstrings, twins, shapes, asserts, tolerances. First the house as it is; then each checker on wrong source."""

import ast

import pytest

import minivllm
from tests.house.source import Checker, load, module, product
from tests.house.words import (
    OBVIOUS_LINES,
    TRIVIAL_LINES,
    asserts_as_checks,
    asserts_that_act,
    literal_tolerances,
    shapeless_tensors,
    twinless_modules,
    undocumented_api,
    undocumented_modules,
    undocumented_names,
)

PRODUCT = product()
TESTS = load("tests", "tests")


@pytest.mark.parametrize(
    "checker",
    [
        undocumented_modules,
        twinless_modules,
        undocumented_names,
        shapeless_tensors,
        asserts_that_act,
        asserts_as_checks,
    ],
    ids=lambda checker: checker.__name__,
)
def test_the_product_keeps_the_law(checker: Checker):
    assert checker(PRODUCT) == []


def test_every_public_method_of_the_api_is_documented():
    assert undocumented_api(PRODUCT, minivllm.__all__) == []


def test_every_test_module_has_a_docstring():
    assert undocumented_modules(TESTS) == []


def test_no_test_has_a_tolerance_of_its_own():
    assert literal_tolerances([module for module in TESTS if module.path != "tests/tolerances.py"]) == []


def test_every_tolerance_has_its_reason_beside_it():
    (tolerances,) = [module for module in TESTS if module.path == "tests/tolerances.py"]
    for node in tolerances.tree.body:
        if isinstance(node, ast.Assign):
            assert "  # " in tolerances.lines[node.end_lineno - 1], ast.unparse(node)


# ------------------------------------------------------------------ docstrings
def test_a_module_without_a_docstring_is_found_and_an_empty_one_is_not():
    assert undocumented_modules([module("minivllm.core.a", "import math")]) == [
        "minivllm/core/a.py:1: no module docstring"
    ]
    assert undocumented_modules([module("minivllm.core", "", package=True)]) == []


@pytest.mark.parametrize(
    ("docstring", "complaints"),
    [
        ("A scheduler.", 1),
        ("A scheduler, as in vLLM.", 1),
        ("A scheduler. Twin in vLLM: v1/core/sched/scheduler.py.", 0),
        ("A scheduler. Called by engine. Twin in\nvLLM: v1/core/sched/scheduler.py.", 0),
        ("Layers. Twins in vLLM: layers/*.py", 0),
        ("A hub. Twin in vLLM: none.", 0),
    ],
)
def test_a_long_module_without_a_twin_is_found(docstring: str, complaints: int):
    body = "x = 1\n" * TRIVIAL_LINES
    assert len(twinless_modules([module("minivllm.core.a", f'"""{docstring}"""\n{body}')])) == complaints
    assert twinless_modules([module("minivllm.core.a", f'"""{docstring}"""\nx = 1')]) == []


LONG = "\n    x = 1" * OBVIOUS_LINES


@pytest.mark.parametrize("head", ["def f():", "class f:", "async def f():"])
def test_a_long_public_name_without_a_docstring_is_found(head: str):
    assert undocumented_names([module("minivllm.core.a", head + LONG)]) == ["minivllm/core/a.py:1: f has no docstring"]
    for fine in (head + '\n    """Says it."""' + LONG, head + "\n    x = 1", f'"""Here f does it."""\n{head}{LONG}'):
        assert undocumented_names([module("minivllm.core.a", fine)]) == []
    assert undocumented_names([module("minivllm.core.a", head.replace(" f", " _f") + LONG)]) == []


def test_a_public_method_of_the_api_without_a_docstring_is_found():
    source = "class LLM:\n    def a(self):\n        x = 1\n        return x\n    def b(self):\n        return 1"
    modules = [module("minivllm.llm", source)]
    assert undocumented_api(modules, ["LLM"]) == ["minivllm/llm.py:2: LLM.a is public API without a docstring"]
    assert undocumented_api(modules, ["Other"]) == []


# ------------------------------------------------------------------ shapes
@pytest.mark.parametrize(
    "source",
    [
        "def f(x: torch.Tensor): ...",
        "def f(self, *, x: torch.Tensor | None = None) -> None: ...",
        "def f(x: torch.Tensor):  # the rows\n    ...",
        'def f(x: torch.Tensor):\n    """Scales x."""',
        'def f(x: torch.Tensor):\n    """Scales x.\n\n    other: [num_rows]"""',
        'def f(max_x: int, x: torch.Tensor):\n    """max_x: [0, 1]"""',
        "@dataclass\nclass C:\n    x: torch.Tensor  # the rows",
        "@dataclass\nclass C:\n    x: tuple[torch.Tensor, torch.Tensor] | None = None",
        "def f(x: list[torch.Tensor]): ...",
        "def f(x: np.ndarray): ...",
        "def f(*x: torch.Tensor): ...",
        "def g():\n    def f(x: torch.Tensor): ...",
    ],
)
def test_a_tensor_without_a_shape_is_found(source: str):
    (complaint,) = shapeless_tensors([module("minivllm.models.a", source)])
    assert "x" in complaint and complaint.endswith(" has no shape")


@pytest.mark.parametrize(
    "source",
    [
        "def f(\n    x: torch.Tensor,  # [num_rows, size]\n): ...",
        "def f(\n    x: torch.Tensor,  # as query\n): ...",
        'def f(x: torch.Tensor):\n    """x: [num_rows] -> [num_rows]"""',
        'def f(x: torch.Tensor, y: torch.Tensor):\n    """x, y: [num_rows]"""',
        'def f(x: torch.Tensor, y: torch.Tensor):\n    """All arguments [num_rows] int64."""',
        'def f(x: torch.Tensor):\n    """Where `x` (any shape) lives."""',
        "@dataclass\nclass C:\n    x: torch.Tensor  # [num_rows]",
        "def f(weights: Iterable[tuple[str, torch.Tensor]], put: Callable[[torch.Tensor], None]): ...",
        "def f(x: int): ...",
        "@overload\ndef f(x: torch.Tensor): ...",
    ],
)
def test_a_shape_in_a_comment_or_a_docstring_is_enough(source: str):
    assert shapeless_tensors([module("minivllm.models.a", source)]) == []


# ------------------------------------------------------------------ asserts
@pytest.mark.parametrize(
    "test", ["queue.pop()", "(x := f()) is not None", "await f()", "x.get(1)", "pool.touch(b) == 1"]
)
def test_an_assert_that_acts_is_found(test: str):
    assert len(asserts_that_act([module("minivllm.core.a", f"async def g():\n    assert {test}")])) == 1


@pytest.mark.parametrize("test", ["x is not None", "isinstance(x, int)", "len(x) == 1", "all(y > 0 for y in x)"])
def test_an_assert_that_looks_is_not(test: str):
    assert asserts_that_act([module("minivllm.core.a", f"def g():\n    assert {test}, f'{{x.pop()}}'")]) == []


def test_an_assert_about_an_argument_of_a_public_function_is_found():
    source = "def f(self, count, record):\n    assert count > 0\n    assert record.plan is not None\n    assert self"
    assert asserts_as_checks([module("minivllm.core.a", source)]) == [
        "minivllm/core/a.py:2: assert guards the argument count"
    ]
    assert asserts_as_checks([module("minivllm.core.a", source.replace("def f", "def _f"))]) == []


# ------------------------------------------------------------------ tolerances
@pytest.mark.parametrize(
    "source",
    [
        "assert_close(a, b, atol=1e-5, rtol=0)",
        "approx(1.0, abs=1e-5)",
        "approx(1.0, rel=2 * 1e-5)",
        "allclose(a, b, rtol=ATOL * 1.5)",
        "assert abs(a - b) < 1e-5",
        "assert (a - b).abs().max() <= 0.001",
        "assert 1e-6 > math.fabs(a)",
    ],
)
def test_a_literal_tolerance_is_found(source: str):
    assert len(literal_tolerances([module("tests.a", source)])) == 1


@pytest.mark.parametrize(
    "source",
    [
        "assert_close(a, b, atol=ATOL, rtol=0)",
        "approx(1.0, rel=2 * RTOL)",
        "assert abs(a - b) < ATOL",
        "assert probability < 0.001",
        "assert abs(a - b) < 3",
    ],
)
def test_a_named_tolerance_is_fine(source: str):
    assert literal_tolerances([module("tests.a", source)]) == []
