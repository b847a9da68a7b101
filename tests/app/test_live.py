"""The app in a real browser, before `minivllm serve` with the default model. What it says is its own affair."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect

from tests.app import web_app
from tests.app.conftest import Say
from tests.app.view import PATIENCE_MS, View
from tests.sdk.test_sdk import Server, server

KEY = "app-key"
READ_LENGTHS = """() => {
    const lengths = new Set();
    window.lengths = lengths;
    new MutationObserver(() => lengths.add(document.querySelector('.assistant')?.textContent.length ?? 0))
        .observe(document.querySelector('.log'), {subtree: true, childList: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], object]:
    """`minivllm serve` on this port; 0 for any."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    return lambda port: server(log, "--api-key", KEY, "--port", str(port), num_threads=2)


@pytest.fixture(scope="module")
def live(start_server: Callable, say: Say) -> Iterator[Server]:
    say("minivllm serve")
    with start_server(0) as running:
        yield running


@pytest.fixture(scope="module")
def live_app(built: None, live: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with web_app.running("start", live.url, tmp_path_factory.mktemp("live"), VLLM_API_KEY=KEY) as url:
        yield url


@pytest.fixture
def view(browser: BrowserContext, live_app: str) -> Iterator[View]:
    view = View(browser.new_page(), live_app)
    yield view
    view.close()


def metric(live: Server, name: str, label: str = "") -> float:
    """The sum of a figure's samples whose labels contain `label`."""
    with urllib.request.urlopen(f"{live.url.removesuffix('/v1')}/metrics", timeout=PATIENCE_MS / 1000) as page:
        samples = re.findall(rf"^{name}{{(.*)}} (\S+)$", page.read().decode(), re.MULTILINE)
    return sum(float(value) for labels, value in samples if label in labels)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_answer_streams_and_the_panel_moves(view: View, live: Server):
    view.open()
    expect(view.panel.locator("h2")).to_have_text(live.model)
    before = view.figure("tokens written")
    view.page.evaluate(READ_LENGTHS)
    view.send("What is a library? One sentence.")
    view.wait_for_end()
    expect(view.facts).to_contain_text("tok/s")
    written = int(re.search(r"(\d+) written", view.facts.inner_text())[1])  # type: ignore[index]
    lengths = view.page.evaluate("[...window.lengths].sort((a, b) => a - b)")
    assert len(lengths) > min(written, 10) / 2, "the text came in lumps"
    expect(view.page.locator('[data-figure="running"]')).to_have_text("0")
    expect(view.page.locator('[data-figure="tokens written"]')).to_have_text(f"{before + written:,}")


def test_stop_ends_the_work_of_the_server(view: View, live: Server):
    aborted = metric(live, "vllm:request_success_total", 'finished_reason="abort"')
    view.open()
    view.send("Write a very long story about a lighthouse. At least a thousand words.")
    expect(view.answer).to_contain_text(" ")
    expect(view.page.locator('[data-figure="running"]')).to_have_text("1")
    view.button.click()
    view.wait_for_end()
    text = view.answer.inner_text()
    wait_until(lambda: metric(live, "vllm:num_requests_running") == 0)
    assert metric(live, "vllm:request_success_total", 'finished_reason="abort"') == aborted + 1
    assert view.answer.inner_text() == text
    expect(view.facts).to_have_text("broken off")


def test_a_tool_is_called_and_its_result_shown(view: View):
    view.open()
    view.send("What is the weather in Tokyo, Japan?", tool="weather")
    expect(view.tool.locator(".state")).to_have_text("done")
    asked = json.loads(view.tool.locator(".input").inner_text())
    told = json.loads(view.tool.locator(".output").inner_text())
    assert asked == {name: told[name] for name in ("location", "unit")}
    view.page.keyboard.press("Escape")  # the rest of the answer does not matter; it may be over
    view.wait_for_end()


def test_a_text_is_continued_to_the_limit(view: View, live: Server):
    wait_until(lambda: metric(live, "vllm:num_requests_running") == 0)
    before = metric(live, "vllm:generation_tokens_total")
    view.open("/completion")
    view.page.get_by_label("temperature").fill("0")
    view.page.get_by_label("tokens", exact=True).fill("8")
    view.send("The capital of France is")
    expect(view.page.locator(".completion")).to_contain_text("Paris")
    view.wait_for_end()
    assert metric(live, "vllm:generation_tokens_total") == before + 8


def test_an_object_is_written_to_its_end(view: View):
    view.open("/object")
    view.send("tomato salad")
    expect(view.page.locator(".outcome")).to_have_text("Complete: it follows the schema.")
    recipe = json.loads(view.page.locator(".recipe pre").text_content() or "")
    assert recipe["difficulty"] in ("easy", "medium", "hard")
    assert view.page.locator(".recipe li").count() == len(recipe["ingredients"]) + len(recipe["instructions"])


def test_a_server_that_goes_and_comes_back(
    browser: BrowserContext, start_server: Callable, tmp_path: Path, built: None, say: Say
):
    """The page says so in plain words, and goes on when the server is there again."""
    port = web_app.free_port()
    url = f"http://127.0.0.1:{port}/v1"
    with web_app.running("start", url, tmp_path, VLLM_API_KEY=KEY) as app:
        view = View(browser.new_page(), app)
        view.open()
        expect(view.panel).to_have_attribute("data-state", "down")
        advice = f"No model server answers at {url}. Start one with `minivllm serve`, then try again."
        expect(view.panel.locator(".down")).to_have_text(advice)
        for path in ("/completion", "/object", "/"):
            view.open(path)
            view.send("Say yes.")
            expect(view.trouble.locator("p")).to_have_text(advice)
        say("minivllm serve")
        with start_server(port):
            expect(view.panel).to_have_attribute("data-state", "up")
            view.trouble.get_by_role("button", name="Try again").click()
            expect(view.answer).to_contain_text(re.compile(r"\w"))
            expect(view.trouble).to_have_count(0)
        # killed in the middle of an answer, or just behind it
        expect(view.panel).to_have_attribute("data-state", "down")
        view.wait_for_end()
        view.send("Again.")
        expect(view.trouble.locator("p")).to_have_text(advice)
        view.close()


def test_npm_run_dev_serves_the_same_app_and_asks_nobody(
    browser: BrowserContext, live: Server, packages: None, tmp_path: Path
):
    """The command of the README. It would ask npm's registry for news as soon as a browser comes."""
    with web_app.running("dev", live.url, tmp_path, VLLM_API_KEY=KEY) as app:
        view = View(browser.new_page(), app)
        view.open()
        view.send("Say yes.")
        expect(view.answer).to_contain_text(re.compile(r"\w"))
        view.page.keyboard.press("Escape")
        view.wait_for_end()
        view.requests = [url for url in view.requests if not url.startswith(("ws:", "wss:"))]
        view.close()
