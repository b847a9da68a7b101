"""The report of sizes counts code and nothing else. It reports; no size is a law."""

from tests.house.sizes import code_lines, file_sizes, function_sizes, report
from tests.house.source import module, product

SOURCE = '''"""A docstring
of two lines."""

# a comment
TEXT = """not a
docstring"""


def f(
    x,
):
    """What it does."""

    # why
    return x  # and this
'''


def test_blank_lines_comments_and_docstrings_are_not_code():
    assert code_lines(module("a", SOURCE)) == {5, 6, 9, 10, 11, 15}


def test_files_and_functions_come_longest_first():
    modules = [module("a", SOURCE), module("b", "x = 1\n")]
    assert file_sizes(modules) == [(6, "a.py"), (1, "b.py")]
    assert function_sizes(modules) == [(4, "a.py:9 f")]


def test_the_report_names_every_file():
    modules = product()
    text = report(modules)
    assert all(module.path in text for module in modules)
    assert "longest of" in text
