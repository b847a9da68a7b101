"""Ways to look at a trace: Chrome's format, figures, the page and the terminal show what the data say."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from minivllm import ClientError
from minivllm.trace import Trace, chrome_trace, page, show_blocks, show_schedule, show_trace
from minivllm.trace.terminal import print_trace

SVG = "{http://www.w3.org/2000/svg}"


def preempted(trace: Trace) -> tuple[int, str]:
    return next((s.number, row.request_id) for s in trace.steps for row in s.rows if row.action == "preempt")


# ------------------------------------------------------------------ chrome
def test_chrome_gets_a_slice_for_every_request_of_every_step(trace: Trace):
    events = json.loads(json.dumps(chrome_trace(trace)))["traceEvents"]
    tracks = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    slices = [e for e in events if e["ph"] == "X"]
    assert [e["name"] for e in slices if e["name"].startswith("step ")] == [f"step {s.number}" for s in trace.steps]
    for request_id in trace.request_ids:
        rows = [row for step in trace.steps if (row := step.row(request_id)) and row.num_scheduled_tokens]
        own = [e for e in slices if e["pid"] == 2 and e["tid"] == tracks[f"request {request_id}"]]
        computing = [e for e in own if e["name"] not in ("waiting", "preempted")]
        assert [e["args"]["reason"] for e in computing] == [row.reason for row in rows]
        own.sort(key=lambda e: e["ts"])
        for one, following in zip(own, own[1:], strict=False):
            assert one["ts"] + one["dur"] <= following["ts"] + 1  # microseconds, each rounded
    _, victim = preempted(trace)
    named = [e["name"] for e in slices if e["pid"] == 2 and e["tid"] == tracks[f"request {victim}"]]
    assert named.count("preempted") == 1 and named.count("waiting") == 1
    used = [e["args"]["blocks"] for e in events if e["name"] == "blocks in use"]
    assert used == [11 - step.num_free_blocks for step in trace.steps] and max(used) == 11


# ------------------------------------------------------------------ figures
def texts(figure) -> list[str]:
    return [node.text for node in ElementTree.fromstring(figure.html).iter(f"{SVG}text")]


def titles(figure) -> list[str]:
    return [node.text for node in ElementTree.fromstring(figure.html).iter(f"{SVG}title")]


@pytest.mark.parametrize("by_time", [False, True])
def test_the_schedule_has_a_cell_with_its_reason_for_every_decision(trace: Trace, by_time: bool):
    figure = show_schedule(trace, by_time=by_time)
    assert figure._repr_html_() == figure.html and "http" not in figure.html.replace("http://www.w3.org", "")
    reasons = [f"{row.request_id}: {row.reason}" for step in trace.steps for row in step.rows]
    assert [title for title in titles(figure) if " of 11 blocks" not in title] == reasons
    assert sum(" of 11 blocks" in title for title in titles(figure)) == len(trace.steps)
    assert {f"request {name}" for name in trace.request_ids} <= set(texts(figure))
    if not by_time:
        assert "✕" in texts(figure) and {"prefill", "decode", "preempt", "wait"} <= set(texts(figure))


def test_the_blocks_of_a_step_are_those_of_its_tables(trace: Trace):
    moment = list(trace.moments())[5]
    figure = show_blocks(trace, moment.step.number)
    owners = moment.owners()
    for block_id in range(1, 12):
        title = f"block {block_id}: {', '.join(owners.get(block_id, [])) or 'free'}"
        title += f", hash {moment.hashes[block_id]}" if block_id in moment.hashes else ""
        assert title in titles(figure)
    assert any(len(holders) == 2 for holders in owners.values())  # a shared prefix
    assert texts(figure)[0].startswith(f"step {moment.step.number}: ")
    fullest = min(trace.steps, key=lambda step: step.num_free_blocks)
    assert texts(show_blocks(trace))[0].startswith(f"step {fullest.number}: ")


def test_an_empty_trace_and_a_step_that_is_not_there_are_refused(trace: Trace):
    empty = Trace(trace.header)
    for call in (lambda: show_schedule(empty), lambda: show_blocks(empty), lambda: show_blocks(trace, 999)):
        with pytest.raises(ClientError, match="this trace has no step"):
            call()


# ------------------------------------------------------------------ page and terminal
def test_the_page_holds_the_data_and_asks_for_nothing(trace: Trace):
    text = page(trace)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S).group(1))
    assert [step["number"] for step in data["steps"]] == [step.number for step in trace.steps]
    assert "".join(data["sequences"][0]["prompt"]) == trace.requests[0].prompt
    assert not re.search(r"""(src|href)=|url\(|@import|fetch\(""", text)
    assert html.escape(text, quote=True) in show_trace(trace, height=300).html


def test_a_page_of_hostile_text_stays_a_page(trace: Trace):
    hostile = Trace.from_json(trace.to_json())
    hostile.requests[0].prompt_texts = ["</script><script>alert(1)</script>", "\ud83d"]
    hostile.header["engine"]["model"] = "<b>model</b>"
    text = page(hostile)
    assert text.count("</script>") == page(trace).count("</script>") and "<b>model" not in text
    text.encode()


def test_the_terminal_tells_decisions_tables_hits_and_draws(trace: Trace):
    console = Console(width=250, record=True, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    print_trace(trace, console)
    console.file.close()
    shown = console.export_text()
    for step in trace.steps:
        assert f"step {step.number}: " in shown
        for row in step.rows:
            assert row.reason in shown
            assert all(block_hash in shown for block_hash in row.prefix_hits.values())
    assert "blocks [] -> [1, 2]" in shown and "top_p 0.9 (" in shown and "attention: cpu, rows" in shown
