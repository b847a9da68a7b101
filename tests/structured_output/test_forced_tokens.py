"""Tokens that a grammar leaves no choice about: appended without a forward of their own, and nothing else changes.

An engine that draws every token, with masks that leave only one, must give the very same tokens, text and ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest

from minivllm import LLM, SamplingParams, StructuredOutputsParams
from minivllm.outputs import CompletionOutput, RequestOutput
from tests.structured_output.helpers import PROMPT, SCHEMAS, generate, long_tiny_llm, manager_of, params, thing
from tests.tolerances import LOGPROB_ATOL

DIGITS = r"[0-9]{2}-#XQZ-[0-9]{2}/KJ/[0-9]"  # a token for each character
KEYS = [f"a_rather_long_property_name_{letter}" for letter in "abcdefgh"]
LONG_KEYS = thing(**{key: {"type": "boolean"} for key in KEYS})


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Its second eos has a text; company and chunks change no bit."""
    return long_tiny_llm(tmp_path_factory.mktemp("llama"), batch_invariant=True)


@pytest.fixture(scope="module")
def one_eos(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The same model, with one way to end."""
    folder = tmp_path_factory.mktemp("llama")
    long_tiny_llm(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return LLM(folder, dtype="float32", num_gpu_blocks_override=1200, batch_invariant=True)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM) -> Iterator[None]:
    yield
    engine = llm.llm_engine
    pool = engine.scheduler.kv_cache.pool
    assert len(engine.structured_output) == 0
    assert not engine.has_unfinished_requests() and pool.num_free_blocks == pool.num_blocks - 1


def run(llm: LLM, *requests: SamplingParams, prompt: Any = PROMPT) -> tuple[int, list[RequestOutput]]:
    """(steps, last outputs) of a batch; a request that fails is an answer and no exception."""
    engine, last, count = llm.llm_engine, {}, 0
    request_ids = [engine.add_request(prompt, request) for request in requests]
    while engine.has_unfinished_requests():
        last.update((output.request_id, output) for output in engine.step())
        count += 1
    return count, [last[request_id] for request_id in request_ids]


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[RequestOutput]]]:
    """As run, in an engine that draws every token."""

    def run_drawing(llm: LLM, *requests: SamplingParams, **options: Any) -> tuple[int, list[RequestOutput]]:
        with monkeypatch.context() as patch:
            patch.setattr(llm.llm_engine.structured_output, "forced_tokens", lambda request_id: [])
            return run(llm, *requests, **options)

    return run_drawing


def answers(outputs: list[RequestOutput]) -> list[CompletionOutput]:
    return [candidate for output in outputs for candidate in output.outputs]


def told(outputs: list[RequestOutput]) -> list[tuple[list[int], str, str | None, Any]]:
    """What callers see, logprobs aside."""
    return [(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in answers(outputs)]


# ------------------------------------------------------------------ the same tokens, in fewer steps
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_forced_tokens_are_those_that_would_have_been_drawn(llm: LLM, drawing: Any, temperature: float):
    requests = [params(llm, regex=DIGITS, temperature=temperature, seed=seed) for seed in range(12)]
    assert told(run(llm, *requests)[1]) == told(drawing(llm, *requests)[1])


def test_they_take_no_step_of_their_own(llm: LLM, drawing: Any):
    request = params(llm, regex=DIGITS, temperature=0)
    count, (output,) = run(llm, request)
    count_drawing, _ = drawing(llm, request)
    assert count_drawing == len(output.outputs[0].token_ids)  # 15 characters and eos
    assert count_drawing - count >= len("-#XQZ-") + len("/KJ/") - 2


@pytest.mark.parametrize("limit", ["max_num_batched_tokens", "num_gpu_blocks_override"])
def test_chunks_preemptions_and_company_change_nothing(llm: LLM, tmp_path_factory: pytest.TempPathFactory, limit: str):
    """16 tokens a step: a run of forced tokens is cut. Few blocks: requests are preempted between two of them."""
    requests = [params(llm, json=LONG_KEYS, seed=seed, max_tokens=400) for seed in range(6)]
    expected = told(run(llm, *requests)[1])
    options = {limit: {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 33}[limit]}
    small = long_tiny_llm(tmp_path_factory.mktemp("small"), batch_invariant=True, **options)
    assert told(run(small, *requests)[1]) == expected
    assert (small.llm_engine.scheduler.num_preemptions > 0) == (limit == "num_gpu_blocks_override")
    assert [told(run(llm, request)[1])[0] for request in requests] == expected


def test_a_prefix_that_was_forced_is_found_again(llm: LLM):
    (first,) = generate(llm, params(llm, json=LONG_KEYS, temperature=0))
    prompt = {"prompt_token_ids": PROMPT["prompt_token_ids"] + first.outputs[0].token_ids[:40]}
    (again,) = generate(llm, SamplingParams(temperature=0, max_tokens=3), prompt=prompt)
    assert again.num_cached_tokens >= 32
    llm.reset_prefix_cache()
    (fresh,) = generate(llm, SamplingParams(temperature=0, max_tokens=3), prompt=prompt)
    assert fresh.num_cached_tokens == 0 and told([fresh]) == told([again])


@pytest.mark.parametrize("name", ["long keys", *SCHEMAS])
def test_a_document_is_the_same_and_valid(llm: LLM, drawing: Any, name: str):
    schema = LONG_KEYS if name == "long keys" else SCHEMAS[name]
    draft_7 = "$schema" in schema or isinstance(schema.get("items"), list)
    validator = (jsonschema.Draft7Validator if draft_7 else jsonschema.Draft202012Validator)(schema)
    requests = [params(llm, json=schema, seed=seed, temperature=1.0) for seed in range(4)]
    found = generate(llm, *requests)
    assert told(found) == told(drawing(llm, *requests)[1])
    for output in answers(found):
        if output.finish_reason == "stop":
            validator.validate(json.loads(output.text))


def test_long_keys_cost_a_fraction_of_the_steps(llm: LLM):
    count, (output,) = run(llm, params(llm, json=LONG_KEYS, temperature=0))
    assert set(json.loads(output.outputs[0].text)) == set(KEYS)
    assert count < len(output.outputs[0].token_ids) / 4


# ------------------------------------------------------------------ limits
@pytest.mark.parametrize("max_tokens", range(1, 17))
def test_max_tokens_cuts_at_the_same_place(llm: LLM, drawing: Any, max_tokens: int):
    request = params(llm, regex=DIGITS, temperature=0, max_tokens=max_tokens)
    found = told(run(llm, request)[1])
    assert found == told(drawing(llm, request)[1]) and len(found[0][0]) == max_tokens


def test_the_context_cuts_at_the_same_place(llm: LLM, drawing: Any):
    for room in (3, 4, 8, 9):
        prompt = {"prompt_token_ids": [5] * (512 - room)}
        request = params(llm, regex=DIGITS, temperature=0)
        found = told(run(llm, request, prompt=prompt)[1])
        assert found == told(drawing(llm, request, prompt=prompt)[1])
        assert (len(found[0][0]), found[0][2]) == (room, "length")


@pytest.mark.parametrize(
    "fields", [{"stop": ["XQ"]}, {"stop": ["#"]}, {"stop": ["Z-"], "include_stop_str_in_output": True}]
)
def test_a_stop_string_among_them_ends_it_there(llm: LLM, drawing: Any, fields: dict[str, Any]):
    request = params(llm, regex=DIGITS, temperature=0, **fields)
    found = told(run(llm, request)[1])
    assert found == told(drawing(llm, request)[1]) and found[0][2:] == ("stop", fields["stop"][0])


@pytest.mark.parametrize("min_tokens", [0, 5, 6, 12])
@pytest.mark.parametrize("fields", [{"stop": ["Q"]}, {"stop_token_ids": "Q"}], ids=["text", "id"])
def test_min_tokens_is_obeyed_among_them(llm: LLM, drawing: Any, fields: dict[str, Any], min_tokens: int):
    """A stop id may not come at all below min_tokens: then no token is left, forced or drawn."""
    if "stop_token_ids" in fields:
        fields = {"stop_token_ids": llm.get_tokenizer().encode("Q")}
    request = params(llm, regex=r"[0-9]{2}-#XQZ-[0-9]{9}", temperature=0, min_tokens=min_tokens, **fields)
    assert told(run(llm, request)[1]) == told(drawing(llm, request)[1])


@pytest.mark.parametrize("word", ["Q", "#", "-"])
def test_a_stop_id_among_them_ends_it_there(llm: LLM, drawing: Any, word: str):
    request = params(llm, regex=DIGITS, temperature=0, stop_token_ids=llm.get_tokenizer().encode(word))
    found = told(run(llm, request)[1])
    assert found == told(drawing(llm, request)[1]) and found[0][2:] == ("stop", llm.get_tokenizer().encode(word)[0])


# ------------------------------------------------------------------ the caller's own fields
@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"repetition_penalty": 5.0},
        {"seed": 9, "temperature": 2.0, "top_p": 0.9},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_penalties_count_them_and_seeds_pass_them(llm: LLM, drawing: Any, fields: dict[str, Any]):
    """The letters that were forced are drawn from later."""
    request = params(llm, regex=r"[0-9]-#XQZ-[#XQZKJ0-9]{30}", **{"temperature": 0, **fields})
    assert told(run(llm, request)[1]) == told(drawing(llm, request)[1])


@pytest.mark.parametrize("forbids", ["allowed_token_ids", "bad_words", "stop_token_ids", "logit_bias"])
def test_what_the_caller_forbids_is_left_to_the_draw(llm: LLM, drawing: Any, forbids: str):
    """A mask that leaves only what another one forbids is an error of the request; a bias forbids nothing."""
    tokenizer = llm.get_tokenizer()
    letters = [tokenizer.encode(letter)[0] for letter in "#XZ-/KJ0123456789"]
    fields: dict[str, Any] = {
        "allowed_token_ids": {"allowed_token_ids": [*letters, *llm.llm_engine.eos_token_ids]},
        "bad_words": {"bad_words": ["Q"]},
        "stop_token_ids": {"stop_token_ids": tokenizer.encode("Q"), "min_tokens": 9},
        "logit_bias": {"logit_bias": {tokenizer.encode("Q")[0]: -100.0}},
    }[forbids]
    request = params(llm, regex=DIGITS, temperature=0, **fields)
    (found,), (drawn,) = run(llm, request)[1], drawing(llm, request)[1]
    assert told([found]) == told([drawn]) and found.error == drawn.error
    if forbids == "logit_bias":
        assert found.error is None and "Q" in found.outputs[0].text
    else:
        assert "No token can be drawn" in found.error and found.outputs[0].text.endswith("-#X")


def test_a_forced_token_has_a_logprob_of_nothing_else(llm: LLM, drawing: Any):
    request = params(llm, regex=DIGITS, temperature=0, logprobs=3)
    (one,), (other,) = answers(generate(llm, request)), answers(drawing(llm, request)[1])
    assert len(one.logprobs) == len(one.token_ids) and one.token_ids == other.token_ids
    for token_id, found, drawn in zip(one.token_ids, one.logprobs, other.logprobs, strict=True):
        assert found[token_id].logprob == pytest.approx(drawn[token_id].logprob, abs=LOGPROB_ATOL)
        assert found[token_id].decoded_token == drawn[token_id].decoded_token
        assert set(found) == set(drawn) or (list(found) == [token_id] and found[token_id].rank == 1)
    assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=LOGPROB_ATOL)
    assert sum(list(found) == [token_id] for token_id, found in zip(one.token_ids, one.logprobs, strict=True)) >= 8


def test_logprobs_and_best_of_change_no_text(llm: LLM):
    wanted = {"json": LONG_KEYS, "seed": 3, "temperature": 1.0}
    plain, with_logprobs = params(llm, **wanted), params(llm, logprobs=2, **wanted)
    assert told(run(llm, plain)[1]) == told(run(llm, with_logprobs)[1])
    several, best = params(llm, n=4, **wanted), params(llm, n=2, best_of=4, **wanted)
    texts = [one.text for one in answers(generate(llm, several))]
    assert {one.text for one in answers(generate(llm, best))} <= set(texts) and len(set(texts)) > 1


# ------------------------------------------------------------------ the end
def test_the_only_eos_is_not_drawn_either(one_eos: LLM):
    count, (output,) = run(one_eos, params(one_eos, choice=["#XQZ"], logprobs=0))
    (answer,) = output.outputs
    assert (count, answer.text, answer.finish_reason, answer.stop_reason) == (1, "#XQZ", "stop", None)
    assert answer.token_ids == [*one_eos.get_tokenizer().encode("#XQZ"), 0] and len(answer.logprobs) == 5
    for fields in ({"ignore_eos": True}, {"stop": ["never"]}):
        count, (output,) = run(one_eos, params(one_eos, choice=["#XQZ"], **fields))
        assert (count, output.outputs[0].text, output.outputs[0].finish_reason) == (1, "#XQZ", "stop")


def test_below_min_tokens_it_ends_without_eos(one_eos: LLM):
    count, (output,) = run(one_eos, params(one_eos, choice=["#XQZ"], min_tokens=9))
    assert (count, output.outputs[0].text, output.outputs[0].finish_reason) == (1, "#XQZ", "stop")
    assert output.outputs[0].token_ids == one_eos.get_tokenizer().encode("#XQZ")


def test_of_two_eos_the_model_chooses(llm: LLM):
    count, (output,) = run(llm, params(llm, choice=["#XQZ"]))
    assert count == 2 and output.outputs[0].token_ids[-1] in llm.llm_engine.eos_token_ids


# ------------------------------------------------------------------ what is no token of the text
def test_neither_eos_nor_a_token_without_a_logit_is_forced(llm: LLM):
    """The second eos of the golden models is a token with a text; some tokenizers know more than the model does."""
    tokenizer = llm.get_tokenizer()
    letters = tokenizer.encode("#XQZ")
    for changes in ({"eos_token_ids": frozenset({letters[2]})}, {"vocab_size": max(letters)}):
        manager = manager_of(tokenizer, **changes)
        manager.add_request("a", manager.compile(StructuredOutputsParams(choice=["#XQZ"])))
        forced = manager.forced_tokens("a")
        assert forced == letters[: len(forced)] and len(forced) < len(letters)
