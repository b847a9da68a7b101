"""The page in a real browser: it talks, it shows what it was told, it shows the engine as it is, it keeps to itself."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import expect

from minivllm import LLM, AsyncEngine, SamplingParams
from minivllm.entrypoints import chat as chat_module
from minivllm.entrypoints.server import Server
from tests.ui.view import PATIENCE_MS, View


def shortened(text: str) -> str:
    """Request ids as the page says them."""
    return re.sub(r"-[0-9a-f]{8}\b", "", text)


Serve = Callable[..., Server]
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


def get_state(server: Server, key: str = "") -> dict[str, Any]:
    call = urllib.request.Request(f"{server.url}/v1/engine/state", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(call, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture
def paused(llm: LLM, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """The engine makes as many steps as it is told to, and otherwise stands between two steps."""
    step, permits = llm.llm_engine.step, threading.Semaphore(0)
    is_open = threading.Event()
    done = threading.Semaphore(0)

    def paced() -> list[Any]:
        if is_open.is_set():
            return step()
        if permits.acquire(timeout=0.02):
            try:
                return step()
            finally:
                done.release()
        return []

    monkeypatch.setattr(llm.llm_engine, "step", paced)

    def advance(count: int) -> None:
        for _ in range(count):
            permits.release()
            assert done.acquire(timeout=60)

    yield advance
    is_open.set()


# ------------------------------------------------------------------ chat
def test_a_conversation_streams_and_remembers(view: View, serve: Serve, monkeypatch: pytest.MonkeyPatch):
    bodies = remember_bodies(monkeypatch)
    view.open(serve())
    expect(view.page.locator("#send")).to_be_disabled()
    view.set(system="be brief", temperature=0.5, top_p=0.9, top_k=40, max_tokens=12, seed=3)
    view.set(presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.1)
    view.send("the capital is")
    view.wait_for_end()
    view.send("what is\nthat")
    view.wait_for_end(2)
    first, second = bodies
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 12, "seed": 3, "presence_penalty": 0.5}
    fields |= {"frequency_penalty": -0.5, "repetition_penalty": 1.1, "stream": True, "logprobs": True}
    assert {name: getattr(first, name) for name in fields} == fields and first.top_logprobs == 5
    assert first.messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the capital is"}]
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "user"]
    asked, answered, again, _ = view.texts
    assert (asked, again) == ("the capital is", "what is\nthat")
    assert answered == second.messages[2]["content"] and answered
    assert view.page.locator(".facts").first.inner_text().startswith("12 tokens · ")
    view.page.click("#new-chat")
    assert view.texts == [] and view.page.locator("#welcome").is_visible()


def test_unfilled_fields_are_the_models_own(view: View, serve: Serve, monkeypatch: pytest.MonkeyPatch):
    bodies = remember_bodies(monkeypatch)
    view.open(serve())
    view.set(max_tokens="")
    view.page.click("#new-chat")
    view.send("the")
    view.wait_for_end()
    (body,) = bodies
    sent = {name for name in type(body).model_fields if getattr(body, name) is not None}
    assert sent == {"messages", "stream", "stream_options", "logprobs", "top_logprobs"}


def remember_bodies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    bodies: list[Any] = []
    begin = chat_module.sse.check_stream_options
    start = chat_module.start_job

    def remember(service: Any, body: Any, *arguments: Any, **options: Any) -> Any:
        bodies.append(body)
        return start(service, body, *arguments, **options)

    assert begin is not None
    monkeypatch.setattr(chat_module, "start_job", remember)
    return bodies


def test_text_appears_while_it_is_made_and_stop_keeps_it(
    view: View, serve: Serve, engine: AsyncEngine, paused: Callable[[int], None]
):
    view.open(serve())
    view.set(temperature=0, max_tokens=100)
    view.send("the")
    paused(4)
    expect(view.page.locator(".token:not(.special)").nth(1)).to_be_visible()
    expect(view.page.locator("#send")).to_have_text("Stop")
    assert view.page.locator(".facts").count() == 0
    before = view.texts[1]
    view.page.click("#send")
    view.wait_for_end()
    assert "stopped" in view.page.locator(".facts").inner_text()
    assert view.texts[1] == before
    expect(view.page.locator("#send")).to_have_text("Send")
    deadline = time.monotonic() + 60
    while engine.num_unfinished_requests:  # the server heard of it
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_escape_stops(view: View, serve: Serve, paused: Callable[[int], None]):
    view.open(serve())
    view.send("the")
    paused(2)
    view.page.keyboard.press("Escape")
    view.wait_for_end()
    assert "stopped" in view.page.locator(".facts").inner_text()


def test_a_token_shows_its_probabilities(view: View, serve: Serve):
    view.open(serve())
    view.set(temperature=0, max_tokens=10)
    view.send("the capital")
    view.wait_for_end()
    token = view.page.locator(".token:not(.special)").nth(2)
    token.hover()
    odds = view.page.locator("#odds")
    expect(odds).to_be_visible()
    assert odds.locator("li").count() == 5
    shares = [float(text.removesuffix(" %")) for text in odds.locator("li span:last-child").all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 101
    assert odds.locator("li.drawn").count() == 1  # greedy: the likeliest one
    assert odds.locator("li").first.get_attribute("class") == "drawn"
    assert odds.locator("h3 span").last.inner_text() == odds.locator("li.drawn span").last.inner_text()
    unsure = float(token.evaluate("node => node.style.getPropertyValue('--unsure')"))
    assert abs((1 - unsure) * 100 - shares[0]) < 1
    view.page.mouse.move(5, 5)
    expect(odds).to_be_hidden()


def test_tokens_can_be_walked_with_the_keyboard_and_untinted(view: View, serve: Serve):
    view.open(serve())
    view.set(temperature=0, max_tokens=10)
    view.send("the capital")
    view.wait_for_end()
    view.page.focus(".assistant .text")
    for _ in range(3):
        view.page.keyboard.press("ArrowRight")
    expect(view.page.locator("#odds")).to_be_visible()
    current = view.page.locator(".token").nth(2)
    assert "current" in (current.get_attribute("class") or "")
    view.page.keyboard.press("Escape")
    expect(view.page.locator("#odds")).to_be_hidden()
    background = "node => getComputedStyle(node).backgroundColor"
    tinted = current.evaluate(background)
    view.page.click("#tint")
    assert view.page.get_attribute("#tint", "aria-pressed") == "false"
    assert current.evaluate(background) == "rgba(0, 0, 0, 0)" != tinted


# ------------------------------------------------------------------ what goes wrong
def test_a_refusal_is_shown_in_the_servers_words_and_can_be_tried_again(view: View, serve: Serve):
    view.open(serve())
    view.set(temperature=5)
    view.send("the")
    failure = view.page.locator(".failure")
    expect(failure).to_contain_text("temperature must be a number in [0, 2], got 5.0")
    view.set(temperature=0, max_tokens=4)
    failure.get_by_role("button", name="Try again").click()
    view.wait_for_end()
    assert view.page.locator(".failure").count() == 0 and len(view.texts) == 2


def test_an_answer_that_breaks_off_says_so(view: View, serve: Serve, paused: Callable[[int], None]):
    server = serve(shutdown_timeout_seconds=0.0)
    view.open(server)
    view.send("the")
    paused(2)
    expect(view.page.locator(".token").first).to_be_visible()
    server.drain(0.0)
    expect(view.page.locator(".failure")).to_contain_text("The server is shutting down.")
    expect(view.page.locator("#link")).not_to_have_text("live")
    server.stop()
    view.page.locator(".failure button").click()
    expect(view.page.locator(".failure")).to_contain_text("The server cannot be reached.")


def test_the_page_is_open_and_asks_for_the_key(view: View, serve: Serve):
    server = serve(api_keys=("secret",))
    view.open(server, is_live=False)
    dialog = view.page.locator("#key-dialog")
    expect(dialog).to_be_visible()
    assert view.page.locator("#refused").is_hidden()
    view.page.fill("#key", "wrong")
    view.page.keyboard.press("Enter")
    expect(view.page.locator("#refused")).to_be_visible()
    view.page.fill("#key", "secret")
    view.page.keyboard.press("Enter")
    expect(view.page.locator("#link")).to_have_text("live")
    view.set(max_tokens=3)
    view.send("the")
    view.wait_for_end()
    assert "secret" not in "".join(view.requests)  # it goes into a header
    view.page.reload()
    expect(view.page.locator("#link")).to_have_text("live")  # kept for the tab
    assert dialog.is_hidden()


def test_a_model_that_writes_html_writes_text(view: View, serve: Serve, monkeypatch: pytest.MonkeyPatch):
    """Through every place where foreign text is shown: the user's, the model's, its tokens, an error's."""
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    view.open(serve())
    view.send(evil)
    view.wait_for_end()
    assert view.texts[0] == evil
    event = {"choices": [{"index": 0, "delta": {"content": evil}, "finish_reason": None}]}
    token = {"token": evil, "logprob": -0.5, "bytes": list(evil.encode())}
    event["choices"][0]["logprobs"] = {"content": [{**token, "top_logprobs": [token]}]}  # type: ignore[index]
    body = f"data: {json.dumps(event)}\n\ndata: {json.dumps({'error': {'message': evil}})}\n\n"
    answer = {"status": 200, "content_type": "text/event-stream", "body": body}
    view.page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))  # type: ignore[arg-type]
    view.send("again")
    expect(view.page.locator(".failure span")).to_have_text(evil)
    assert view.texts[3] == evil
    view.page.locator(".token", has_text="onerror").hover()
    expect(view.page.locator("#odds h3")).to_contain_text("onerror")
    assert view.page.title() == "minivllm" and view.page.locator("main img, #odds img").count() == 0


