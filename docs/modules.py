"""Two things that Sphinx does not do: a page of all modules in their own words, and docstrings as they are written.

    ```{modules} minivllm/core
    ```

The docstrings of this project are plain text with aligned tables and drawings. So they are shown as they stand in the
source, and not read as reStructuredText.
"""

import ast
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]


class Modules(SphinxDirective):
    """Every module of a folder with its docstring. The argument: the folder, from the repository's root."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A section for each file, `__init__` first."""
        found: list[nodes.Node] = []
        files = sorted((ROOT / self.arguments[0]).glob("*.py"), key=lambda file: (file.stem != "__init__", file.stem))
        if not files:
            raise self.error(f"there is no module in {self.arguments[0]}")
        for file in files:
            self.env.note_dependency(str(file))
            path = file.relative_to(ROOT).as_posix()
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            if docstring:
                section = nodes.section(ids=[nodes.make_id(path)])
                section += nodes.title(text=path)
                section += nodes.literal_block(docstring, docstring, language="none")
                found.append(section)
        return found


def as_written(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make a docstring one literal block."""
    if any(lines):
        lines[:] = [".. code-block:: none", "", *(f"   {line}" for line in lines), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("modules", Modules)
    app.connect("autodoc-process-docstring", as_written)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
