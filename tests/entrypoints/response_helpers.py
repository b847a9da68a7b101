"""A strict reader of the Responses API's streams: every rule about the order of events, and what they add up to."""

from __future__ import annotations

import json
from typing import Any, get_args

from openai.types.responses import Response, ResponseStreamEvent

from tests.entrypoints.helpers import Reply

RESPONSES = "/v1/responses"
GREEDY = {"temperature": 0, "max_output_tokens": 8, "ignore_eos": True}
ENDS = ("response.completed", "response.incomplete", "response.failed")
DELTAS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}
# What the client itself has for each type of event.
MODELS = {kind.model_fields["type"].annotation.__args__[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])}


def named_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream that ends in [DONE]; each is named in its own line. Comments are left out."""
    assert text.endswith("data: [DONE]\n\n"), text[-300:]
    blocks = [block for block in text.split("\n\n")[:-2] if not block.startswith(":")]
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def checked(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that a stream tells of, after every rule has been checked."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        MODELS[event["type"]].model_validate(event)
    created, started, *middle, last = events
    assert (created["type"], started["type"]) == ("response.created", "response.in_progress")
    assert last["type"] in ENDS
    for event in (created, started):
        assert event["response"]["status"] == "in_progress" and event["response"]["usage"] is None
        assert event["response"]["output"] == []
    same = ("id", "created_at", "model", "temperature", "tools", "metadata")
    assert len({json.dumps([event["response"][key] for key in same]) for event in (created, started, last)}) == 1
    output = folded(middle)
    if last["type"] != "response.failed":
        assert output == last["response"]["output"]
    assert_complete(last["response"])
    return last["response"]


def folded(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items, put together from the deltas alone and then compared with what the other events say.

    Items come one after the other, each of them: added, its part added, deltas, text done, part done, item done.
    """
    items: list[dict[str, Any]] = []
    while events:
        added, *events = events
        assert added["type"] == "response.output_item.added" and added["output_index"] == len(items)
        item = added["item"]
        assert item["status"] == "in_progress"
        prefix = DELTAS[item["type"]]
        end = next(n for n, event in enumerate(events) if event["type"] == "response.output_item.done")
        inside, done, events = events[:end], events[end], events[end + 1 :]
        for event in inside:
            assert (event["item_id"], event["output_index"]) == (item["id"], len(items))
            assert event.get("content_index", 0) == 0
        if item["type"] == "function_call":
            item = {**item, **_folded_call(inside, prefix, item)}
        else:
            item = {**item, "content": [_folded_part(inside, prefix, item)]}
        assert done["item"]["status"] in ("completed", "incomplete")
        assert done["item"] == {**item, "status": done["item"]["status"]}
        assert done["output_index"] == len(items)
        items.append(done["item"])
    assert all(item["status"] == "completed" for item in items[:-1])
    return items


def _folded_part(events: list[dict[str, Any]], prefix: str, item: dict[str, Any]) -> dict[str, Any]:
    opened, *deltas, text_done, part_done = events
    assert item["content"] == []
    assert opened["type"] == "response.content_part.added" and opened["part"]["text"] == ""
    assert {event["type"] for event in deltas} <= {f"{prefix}.delta"}
    part = {**opened["part"], "text": "".join(event["delta"] for event in deltas)}
    if item["type"] == "message":
        part["logprobs"] = [entry for event in deltas for entry in event["logprobs"]]
        assert text_done["logprobs"] == part["logprobs"] and part["annotations"] == []
    assert (text_done["type"], text_done["text"]) == (f"{prefix}.done", part["text"])
    assert (part_done["type"], part_done["part"]) == ("response.content_part.done", part)
    return part


def _folded_call(events: list[dict[str, Any]], prefix: str, item: dict[str, Any]) -> dict[str, Any]:
    *deltas, done = events
    assert item["arguments"] == "" and item["name"] and item["call_id"] and item["id"] != item["call_id"]
    assert {event["type"] for event in deltas} <= {f"{prefix}.delta"}
    arguments = "".join(event["delta"] for event in deltas)
    assert done["type"] == f"{prefix}.done"
    assert (done["arguments"], done["name"]) == (arguments, item["name"])
    return {"arguments": arguments}


def assert_complete(response: dict[str, Any]) -> None:
    """Every field that the client's type has without a default, and nothing that it would not understand."""
    Response.model_validate(response)
    assert response["object"] == "response" and response["id"].startswith("resp_") and len(response["id"]) > 30
    assert (response["completed_at"] is not None) == (response["status"] == "completed")
    assert (response["incomplete_details"] is not None) == (response["status"] == "incomplete")
    assert (response["error"] is not None) == (response["status"] == "failed")
    ids = [item["id"] for item in response["output"]]
    assert len(set(ids)) == len(ids)
    for item in response["output"]:
        assert item["id"].startswith({"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}[item["type"]])
        assert (item["status"] == "in_progress") == (response["status"] == "in_progress") or item["status"]


def streamed(reply: Reply) -> dict[str, Any]:
    """The response of a stream that went well from its first byte on."""
    assert reply.status == 200 and reply.headers["Content-Type"].startswith("text/event-stream"), reply.text
    return checked(named_events(reply.text))


def nameless(response: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two equal answers: ids, times, and what the prefix cache had."""
    output = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
    gone = {"id", "created_at", "completed_at", "usage", "output"}
    return {**{k: v for k, v in response.items() if k not in gone}, "output": output}


def text_of(response: dict[str, Any]) -> str:
    """The text of all messages."""
    messages = [item for item in response["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in messages for part in item["content"])