# ------------------------------------------------------------------ the engine
def test_the_grid_and_the_lanes_are_the_engines_state(
    view: View, serve: Serve, engine: AsyncEngine, paused: Callable[[int], None]
):
    """Three run and share a prefix, one waits, and a prefix that nobody holds is still known. Pixel by pixel."""
    server = serve()
    view.open(server)
    prefix = list(range(3, 35))
    with engine.submit({"prompt_token_ids": [90, *range(40, 60)]}, LONG):
        paused(1)
    paused(1)
    streams = [engine.submit({"prompt_token_ids": [*prefix, 60 + i, 61, 62]}, LONG) for i in range(4)]
    paused(3)
    state = get_state(server)
    view.wait_for_revision(state["revision"])
    assert (state["num_running"], state["num_waiting"]) == (3, 1)
    assert state["blocks"]["num_shared"] == 2 and state["blocks"]["num_cached_free"] >= 1
    assert_grid_is(view, state)
    reasons = {decision["request_id"]: decision["reason"] for decision in state["decisions"]}
    for status in ("running", "waiting", "preempted"):
        names = [request["request_id"] for request in state["requests"] if request["status"] == status]
        assert view.lane(status) == {name: shortened(reasons[name]) for name in names}
    assert view.page.locator("#num-running").inner_text() == "3 of 3"
    view.page.click("#theme")
    assert_grid_is(view, state)
    for stream in streams:
        stream.close()


