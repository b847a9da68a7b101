"""The pictures in docs/: `python -m tests.ui.screenshots [FOLDER]`. The default model, and a cache that is too small.

Twelve requests and a chat share 140 blocks, so that some run, some wait, and one had to give way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page

from minivllm import LLM, AsyncEngine, SamplingParams
from minivllm.engine.async_engine import RequestStream
from minivllm.entrypoints.server import make_server
from minivllm.entrypoints.service import ServerConfig
from tests.house.source import ROOT
from tests.ui.browser import open_browser
from tests.ui.view import View

WIDE, TALL, NARROW = ({"width": width, "height": height} for width, height in ((1280, 880), (1280, 1300), (390, 820)))
PATIENCE_SECONDS = 300.0
LETTER = "You answer letters to a small town library, kindly and in a few words. The library opens at nine. " * 4
QUESTIONS = [
    "Where are the maps?",
    "Who wrote this?",
    "When do you open?",
    "May I bring my dog?",
    "Is there a quiet room?",
]


def main(folder: Path) -> None:
    """Write light.png, busy.png, dark.png and narrow.png."""
    folder.mkdir(exist_ok=True)
    llm = LLM(num_gpu_blocks_override=141, max_num_seqs=8, seed=1)
    engine = AsyncEngine(llm.llm_engine)
    server = make_server(engine, ServerConfig(port=0))
    server.start()
    try:
        with open_browser(viewport=WIDE, color_scheme="light") as context:
            view = View(context.pages[0])
            view.open(server)
            take_light(view, folder)
            take_busy(view, engine, folder)
            take_dark_and_narrow(view, folder)
    finally:
        server.service.aborting.set()
        server.stop()
        engine.shutdown()


def take_light(view: View, folder: Path) -> None:
    """A question, its answer, and what else the fifth word might have been."""
    view.set(temperature=0.6, seed=4, max_tokens=70)
    view.page.click("#settings-button")
    view.send("What is a library for? One sentence.")
    view.wait_for_end()
    view.page.locator(".assistant .token").nth(6).hover()
    shoot(view.page, folder / "light.png")


def take_busy(view: View, engine: AsyncEngine, folder: Path) -> None:
    """While everybody wants blocks."""
    view.page.mouse.move(3, 3)
    view.set(max_tokens=400, system="You are a storyteller.")
    view.page.click("#settings-button")
    view.send("Tell me a long story about a lighthouse.")
    streams = [ask(engine, LETTER + question, seed) for seed, question in enumerate(QUESTIONS)]
    streams += [ask(engine, f"Once upon a time, in the year {1800 + seed}, there lived", seed) for seed in range(7)]
    try:
        wait_until(view, lambda: view.lane("preempted") != {} and len(view.lane("running")) > 3)
        view.page.set_viewport_size(TALL)
        shoot(view.page, folder / "busy.png")
        view.page.set_viewport_size(WIDE)
    finally:
        for stream in streams:
            stream.close()
    view.page.keyboard.press("Escape")
    view.wait_for_end(2)


def take_dark_and_narrow(view: View, folder: Path) -> None:
    """The same page at night, with its settings; and on a telephone."""
    view.page.emulate_media(color_scheme="dark")
    view.page.click("#settings-button")
    shoot(view.page, folder / "dark.png")
    view.page.click("#settings-button")
    view.page.set_viewport_size(NARROW)
    view.page.emulate_media(color_scheme="light")
    view.page.click("#tab-engine")
    shoot(view.page, folder / "narrow.png")


def ask(engine: AsyncEngine, prompt: str, seed: int) -> RequestStream:
    return engine.submit(prompt, SamplingParams(max_tokens=380, seed=seed, temperature=0.8, ignore_eos=True))


def wait_until(view: View, condition: Callable[[], bool]) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the engine never came into the state of the picture")
        view.page.wait_for_timeout(50)


def shoot(page: Page, path: Path) -> None:
    page.wait_for_timeout(600)
    page.screenshot(path=path)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
