"""Chromium without a window, from the system's package, with nothing of its own to say to the network."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def find_chromium() -> str:
    """Its path. Raises FileNotFoundError that says what to do."""
    for name in NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    raise FileNotFoundError("there is no Chromium: `apt-get install chromium`, or run `tox -e ui`")


@contextlib.contextmanager
def open_browser(**options: Any) -> Iterator[BrowserContext]:
    """A browser with a profile that is new and empty, and gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            Path(profile), executable_path=find_chromium(), headless=True, args=ARGUMENTS, **options
        )
        try:
            yield context
        finally:
            context.close()
