"""POST /v1/chat/completions: the same answer whole, as a stream, and from LLM; the order of chunks; failures."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine, BeamSearchParams, SamplingParams
from minivllm.entrypoints.service import ServerConfig
from tests.engine.test_async_engine import Gate, settle
from tests.entrypoints.helpers import CHAT, HELLO, PATIENCE, Reply, Web, events_of, eventually

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def prompt_of(llm: LLM) -> Any:
    return llm.llm_engine.render_chat(HELLO)


# ------------------------------------------------------------------ whole
def test_the_answer_is_the_engines_own(llm: LLM, engine: AsyncEngine):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    expected = list(engine.submit(prompt_of(llm), params))[-1]
    body = Web(engine).chat(**GREEDY).body
    (choice,) = body["choices"]
    assert choice["message"]["content"] == expected.outputs[0].text
    assert choice["message"]["role"] == "assistant" and "tool_calls" not in choice["message"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    num_prompt_tokens = len(expected.prompt_token_ids)
    assert body["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "total_tokens": num_prompt_tokens + 8,
        "completion_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": num_prompt_tokens // 16 * 16},  # the first answer's full blocks
    }


def test_the_first_served_name_is_in_every_answer_whatever_name_was_asked_for(web: Web):
    for model in ({}, {"model": "tiny"}, {"model": "alias"}, {"model": None}, {"model": ""}):
        assert web.chat(**GREEDY, **model).body["model"] == "tiny"
    error = web.chat(model="gpt-4").error
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_without_a_limit_the_answer_fills_the_context(web: Web, llm: LLM):
    usage = web.chat(temperature=0, ignore_eos=True).body["usage"]
    assert usage["total_tokens"] == llm.llm_engine.config.model.max_model_len


def test_less_than_what_was_asked_for_is_said(web: Web, llm: LLM):
    """max_tokens beyond the room was lowered in silence."""
    room = llm.llm_engine.config.model.max_model_len - len(prompt_of(llm)["prompt_token_ids"])
    fields = {"temperature": 0, "ignore_eos": True}
    for name in ("max_tokens", "max_completion_tokens"):
        reply = web.chat(**fields, **{name: 5000})
        assert reply.headers["X-Minivllm-Clamped"] == f"max_tokens={room}"
        assert reply.body["usage"]["completion_tokens"] == room
    assert web.chat(stream=True, max_tokens=room + 1, **fields).headers["X-Minivllm-Clamped"] == f"max_tokens={room}"
    for reply in (web.chat(max_tokens=room, **fields), web.chat(**fields)):
        assert "X-Minivllm-Clamped" not in reply.headers


def test_max_completion_tokens_wins(web: Web):
    body = web.chat(temperature=0, ignore_eos=True, max_tokens=9, max_completion_tokens=3).body
    assert body["usage"]["completion_tokens"] == 3


def test_logprobs_have_the_sampled_token_first_and_no_more_than_were_asked_for(web: Web):
    content = web.chat(**GREEDY, logprobs=True, top_logprobs=3).body["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}
    assert all(
        entry["top_logprobs"] == []
        for entry in web.chat(**GREEDY, logprobs=True).body["choices"][0]["logprobs"]["content"]
    )
    assert web.chat(**GREEDY).body["choices"][0]["logprobs"] is None


def test_the_bytes_of_all_tokens_are_the_bytes_of_the_text(web: Web, llm: LLM):
    """Halves of characters had the bytes of U+FFFD."""
    choice = web.chat(temperature=1.5, seed=3, max_tokens=40, ignore_eos=True, logprobs=True).body["choices"][0]
    spelled = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert "\ufffd" in choice["message"]["content"]  # there are halves
    assert spelled.decode("utf-8", "replace") == choice["message"]["content"]


def test_n_answers_and_token_ids(web: Web):
    body = web.chat(n=3, seed=5, max_tokens=4, ignore_eos=True, return_token_ids=True).body
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert all(len(choice["token_ids"]) == 4 for choice in body["choices"])
    assert len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 12


def test_best_of_gives_the_likeliest(web: Web, engine: AsyncEngine, llm: LLM):
    params = SamplingParams(n=1, best_of=4, seed=5, max_tokens=6, ignore_eos=True)
    expected = list(engine.submit(prompt_of(llm), params))[-1].outputs[0].text
    body = web.chat(best_of=4, seed=5, max_tokens=6, ignore_eos=True).body
    assert [choice["message"]["content"] for choice in body["choices"]] == [expected]


def test_prompt_logprobs_are_keyed_by_token_id(web: Web):
    body = web.chat(**GREEDY, prompt_logprobs=1, return_token_ids=True).body
    first, *others = body["prompt_logprobs"]
    assert first is None and len(others) == len(body["prompt_token_ids"]) - 1
    for token_id, position in zip(body["prompt_token_ids"][1:], others, strict=True):
        assert set(position[str(token_id)]) == {"logprob", "rank", "decoded_token"}


# ------------------------------------------------------------------ streams
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "three": {"n": 3, "seed": 11, "max_tokens": 12, "ignore_eos": True},
    "logprobs": {"n": 2, "seed": 4, "max_tokens": 9, "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
    "halves": {"temperature": 1.7, "seed": 8, "max_tokens": 40, "ignore_eos": True},
    "stop": {"temperature": 1.5, "seed": 1, "max_tokens": 60, "stop": ["e", "the"], "ignore_eos": True},
    "stop kept": {
        "temperature": 1.5,
        "seed": 1,
        "max_tokens": 60,
        "stop": ["e"],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
    },
    "stop token": {"seed": 2, "max_tokens": 60, "stop_token_ids": list(range(60, 180))},
    "beams": {"use_beam_search": True, "n": 2, "max_tokens": 4},
}


def joined(reply: Reply) -> dict[int, dict[str, Any]]:
    """What a client knows after a stream: index -> text, logprobs, token ids, reasons."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in reply.events[:-1]:
        for choice in chunk["choices"]:
            known = choices.setdefault(
                choice["index"], {"content": "", "logprobs": [], "token_ids": [], "finish_reason": None}
            )
            assert known["finish_reason"] is None, "a chunk after the last one"
            known["content"] += choice["delta"].get("content", "")
            known["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            known["token_ids"] += choice.get("token_ids") or []
            known["finish_reason"] = choice["finish_reason"]
            if choice["finish_reason"] is not None:
                known["stop_reason"] = choice["stop_reason"]
    return choices


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_stream_is_the_whole_answer_in_pieces(web: Web, llm: LLM, fields: dict[str, Any]):
    llm.reset_prefix_cache()
    whole = web.chat(**fields).body
    llm.reset_prefix_cache()
    reply = web.chat(**fields, stream=True, stream_options={"include_usage": True})
    assert reply.status == 200 and reply.headers["Content-Type"].startswith("text/event-stream")
    assert reply.events[-1] == "[DONE]" and reply.events.count("[DONE]") == 1
    expected = {
        choice["index"]: {
            "content": choice["message"]["content"],
            "logprobs": (choice["logprobs"] or {"content": []})["content"],
            "token_ids": choice["token_ids"] or [],
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
        }
        for choice in whole["choices"]
    }
    assert joined(reply) == expected
    assert reply.events[-2]["usage"] == whole["usage"]


def test_the_variants_end_in_every_way(web: Web):
    ends = {
        name: {choice["finish_reason"] for choice in web.chat(**fields).body["choices"]}
        for name, fields in VARIANTS.items()
    }
    assert ends["greedy"] == {"length"} and ends["stop"] == ends["stop kept"] == ends["stop token"] == {"stop"}


def test_the_order_of_chunks(web: Web):
    events = web.chat(n=2, seed=3, max_tokens=3, ignore_eos=True, stream=True).events
    *chunks, done = events
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert [chunk["choices"][0]["index"] for chunk in chunks[:2]] == [0, 1]
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[2:])
    for index in (0, 1):
        reasons = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["index"] == index]
        assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert len({(c["id"], c["object"], c["created"], c["model"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert all(len(c["choices"]) == 1 and "usage" not in c for c in chunks)
    assert ["stop_reason" in c["choices"][0] for c in chunks].count(True) == 2  # only where a choice ends


def test_usage_comes_last_and_only_on_request(web: Web):
    *chunks, usage, _ = web.chat(**GREEDY, stream=True, stream_options={"include_usage": True}).events
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 8
    assert all("usage" not in chunk for chunk in chunks)


def test_continuous_usage_starts_at_nothing_and_grows(web: Web):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = web.chat(**GREEDY, stream=True, stream_options=options).events
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == 8
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1


def test_the_first_bytes_leave_before_the_engine_has_done_anything(gate: Gate, engine: AsyncEngine):
    """Clients give up on a request whose headers do not come; a queue can be long."""
    web = Web(engine, ServerConfig(keep_alive_seconds=0.0, poll_seconds=0.001))
    response = web.streamed(CHAT, messages=HELLO, **GREEDY)
    pieces = response.iter_encoded()
    assert "role" in next(pieces).decode()
    assert next(pieces) == b": keep-alive\n\n"
    assert next(pieces) == b": keep-alive\n\n"
    gate.open()
    rest = [event for piece in pieces for event in events_of(piece.decode())]
    assert rest[-1] == "[DONE]" and rest[-2]["choices"][0]["finish_reason"] == "length"
    response.close()


def test_a_stream_that_is_closed_gives_its_request_up(gate: Gate, engine: AsyncEngine):
    web = Web(engine)
    response = web.streamed(CHAT, messages=HELLO, temperature=0, ignore_eos=True)
    next(response.iter_encoded())
    assert engine.num_unfinished_requests == 1
    response.close()
    gate.open()
    settle(engine)
    assert engine.num_unfinished_requests == 0 and web.service.num_in_flight == 0


def test_a_stream_of_which_nothing_is_read_gives_its_request_up(gate: Gate, engine: AsyncEngine):
    """A generator that never started runs no `finally`."""
    with Web(engine).app.test_request_context(CHAT, method="POST", json={"messages": HELLO, "stream": True}) as context:
        response = context.app.dispatch_request()
    assert engine.num_unfinished_requests == 1
    response.close()
    gate.open()
    settle(engine)
    assert engine.num_unfinished_requests == 0


# ------------------------------------------------------------------ beams
def test_beams_are_those_of_llm(web: Web, engine: AsyncEngine, tiny_model: Any):
    own = LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64, batch_invariant=True)
    for fields, width, num_returned in (
        ({"n": 3}, 3, 3),
        ({"n": 1, "best_of": 4}, 4, 1),
        ({"n": 2, "temperature": 0, "length_penalty": -1.0, "ignore_eos": True}, 2, 2),
    ):
        params = BeamSearchParams(
            width, 5, length_penalty=fields.get("length_penalty", 1.0), ignore_eos=fields.get("ignore_eos", False)
        )
        expected = own.beam_search(prompt_of(own), params)[0].sequences[:num_returned]
        body = web.chat(use_beam_search=True, max_tokens=5, **fields).body
        assert [c["message"]["content"] for c in body["choices"]] == [s.text for s in expected]
        assert [c["finish_reason"] for c in body["choices"]] == [s.finish_reason for s in expected]


def test_a_beam_wider_than_the_queue_waits_for_room(web: Web, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    """An idle server with a place for one request answers it, and has room again afterwards."""
    fields = {"use_beam_search": True, "n": 3, "max_tokens": 4}
    expected = web.chat(**fields).body["choices"]
    monkeypatch.setattr(engine, "max_requests", 1)
    assert web.chat(**fields).body["choices"] == expected
    assert web.chat(max_tokens=1).status == 200


def test_what_only_changes_how_tokens_are_drawn_is_named_and_changes_no_beam(web: Web):
    """The guide sends all of these in one request."""
    fields = {"use_beam_search": True, "best_of": 3, "max_tokens": 4}
    drawing = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.1, "seed": 3, "stop": ["END"]}
    drawing |= {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.1}
    reply = web.chat(**fields, **drawing, logprobs=True, top_logprobs=5, unknown_field=1)
    assert reply.status == 200
    named = reply.headers["X-Minivllm-Ignored"].split(", ")
    assert named == [*sorted(drawing), "unknown_field"]
    (choice,) = reply.body["choices"]
    assert choice["message"] == web.chat(**fields).body["choices"][0]["message"]
    positions = choice["logprobs"]["content"]
    assert len(positions) == reply.body["usage"]["completion_tokens"] and len(positions[0]["top_logprobs"]) == 5
    assert all(position["logprob"] <= position["top_logprobs"][0]["logprob"] for position in positions)


@pytest.mark.parametrize(
    ("name", "value"),
    [("logit_bias", {"5": 1}), ("min_tokens", 2), ("bad_words", ["a"]), ("prompt_logprobs", 1)],
)
def test_what_beams_would_have_to_obey_is_refused(web: Web, name: str, value: Any):
    assert web.chat(use_beam_search=True, n=2, **{name: value}).error["param"] == name
    assert web.chat(length_penalty=2.0).error["param"] == "length_penalty"


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 65}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"stream": True, "best_of": 3}, "best_of"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"guided_choice": []}, "guided_choice"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 200}]}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"priority": 2**63}, "priority"),
    ],
    ids=str,
)
def test_a_bad_request_is_a_400_that_names_the_field_also_for_a_stream(web: Web, fields: dict[str, Any], param: str):
    for stream in ({}, {"stream": True}) if "stream_options" not in fields else ({},):
        reply = web.post(CHAT, **{"messages": HELLO, **stream, **fields})
        assert (reply.status, reply.error["param"]) == (400, param)


