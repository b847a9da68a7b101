"""The page of a run's trace: it steps, plays, pauses and jumps, shows what the trace says, and asks for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from minivllm import LLM, SamplingParams
from minivllm.trace import Trace
from minivllm.trace import page as page_of


@pytest.fixture(scope="module")
def trace(tiny_model: Callable[[str], Path]) -> Trace:
    llm = LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=12, max_num_seqs=3, block_size=8)
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=20, ignore_eos=True, seed=3)
    return llm.trace(["the value is what the value", "the value is what the value for", "on the road"], params)


@pytest.fixture(scope="module")
def file(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "explain.html"
    path.write_text(page_of(trace), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: BrowserContext, file: Path) -> Iterator[Page]:
    page = browser.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "about:")) or complaints.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert complaints == []


def test_a_step_shows_decisions_tables_hits_and_draws(page: Page, trace: Trace):
    first = trace.steps[0]
    expect(page.locator("#now")).to_contain_text(f"step {first.number}")
    for row in first.rows:
        card = page.locator("section", has_text=f"request {row.request_id}").first
        expect(card).to_contain_text(row.reason)
        expect(card).to_contain_text(row.kernel)
        for block_hash in row.prefix_hits.values():
            expect(card).to_contain_text(block_hash)
        for draw in row.draws:
            expect(page.locator("section", has_text=draw.digest)).to_contain_text(draw.why)
    assert any(row.prefix_hits for row in first.rows)


def test_buttons_and_keys_step_and_stop_at_the_ends(page: Page, trace: Trace):
    last = len(trace.steps)
    now, back, forward = page.locator("#now"), page.locator("#back"), page.locator("#forward")
    expect(back).to_be_disabled()
    forward.click()
    expect(now).to_contain_text("step 2")
    page.keyboard.press("ArrowRight")
    expect(now).to_contain_text("step 3")
    page.keyboard.press("End")
    expect(now).to_contain_text(f"{last} of {last}")
    expect(forward).to_be_disabled()
    page.keyboard.press("ArrowLeft")
    expect(now).to_contain_text(f"{last - 1} of {last}")
    page.locator("#first").click()
    expect(back).to_be_disabled()


def test_it_plays_pauses_and_ends(page: Page, trace: Trace):
    play, now = page.locator("#play"), page.locator("#now")
    page.locator("#speed").select_option("15")
    play.click()
    expect(play).to_have_text("Pause")
    expect(now).not_to_contain_text(f"1 of {len(trace.steps)}")
    play.click()
    expect(play).to_have_text("Play")
    play.click()
    expect(now).to_contain_text(f"{len(trace.steps)} of {len(trace.steps)}")
    expect(play).to_have_text("Play")


def test_a_link_opens_its_step_and_a_preempted_request_has_no_blocks(page: Page, trace: Trace, file: Path):
    index, row = next((i, r) for i, s in enumerate(trace.steps) for r in s.rows if r.action == "preempt")
    page.goto("about:blank")
    page.goto(f"{file.as_uri()}#{index + 1}")
    expect(page.locator("#now")).to_contain_text(f"step {trace.steps[index].number}")
    card = page.locator("section", has_text=row.reason)
    expect(card).to_contain_text("preempt")
    expect(card.locator(".blocks").nth(0).locator(".block")).not_to_have_count(0)
    expect(card.locator(".blocks").nth(1)).to_have_text("no blocks")
