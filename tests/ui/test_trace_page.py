"""The page of a kernel's trace: it steps, plays, pauses and jumps, and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from minivllm.kernels.trace import Access, Launch, Program, TensorInfo, Tile, Trace

NUM_PROGRAMS = 3


def program(index: int) -> Program:
    """Two tiles of keys, each from a block of its own, then a row of the output."""
    loads = []
    for tile in (0, 16):
        block = 2 * index + tile // 16
        span = (block * 128, block * 128 + 128)
        axes = (((0, 1),), ((block, block + 1),), ((0, 16),), ((0, 8),))
        loads.append(Access("load", "k_cache", (span,), axes, 128, 128, 12, tile))
    query = Access("load", "query", ((8 * index, 8 * index + 8),), (((index, index + 1),), ((0, 8),)), 16, 8, 11)
    out = Access(
        "store", "out", ((8 * index, 8 * index + 8),), (((index, index + 1),), ((0, 8),)), 16, 8, 13, None, (0.5,) * 8
    )
    tiles = (Tile(0, (1.0, float("-inf")), (2.0, 0.0)), Tile(16, (3.0, float("-inf")), (4.5, 0.0)))
    return Program((index, 0, 0), (query, *loads, out), tiles)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    matrix = (NUM_PROGRAMS, 8)
    tensors = (
        TensorInfo("query", matrix, "float32"),
        TensorInfo("k_cache", (1, 6, 16, 8), "float32"),
        TensorInfo("out", matrix, "float32"),
    )
    source = ("def attend(query_ptr, k_cache_ptr, out_ptr):", "    load(query)", "    load(k_cache)", "    store(out)")
    programs = tuple(program(index) for index in range(NUM_PROGRAMS))
    launches = (
        Launch("attend", (NUM_PROGRAMS, 1, 1), tensors, {}, 10, source, programs),
        Launch("merge", (1, 1, 1), tensors[:1], {}, 30, ("def merge():",), (Program((0, 0, 0), (), ()),)),
    )
    path = tmp_path_factory.mktemp("trace") / "trace.html"
    path.write_text(Trace("attention", launches).to_html())
    return path


@pytest.fixture
def page(browser: BrowserContext, file: Path) -> Iterator[Page]:
    page = browser.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert complaints == []


def test_it_steps_on_and_back_and_says_what_happens(page: Page):
    now = page.locator("#now")
    expect(now).to_contain_text("load query[0, 0:8]")
    expect(now).to_contain_text("program (0) · step 1 of 4 · 8 of 16 lanes, the others are masked off")
    expect(page.locator("#back")).to_be_disabled()
    page.click("#forward")
    expect(now).to_contain_text("load k_cache[0, 0, 0:16, 0:8]")
    expect(now).to_contain_text("tile of keys from 0 · 128 lanes")
    expect(page.locator(".at-load")).to_have_attribute("data-line", "12")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(now).to_contain_text("store out[0, 0:8]")
    expect(now).to_contain_text("values from 0.5 to 0.5")
    expect(page.locator(".card.active.written h2")).to_contain_text("out")
    page.click("#back")
    expect(now).to_contain_text("load k_cache[0, 1, 0:16, 0:8]")


def test_maximum_and_sum_appear_when_their_tile_is_done(page: Page):
    cells = page.locator("#tiles td")
    expect(cells).to_have_count(2)  # the second lane has seen no key: it has no row
    expect(cells.first).to_have_text("·")
    page.locator("#position").fill("2")
    expect(cells.first).to_have_text("1.00 Σ 2.00")
    expect(cells.last).to_have_text("·")
    page.click("#forward")
    expect(cells.last).to_have_text("3.00 Σ 4.50")


def test_it_plays_to_the_end_and_pauses(page: Page):
    page.select_option("#speed", "60")
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Pause")
    expect(page.locator("#now")).to_contain_text("store out[2, 0:8]")
    expect(page.locator("#play")).to_have_text("Play")
    expect(page.locator("#forward")).to_be_disabled()
    page.select_option("#speed", "1")
    page.click("#play")  # from the start again
    page.click("#play")
    expect(page.locator("#now")).to_contain_text("program (0) · step 1 of 4")
    page.wait_for_timeout(1200)
    expect(page.locator("#now")).to_contain_text("program (0) · step 1 of 4")


def test_it_jumps_between_programs_and_launches(page: Page):
    now = page.locator("#now")
    page.click("#next-program")
    expect(now).to_contain_text("program (1) · step 1 of 4")
    page.click("#forward")
    page.click("#previous-program")
    expect(now).to_contain_text("program (1) · step 1 of 4")
    page.click("#previous-program")
    expect(now).to_contain_text("program (0) · step 1 of 4")
    page.locator("#programs").click(position={"x": 2 * 14 + 5, "y": 5})
    expect(now).to_contain_text("program (2) · step 1 of 4")
    page.get_by_role("button", name="merge").click()
    expect(now).to_have_text("nothing was loaded or stored")
    expect(page.locator("#forward")).to_be_disabled()
    page.click("#next-program")
    expect(now).to_have_text("nothing was loaded or stored")
    expect(page.locator("#softmax")).to_be_hidden()


def colour_of(page: Page, canvas: int, x: int, y: int) -> list[int]:
    """Of one pixel of a tensor's drawing."""
    return page.evaluate(
        "([i, x, y]) => { const canvas = document.querySelectorAll('.card canvas')[i], scale = devicePixelRatio;"
        " return [...canvas.getContext('2d').getImageData(x * scale, y * scale, 1, 1).data].slice(0, 3); }",
        [canvas, x, y],
    )


def test_squares_are_coloured_by_who_touched_them(page: Page):
    """Row 0 of the query: loaded now, then loaded by this program, then by an earlier one."""
    square = (1, 30 + 4, 4)
    seen = []
    for button in (None, "#forward", "#next-program"):
        if button:
            page.click(button)
        seen.append(tuple(colour_of(page, *square)))
    untouched = tuple(colour_of(page, 1, 30 + 4, 2 * 14 + 4))  # row 2
    assert len({*seen, untouched}) == 4, seen
