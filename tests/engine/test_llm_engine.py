"""LLMEngine and LLM on a tiny random model: prompts in every form, n, best_of, beams, faults, bad input."""

import math

import pytest
import torch

from minivllm import LLM, BeamSearchParams, ClientError, ConfigError, ContextLengthError, SamplingParams, ServerError
from tests.tolerances import HF_LOGPROB_ATOL, UNIT_LENGTH_ATOL

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model) -> LLM:
    return LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64)


def ids_of(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def assert_idle(llm: LLM) -> None:
    """Nothing runs, nothing waits, every block is free, the recount agrees."""
    scheduler = llm.llm_engine.scheduler
    assert not llm.llm_engine.has_unfinished_requests()
    assert scheduler.kv_cache.pool.num_free_blocks == scheduler.kv_cache.pool.num_blocks - 1
    assert llm.llm_engine.output_processor.num_requests == 0
    scheduler.check_integrity()


def test_every_prompt_form_gives_the_same_tokens(llm: LLM):
    ids = llm.get_tokenizer().encode("the value is")
    forms = ["the value is", {"prompt": "the value is"}, {"prompt_token_ids": ids}]
    alone = [llm.generate(form, GREEDY, use_tqdm=False)[0] for form in [*forms, ids]]
    together = llm.generate(forms, GREEDY, use_tqdm=False)
    assert len({tuple(tokens) for tokens in ids_of(alone + together)}) == 1
    assert alone[0].prompt == "the value is" and alone[2].prompt is None
    assert_idle(llm)


def test_answers_come_in_the_order_of_the_prompts(llm: LLM):
    prompts = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (30, 2, 17, 1)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 9, 1, 5)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(tokens) for tokens in ids_of(outputs)] == [2, 9, 1, 5]
    assert [output.prompt_token_ids for output in outputs] == [prompt["prompt_token_ids"] for prompt in prompts]


def test_n_gives_different_candidates_that_share_the_prompt(llm: LLM):
    params = SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=8, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(10, 58))}
    output = llm.generate(prompt, params, use_tqdm=False)[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
    seeded = SamplingParams(temperature=1.5, seed=5, max_tokens=8, ignore_eos=True)
    assert llm.generate(prompt, seeded, use_tqdm=False)[0].outputs[0].token_ids == output.outputs[2].token_ids
    assert_idle(llm)


def test_candidates_compute_their_prompt_once(tiny_model):
    llm = LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64)
    llm.llm_engine.add_request(
        {"prompt_token_ids": list(range(10, 58))}, SamplingParams(n=4, temperature=1.0, max_tokens=2)
    )
    llm.llm_engine.step()
    assert llm.llm_engine.last_step.total_num_scheduled_tokens == 48 + 3 * 16  # three candidates: their last block


def test_best_of_keeps_the_likeliest(llm: LLM):
    common = {"temperature": 1.5, "seed": 3, "max_tokens": 6, "ignore_eos": True}
    every = llm.generate("the", SamplingParams(n=6, logprobs=0, **common), use_tqdm=False)[0].outputs
    best = llm.generate("the", SamplingParams(n=2, best_of=6, **common), use_tqdm=False)[0].outputs
    expected = sorted(every, key=lambda completion: -completion.cumulative_logprob)[:2]
    assert [completion.token_ids for completion in best] == [completion.token_ids for completion in expected]
    assert [completion.index for completion in best] == [0, 1]


def test_beam_search_of_width_one_is_greedy(llm: LLM):
    result = llm.beam_search("the value", BeamSearchParams(beam_width=1, max_tokens=8, ignore_eos=True))[0]
    prompt_ids = llm.get_tokenizer().encode("the value")
    greedy = llm.generate("the value", GREEDY, use_tqdm=False)[0].outputs[0]
    assert result.sequences[0].tokens == prompt_ids + greedy.token_ids
    assert result.sequences[0].text == greedy.text


def test_beam_search_finds_the_likeliest_of_all_short_continuations(llm: LLM):
    """Two tokens of a 320-token vocabulary: the true best pair is known by looking at every first token."""
    prompt = list(range(20, 30))
    width = 20
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)
    first = llm.generate({"prompt_token_ids": prompt}, one, use_tqdm=False)[0].outputs[0].logprobs[0]
    pairs = {}
    for token, entry in first.items():
        second = llm.generate({"prompt_token_ids": [*prompt, token]}, one, use_tqdm=False)[0].outputs[0].logprobs[0]
        pairs.update({(token, other): entry.logprob + e.logprob for other, e in second.items()})
    best = max(pairs, key=pairs.__getitem__)
    beams = llm.beam_search({"prompt_token_ids": prompt}, BeamSearchParams(width, max_tokens=2, ignore_eos=True))[0]
    assert tuple(beams.sequences[0].tokens[-2:]) == best
    assert beams.sequences[0].cum_logprob == pytest.approx(pairs[best], abs=HF_LOGPROB_ATOL)
    scores = [sequence.cum_logprob for sequence in beams.sequences]
    assert scores == sorted(scores, reverse=True)