def assert_grid_is(view: View, state: dict[str, Any]) -> None:
    """Every block is painted as what it is, the first two owners in the colours of their rows."""
    tones = {
        name: (view.paint(tone), view.paint(tone.replace("/ 1)", "/ 0.45)"))) for name, tone in view.tones().items()
    }
    owners: list[list[str]] = [[] for _ in state["blocks"]["ref_counts"]]
    for request in state["requests"]:
        for block_id in request["block_ids"]:
            owners[block_id].append(request["request_id"])
    free, cached, null = view.variable("free"), view.variable("cached"), view.variable("null")
    expected = []
    for block_id, names in enumerate(owners):
        is_cached = state["blocks"]["cached"][block_id]
        if block_id == state["blocks"]["null_block_id"]:
            pair = [null, null]
        elif not names:
            pair = [cached, cached] if is_cached else [free, free]
        else:
            first = tones[names[0]][0 if is_cached else 1]
            pair = [first, tones[names[1]][0] if len(names) > 1 else first]
        expected.append(pair)
    assert len({free, cached, *(tone for tone, _ in tones.values())}) == 2 + len(tones)
    assert view.grid() == expected


def test_a_preempted_request_has_its_lane_and_its_reason(
    view: View, serve: Serve, engine: AsyncEngine, paused: Callable[[int], None]
):
    server = serve()
    view.open(server)
    streams = [engine.submit({"prompt_token_ids": [i + 5] * 40}, LONG) for i in range(3)]
    state = get_state(server)
    for _ in range(100):
        paused(1)
        state = get_state(server)
        if state["num_preempted"]:
            break
    view.wait_for_revision(state["revision"])
    (name,) = [request["request_id"] for request in state["requests"] if request["status"] == "preempted"]
    assert view.lane("preempted")[name].startswith("preempted so that")
    assert_grid_is(view, state)
    for stream in streams:
        stream.close()