def test_too_long_says_so(web: Web):
    error = web.chat([{"role": "user", "content": "word " * 200}]).error
    assert error["code"] == "context_length_exceeded" and "128" in error["message"]


# ------------------------------------------------------------------ failures
def break_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Every step but the first `after` fails, late enough for their text to have been read."""
    execute, count = llm.llm_engine._executor.execute_model, itertools.count()

    def failing(step: Any, *masks: Any) -> Any:
        if next(count) >= after:
            threading.Event().wait(0.3 if after else 0)
            raise RuntimeError("secret /srv/path")
        return execute(step, *masks)

    monkeypatch.setattr(llm.llm_engine._executor, "execute_model", failing)


def test_a_failed_step_is_a_500_that_shows_nothing_of_the_inside(web: Web, llm: LLM, monkeypatch: pytest.MonkeyPatch):
    break_steps(llm, monkeypatch, 0)
    reply = web.chat(**GREEDY)
    assert (reply.status, reply.error["type"]) == (500, "internal_error") and "secret" not in reply.text
    monkeypatch.undo()
    assert web.chat(**GREEDY).status == 200  # the engine goes on


def test_a_step_that_fails_in_a_stream_is_an_event(web: Web, llm: LLM, monkeypatch: pytest.MonkeyPatch):
    break_steps(llm, monkeypatch, 3)
    reply = web.chat(**GREEDY, stream=True)
    *_, delta, error, done = reply.events
    assert delta["choices"][0]["finish_reason"] is None and done == "[DONE]"
    assert list(error) == ["error"] and error["error"]["code"] == 500 and "secret" not in reply.text


def test_an_engine_that_dies_ends_its_streams(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("threading.excepthook", lambda _: None)  # the thread's own death is expected
    gate = Gate(llm, monkeypatch)
    engine = AsyncEngine(llm.llm_engine)
    web = Web(engine)
    response = web.streamed(CHAT, messages=HELLO, **GREEDY)
    pieces = response.iter_encoded()
    next(pieces)
    gate.wait()

    def die() -> list[Any]:
        raise KeyboardInterrupt("secret")

    monkeypatch.setattr(llm.llm_engine, "step", die)
    gate.open()  # one more real step, then the end
    events = [event for piece in pieces for event in events_of(piece.decode())]
    assert events[-2]["error"]["code"] == 503 and events[-1] == "[DONE]"
    response.close()
    eventually(lambda: not engine.is_alive)
    for reply in (web.chat(**GREEDY), web.get("/health"), web.get("/ready")):
        assert reply.status == 503 and reply.error["type"] == "service_unavailable" and "Retry-After" in reply.headers
    assert web.get("/live").status == 200
    for request_id in list(llm.llm_engine.output_processor._parents):
        llm.llm_engine.abort_request(request_id)
    engine._thread.join(PATIENCE)