def test_a_stop_string_ends_the_request_and_frees_its_blocks(llm: LLM):
    free = llm.generate("the value", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), use_tqdm=False)[0]
    text = free.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=[stop])
    ended = llm.generate("the value", params, use_tqdm=False)[0].outputs[0]
    assert ended.text == text[: text.index(stop)]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    assert_idle(llm)


def test_streamed_text_is_the_whole_text(llm: LLM):
    pieces, shown = [], 0
    for output in llm.stream("the value", GREEDY):
        pieces.append(output.outputs[0].text[shown:])
        shown = len(output.outputs[0].text)
    assert "".join(pieces) == llm.generate("the value", GREEDY, use_tqdm=False)[0].outputs[0].text


def test_leaving_a_stream_early_frees_the_request(llm: LLM):
    stream = llm.stream("the value", GREEDY)
    next(stream)
    stream.close()
    assert_idle(llm)


def test_the_second_time_the_prompt_comes_from_the_cache(llm: LLM):
    assert llm.reset_prefix_cache()
    prompt = {"prompt_token_ids": list(range(40, 88))}
    first, second = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)  # 48 tokens: the last block is computed
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_another_salt_shares_nothing(llm: LLM):
    ids = list(range(90, 122))
    engine = llm.llm_engine
    for salt, expected in (("a", 0), ("b", 0), ("a", 16)):
        request_id = engine.add_request({"prompt_token_ids": ids}, GREEDY, cache_salt=salt)
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        assert outputs[-1].request_id == request_id and outputs[-1].num_cached_tokens == expected


def test_prompt_logprobs_do_not_depend_on_chunks_or_preemption(tiny_model):
    prompt = {"prompt_token_ids": list(range(7, 60))}
    params = SamplingParams(temperature=0, max_tokens=14, prompt_logprobs=2, ignore_eos=True)
    whole = LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64)
    small = LLM(
        tiny_model("llama"), dtype="float32", num_gpu_blocks_override=9, max_num_batched_tokens=16, max_model_len=96
    )
    expected = whole.generate(prompt, params, use_tqdm=False)[0].prompt_logprobs
    outputs = small.generate([prompt] * 3, params, use_tqdm=False)
    assert small.llm_engine.scheduler.num_preemptions > 0
    for output in outputs:
        assert len(output.prompt_logprobs) == 53 and output.prompt_logprobs[0] is None
        for ours, theirs in zip(output.prompt_logprobs[1:], expected[1:], strict=True):
            assert ours.keys() == theirs.keys()
            assert all(abs(ours[t].logprob - theirs[t].logprob) <= HF_LOGPROB_ATOL for t in ours)


# ------------------------------------------------------------------ faults
def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    expected = ids_of(llm.generate("the", GREEDY, use_tqdm=False))
    model = llm.llm_engine._executor.model
    with monkeypatch.context() as patch:
        patch.setattr(model, "compute_logits", lambda rows: 1 / 0)
        with pytest.raises(ServerError, match="ZeroDivisionError"):
            llm.generate("the", GREEDY, use_tqdm=False)
    assert_idle(llm)
    assert ids_of(llm.generate("the", GREEDY, use_tqdm=False)) == expected


