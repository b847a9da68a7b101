"""POST /v1/completions: every form of a prompt, streams, and scoring a given text as evaluation harnesses do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine, Logprob, SamplingParams
from minivllm.entrypoints.completions import CompletionWriter
from minivllm.entrypoints.logprobs import completion_logprobs
from minivllm.entrypoints.protocol import CompletionRequest, parse
from minivllm.outputs import CompletionOutput, RequestOutput
from tests.entrypoints.helpers import Reply, Web

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
HARNESS = {"max_tokens": 1, "temperature": 0, "seed": 1234, "logprobs": 1, "echo": True}  # what lm-eval sends
TEXT = "the value is 3"


def texts(reply: Reply) -> list[str]:
    return [choice["text"] for choice in reply.body["choices"]]


# ------------------------------------------------------------------ prompts
def test_every_form_of_a_prompt(web: Web, llm: LLM):
    first, second = (llm.get_tokenizer().encode(text) for text in (TEXT, "and"))
    (expected,) = texts(web.complete(TEXT, **GREEDY))
    assert texts(web.complete(first, **GREEDY)) == texts(web.complete([TEXT], **GREEDY)) == [expected]
    both = texts(web.complete([TEXT, "and"], **GREEDY))
    assert both == texts(web.complete([first, second], **GREEDY)) == [expected, *texts(web.complete("and", **GREEDY))]


def test_choices_are_numbered_through_all_prompts(web: Web):
    body = web.complete([TEXT, "and", [5]], n=2, seed=3, max_tokens=3, ignore_eos=True).body
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["usage"]["completion_tokens"] == 18


def test_sixteen_tokens_unless_said_otherwise(web: Web):
    for fields in ({}, {"max_tokens": None}):
        assert web.complete(temperature=0, ignore_eos=True, **fields).body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], [None], [5, "a"], [320], [-1], [[5], [320]], ["a", ""], 5, {}])
def test_a_bad_prompt_is_refused_by_name_and_nothing_is_left_of_the_others(web: Web, prompt: Any):
    reply = web.complete(prompt)
    assert (reply.status, reply.error["param"]) == (400, "prompt")


# ------------------------------------------------------------------ streams
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": GREEDY,
    "several": {"prompt": [TEXT, "and", [5, 6]], "n": 2, "seed": 9, "max_tokens": 7, "ignore_eos": True},
    "logprobs": {"logprobs": 3, "seed": 2, "temperature": 1.5, "max_tokens": 20, "ignore_eos": True},
    "echo": {"prompt": [TEXT, [5, 6]], "echo": True, "seed": 2, "max_tokens": 5},
    "echo and logprobs": {"n": 2, "echo": True, "logprobs": 2, "seed": 2, "max_tokens": 5, "prompt": [TEXT, "and"]},
    "only echo": {"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 0},
    "only echo, no logprobs": {"prompt": TEXT, "echo": True, "max_tokens": 0},
    "stop": {"temperature": 1.5, "seed": 1, "max_tokens": 60, "stop": ["e"], "return_token_ids": True},
    "beams": {"use_beam_search": True, "n": 3, "max_tokens": 4, "prompt": [TEXT, "and"]},
}
LISTS = ("text_offset", "token_logprobs", "tokens", "top_logprobs")


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_stream_is_the_whole_answer_in_pieces(web: Web, llm: LLM, fields: dict[str, Any]):
    body = {"prompt": TEXT, **fields}
    llm.reset_prefix_cache()
    whole = web.complete(**body).body
    llm.reset_prefix_cache()
    *chunks, usage, done = web.complete(**body, stream=True, stream_options={"include_usage": True}).events
    assert done == "[DONE]" and usage["usage"] == whole["usage"] and usage["choices"] == []
    joined: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        if chunk == ": keep-alive":
            continue
        (choice,) = chunk["choices"]
        known = joined.setdefault(choice["index"], {"text": "", "logprobs": None, "token_ids": None, "end": None})
        assert known["end"] is None, "a chunk after the last one"
        known["text"] += choice["text"]
        if choice["token_ids"] is not None:
            known["token_ids"] = [*(known["token_ids"] or []), *choice["token_ids"]]
        if choice["logprobs"] is not None:
            before = known["logprobs"] or {name: [] for name in LISTS}
            known["logprobs"] = {name: before[name] + choice["logprobs"][name] for name in LISTS}
        if choice["finish_reason"] is not None:
            known["end"] = choice["finish_reason"], choice["stop_reason"]
    assert joined == {
        choice["index"]: {
            "text": choice["text"],
            "logprobs": choice["logprobs"],
            "token_ids": choice["token_ids"],
            "end": (choice["finish_reason"], choice["stop_reason"]),
        }
        for choice in whole["choices"]
    }


# ------------------------------------------------------------------ scoring a text
def test_a_scored_text_has_one_entry_per_token_and_one_for_the_generated_one(web: Web, llm: LLM):
    token_ids = [5, 60, 70, 80, 90]
    body = web.complete([token_ids, [9, 10]], **HARNESS).body
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice, prompt in zip(body["choices"], (token_ids, [9, 10]), strict=True):
        assert all(len(choice["logprobs"][name]) == len(prompt) + 1 for name in LISTS)
        for name in ("token_logprobs", "top_logprobs"):
            assert choice["logprobs"][name][0] is None and None not in choice["logprobs"][name][1:]


def test_scores_are_the_prompt_logprobs_of_the_engine(web: Web, engine: AsyncEngine):
    token_ids = [5, 60, 70, 80, 90]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    expected = list(engine.submit(token_ids, params))[-1].prompt_logprobs
    (choice,) = web.complete(token_ids, **HARNESS).body["choices"]
    for position in range(1, len(token_ids)):
        own = expected[position][token_ids[position]]
        assert choice["logprobs"]["token_logprobs"][position] == own.logprob
        # lm-eval's is_greedy: exact equality of floats that came through JSON
        largest = max(choice["logprobs"]["top_logprobs"][position].values())
        assert (choice["logprobs"]["token_logprobs"][position] == largest) == (own.rank == 1)


def test_no_entry_of_the_likeliest_hides_another(web: Web):
    """Half of this vocabulary is halves of characters: all of them were one key, U+FFFD."""
    body = web.complete(temperature=2, seed=5, max_tokens=60, ignore_eos=True, logprobs=20).body
    positions = body["choices"][0]["logprobs"]["top_logprobs"]
    assert all(len(position) in (20, 21) for position in positions)
    assert any(name.startswith("bytes:\\x") for position in positions for name in position)


def test_two_tokens_of_one_text_are_two_entries_and_infinity_is_a_number():
    """The likelier one was hidden behind the sampled one, which then passed for the likeliest."""
    position = {5: Logprob(-2.0, 2, "a"), 6: Logprob(-0.5, 1, "a"), 7: Logprob(-math.inf, 3, "b")}
    found = completion_logprobs(None, [5], [position])
    assert found == {
        "text_offset": [0],
        "token_logprobs": [-2.0],
        "tokens": ["a"],
        "top_logprobs": [{"a": -2.0, "token_id:6": -0.5, "b": -9999.0}],
    }


def test_text_offsets_point_into_the_text(web: Web):
    (choice,) = web.complete(TEXT, **HARNESS).body["choices"]
    logprobs = choice["logprobs"]
    for offset, token in zip(logprobs["text_offset"][:-1], logprobs["tokens"][:-1], strict=True):
        assert choice["text"][offset : offset + len(token)] == token
    assert choice["text"].startswith(TEXT) and logprobs["text_offset"][-1] == len(TEXT)


def test_echo_alone_gives_the_prompt_back(web: Web, llm: LLM):
    (choice,) = web.complete(TEXT, echo=True, max_tokens=0, logprobs=0).body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert "".join(choice["logprobs"]["tokens"]) == TEXT
    assert texts(web.complete(llm.get_tokenizer().encode(TEXT), echo=True, max_tokens=0)) == [TEXT]
    assert web.complete(TEXT, max_tokens=0).error["param"] == "max_tokens"  # nothing to do


def test_prompt_logprobs_may_not_contradict_logprobs_with_echo(web: Web):
    assert web.complete(echo=True, logprobs=1, prompt_logprobs=2).error["param"] == "prompt_logprobs"
    assert web.complete(prompt_logprobs=2).body["choices"][0]["prompt_logprobs"][0] is None


def test_special_tokens_in_front_can_be_left_out(web: Web, llm: LLM):
    for flag in (True, False):
        expected = llm.get_tokenizer().encode(TEXT, add_special_tokens=flag)
        body = web.complete(TEXT, add_special_tokens=flag, return_token_ids=True, **GREEDY).body
        assert body["choices"][0]["prompt_token_ids"] == expected


def test_a_stream_waits_for_the_logprobs_of_the_whole_prompt(web: Web):
    """A sibling that found the prompt in the cache draws tokens while the first one still computes it."""
    body, _ = parse(CompletionRequest, {"prompt": [5, 6, 7], "n": 2, "echo": True, "logprobs": 0})
    with web.app.test_request_context():
        writer = CompletionWriter(web.service, body, only_echo=False)
    position = {6: Logprob(-1.0, 1, "x")}
    ahead = [CompletionOutput(0, "", [], logprobs=[]), CompletionOutput(1, "x", [6], logprobs=[position])]
    output = RequestOutput("1", None, [5, 6, 7], ahead, finished=False, prompt_logprobs=[None, position])
    assert writer.choices(0, output) == []
    output.prompt_logprobs = [None, position, {7: Logprob(-1.0, 1, "y")}]
    (choice,) = writer.choices(0, output)
    assert choice["index"] == 1 and len(choice["logprobs"]["tokens"]) == 4
