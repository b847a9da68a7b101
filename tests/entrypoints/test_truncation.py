"""truncate_prompt_tokens in completions and chat: only on request, and the answer says so."""

from __future__ import annotations

from typing import Any

import pytest

from minivllm import LLM
from tests.entrypoints.helpers import CHAT, COMPLETIONS, HELLO, Web

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
LONG = "the value is and " * 60


def prompt_of(reply: Any) -> list[int]:
    """What the model has seen."""
    assert reply.status == 200, reply.text
    body = reply.body
    return body.get("prompt_token_ids") or body["choices"][0]["prompt_token_ids"]


def test_a_long_prompt_is_refused_unless_it_may_be_cut(web: Web, llm: LLM):
    assert web.complete(LONG, **GREEDY).error["code"] == "context_length_exceeded"
    ids, longest = llm.get_tokenizer().encode(LONG), llm.llm_engine.config.model.max_model_len - 1
    for limit, kept in ((-1, longest), (9, 9)):
        reply = web.complete(LONG, truncate_prompt_tokens=limit, return_token_ids=True, **GREEDY)
        assert prompt_of(reply) == ids[-kept:]
        assert reply.headers["X-Minivllm-Truncated"] == f"prompt_tokens={kept}"
        assert reply.body["usage"]["prompt_tokens"] == kept
    beginning = web.complete(LONG, truncate_prompt_tokens=9, truncation_side="right", return_token_ids=True, **GREEDY)
    assert prompt_of(beginning) == ids[:9]
    assert reply.body["choices"][0]["text"] == web.complete(ids[-9:], **GREEDY).body["choices"][0]["text"]


def test_the_room_that_is_left_is_said_as_ever(web: Web):
    reply = web.complete(LONG, truncate_prompt_tokens=-1, **GREEDY)
    assert reply.headers["X-Minivllm-Clamped"] == "max_tokens=1"


def test_only_what_is_too_long_is_cut(web: Web):
    reply = web.complete(["the", LONG, "and"], truncate_prompt_tokens=5, **GREEDY)
    assert reply.headers["X-Minivllm-Truncated"] == "prompt_tokens=5" and reply.body["usage"]["prompt_tokens"] < 10
    short = web.complete("the", truncate_prompt_tokens=5, **GREEDY)
    assert "X-Minivllm-Truncated" not in short.headers
    assert short.body["choices"] == web.complete("the", **GREEDY).body["choices"]


def test_an_echo_is_what_the_model_has_seen(web: Web, llm: LLM):
    reply = web.complete(LONG, truncate_prompt_tokens=4, echo=True, **GREEDY)
    kept = llm.get_tokenizer().decode(llm.get_tokenizer().encode(LONG)[-4:])
    assert reply.body["choices"][0]["text"].startswith(kept) and not reply.body["choices"][0]["text"].startswith(LONG)


def test_a_stream_has_the_header_too(web: Web):
    response = web.streamed(COMPLETIONS, prompt=LONG, truncate_prompt_tokens=4, **GREEDY)
    assert response.headers["X-Minivllm-Truncated"] == "prompt_tokens=4"
    assert b"[DONE]" in response.get_data()


def test_a_conversation_keeps_its_end(web: Web, llm: LLM):
    messages = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "and"}, *HELLO]
    assert web.chat(messages, **GREEDY).error["code"] == "context_length_exceeded"
    reply = web.chat(messages, truncate_prompt_tokens=20, return_token_ids=True, **GREEDY)
    end = llm.llm_engine.render_chat(messages, may_be_cut=True)["prompt_token_ids"][-20:]
    assert prompt_of(reply) == end and reply.headers["X-Minivllm-Truncated"] == "prompt_tokens=20"


def test_a_conversation_far_beyond_the_context_may_be_cut(web: Web):
    """Its text is refused by its characters, before it is tokenised, where nobody asked for a cut."""
    messages = [{"role": "user", "content": LONG * 40}]
    assert web.chat(messages, **GREEDY).error["code"] == "context_length_exceeded"
    assert web.chat(messages, truncate_prompt_tokens=-1, **GREEDY).status == 200


def test_beams_grow_from_the_prompt_that_was_cut(web: Web, llm: LLM):
    fields = {"use_beam_search": True, "n": 2, "max_tokens": 5, "ignore_eos": True}
    ids = llm.get_tokenizer().encode(LONG)
    cut = web.complete(LONG, truncate_prompt_tokens=6, **fields)
    assert cut.body["choices"] == web.complete(ids[-6:], **fields).body["choices"]
    assert cut.headers["X-Minivllm-Truncated"] == "prompt_tokens=6"


def test_special_tokens_may_be_left_out_of_a_completion(web: Web, llm: LLM):
    reply = web.complete("the value", add_special_tokens=False, return_token_ids=True, **GREEDY)
    assert prompt_of(reply) == llm.get_tokenizer().encode("the value", add_special_tokens=False)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 129}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 1.5}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 5, "truncation_side": "up"}, "truncation_side"),
        ({"truncation_side": "left"}, "truncation_side"),
    ],
    ids=str,
)
def test_a_bad_value_names_its_field(web: Web, path: str, fields: dict[str, Any], param: str):
    prompt = {"messages": HELLO} if path == CHAT else {"prompt": "the"}
    reply = web.post(path, **prompt, **fields)
    assert (reply.status, reply.error["param"]) == (400, param)