def test_nan_logits_fail_their_own_request_only(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    expected = ids_of(llm.generate("the", GREEDY, use_tqdm=False))
    model = llm.llm_engine._executor.model
    compute = model.compute_logits

    def poisoned(rows: torch.Tensor) -> torch.Tensor:
        logits = compute(rows)
        if len(logits) == 2:
            logits[1] = float("nan")
        return logits

    engine = llm.llm_engine
    with monkeypatch.context() as patch:
        patch.setattr(model, "compute_logits", poisoned)
        good = engine.add_request("the", GREEDY)
        bad = engine.add_request("value", GREEDY)
        outputs = {}
        while engine.has_unfinished_requests():
            outputs.update((output.request_id, output) for output in engine.step())
    assert outputs[bad].outputs[0].finish_reason == "error" and "NaN" in outputs[bad].error
    assert outputs[good].outputs[0].token_ids == expected[0]
    assert_idle(llm)


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("prompt", "fields", "parameter"),
    [
        ("", {}, "prompt"),
        ({"prompt_token_ids": []}, {}, "prompt_token_ids"),
        ({"prompt_token_ids": [1, 320]}, {}, "prompt_token_ids"),
        ({"prompt_token_ids": [1, -1]}, {}, "prompt_token_ids"),
        ({"prompt_token_ids": [1, 2.5]}, {}, "prompt_token_ids"),
        ({"prompt_token_ids": [5] * 200}, {}, "prompt"),
        ("the " * 100_000, {}, "prompt"),
        ({"text": "the"}, {}, "prompt"),
        (None, {}, "prompt"),
        ("the", {"temperature": -1.0}, "temperature"),
        ("the", {"temperature": math.nan}, "temperature"),
        ("the", {"top_p": 0.0}, "top_p"),
        ("the", {"top_p": math.inf}, "top_p"),
        ("the", {"top_k": -2}, "top_k"),
        ("the", {"min_p": 1.5}, "min_p"),
        ("the", {"repetition_penalty": 0.0}, "repetition_penalty"),
        ("the", {"presence_penalty": math.nan}, "presence_penalty"),
        ("the", {"max_tokens": 0}, "max_tokens"),
        ("the", {"max_tokens": -5}, "max_tokens"),
        ("the", {"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ("the", {"n": 0}, "n"),
        ("the", {"n": 10**9}, "n"),
        ("the", {"best_of": 0}, "best_of"),
        ("the", {"n": 2, "temperature": 0.0}, "n"),
        ("the", {"logprobs": 21}, "logprobs"),
        ("the", {"prompt_logprobs": -1}, "prompt_logprobs"),
        ("the", {"seed": 2**70}, "seed"),
        ("the", {"stop": [""]}, "stop"),
        ("the", {"stop": ["x"] * 5}, "stop"),
        ("the", {"stop_token_ids": [320]}, "stop_token_ids"),
        ("the", {"allowed_token_ids": []}, "allowed_token_ids"),
        ("the", {"allowed_token_ids": [10**9]}, "allowed_token_ids"),
        ("the", {"logit_bias": {320: 1.0}}, "logit_bias"),
        ("the", {"logit_bias": {3: math.nan}}, "logit_bias"),
        ("the", {"bad_words": [""]}, "bad_words"),
    ],
)
def test_bad_input_is_one_clear_error_and_the_engine_goes_on(llm: LLM, prompt, fields, parameter):
    with pytest.raises(ClientError) as caught:
        llm.generate(prompt, SamplingParams(**fields), use_tqdm=False)
    assert caught.value.parameter == parameter
    assert len(str(caught.value)) < 1000
    assert_idle(llm)


def test_one_bad_prompt_of_many_starts_nothing(llm: LLM):
    with pytest.raises(ClientError):
        llm.generate(["the", ""], GREEDY, use_tqdm=False)
    assert_idle(llm)


def test_a_request_that_can_never_fit_the_pool_is_refused_with_the_arithmetic(tiny_model):
    llm = LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=4)
    with pytest.raises(ContextLengthError, match="40 prompt tokens \\+ 20 max_tokens = 60 tokens need 4 blocks"):
        llm.generate({"prompt_token_ids": [5] * 40}, SamplingParams(max_tokens=20), use_tqdm=False)
    fits = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    assert len(llm.generate({"prompt_token_ids": [5] * 40}, fits, use_tqdm=False)[0].outputs[0].token_ids) == 8
    unlimited = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
    answer = llm.generate({"prompt_token_ids": [5] * 40}, unlimited, use_tqdm=False)[0]
    assert len(answer.outputs[0].token_ids) == 8  # as much as the pool holds


@pytest.mark.parametrize(
    ("settings", "parameter"),
    [
        ({"dtype": "int3"}, "dtype"),
        ({"block_size": 0}, "block_size"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": math.nan}, "gpu_memory_utilization"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy"),
        ({"speculative_config": {"method": "ngram"}}, "speculative_config"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 8}, "max_num_batched_tokens"),
        ({"kv_cache_memory_bytes": 10}, "kv_cache_memory_bytes"),
    ],
)
def test_a_bad_setting_is_refused_at_start_up(tiny_model, settings, parameter):
    with pytest.raises(ConfigError) as caught:
        LLM(tiny_model("llama"), **settings)
    assert caught.value.parameter == parameter


# ------------------------------------------------------------------ vectors
def test_embeddings_have_length_one_and_do_not_depend_on_company(tiny_model):
    llm = LLM(tiny_model("bert-mean"), dtype="float32")
    texts = ["the value is", "and", "for index in range"]
    together = [output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)]
    alone = [llm.embed(text, use_tqdm=False)[0].outputs.embedding for text in texts]
    for a, b in zip(together, alone, strict=True):
        assert sum(x * x for x in a) == pytest.approx(1.0, abs=UNIT_LENGTH_ATOL)
        assert a == pytest.approx(b, abs=UNIT_LENGTH_ATOL)
    scores = llm.score(texts[0], texts, use_tqdm=False)
    assert scores[0].outputs.score == pytest.approx(1.0, abs=UNIT_LENGTH_ATOL)
    assert_idle(llm)


def test_a_generating_model_embeds_with_its_last_token(llm: LLM):
    output = llm.embed("the value is", use_tqdm=False)[0]
    assert len(output.outputs.embedding) == llm.llm_engine._executor.model.hidden_size
    assert_idle(llm)


def test_an_embedding_model_generates_nothing(tiny_model):
    llm = LLM(tiny_model("bert-cls"), dtype="float32")
    with pytest.raises(ClientError, match="embedding model"):
        llm.generate("the", GREEDY, use_tqdm=False)
