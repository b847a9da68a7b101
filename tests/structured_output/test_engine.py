"""Grammars in the whole engine: batches, preemption, several sequences, every way to end, faults of one request."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from minivllm import LLM, InvalidRequestError, SamplingParams, ServerError, StructuredOutputsParams
from minivllm.outputs import CompletionOutput, RequestOutput
from minivllm.structured_output import grammar
from tests.structured_output.helpers import PROMPT, SCHEMAS, generate, long_tiny_llm, params, thing
from tests.tolerances import LOGPROB_ATOL

FREE = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SMALL = thing(a={"type": "integer", "minimum": 0, "maximum": 99}, b={"type": "boolean"})
PLATE = r"[A-Z]{2}-\d{3}"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return long_tiny_llm(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM) -> Iterator[None]:
    yield
    engine = llm.llm_engine
    pool = engine.scheduler.kv_cache.pool
    assert len(engine.structured_output) == 0
    assert not engine.has_unfinished_requests() and pool.num_free_blocks == pool.num_blocks - 1


def one(llm: LLM, **fields: Any) -> CompletionOutput:
    (output,) = generate(llm, params(llm, **fields))
    return output.outputs[0]


def run(llm: LLM, *requests: SamplingParams) -> list[RequestOutput]:
    """As generate, but a failed request is an answer and no exception."""
    engine, last = llm.llm_engine, {}
    request_ids = [engine.add_request(PROMPT, request) for request in requests]
    while engine.has_unfinished_requests():
        last.update((output.request_id, output) for output in engine.step())
    return [last[request_id] for request_id in request_ids]


# ------------------------------------------------------------------ the end
def test_it_ends_with_eos_as_soon_as_the_grammar_is_complete(llm: LLM):
    output = one(llm, regex=PLATE)
    assert re.fullmatch(PLATE, output.text)
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert output.token_ids[-1] in llm.llm_engine.eos_token_ids
    assert llm.llm_engine.decode(output.token_ids[:-1]) == output.text


def test_max_tokens_may_cut(llm: LLM):
    output = one(llm, regex=PLATE, max_tokens=2)
    assert (output.finish_reason, len(output.token_ids)) == ("length", 2)
    assert re.fullmatch("[A-Z]{2}", output.text)


def test_a_complete_grammar_ends_below_min_tokens(llm: LLM):
    """eos is masked there by min_tokens, everything else by the grammar: it was an error that no token is left."""
    output = one(llm, regex=PLATE, min_tokens=200)
    assert re.fullmatch(PLATE, output.text)
    assert output.finish_reason == "stop"
    assert llm.llm_engine.decode(output.token_ids) == output.text  # all of it is text: no eos


def test_min_tokens_holds_where_the_grammar_can_go_on(llm: LLM):
    output = one(llm, regex="(ab)+", min_tokens=20, logit_bias={0: 30.0, 118: 30.0})
    assert output.finish_reason == "stop" and len(output.token_ids) in (21, 22)  # the first end from 20 on, and eos
    assert re.fullmatch("(ab)+", output.text)


def test_a_complete_grammar_ends_without_eos_among_the_allowed_tokens(llm: LLM):
    tokens = [llm.get_tokenizer().encode(letter)[0] for letter in "ab"]
    output = one(llm, regex="[abc]{3}", allowed_token_ids=tokens)
    assert re.fullmatch("[ab]{3}", output.text) and (output.finish_reason, output.token_ids) == (
        "stop",
        output.token_ids[:3],
    )


def test_ignore_eos_does_not_run_on_behind_the_end(llm: LLM):
    output = one(llm, regex=PLATE, ignore_eos=True)
    assert re.fullmatch(PLATE, output.text) and output.finish_reason == "stop"
    assert output.token_ids[-1] in llm.llm_engine.eos_token_ids


def test_a_stop_string_ends_it_before_the_grammar_does(llm: LLM):
    output = one(llm, regex=PLATE, stop=["-"])
    assert re.fullmatch("[A-Z]{2}", output.text)
    assert (output.finish_reason, output.stop_reason) == ("stop", "-")


# ------------------------------------------------------------------ beside other requests
def test_a_batch_holds_requests_with_and_without_grammars(llm: LLM):
    (alone,) = generate(llm, FREE)
    requests = [
        FREE,
        params(llm, json=SMALL, temperature=0),
        params(llm, regex=PLATE),
        FREE,
        params(llm, choice=["yes", "no"]),
        params(llm, json_object=True, seed=3),
    ]
    outputs = [output.outputs[0] for output in generate(llm, *requests)]
    assert outputs[0].token_ids == outputs[3].token_ids == alone.outputs[0].token_ids
    assert set(json.loads(outputs[1].text)) == {"a", "b"}
    assert re.fullmatch(PLATE, outputs[2].text)
    assert outputs[4].text in ("yes", "no")
    assert isinstance(json.loads(outputs[5].text), dict)


def test_chunks_and_preemptions_change_nothing(llm: LLM, tmp_path_factory: pytest.TempPathFactory):
    """The matcher follows output tokens; what is computed again after a preemption is not accepted again."""
    requests = [params(llm, json=SCHEMAS["weather"], seed=seed) for seed in range(8)]
    prompt = {"prompt_token_ids": list(range(5, 45))}
    expected = generate(llm, *requests, prompt=prompt)
    folder = tmp_path_factory.mktemp("small")
    small = long_tiny_llm(folder, num_gpu_blocks_override=14, max_num_batched_tokens=16, max_model_len=200)
    found = generate(
        small, *[params(llm, json=SCHEMAS["weather"], seed=seed, max_tokens=150) for seed in range(8)], prompt=prompt
    )
    assert small.llm_engine.scheduler.num_preemptions > 0
    assert [output.outputs[0].text for output in found] == [output.outputs[0].text for output in expected]
    assert len(small.llm_engine.structured_output) == 0


def test_every_candidate_follows_its_own_matcher(llm: LLM):
    several = params(llm, json=SMALL, seed=5)
    several.n = 6
    (output,) = generate(llm, several)
    texts = [candidate.text for candidate in output.outputs]
    assert all(set(json.loads(text)) == {"a", "b"} for text in texts) and len(set(texts)) > 1
    best = params(llm, json=SMALL, seed=5)
    best.n, best.best_of = 2, 6
    (chosen,) = generate(llm, best)
    assert {candidate.text for candidate in chosen.outputs} <= set(texts)


# ------------------------------------------------------------------ beside other fields
def test_logprobs_are_those_behind_the_mask(llm: LLM):
    spec = StructuredOutputsParams(regex="[ab]c")
    (output,) = generate(llm, SamplingParams(temperature=0, max_tokens=9, logprobs=20, structured_outputs=spec))
    first, second, last = output.outputs[0].logprobs
    possible = {token for token, entry in first.items() if entry.logprob > -math.inf}
    assert {first[token].decoded_token for token in possible} <= {"a", "b", "ac", "bc"}
    assert sum(math.exp(first[token].logprob) for token in possible) == pytest.approx(1, abs=10 * LOGPROB_ATOL)
    assert second[output.outputs[0].token_ids[1]].logprob == pytest.approx(0, abs=LOGPROB_ATOL)  # nothing else may come
    assert len([entry for entry in last.values() if entry.logprob > -math.inf]) == 2  # the two eos of this model


def test_penalties_and_biases_choose_among_what_the_grammar_allows(llm: LLM):
    tokens = {letter: llm.get_tokenizer().encode(letter)[0] for letter in "abz"}
    bias = {tokens["z"]: 100.0, tokens["a"]: 60.0, tokens["b"]: 40.0}
    output = one(llm, regex="[ab]{8}", temperature=0, logit_bias=bias)
    assert output.text == "a" * 8
    penalised = one(llm, regex="[ab]{8}", temperature=0, logit_bias=bias, presence_penalty=2.0, repetition_penalty=10.0)
    assert re.fullmatch("[ab]{8}", penalised.text) and "b" in penalised.text


# ------------------------------------------------------------------ faults
@pytest.mark.parametrize(
    "spec",
    [{"json": {"type": "thing"}}, {"regex": "("}, {"grammar": "start: a"}, {"json": {"not": {"type": "null"}}}],
    ids=str,
)
def test_a_bad_grammar_is_refused_before_anything_is_queued(llm: LLM, spec: dict[str, Any]):
    with pytest.raises(InvalidRequestError) as caught:
        llm.llm_engine.process_input(PROMPT, params(llm, **spec))
    assert caught.value.parameter == "structured_outputs"
    assert not llm.llm_engine.has_unfinished_requests()
    with pytest.raises(InvalidRequestError):  # nor are its neighbours
        generate(llm, FREE, params(llm, **spec))
    assert one(llm, choice=["yes"]).text == "yes"


def test_a_refused_token_ends_its_own_request(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """It cannot happen while the mask is applied; here it is not."""
    grammars = llm.llm_engine.structured_output
    ones = np.full(10, -1, dtype=np.int32)
    expected = generate(llm, FREE)[0].outputs[0].token_ids
    with monkeypatch.context() as patch:
        patch.setattr(grammars, "bitmasks", lambda request_ids: dict.fromkeys(request_ids, ones))
        free, bad, forced = run(llm, FREE, params(llm, regex="q{40}", logprobs=0), params(llm, regex=".{1,99}\n?"))
    assert free.outputs[0].token_ids == expected and free.outputs[0].finish_reason == "length"
    assert bad.outputs[0].finish_reason == "error" and "which the grammar refuses" in bad.error
    assert len(bad.outputs[0].token_ids) == len(bad.outputs[0].logprobs) and set(bad.outputs[0].text) <= {"q"}
    assert forced.finished


def test_a_broken_matcher_ends_its_own_request_and_says_why(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 100)
    letters = {llm.get_tokenizer().encode(letter)[0]: 60.0 for letter in "ab"}
    broken = params(llm, regex="(.*a.{40})", temperature=2.0, logit_bias=letters)
    bad, good, free = run(llm, broken, params(llm, regex=PLATE), FREE)
    assert bad.outputs[0].finish_reason == "error" and "too many states" in bad.error
    assert set(bad.outputs[0].text) <= {"a", "b"}
    assert re.fullmatch(PLATE, good.outputs[0].text) and free.outputs[0].finish_reason == "length"


def test_a_failed_step_and_an_abort_forget_the_matchers(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    engine = llm.llm_engine
    with monkeypatch.context() as patch:
        patch.setattr(engine._executor.model, "compute_logits", lambda rows: 1 / 0)
        with pytest.raises(ServerError, match="ZeroDivisionError"):
            generate(llm, params(llm, regex=PLATE))
    assert len(engine.structured_output) == 0
    several = params(llm, regex=PLATE)
    several.n = 3
    request_id = engine.add_request(PROMPT, several)
    engine.step()
    assert len(engine.structured_output) == 3
    engine.abort_request(request_id)


def test_rows_are_made_only_for_requests_that_draw_a_token(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    """40 prompt tokens beside a decoding request, 16 a step: the first chunks draw nothing and ask for nothing."""
    small = long_tiny_llm(tmp_path_factory.mktemp("small"), max_num_batched_tokens=16)
    engine, asked = small.llm_engine, []
    make = engine.structured_output.bitmasks
    monkeypatch.setattr(engine.structured_output, "bitmasks", lambda ids: asked.append(list(ids)) or make(ids))
    engine.add_request(PROMPT, FREE)
    engine.step()
    request_id = engine.add_request({"prompt_token_ids": list(range(5, 45))}, params(small, choice=["yes"]))
    engine.step()  # 15 of 40
    engine.step()  # 30 of 40
    assert asked == []
    while engine.has_unfinished_requests():
        engine.step()
    assert asked and all(ids == [request_id] for ids in asked) and len(asked) <= 4  # y, e, s and eos at the most
