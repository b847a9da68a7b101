"""The app as its user has it before him."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect

PATIENCE_MS = 180_000


class View:
    """One open page."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page, self.origin = page, origin
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)

    def open(self, path: str = "/") -> None:
        """Until the page is alive: its script reads the server's figures."""
        self.page.goto(self.origin + path)
        expect(self.panel).to_have_attribute("data-state", re.compile("up|down"))

    def close(self) -> None:
        """The page made no mistake, and called nobody but the app."""
        self.page.close()
        strangers = [url for url in self.requests if not url.startswith((f"{self.origin}/", "data:", "blob:"))]
        assert strangers == []
        # a refused request shows up there too, and is shown on the page
        assert [text for text in self.complaints if "Failed to load resource" not in text] == []

    # ------------------------------------------------------------------ asking
    def send(self, text: str, tool: str | None = None) -> None:
        if tool is not None:
            self.page.select_option("select", tool)
        self.page.fill("textarea", text)
        self.page.keyboard.press("Enter")

    @property
    def button(self) -> Locator:
        """Send, Complete or Write; Stop while an answer comes."""
        return self.page.locator(".primary")

    def wait_for_end(self) -> None:
        expect(self.button).not_to_have_text("Stop")

    # ------------------------------------------------------------------ what is there
    @property
    def answer(self) -> Locator:
        """The text of the last answer."""
        return self.page.locator(".assistant .text").last

    @property
    def facts(self) -> Locator:
        return self.page.locator(".message .facts").last

    @property
    def tool(self) -> Locator:
        return self.page.locator(".tool").last

    @property
    def trouble(self) -> Locator:
        return self.page.locator(".trouble")

    @property
    def panel(self) -> Locator:
        return self.page.locator(".metrics")

    def figure(self, name: str) -> int:
        """A count in the panel."""
        return int(self.page.locator(f'[data-figure="{name}"]').inner_text().replace(",", ""))