def test_a_block_says_whose_it_is(view: View, serve: Serve, engine: AsyncEngine, paused: Callable[[int], None]):
    server = serve()
    view.open(server)
    streams = [engine.submit({"prompt_token_ids": [*range(3, 35), 60 + i]}, LONG) for i in range(2)]
    paused(2)
    first, second = (shortened(stream.request_id) for stream in streams)
    expect(view.page.locator(".row")).to_have_count(2)
    state = get_state(server)
    shared = state["blocks"]["ref_counts"].index(2)
    (free, *_) = [i for i, count in enumerate(state["blocks"]["ref_counts"]) if count == 0]
    filling = state["requests"][1]["block_ids"][-1]
    words = {
        0: "Block 0: the null block, pads block tables.",
        shared: f"Block {shared}: held by {first}, {second}, shared by 2; full, findable as a prefix.",
        filling: f"Block {filling}: held by {second}; being filled.",
        free: f"Block {free}: free.",
    }
    view.page.focus("#grid")
    for block_id in range(12):
        view.page.keyboard.press("ArrowRight")
        if block_id in words:
            expect(view.page.locator("#block")).to_have_text(words[block_id])
    place = view.page.evaluate("({...document.getElementById('grid').dataset})")
    x = (int(place["cell"]) + int(place["gap"])) * shared + 4
    view.page.hover("#grid", position={"x": x, "y": 4})
    expect(view.page.locator("#block")).to_have_text(words[shared])
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("num_blocks", [1000, 1001, 20_000])
def test_many_blocks_fit_and_every_one_is_painted(view: View, serve: Serve, num_blocks: int):
    """A state made by hand, of a size that no test model has."""
    server = serve()
    state = get_state(server)
    names = [str(number) for number in range(64)]
    each = num_blocks // 100
    requests = []
    ref_counts, cached = [1] + [0] * (num_blocks - 1), [block % 3 == 0 for block in range(num_blocks)]
    for index, name in enumerate(names):
        held = list(range(1 + index * each, 1 + (index + 1) * each))
        request = {"request_id": name, "status": "running", "num_prompt_tokens": 9, "num_output_tokens": 1}
        request |= {"max_tokens": 9, "num_computed_tokens": 9, "num_cached_tokens": 0, "num_preemptions": 0}
        requests.append({**request, "priority": 0, "age_seconds": 1.0, "block_ids": held})
        for block in held:
            ref_counts[block] = 1
    state |= {"requests": requests, "decisions": [], "num_running": 64, "revision": 9}
    state["config"]["num_blocks"] = num_blocks
    state["blocks"] |= {"ref_counts": ref_counts, "cached": [int(flag) for flag in cached]}
    body = f"event: state\ndata: {json.dumps(state)}\n\n"
    answer = {"status": 200, "content_type": "text/event-stream", "body": body}
    view.page.route("**/v1/engine/events", lambda route: route.fulfill(**answer))  # type: ignore[arg-type]
    view.open(server, is_live=False)
    view.wait_for_revision(9)
    assert view.page.locator(".row").count() == 64
    assert_grid_is(view, state)
    milliseconds = view.page.evaluate(
        "() => { const t = performance.now(); drawGrid(); return performance.now() - t; }"
    )
    print(milliseconds)
    assert milliseconds < 500
    overflow = "document.documentElement.scrollWidth > innerWidth"
    assert not view.page.evaluate(overflow)


