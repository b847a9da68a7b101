"""Batch files: good lines are answered in OpenAI's form, bad ones reported in their place, order kept."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm import LLM, AsyncEngine, SamplingParams
from minivllm.entrypoints.run_batch import SAMPLING_FIELDS, run_batch_lines
from tests.entrypoints.helpers import Web

MESSAGES = [{"role": "user", "content": "what is the capital"}]


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path]) -> LLM:
    return LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64)


def line(custom_id: str, url: str, body: object) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def completion(custom_id: str = "x", **fields: object) -> str:
    body = {"prompt": "the", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}
    return line(custom_id, "/v1/completions", body)


def chat(custom_id: str = "x", **fields: object) -> str:
    body = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}
    return line(custom_id, "/v1/chat/completions", body)


def embedding(custom_id: str = "x", **fields: object) -> str:
    return line(custom_id, "/v1/embeddings", {"input": "the value", **fields})


def run(llm: LLM, lines: list[str]) -> list[dict[str, Any]]:
    """The answers; whatever the lines were: progress counts up to all of them, all is JSON, nothing is left behind."""
    progress: list[tuple[int, int]] = []
    answers = run_batch_lines(llm.llm_engine, lines, lambda done, total: progress.append((done, total)))
    assert progress[-1] == (len(answers), len(answers)) and progress == sorted(progress)
    json.dumps(answers, allow_nan=False)
    assert len({answer["id"] for answer in answers}) == len(answers)
    assert_idle(llm)
    return answers


def assert_idle(llm: LLM) -> None:
    pool = llm.llm_engine.scheduler.kv_cache.pool
    assert not llm.llm_engine.has_unfinished_requests() and llm.llm_engine.output_processor.num_requests == 0
    assert pool.num_free_blocks == pool.num_blocks - 1


def body_of(llm: LLM, text: str) -> dict[str, Any]:
    """The body of the answer to one good line."""
    [answer] = run(llm, [text])
    assert answer["error"] is None and answer["response"]["status_code"] == 200, answer
    return answer["response"]["body"]


def error_of(llm: LLM, text: str) -> dict[str, Any]:
    """The error of one bad line, which stands in its response, too."""
    [answer] = run(llm, [text])
    assert answer["response"]["body"] == {"error": answer["error"]}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    return {**answer["error"], "status": answer["response"]["status_code"]}


# ------------------------------------------------------------------ the form of an answer
def test_an_answer_names_its_line_and_its_request(llm: LLM):
    [answer] = run(llm, [completion("my line")])
    assert set(answer) == {"id", "custom_id", "response", "error"}
    assert answer["custom_id"] == "my line" and answer["id"].startswith("batch_req_") and answer["error"] is None
    assert set(answer["response"]) == {"status_code", "request_id", "body"}


def test_a_completion_has_the_form_of_openai(llm: LLM):
    expected = llm.generate("the", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)[
        0
    ].outputs[0]
    body = body_of(llm, completion())
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and body["model"] == "llama"
    assert body["choices"] == [
        {"index": 0, "text": expected.text, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    num_prompt_tokens = len(llm.get_tokenizer().encode("the"))
    assert body["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": 4,
        "total_tokens": num_prompt_tokens + 4,
    }


def test_a_chat_has_the_form_of_openai(llm: LLM):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    expected = llm.chat(MESSAGES, params, use_tqdm=False)[0]
    body = body_of(llm, chat())
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected.outputs[0].text},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)


def test_an_embedding_has_the_form_of_openai(llm: LLM):
    expected = llm.embed("the value", use_tqdm=False)[0]
    body = body_of(llm, embedding(model="llama", encoding_format="float"))
    num_tokens = len(expected.prompt_token_ids)
    assert body == {
        "object": "list",
        "model": "llama",
        "data": [{"object": "embedding", "index": 0, "embedding": expected.outputs.embedding}],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def test_several_choices_are_numbered_and_counted_together(llm: LLM):
    body = body_of(llm, chat(n=3, temperature=1.5, seed=5))
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in body["choices"]}) > 1
    assert body["usage"]["completion_tokens"] == 3 * 4
    best = body_of(llm, completion(n=1, best_of=3, temperature=1.5, seed=5))
    assert len(best["choices"]) == 1


def test_a_stop_string_is_named(llm: LLM):
    text = body_of(llm, completion(max_tokens=12))["choices"][0]["text"]
    choice = body_of(llm, completion(max_tokens=12, stop=text[3:5]))["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", text[3:5])
    assert choice["text"] == text[: text.index(text[3:5])]


# ------------------------------------------------------------------ logprobs
@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_of_a_completion_are_four_lists_of_its_tokens(llm: LLM, count: int):
    choice = body_of(llm, completion(logprobs=count, temperature=1.0, seed=2, max_tokens=6))["choices"][0]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"text_offset", "tokens", "token_logprobs", "top_logprobs"}
    assert all(len(values) == 6 for values in logprobs.values())
    lengths = map(len, logprobs["tokens"])
    assert logprobs["text_offset"] == list(itertools.accumulate(lengths, initial=0))[:-1]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        name = token if "\ufffd" not in token else next(iter(top))  # no character: named by its bytes
        assert next(iter(top.items())) == (name, logprob)  # the sampled one first, then the likeliest
        assert name == token or name.startswith("bytes:")
        assert len(top) <= count + 1
        assert -20 < logprob <= 0


@pytest.mark.parametrize(("top_logprobs", "count"), [(None, 0), (0, 0), (1, 1), (5, 5)])
def test_logprobs_of_a_chat_show_as_many_top_tokens_as_were_asked_for(llm: LLM, top_logprobs: int | None, count: int):
    """logprobs: true alone shows none; the sampled one used to be there, and one too many when it was unlikely."""
    fields = {"logprobs": True, "temperature": 1.5, "seed": 2, "max_tokens": 8}
    content = body_of(llm, chat(**fields, top_logprobs=top_logprobs))["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    for position in content:
        assert set(position) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(position["top_logprobs"]) == count
        assert bytes(position["bytes"]).decode("utf-8", "replace") == position["token"]
        if count:
            first = {name: position[name] for name in ("token", "logprob", "bytes")}
            assert position["top_logprobs"][0] == first  # as in vLLM


@pytest.mark.parametrize("fields", [{}, {"logprobs": False}, {"logprobs": None, "top_logprobs": None}], ids=str)
def test_a_chat_without_logprobs_has_none(llm: LLM, fields: dict[str, Any]):
    assert body_of(llm, chat(**fields))["choices"][0]["logprobs"] is None


def test_logprobs_are_those_of_the_server_byte_for_byte(tiny_model: Callable[[str], Path]):
    """Two tokens may read alike (halves of characters): the batch had shapes of its own, in which one hid the other."""
    llm = LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64, batch_invariant=True)
    fields = {"max_tokens": 12, "temperature": 2.0, "seed": 4, "ignore_eos": True}
    texts = {"prompt": "the", "logprobs": 20, **fields}
    messages = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 20, **fields}
    batch = [line("a", "/v1/completions", texts), line("b", "/v1/chat/completions", messages)]
    found = [answer["response"]["body"]["choices"][0]["logprobs"] for answer in run(llm, batch)]
    assert any("\ufffd" in entry["token"] for entry in found[1]["content"][0]["top_logprobs"])
    with AsyncEngine(llm.llm_engine) as engine:
        web = Web(engine)
        served = [web.complete(**texts), web.chat(**messages)]
    assert found == [reply.body["choices"][0]["logprobs"] for reply in served]


def test_an_impossible_token_has_a_finite_logprob_because_json_has_no_infinity(llm: LLM):
    """Only one token is allowed: all others have a probability of 0."""
    choice = body_of(llm, completion(allowed_token_ids=[270], logprobs=3, max_tokens=1))["choices"][0]
    assert min(choice["logprobs"]["top_logprobs"][0].values()) >= -9999.0


# ------------------------------------------------------------------ as they come
def test_every_answer_is_handed_on_when_it_is_there(llm: LLM):
    lines = [completion("slow", max_tokens=40), "nonsense", completion("fast", max_tokens=1), completion("middle")]
    events: list[Any] = []
    answers = run_batch_lines(
        llm.llm_engine,
        lines,
        lambda done, total: events.append((done, total)),
        lambda index, answer: events.append((index, answer["custom_id"], answer["response"] is not None)),
    )
    taken = [event for event in events if len(event) == 3]
    assert taken == [(1, None, True), (2, "fast", True), (3, "middle", True), (0, "slow", True)]
    assert [answer["custom_id"] for answer in answers] == ["slow", None, "fast", "middle"]
    assert events.index((2, "fast", True)) < events.index((2, 4))  # counted after it was handed on


def test_an_answer_that_cannot_be_written_ends_the_batch_and_leaves_nothing_behind(llm: LLM):
    def no_space(index: int, answer: Any) -> None:
        raise OSError(28, "No space left on device")

    for lines in ([completion(max_tokens=n) for n in (2, 90)], [completion(max_tokens=90), "nonsense"]):
        with pytest.raises(OSError, match="No space left"):
            run_batch_lines(llm.llm_engine, lines, lambda *_: None, no_space)
        assert_idle(llm)


# ------------------------------------------------------------------ fields
def test_the_defaults_of_a_chat_fill_the_context_and_those_of_a_completion_do_not(llm: LLM):
    body = body_of(llm, chat(max_tokens=None))
    assert body["usage"]["total_tokens"] == 128
    text = line("x", "/v1/completions", {"prompt": "the", "temperature": 0, "ignore_eos": True})
    assert body_of(llm, text)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("fields", "num_tokens"),
    [
        ({"max_completion_tokens": 3}, 3),
        ({"max_completion_tokens": 3, "max_tokens": 7}, 3),
        ({"max_completion_tokens": None, "max_tokens": 7}, 7),  # null took the limit away
    ],
    ids=str,
)
def test_the_newer_name_of_max_tokens_wins_unless_it_is_null(llm: LLM, fields: dict[str, Any], num_tokens: int):
    assert body_of(llm, chat(**fields))["usage"]["completion_tokens"] == num_tokens


def test_fields_without_effect_are_taken(llm: LLM):
    plain = body_of(llm, chat())
    fields = {
        "model": "llama", "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
        "stream": False, "tools": None, "parallel_tool_calls": False, "response_format": None,
    }  # fmt: skip
    assert body_of(llm, chat(**fields))["choices"] == plain["choices"]


def test_token_ids_are_a_prompt_too(llm: LLM):
    ids = llm.get_tokenizer().encode("the")
    assert body_of(llm, completion(prompt=ids))["choices"] == body_of(llm, completion())["choices"]


def test_logit_bias_is_keyed_by_token_ids_as_text(llm: LLM):
    choice = body_of(llm, completion(logit_bias={"270": 100}, logprobs=0))["choices"][0]
    assert choice["logprobs"]["tokens"] == [llm.get_tokenizer().token_text(270)] * 4


# ------------------------------------------------------------------ bad lines
@pytest.mark.parametrize(
    ("bad", "parameter"),
    [
        ("{not json", None),
        ("[1, 2]", None),
        ("[" * 100_000, None),
        ("null", None),
        (json.dumps({"custom_id": "x", "url": "/v1/completions"}), "body"),
        (line("x", "/v1/completions", [1]), "body"),
        (json.dumps({"url": "/v1/completions", "body": {"prompt": "the"}}), "custom_id"),
        (json.dumps({"custom_id": 5, "url": "/v1/completions", "body": {"prompt": "the"}}), "custom_id"),
        (json.dumps({"custom_id": "x", "method": "GET", "url": "/v1/completions", "body": {}}), "method"),
        (line("x", "/v1/images", {"prompt": "the"}), "url"),
        (json.dumps({"custom_id": "x", "url": ["/v1/completions"], "body": {"prompt": "the"}}), "url"),
        (line("x", "/v1/completions", {}), "prompt"),
        (completion("x", temperature=-1), "temperature"),
        (completion("x", temperature="hot"), "temperature"),
        (completion("x", tempratur=1), "tempratur"),
        (completion("x", stream=True), "stream"),
        (completion("x", prompt=[1, 10**9]), "prompt_token_ids"),
        (completion("x", prompt=["the", "and"]), "prompt_token_ids"),
        (completion("x", prompt={"prompt": "the"}), "prompt_token_ids"),
        (completion("x", logit_bias={"a": 1}), "logit_bias"),
        (completion("x", logit_bias=[1]), "logit_bias"),
        (completion("x", logprobs=True), "logprobs"),
        (completion("x", prompt="the \ud800"), "prompt"),
        (line("x", "/v1/chat/completions", {"messages": []}), "messages"),
        (line("x", "/v1/chat/completions", {"messages": "hello"}), "messages"),
        (chat("x", messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages"),
        (chat("x", logprobs=5), "logprobs"),
        (chat("x", top_logprobs=5), "top_logprobs"),
        (chat("x", logprobs=True, top_logprobs=21), "logprobs"),
        (chat("x", n=2), "n"),  # greedy
        (line("x", "/v1/embeddings", {"input": ""}), "prompt"),
        (embedding("x", input=["a", "b"]), "input"),
        (embedding("x", dimensions=8), "dimensions"),
        (embedding("x", encoding_format="base64"), "encoding_format"),
    ],
)
def test_a_bad_line_is_reported_in_its_place_and_the_rest_runs(llm: LLM, bad: str, parameter: str | None):
    answers = run(llm, [completion("first"), bad, completion("last")])
    assert [answer["error"] is None for answer in answers] == [True, False, True]
    assert [answer["custom_id"] for answer in answers][::2] == ["first", "last"]
    assert answers[1]["response"]["status_code"] == 400
    assert answers[1]["error"]["param"] == parameter


ODD = [
    None, True, 5, -1, 2.5, math.inf, math.nan, 10**300, "x", "", "\ud800", [], {}, [[]], [None], ["x"], [1.5],
    {"a": 1}, {"1": "x"}, {"-1": 1}, [{}], [{"role": 5, "content": {}}],
]  # fmt: skip


@pytest.mark.parametrize("make", [completion, chat, embedding])
def test_no_value_of_any_field_stops_the_others(llm: LLM, make: Callable[..., str]):
    """An unhashable url did: the whole batch ended in a TypeError. json.loads reads NaN, which is no JSON to write."""
    fields = sorted(SAMPLING_FIELDS | {"messages", "prompt", "input", "top_logprobs", "max_completion_tokens", "echo"})
    lines = [make(**{field: value}) for field in fields for value in ODD]
    for name, value in itertools.product(("custom_id", "method", "url", "body"), ODD):
        lines.append(json.dumps({**json.loads(make()), name: value}))
    answers = run(llm, [*lines, completion("last")])
    assert {answer["response"]["status_code"] for answer in answers} <= {200, 400}
    assert answers[-1]["error"] is None


def test_an_error_has_the_form_of_the_wire_and_names_its_line(llm: LLM):
    error = error_of(llm, completion("x", temperature=-1))
    assert (error["status"], error["type"], error["param"]) == (400, "InvalidRequestError", "temperature")
    assert error["message"] == "temperature must be a number in [0, 2], got -1."
    too_long = error_of(llm, completion("x", prompt=[5] * 200))
    assert (too_long["status"], too_long["code"]) == (400, "context_length_exceeded")
    [answer] = run(llm, [completion("named", temperature=-1)])
    assert answer["custom_id"] == "named"


def test_unknown_fields_are_all_named(llm: LLM):
    error = error_of(llm, chat(tools=[{"type": "function"}], audio={"voice": "x"}))
    assert error["message"] == "audio, tools: not supported in a batch file." and error["param"] == "audio"


def test_empty_lines_are_no_requests(llm: LLM):
    assert run(llm, ["", "  "]) == []
    assert [answer["custom_id"] for answer in run(llm, ["", completion("a"), "\t", completion("b"), ""])] == ["a", "b"]


def test_two_lines_with_one_custom_id_are_both_answered(llm: LLM):
    answers = run(llm, [completion("same", prompt="the"), completion("same", prompt="and")])
    assert [answer["custom_id"] for answer in answers] == ["same", "same"]
    texts = [answer["response"]["body"]["choices"][0]["text"] for answer in answers]
    assert texts[0] != texts[1]


def test_answers_keep_the_order_of_the_lines_whoever_ends_first(llm: LLM):
    lengths = [30, 1, 12, 2, 7]
    lines = [completion(str(length), max_tokens=length) for length in lengths] + [embedding("vector")]
    answers = run(llm, lines)
    assert [answer["custom_id"] for answer in answers] == ["30", "1", "12", "2", "7", "vector"]
    counts = [answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers[:-1]]
    assert counts == lengths


# ------------------------------------------------------------------ faults
def test_a_request_that_fails_while_it_runs_is_an_error_in_its_place(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    model = llm.llm_engine._executor.model
    compute = model.compute_logits

    def poisoned(rows: torch.Tensor) -> torch.Tensor:  # [num_rows, hidden_size]
        logits = compute(rows)
        logits[1] = math.nan
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(model, "compute_logits", poisoned)
        answers = run(llm, [completion("good", max_tokens=1), completion("bad"), completion("good too", max_tokens=1)])
    assert [answer["error"] is None for answer in answers] == [True, False, True]
    assert answers[1]["response"]["status_code"] == 500 and answers[1]["error"]["type"] == "ServerError"
    assert "NaN" in answers[1]["error"]["message"]


def test_an_interrupt_leaves_nothing_behind(llm: LLM):
    def stop_at_the_first_answer(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch_lines(llm.llm_engine, [completion(max_tokens=n) for n in (2, 90)], stop_at_the_first_answer)
    assert_idle(llm)


def test_an_embedding_model_answers_embeddings_only(tiny_model: Callable[[str], Path]):
    bert = LLM(tiny_model("bert-mean"), dtype="float32")
    answers = run(bert, [embedding("a"), completion("b"), embedding("c", input="and")])
    assert [answer["error"] is None for answer in answers] == [True, False, True]
    assert "is an embedding model and generates no text" in answers[1]["error"]["message"]
