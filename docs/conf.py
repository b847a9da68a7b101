"""The site: `sphinx-build -c docs . build/docs`. Pages are the repository's own files, each where it lies.

The source folder is the repository, so a README is its own page, its links and pictures work as they do elsewhere, and
nothing is copied. INCLUDED says which files; everything else is not looked at. Notebooks are shown and not executed:
`tox -e notebooks` executes them. No page fetches anything from another host.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for modules.py

from minivllm.version import __version__

project, author, copyright = "minivllm", "the minivllm authors", "the minivllm authors"
release = version = __version__
root_doc = "docs/index"
extensions = ["myst_nb", "sphinx.ext.autodoc", "modules"]
include_patterns = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/api/*.md", "kernels/README.md",
    "kernels/ops/*/README.md", "minivllm/*/README.md", "notebooks/README.md", "notebooks/*.ipynb", "benchmarks/*.md",
    "examples/*/README.md",
]  # fmt: skip
exclude_patterns = [".*", "build", "dist", "node_modules", "shared", "tests", "**/.*", "**/node_modules"]
templates_path = ["_templates"]

nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # they would be fetched from another host
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page may begin with a second-level heading where it is read elsewhere, too

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 100
python_use_unqualified_type_names = True
highlight_language = "none"  # a block without a language is a drawing
smartquotes = False

html_theme = "furo"
html_title = "minivllm"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_additional_pages = {"index": "to_first_page.html"}
html_show_sphinx = False
html_copy_source = False
