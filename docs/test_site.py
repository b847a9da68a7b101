"""The site as `sphinx-build` left it in build/docs (`tox -e docs`): complete, whole, and at home on any disk."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import minivllm

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "docs"


class Page(HTMLParser):
    """What a page fetches, where it leads, and the places in it that others can point at."""

    def __init__(self, file: Path):
        super().__init__()
        self.file = file
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" or found.get("rel") in ("index", "search", "next", "prev"):
            self.links.append(found.get("href", ""))
        elif tag in ("link", "script", "img", "iframe", "source"):
            self.fetched += [found[name] for name in ("href", "src") if name in found]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    found = {file: Page(file) for file in SITE.rglob("*.html")}
    assert found, "build the site first: tox -e docs"
    return found


def test_every_link_inside_the_site_leads_somewhere(pages: dict[Path, Page]) -> None:
    broken = []
    for page in pages.values():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.file.parent / unquote(parts.path)).resolve() if parts.path else page.file
            place = unquote(parts.fragment)
            if not target.exists() or (place and target in pages and place not in pages[target].ids):
                broken.append(f"{page.file.relative_to(SITE)}: {link}")
    assert broken == []


def test_no_page_needs_another_host(pages: dict[Path, Page]) -> None:
    for page in pages.values():
        for address in page.fetched:
            assert not urlsplit(address).netloc, (page.file, address)
            assert address.startswith("data:") or (page.file.parent / urlsplit(address).path).exists(), address
    for style in SITE.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_kernel_folder_notebook_and_page_of_docs_is_there() -> None:
    sources = [
        *ROOT.glob("kernels/ops/*/README.md"),
        *ROOT.glob("minivllm/*/README.md"),
        *ROOT.glob("notebooks/[0-9]*.ipynb"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/api/*.md"),
    ]
    assert len(sources) > 20
    missing = [str(one) for one in sources if not (SITE / one.relative_to(ROOT)).with_suffix(".html").exists()]
    assert missing == []


def test_every_public_name_and_every_module_is_described(pages: dict[Path, Page]) -> None:
    described = {place.rsplit(".", 1)[-1] for page in pages.values() for place in page.ids if "minivllm." in place}
    assert set(minivllm.__all__) - described == {"__version__"}
    own_words = "".join(pages[SITE / "docs" / "api" / "modules.html"].text)
    folders = [file.parent.relative_to(ROOT).as_posix() for file in ROOT.glob("minivllm/*/__init__.py")]
    missing = [folder for folder in folders if f"{folder}/__init__.py" not in own_words and folder not in own_words]
    assert missing == []


def test_the_house_names_files_that_exist() -> None:
    named = re.findall(r"`(\w+/[\w/]+(?:\.py|/))`", (ROOT / "docs" / "house.md").read_text(encoding="utf-8"))
    assert len(named) >= 14
    assert [path for path in named if not any((base / path).exists() for base in (ROOT / "minivllm", ROOT))] == []


def test_the_glossary_has_words_that_the_code_uses() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| \*\*(\w+)\*\*", text, re.MULTILINE)
    source = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("minivllm/**/*.py"))
    assert len(words) > 8 and [word for word in words if word not in source] == []
