"""Draws a trace: one HTML page with its data inside, which steps through the steps of the engine, plays and pauses.

Knows no engine. Called by figures.py and cli/tracing.py. Twin in vLLM: none.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from minivllm.trace.document import Moment, Trace, plain
from minivllm.trace.records import Added


def page(trace: Trace) -> str:
    """The whole page; nothing in it asks for another file."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    data = {
        "engine": trace.header["engine"],
        "sequences": [_sequence(trace, request_id) for request_id in trace.request_ids],
        "steps": [_step(moment) for moment in trace.moments()],
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.replace("__TITLE__", html.escape(trace.header["engine"]["model"])).replace("__TRACE__", text)


def _sequence(trace: Trace, request_id: str) -> dict[str, Any]:
    added = trace.prompt_of(request_id) or Added(request_id, [])
    return {"id": request_id, "prompt": added.prompt_texts or [f"<{token_id}>" for token_id in added.prompt_token_ids]}


def _step(moment: Moment) -> dict[str, Any]:
    return {
        **plain(moment.step),
        "before": moment.before,
        "tables": moment.tables,
        "hashes": moment.hashes,
        "num_tokens": moment.step.num_tokens,
    }
