"""The page as its user has it before him: what is there, and the engine's state beside it."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Page, expect

from minivllm.entrypoints.server import Server

PATIENCE_MS = 60_000
READ_GRID = """() => {
    const canvas = document.getElementById("grid");
    const {cell, gap, columns, blocks} = Object.fromEntries(Object.entries(canvas.dataset).map(([k, v]) => [k, +v]));
    const ratio = canvas.width / canvas.clientWidth;
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const at = (x, y) => {
        const start = 4 * (Math.floor(y * ratio) * canvas.width + Math.floor(x * ratio));
        return pixels.data.slice(start, start + 4).join();
    };
    return Array.from({length: blocks}, (_, block) => {
        const x = (block % columns) * (cell + gap), y = Math.floor(block / columns) * (cell + gap);
        return `${at(x + 0.3 * cell, y + 0.75 * cell)} ${at(x + 0.75 * cell, y + 0.3 * cell)}`;
    }).join(";");
}"""
# A CSS colour as a canvas paints it.
PAINT = """(colour) => {
    const context = new OffscreenCanvas(1, 1).getContext("2d");
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return context.getImageData(0, 0, 1, 1).data.join();
}"""
Pixel = str  # red, green, blue, alpha


class View:
    """One open page."""

    def __init__(self, page: Page):
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.expected_complaints: tuple[str, ...] = ("status of 4", "status of 5", "ERR_", "net::")
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        self.origin = ""

    def open(self, server: Server, is_live: bool = True) -> None:
        self.origin = server.url
        self.page.goto(server.url)
        if is_live:
            expect(self.page.locator("#link")).to_have_text("live", timeout=PATIENCE_MS)

    def close(self) -> None:
        """The page made no mistake, and called nobody but its server."""
        strangers = [url for url in self.requests if not url.startswith((f"{self.origin}/", "data:", "blob:"))]
        self.page.close()
        assert strangers == []
        unexpected = [text for text in self.complaints if not any(part in text for part in self.expected_complaints)]
        assert unexpected == []

    @property
    def paths(self) -> list[str]:
        """What was called."""
        return [urlsplit(url).path for url in self.requests]

    def wait_for(self, expression: str) -> None:
        """Until this is true in the page. (playwright's own way needs eval, which the page's policy forbids.)"""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"it never came true: {expression}"
            self.page.wait_for_timeout(20)

    # ------------------------------------------------------------------ chat
    def send(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.keyboard.press("Enter")

    def set(self, **fields: Any) -> None:
        """Sampling controls; they may be folded away."""
        if self.page.locator("#settings").is_hidden():
            self.page.click("#settings-button")
        for name, value in fields.items():
            self.page.fill(f"#{name}", str(value))

    def wait_for_end(self, count: int = 1) -> None:
        """So many answers are complete."""
        expect(self.page.locator(".facts")).to_have_count(count, timeout=PATIENCE_MS)

    @property
    def texts(self) -> list[str]:
        """The messages of the conversation, in order, without the chips of invisible tokens."""
        script = """nodes => nodes.map(node => {
            const copy = node.cloneNode(true);
            copy.querySelectorAll(".special").forEach(chip => chip.remove());
            return copy.textContent;
        })"""
        return self.page.eval_on_selector_all(".turn > .text", script)

    # ------------------------------------------------------------------ engine
    def wait_for_revision(self, revision: int) -> None:
        """The page shows at least this."""
        self.wait_for(f"Number(document.documentElement.dataset.revision) >= {revision}")

    def grid(self) -> list[list[Pixel]]:
        """Two pixels of every block: lower left and upper right."""
        return [block.split(" ") for block in self.page.evaluate(READ_GRID).split(";")]

    def paint(self, colour: str) -> Pixel:
        return self.page.evaluate(PAINT, colour)

    def variable(self, name: str) -> Pixel:
        """A colour of the style sheet."""
        return self.paint(
            self.page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
        )

    def tones(self) -> dict[str, str]:
        """Request -> the colour of its row."""
        script = "rows => rows.map(row => [row.dataset.request, row.style.getPropertyValue('--tone')])"
        return dict(self.page.eval_on_selector_all(".row", script))

    def lane(self, status: str) -> dict[str, str]:
        """Request -> the sentence under it."""
        script = "rows => rows.map(row => [row.dataset.request, row.querySelector('.why').textContent])"
        return dict(self.page.eval_on_selector_all(f".lane[data-status={status}] .row", script))
