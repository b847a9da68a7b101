"""Batch files: good lines are answered, bad ones reported in their place, order kept."""

import json

import pytest

from minivllm import LLM
from minivllm.entrypoints.run_batch import run_batch_lines


@pytest.fixture(scope="module")
def llm(tiny_model) -> LLM:
    return LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64)


def line(custom_id: str, url: str, body: object) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def completion(custom_id: str, **fields: object) -> str:
    return line(custom_id, "/v1/completions", {"prompt": "the", "max_tokens": 4, "temperature": 0, **fields})


def run(llm: LLM, lines: list[str]) -> list[dict]:
    progress: list[tuple[int, int]] = []
    answers = run_batch_lines(llm.llm_engine, lines, lambda done, total: progress.append((done, total)))
    assert progress[-1] == (len(answers), len(answers))
    assert not llm.llm_engine.has_unfinished_requests()
    return answers


def test_answers_have_the_openai_form_and_order(llm: LLM):
    answers = run(llm, [completion("a", n=1), completion("b", logprobs=2, ignore_eos=True)])
    assert [answer["custom_id"] for answer in answers] == ["a", "b"]
    body = answers[1]["response"]["body"]
    assert answers[1]["response"]["status_code"] == 200 and answers[1]["error"] is None
    assert body["object"] == "text_completion" and body["usage"]["completion_tokens"] == 4
    assert len(body["choices"][0]["logprobs"]["token_logprobs"]) == 4
    json.dumps(answers, allow_nan=False)


@pytest.mark.parametrize(
    ("bad", "parameter"),
    [
        ("{not json", None),
        ("[1, 2]", None),
        ("[" * 100_000, None),
        (json.dumps({"custom_id": "x", "url": "/v1/completions"}), "body"),
        (json.dumps({"url": "/v1/completions", "body": {"prompt": "the"}}), "custom_id"),
        (line("x", "/v1/images", {"prompt": "the"}), "url"),
        (line("x", "/v1/completions", {}), "prompt"),
        (completion("x", temperature=-1), "temperature"),
        (completion("x", temperature="hot"), "temperature"),
        (completion("x", tempratur=1), "tempratur"),
        (completion("x", stream=True), "stream"),
        (completion("x", prompt=[1, 10**9]), "prompt_token_ids"),
        (completion("x", logit_bias={"a": 1}), "logit_bias"),
        (line("x", "/v1/chat/completions", {"messages": []}), "messages"),
        (line("x", "/v1/embeddings", {"input": ""}), "prompt"),
    ],
)
def test_a_bad_line_is_reported_in_its_place_and_the_rest_runs(llm: LLM, bad: str, parameter: str | None):
    answers = run(llm, [completion("first"), bad, completion("last")])
    assert [answer["error"] is None for answer in answers] == [True, False, True]
    assert answers[1]["response"]["status_code"] == 400
    assert answers[1]["error"]["param"] == parameter


def test_empty_lines_are_no_requests(llm: LLM):
    assert run(llm, ["", "  "]) == []