def test_speed_is_shown_and_falls_back_to_zero(view: View, serve: Serve, engine: AsyncEngine):
    server = serve()
    view.open(server)
    stream = engine.submit("the", LONG)
    expect(view.page.locator("#rate")).not_to_have_text("0")
    list(stream)
    expect(view.page.locator("#rate")).to_have_text("0", timeout=PATIENCE_MS)


def test_a_hidden_page_does_not_watch(view: View, serve: Serve):
    server = serve()
    view.open(server)
    assert server.service.num_in_flight == 1
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    view.page.evaluate(hide % "true" + "document.dispatchEvent(new Event('visibilitychange'))")
    deadline = time.monotonic() + 60
    while server.service.num_in_flight:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    view.page.evaluate(hide % "false" + "document.dispatchEvent(new Event('visibilitychange'))")
    while not server.service.num_in_flight:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------ narrow, dark, keyboard
def test_a_narrow_screen_has_two_tabs_and_no_sideways_scrolling(view: View, serve: Serve):
    view.page.set_viewport_size({"width": 360, "height": 700})
    view.open(serve())
    assert view.page.locator("#chat").is_visible() and view.page.locator("#engine").is_hidden()
    view.page.focus("#tab-chat")
    view.page.keyboard.press("ArrowRight")
    assert view.page.locator("#engine").is_visible() and view.page.locator("#chat").is_hidden()
    assert view.page.evaluate("document.activeElement.id") == "tab-engine"
    assert len(view.grid()) == 12  # drawn when it is seen
    assert not view.page.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_the_theme_is_the_systems_until_it_is_chosen(view: View, serve: Serve):
    theme = "document.documentElement.dataset.theme"
    view.page.emulate_media(color_scheme="dark")
    view.open(serve())
    assert view.page.evaluate(theme) == "dark"
    view.page.emulate_media(color_scheme="light")
    view.wait_for(f"{theme} === 'light'")
    view.page.click("#theme")
    assert view.page.evaluate(theme) == "dark"
    view.page.reload()
    assert view.page.evaluate(theme) == "dark"
    view.page.evaluate("localStorage.clear()")


def test_everything_can_be_reached_with_the_tab_key(view: View, serve: Serve):
    view.open(serve())
    view.set(max_tokens=3)
    view.send("the")
    view.wait_for_end()
    reached = set()
    for _ in range(60):
        view.page.keyboard.press("Tab")
        reached.add(view.page.evaluate("document.activeElement.id || document.activeElement.className"))
    wanted = {"theme", "new-chat", "settings-button", "tint", "system", "temperature", "repetition_penalty", "prompt"}
    assert wanted | {"grid", "text", "rows"} <= reached
    unnamed = """[...document.querySelectorAll('button, input, textarea, canvas, [role]')].filter(node =>
        node.checkVisibility() && !(node.textContent.trim() || node.getAttribute('aria-label') || node.labels?.length
        || ['status', 'log'].includes(node.getAttribute('role')))).map(node => node.outerHTML)"""
    assert view.page.evaluate(unnamed) == []


def test_the_page_is_one_file_with_a_policy_that_holds(view: View, serve: Serve):
    """Neither a script that somebody adds nor a call elsewhere gets through."""
    server = serve()
    view.open(server)
    assert set(view.paths) == {"/", "/v1/engine/events"}
    view.page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "document.title = 'owned'";
        document.body.append(script);
    }""")
    assert view.page.title() == "minivllm"
    elsewhere = view.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'through', error => error.name)")
    assert elsewhere == "TypeError"
    refused = [text for text in view.complaints if "Content Security Policy" in text]
    assert len(refused) >= 2
    view.complaints.clear()
    view.requests[:] = [url for url in view.requests if ":9/" not in url]
