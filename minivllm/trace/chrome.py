"""A trace for chrome://tracing and ui.perfetto.dev: one track for the engine, one for each sequence, and counters.

    engine      step 7 [ compute | outputs ]
    request 1   waiting | prefill 40 | decode | decode | preempted | prefill 41 | ...
    counters    blocks in use, tokens of the step, sequences that compute and that wait

Knows no engine. Called by people who look on and cli/tracing.py. Twin in vLLM: none (its benchmarks draw a timeline).
Source: the "Trace Event Format" of Chromium's catapult project; ph "X" is a slice, "C" a counter, "M" a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minivllm.trace.document import Trace
from minivllm.trace.records import Row, Step

ENGINE, REQUESTS = 1, 2  # process ids
MICROSECONDS = 1e6


def chrome_trace(trace: Trace) -> dict[str, Any]:
    """The whole file as a JSON object; times are microseconds since the trace began."""
    tracks = {request_id: number for number, request_id in enumerate(trace.request_ids, 1)}
    events = [_name("process_name", ENGINE, 0, "engine"), _name("process_name", REQUESTS, 0, "requests")]
    events += [_name("thread_name", REQUESTS, track, f"request {name}") for name, track in tracks.items()]
    steps, num_blocks = trace.steps, trace.header["engine"]["num_blocks"] - 1
    for step in steps:
        events += _engine_events(step, num_blocks)
        events += [_row_slice(step, row, tracks[row.request_id]) for row in step.rows if row.num_scheduled_tokens]
    for request_id, track in tracks.items():
        added = trace.prompt_of(request_id)
        start = added.added_seconds if added is not None else 0.0
        events += _idle_slices(steps, request_id, track, start)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": trace.header["environment"]}


def _engine_events(step: Step, num_blocks: int) -> Iterator[dict[str, Any]]:
    facts = {"num_tokens": step.num_tokens, "num_requests": sum(row.num_scheduled_tokens > 0 for row in step.rows)}
    yield _slice(f"step {step.number}", ENGINE, 1, step.scheduled_seconds, step.ended_seconds, facts)
    yield _slice("compute", ENGINE, 1, step.scheduled_seconds, step.computed_seconds, {})
    yield _slice("outputs", ENGINE, 1, step.computed_seconds, step.ended_seconds, {})
    waiting = len(step.rows) - facts["num_requests"]
    yield _counter("blocks in use", step, {"blocks": num_blocks - step.num_free_blocks})
    yield _counter("tokens", step, {"tokens": step.num_tokens})
    yield _counter("sequences", step, {"computing": facts["num_requests"], "waiting": waiting})


def _row_slice(step: Step, row: Row, track: int) -> dict[str, Any]:
    name = row.action if row.num_scheduled_tokens == 1 else f"{row.action} {row.num_scheduled_tokens}"
    facts: dict[str, Any] = {"reason": row.reason, "kernel": row.kernel, "new_block_ids": row.new_block_ids}
    if row.prefix_hits:
        facts["prefix_hits"] = {str(block_id): block_hash for block_id, block_hash in row.prefix_hits.items()}
    if row.new_token_ids:
        facts["tokens"] = row.new_texts or row.new_token_ids
    return _slice(name, REQUESTS, track, step.scheduled_seconds, step.computed_seconds, facts)


def _idle_slices(steps: list[Step], request_id: str, track: int, start: float) -> Iterator[dict[str, Any]]:
    """Waiting and preempted, from the last thing that happened to the sequence until it computes (again)."""
    name, why = "waiting", ""
    for step in steps:
        row = step.row(request_id)
        if row is None:
            continue
        if row.action == "preempt":
            name, why, start = "preempted", row.reason, step.scheduled_seconds
        elif not row.num_scheduled_tokens:
            why = row.reason
        else:
            if why or name == "waiting":
                yield _slice(name, REQUESTS, track, start, step.scheduled_seconds, {"reason": why})
            name, why, start = "", "", step.computed_seconds


def _slice(name: str, process: int, track: int, start: float, end: float, facts: dict[str, Any]) -> dict[str, Any]:
    times = {"ts": round(start * MICROSECONDS), "dur": max(0, round((end - start) * MICROSECONDS))}
    return {"name": name, "ph": "X", "pid": process, "tid": track, **times, "args": facts}


def _counter(name: str, step: Step, values: dict[str, int]) -> dict[str, Any]:
    return {"name": name, "ph": "C", "pid": ENGINE, "ts": round(step.scheduled_seconds * MICROSECONDS), "args": values}


def _name(kind: str, process: int, track: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": track, "args": {"name": name}}
