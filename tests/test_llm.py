"""LLM on tiny models: every prompt form, the order of answers, streams, chat, beams beside transformers' own, vectors,
and that nothing is left behind however a call ends."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minivllm import LLM, BeamSearchParams, ClientError, InvalidRequestError, SamplingParams, ServerError
from minivllm.errors import ConfigError, ContextLengthError
from minivllm.outputs import RequestOutput
from tests.tolerances import HF_LOGPROB_ATOL, UNIT_LENGTH_ATOL

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
QUESTION = [{"role": "user", "content": "what is the capital"}]


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path]) -> LLM:
    return LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64)


@pytest.fixture(scope="module")
def bert(tiny_model: Callable[[str], Path]) -> LLM:
    return LLM(tiny_model("bert-mean"), dtype="float32")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test: nothing runs or waits, every block is free, the worker knows nobody."""
    yield
    for name in {"llm", "bert"} & set(request.fixturenames):
        assert_idle(request.getfixturevalue(name))


def assert_idle(llm: LLM) -> None:
    engine = llm.llm_engine
    pool = engine.scheduler.kv_cache.pool
    assert not engine.has_unfinished_requests() and engine.output_processor.num_requests == 0
    assert pool.num_free_blocks == pool.num_blocks - 1
    engine.scheduler.check_integrity()
    engine.step()  # tells the worker who has ended
    assert engine._executor._runner.states == {}
    assert llm._newest == {}


def generate(llm: LLM, prompts: Any, params: Any = GREEDY, **options: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False, **options)


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def ids(*token_ids: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(token_ids)}


# ------------------------------------------------------------------ prompts
def test_every_form_of_a_prompt_gives_the_same_answer(llm: LLM):
    text = "the value is"
    tokens = llm.get_tokenizer().encode(text)
    forms = [text, {"prompt": text}, {"prompt_token_ids": tokens}, tokens, {"prompt": text, "cache_salt": "a"}]
    single = [generate(llm, form)[0] for form in forms]
    together = generate(llm, forms)
    as_tuple = generate(llm, tuple(forms))
    assert len({tuple(found) for found in token_ids([*single, *together, *as_tuple])}) == 1
    assert [output.prompt for output in together] == [text, text, None, None, text]
    assert all(output.prompt_token_ids == tokens for output in together)


def test_a_list_of_lists_is_several_prompts_and_a_list_of_ids_is_one(llm: LLM):
    assert len(generate(llm, [5, 6, 7])) == 1
    assert [output.prompt_token_ids for output in generate(llm, [[5, 6, 7], [8]])] == [[5, 6, 7], [8]]


@pytest.mark.parametrize(
    "prompt", [None, 5, 2.5, b"the", [None], [5.5], [["the"]], {"text": "the"}, [True], []], ids=str
)
def test_what_is_no_prompt_is_refused_by_name(llm: LLM, prompt: Any):
    """None was a TypeError about iteration, and bytes ran as token ids."""
    with pytest.raises(InvalidRequestError, match="prompt"):
        generate(llm, prompt)


def test_answers_keep_the_order_of_the_prompts_whoever_ends_first(llm: LLM):
    prompts = [ids(*range(5, 5 + length)) for length in (30, 2, 17, 1)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 2, 5, 1)]
    outputs = generate(llm, prompts, params)
    assert [len(found) for found in token_ids(outputs)] == [9, 2, 5, 1]
    alone = [generate(llm, prompt, param)[0] for prompt, param in zip(prompts, params, strict=True)]
    assert token_ids(outputs) == token_ids(alone)


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"params": [GREEDY] * 3}, "sampling_params"),
        ({"priority": [1]}, "priority"),
        ({"params": []}, "sampling_params"),
    ],
)
def test_a_list_of_another_length_than_the_prompts_is_refused(llm: LLM, options: dict[str, Any], parameter: str):
    with pytest.raises(InvalidRequestError, match="as many as the prompts") as caught:
        generate(llm, ["the", "and"], **options)
    assert caught.value.parameter == parameter


def test_one_bad_prompt_of_many_starts_nothing(llm: LLM):
    last_step = llm.llm_engine.last_step
    with pytest.raises(ClientError):
        generate(llm, ["the", "and", ""])
    assert llm.llm_engine.last_step is last_step


# ------------------------------------------------------------------ what an answer holds
@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_token_has_its_own_logprob_and_those_of_the_likeliest(llm: LLM, count: int):
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=12, ignore_eos=True, logprobs=count)
    completion = generate(llm, "the value", params)[0].outputs[0]
    assert len(completion.logprobs) == 12
    for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
        assert next(iter(position)) == token_id  # the sampled one first
        ranks = sorted(entry.rank for entry in position.values())
        assert ranks[:count] == list(range(1, count + 1))
        assert len(position) == count + (position[token_id].rank > count)
    total = sum(position[t].logprob for t, position in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == total


def test_decoded_tokens_joined_are_the_text_when_no_character_is_split(llm: LLM):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0, allowed_token_ids=[260, 270, 280])
    completion = generate(llm, "the", params)[0].outputs[0]
    tokens = [p[t].decoded_token for t, p in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert "".join(tokens) == completion.text


def test_prompt_logprobs_have_one_entry_per_prompt_token_and_none_for_the_first(llm: LLM):
    prompt = [9, 20, 31, 42]
    output = generate(llm, prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))[0]
    first, *others = output.prompt_logprobs
    assert first is None
    assert [next(iter(position)) for position in others] == prompt[1:]


def test_n_answers_are_those_of_the_seeds_that_follow(llm: LLM):
    def params(seed: int, n: int = 1) -> SamplingParams:
        return SamplingParams(n=n, temperature=1.5, seed=seed, max_tokens=6, ignore_eos=True)

    together = generate(llm, "the", params(20, n=3))[0].outputs
    alone = [generate(llm, "the", params(20 + index))[0].outputs[0].token_ids for index in range(3)]
    assert [completion.token_ids for completion in together] == alone
    assert [completion.index for completion in together] == [0, 1, 2] and len(set(map(tuple, alone))) == 3


def test_best_of_keeps_the_likeliest_of_its_candidates(llm: LLM):
    common = {"temperature": 1.5, "seed": 3, "max_tokens": 6, "ignore_eos": True}
    every = generate(llm, "the", SamplingParams(n=5, logprobs=0, **common))[0].outputs
    best = generate(llm, "the", SamplingParams(n=2, best_of=5, **common))[0].outputs
    ranked = sorted(every, key=lambda completion: -completion.cumulative_logprob)
    assert [completion.token_ids for completion in best] == [completion.token_ids for completion in ranked[:2]]
    assert [(completion.index, completion.logprobs) for completion in best] == [(0, None), (1, None)]


def test_a_failed_request_is_an_error_and_no_short_answer(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm.llm_engine._executor.model, "compute_logits", lambda rows: 1 / 0)
    with pytest.raises(ServerError, match=r"2 of 2 requests failed; request \d+-\w+: .*ZeroDivisionError"):
        generate(llm, ["the", "and"])
    with pytest.raises(ServerError, match="ZeroDivisionError"):
        list(llm.stream("the", GREEDY))


# ------------------------------------------------------------------ streams
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=1.2, seed=11, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=["ra", "x"]),
        SamplingParams(n=3, temperature=1.2, seed=11, max_tokens=9, ignore_eos=True, logprobs=2),
        SamplingParams(n=1, best_of=3, temperature=1.2, seed=11, max_tokens=9, ignore_eos=True),
    ],
    ids=["greedy", "sampled", "stop", "n", "best_of"],
)
def test_a_stream_ends_with_what_generate_gives_and_only_ever_grows(llm: LLM, params: SamplingParams):
    streamed = list(llm.stream("the value", params))
    expected = generate(llm, "the value", params)[0]
    assert streamed[-1].outputs == expected.outputs
    assert [output.finished for output in streamed] == [False] * (len(streamed) - 1) + [True]
    for earlier, later in itertools.pairwise(streamed):
        for before, after in zip(earlier.outputs, later.outputs, strict=True):
            assert after.text.startswith(before.text)
            assert after.token_ids[: len(before.token_ids)] == before.token_ids


def test_a_stream_takes_a_conversation_and_token_ids(llm: LLM):
    rendered = llm.llm_engine.render_chat(QUESTION)
    from_chat = list(llm.stream(QUESTION, GREEDY))[-1]
    from_ids = list(llm.stream(rendered["prompt_token_ids"], GREEDY))[-1]
    assert from_chat.outputs == from_ids.outputs and from_chat.prompt_token_ids == from_ids.prompt_token_ids


def test_leaving_a_stream_early_gives_the_request_up(llm: LLM):
    for output in llm.stream("the value", LONG):
        assert llm.llm_engine.has_unfinished_requests()
        if len(output.outputs[0].token_ids) == 3:
            break
    assert_idle(llm)


def test_a_stream_that_was_never_begun_has_started_nothing(llm: LLM):
    llm.stream("the value", LONG)
    assert_idle(llm)


def test_the_loop_of_a_stream_may_ask_for_something_else(llm: LLM):
    """The steps of the other call bring tokens for the stream, too. They were thrown away, the last output with them:
    the stream ended without an end."""
    expected = generate(llm, ["the value", "and", "with"], GREEDY)
    stream = llm.stream("the value", GREEDY)
    first = next(stream)
    inside = generate(llm, ["and", "with"], GREEDY)  # longer than the stream's own rest
    rest = list(stream)
    assert len(first.outputs[0].token_ids) == 1
    assert [output.finished for output in rest] == [True]
    assert token_ids([rest[-1], *inside]) == token_ids(expected)


def test_streams_may_take_turns(llm: LLM):
    prompts = ["the value", "and", "with"]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 9, 6)]
    streams = [llm.stream(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
    last: dict[int, RequestOutput] = {}
    for turn in itertools.zip_longest(*streams):
        last.update((index, output) for index, output in enumerate(turn) if output is not None)
    assert token_ids([last[0], last[1], last[2]]) == token_ids(generate(llm, prompts, params))
    assert all(output.finished for output in last.values())


def test_a_stream_whose_request_somebody_else_aborts_ends(llm: LLM):
    outputs = []
    for output in llm.stream("the value", LONG):
        outputs.append(output)
        llm.llm_engine.abort_request(output.request_id)
    assert len(outputs) == 1


# ------------------------------------------------------------------ interrupts
def interrupt_at(llm: LLM, monkeypatch: pytest.MonkeyPatch, calls: int, method: str) -> None:
    """KeyboardInterrupt, as Ctrl-C gives it, in the middle of the calls-th step."""
    model = llm.llm_engine._executor.model
    original = getattr(model, method)
    count = itertools.count(1)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(model, method, interrupted)


@pytest.mark.parametrize("method", ["forward", "compute_logits"])
@pytest.mark.parametrize("calls", [1, 2, 5])
def test_ctrl_c_in_the_middle_of_a_step_leaves_nothing_behind(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, calls: int, method: str
):
    """Prompts of several blocks: what the broken step did not write must not be found in the prefix cache later."""
    prompts = [ids(*range(100, 150)), ids(*range(100, 140))]
    expected = token_ids(generate(llm, prompts))
    llm.reset_prefix_cache()
    with monkeypatch.context() as patch:
        interrupt_at(llm, patch, calls, method)
        with pytest.raises(KeyboardInterrupt):
            generate(llm, prompts)
    assert_idle(llm)
    assert token_ids(generate(llm, prompts)) == expected


def test_ctrl_c_while_a_stream_waits_for_a_token_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        interrupt_at(llm, patch, 3, "forward")
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream("the value", LONG))
    assert_idle(llm)


def test_ctrl_c_while_requests_are_being_queued_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """Those that were queued already used to stay, and ran along with the next call."""
    add = llm.llm_engine.add_processed
    count = itertools.count(1)

    def interrupted(request: Any) -> None:
        add(request)
        if next(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(llm.llm_engine, "add_processed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(llm, ["the", "and", "with"])


# ------------------------------------------------------------------ chat
def test_a_chat_is_the_rendered_template_continued(llm: LLM):
    conversation = [{"role": "system", "content": "be brief"}, *QUESTION]
    output = llm.chat(conversation, GREEDY, use_tqdm=False)[0]
    text = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhat is the capital<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert output.prompt == text
    assert output.prompt_token_ids == llm.get_tokenizer().encode(text, add_special_tokens=False)
    assert token_ids([output]) == token_ids(generate(llm, output.prompt_token_ids))


def test_a_list_of_conversations_gives_an_answer_to_each(llm: LLM):
    other = [{"role": "user", "content": "and"}]
    together = llm.chat([QUESTION, other], GREEDY, use_tqdm=False)
    alone = [llm.chat(conversation, GREEDY, use_tqdm=False)[0] for conversation in (QUESTION, other)]
    assert token_ids(together) == token_ids(alone)


def test_template_options_reach_the_template(llm: LLM):
    begun = [*QUESTION, {"role": "assistant", "content": "it is"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert llm.chat(begun, GREEDY, use_tqdm=False, **options)[0].prompt.endswith("<|im_start|>assistant\nit is")
    plain = llm.chat(QUESTION, GREEDY, use_tqdm=False, add_generation_prompt=False)[0]
    assert plain.prompt.endswith("what is the capital<|im_end|>\n")


@pytest.mark.parametrize("messages", [None, [], "the", {"role": "user", "content": "x"}, [[]], ["the"]], ids=str)
def test_what_is_no_conversation_is_refused_by_name(llm: LLM, messages: Any):
    """A dict was a KeyError."""
    with pytest.raises(InvalidRequestError) as caught:
        llm.chat(messages, GREEDY, use_tqdm=False)
    assert caught.value.parameter == "messages"


# ------------------------------------------------------------------ the model's defaults
def with_generation_config(folder: Path, target: Path, **settings: Any) -> Path:
    shutil.copytree(folder, target)
    (target / "generation_config.json").write_text(json.dumps(settings))
    return target


def test_defaults_come_from_the_generation_config(tiny_model: Callable[[str], Path], tmp_path: Path):
    settings = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1, "max_new_tokens": 3, "eos_token_id": [0, 7]}
    folder = with_generation_config(tiny_model("llama"), tmp_path / "m", **settings)
    llm, again = (LLM(folder, dtype="float32", num_gpu_blocks_override=64, seed=4) for _ in range(2))
    defaults = llm.get_default_sampling_params()
    assert (defaults.temperature, defaults.top_k, defaults.repetition_penalty, defaults.max_tokens) == (0.7, 5, 1.1, 3)
    assert (defaults.top_p, defaults.n) == (1.0, 1)
    output = llm.generate("the", use_tqdm=False)[0]
    assert 1 <= len(output.outputs[0].token_ids) <= 3
    assert llm.llm_engine.eos_token_ids == {0, 7}
    # Where a request brings no seed the engine's decides.
    assert again.generate("the", use_tqdm=False)[0].outputs == output.outputs


def test_without_a_generation_config_the_defaults_are_those_of_sampling_params(llm: LLM):
    assert llm.get_default_sampling_params() == SamplingParams()


def test_get_tokenizer_speaks_the_models_vocabulary(llm: LLM):
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("the value")) == "the value"
    assert tokenizer.vocab_size == llm.llm_engine.config.model.vocab_size == 320


# ------------------------------------------------------------------ prefix cache
@pytest.mark.parametrize(("length", "cached"), [(15, 0), (16, 0), (17, 16), (48, 32), (49, 48)])
def test_an_equal_prompt_finds_its_full_blocks_but_computes_its_last_token(llm: LLM, length: int, cached: int):
    llm.reset_prefix_cache()
    prompt = ids(*range(200, 200 + length))
    one = SamplingParams(temperature=0, max_tokens=1)
    outputs = [generate(llm, prompt, one)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, cached]
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_a_reset_forgets_the_prefixes_and_is_refused_while_requests_run(llm: LLM):
    prompt = ids(*range(200, 248))
    generate(llm, prompt)
    stream = llm.stream(prompt, LONG)
    assert next(stream).num_cached_tokens == 32
    assert llm.reset_prefix_cache() is False
    stream.close()
    assert llm.reset_prefix_cache() is True
    assert generate(llm, prompt)[0].num_cached_tokens == 0


# ------------------------------------------------------------------ priority
@pytest.mark.parametrize(
    ("policy", "order"), [("priority", ["with", "that", "the", "and"]), ("fcfs", ["the", "and", "with", "that"])]
)
def test_with_the_priority_policy_lower_numbers_run_first_and_equals_in_order(
    tiny_model: Callable[[str], Path], policy: str, order: list[str]
):
    llm = LLM(
        tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64, max_num_seqs=1, scheduling_policy=policy
    )
    outputs = generate(llm, ["the", "and", "with", "that"], priority=[0, 5, -3, -3])
    by_time = sorted(outputs, key=lambda output: output.metrics["first_token_time"])
    assert [output.prompt for output in by_time] == order
    assert [output.prompt for output in outputs] == ["the", "and", "with", "that"]  # answers keep their order


# ------------------------------------------------------------------ beam search
# Wide enough gaps: no two candidates of these searches are closer than 0.01.
BEAMS = [
    ("llama", 10, 9), ("llama", 20, 5), ("llama", 30, 9), ("qwen2", 20, 5), ("qwen2", 100, 5),
    ("mistral", 60, 5), ("mistral", 60, 9), ("mistral", 100, 5),
]  # fmt: skip
WIDTH, NUM_STEPS = 3, 6


def both_searches(
    folder: Path, prompt: list[int], *, ignore_eos: bool
) -> tuple[list[tuple[list[int], float]], list[tuple[list[int], float]]]:
    """(ours, transformers'): generated tokens and sum of logprobs, best first.

    length_penalty 0 makes a score the plain sum, with which the two definitions of length (ours counts the prompt)
    are the same; "never" lets transformers search to the end, as we do.
    """
    llm = LLM(folder, dtype="float32", num_gpu_blocks_override=200)
    params = BeamSearchParams(WIDTH, max_tokens=NUM_STEPS, ignore_eos=ignore_eos, length_penalty=0.0)
    ours = llm.beam_search(ids(*prompt), params)[0].sequences
    assert_idle(llm)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    eos = sorted(llm.llm_engine.eos_token_ids)
    theirs = network.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=WIDTH,
        num_return_sequences=WIDTH,
        do_sample=False,
        max_new_tokens=NUM_STEPS,
        eos_token_id=None if ignore_eos else eos,
        pad_token_id=0,
        length_penalty=0.0,
        early_stopping="never",
        return_dict_in_generate=True,
        output_scores=True,
    )

    def cut(tokens: list[int]) -> list[int]:
        """Up to the first eos: padding follows."""
        ends = [] if ignore_eos else [index for index, token in enumerate(tokens, 1) if token in eos]
        return tokens[: ends[0]] if ends else tokens

    sequences = [cut(row.tolist()[len(prompt) :]) for row in theirs.sequences]
    return (
        [(sequence.tokens[len(prompt) :], sequence.cum_logprob) for sequence in ours],
        list(zip(sequences, theirs.sequences_scores.tolist(), strict=True)),
    )


@pytest.mark.parametrize(("name", "first", "length"), BEAMS)
def test_beams_without_eos_are_those_of_transformers(
    tiny_model: Callable[[str], Path], name: str, first: int, length: int
):
    prompt = list(range(first, first + length))
    ours, theirs = both_searches(tiny_model(name), prompt, ignore_eos=True)
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    for (_, our_score), (_, their_score) in zip(ours, theirs, strict=True):
        assert abs(our_score - their_score) <= NUM_STEPS * HF_LOGPROB_ATOL


@pytest.mark.parametrize(("name", "first", "length"), BEAMS)
def test_beams_with_eos_are_at_least_as_good_as_those_of_transformers(
    tiny_model: Callable[[str], Path], name: str, first: int, length: int
):
    """The open beams are the same. transformers lets a sequence end only if its eos is among the WIDTH best candidates
    of the step; we (and vLLM) keep every ended sequence and choose at the end, so none of ours can be worse."""
    prompt = list(range(first, first + length))
    ours, theirs = both_searches(tiny_model(name), prompt, ignore_eos=False)
    for (_, our_score), (_, their_score) in zip(ours, theirs, strict=True):
        assert our_score >= their_score - NUM_STEPS * HF_LOGPROB_ATOL
    theirs_best, their_score = theirs[0]
    found = [score for tokens, score in ours if tokens == theirs_best]
    if found:  # the same sequence has the same sum
        assert abs(found[0] - their_score) <= NUM_STEPS * HF_LOGPROB_ATOL
    else:
        assert ours[-1][1] >= their_score


def test_a_beam_that_ends_in_eos_hides_it_unless_asked(llm: LLM, tiny_model: Callable[[str], Path], tmp_path: Path):
    prompt = [20, 40, 41]
    [[eos]] = token_ids(generate(llm, prompt, SamplingParams(temperature=0, max_tokens=1)))  # the likeliest token
    folder = with_generation_config(tiny_model("llama"), tmp_path / "m", eos_token_id=[0, eos])
    ending = LLM(folder, dtype="float32", num_gpu_blocks_override=64)
    hidden, shown = (
        ending.beam_search(ids(*prompt), BeamSearchParams(2, 3, include_stop_str_in_output=on, length_penalty=0.0))[0]
        for on in (False, True)
    )
    best = hidden.sequences[0]
    assert (best.tokens, best.text, best.finish_reason) == ([*prompt, eos], "", "stop")
    assert shown.sequences[0].text == llm.get_tokenizer().decode([eos]) != ""
    assert [sequence.tokens for sequence in shown.sequences] == [sequence.tokens for sequence in hidden.sequences]


def test_every_prompt_gets_its_own_beams_within_the_room_left(llm: LLM):
    long_prompt = ids(*range(10, 134))  # of a context of 128: four tokens are left
    results = llm.beam_search(["the", long_prompt], BeamSearchParams(2, max_tokens=6, ignore_eos=True))
    tokens = llm.get_tokenizer().encode("the")
    assert [len(sequence.tokens) for sequence in results[0].sequences] == [len(tokens) + 6] * 2
    assert [len(sequence.tokens) for sequence in results[1].sequences] == [128] * 2
    assert results[0].sequences[0].tokens[: len(tokens)] == tokens
    assert results[0].sequences[0].text == llm.get_tokenizer().decode(results[0].sequences[0].tokens[len(tokens) :])


@pytest.mark.parametrize("params", [None, SamplingParams(), {"beam_width": 2}, 2], ids=lambda v: type(v).__name__)
def test_beams_want_their_own_parameters(llm: LLM, params: Any):
    """None ended in an AttributeError."""
    with pytest.raises(InvalidRequestError, match="params must be BeamSearchParams") as caught:
        llm.beam_search("the", params)
    assert caught.value.parameter == "params"


def test_the_widest_beam_asks_for_more_logprobs_than_a_caller_may(llm: LLM):
    sequences = llm.beam_search("the", BeamSearchParams(64, max_tokens=2, ignore_eos=True))[0].sequences
    assert len({tuple(sequence.tokens) for sequence in sequences}) == 64


# ------------------------------------------------------------------ vectors
def cosine(left: list[float], right: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("fixture", ["bert", "llm"])
def test_vectors_have_length_one_and_come_in_order(fixture: str, request: pytest.FixtureRequest):
    model: LLM = request.getfixturevalue(fixture)
    texts = ["the value is", "and", "for index in range"]
    vectors = [output.outputs.embedding for output in model.embed(texts, use_tqdm=False)]
    for text, vector in zip(texts, vectors, strict=True):
        assert math.fsum(x * x for x in vector) == pytest.approx(1.0, abs=UNIT_LENGTH_ATOL)
        [alone] = model.embed(text, use_tqdm=False)
        assert alone.outputs.embedding == pytest.approx(vector, abs=UNIT_LENGTH_ATOL)
        assert alone.prompt_token_ids == model.get_tokenizer().encode(text)


@pytest.mark.parametrize("fixture", ["bert", "llm"])
def test_a_score_is_the_cosine_of_two_vectors(fixture: str, request: pytest.FixtureRequest):
    model: LLM = request.getfixturevalue(fixture)
    texts = ["the value is", "and", "for index in range"]
    vectors = [output.outputs.embedding for output in model.embed(texts, use_tqdm=False)]
    one_to_many = [output.outputs.score for output in model.score(texts[0], texts, use_tqdm=False)]
    assert one_to_many == pytest.approx([cosine(vectors[0], v) for v in vectors], abs=UNIT_LENGTH_ATOL)
    assert one_to_many[0] == pytest.approx(1.0, abs=UNIT_LENGTH_ATOL)
    pairs = model.score(texts, texts[::-1], use_tqdm=False)
    expected = [cosine(left, right) for left, right in zip(vectors, vectors[::-1], strict=True)]
    assert [output.outputs.score for output in pairs] == pytest.approx(expected, abs=UNIT_LENGTH_ATOL)
    tokenizer = model.get_tokenizer()
    assert pairs[0].prompt_token_ids == tokenizer.encode(texts[0]) + tokenizer.encode(texts[2])


def test_scores_of_unequal_numbers_are_refused(bert: LLM):
    with pytest.raises(InvalidRequestError, match=r"as many as text_2 \(3\), got 2") as caught:
        bert.score(["a", "b"], ["a", "b", "c"], use_tqdm=False)
    assert caught.value.parameter == "text_1"


def changed(folder: Path, copy: Path, **config: Any) -> Path:
    """The model with other values in its config.json."""
    shutil.copytree(folder, copy)
    (copy / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return copy


def test_shorter_vectors_are_refused_unless_the_model_was_trained_for_them(bert: LLM):
    with pytest.raises(InvalidRequestError, match="bert-mean was not trained for shorter vectors") as caught:
        bert.embed("the", dimensions=8, use_tqdm=False)
    assert caught.value.parameter == "dimensions"


@pytest.mark.parametrize("config", [{"is_matryoshka": True}, {"matryoshka_dimensions": [8, 16]}], ids=["any", "list"])
def test_a_shorter_vector_is_the_beginning_of_the_whole_one_with_length_one(
    tiny_model: Callable[[str], Path], tmp_path: Path, config: dict[str, Any]
):
    model = LLM(changed(tiny_model("bert-mean"), tmp_path / "m", **config), dtype="float32")
    size = model.llm_engine.config.model.embedding_size
    [whole] = model.embed("the value", use_tqdm=False)
    assert len(whole.outputs.embedding) == size
    for dimensions in (8, 16):
        [output] = model.embed("the value", dimensions=dimensions, use_tqdm=False)
        head = torch.tensor(whole.outputs.embedding[:dimensions], dtype=torch.float64)
        expected = torch.nn.functional.normalize(head, dim=0).tolist()
        assert output.outputs.embedding == pytest.approx(expected, abs=UNIT_LENGTH_ATOL)
    bad = [0, -1, size + 1, 8.0, True, "8"] + ([9, size] if "matryoshka_dimensions" in config else [])
    for dimensions in bad:
        with pytest.raises(InvalidRequestError, match="dimensions: for m it must be"):
            model.embed("the value", dimensions=dimensions, use_tqdm=False)


@pytest.mark.parametrize("dimensions", [[8, 0], [8, 10**6], ["8"], [True]], ids=["zero", "long", "text", "true"])
def test_a_model_with_impossible_dimensions_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, dimensions: list[Any]
):
    folder = changed(tiny_model("bert-mean"), tmp_path / "m", matryoshka_dimensions=dimensions)
    with pytest.raises(ConfigError, match="matryoshka_dimensions must be an integer in"):
        LLM(folder)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_a_cross_encoder_is_refused_when_it_is_loaded(
    tiny_model: Callable[[str], Path], tmp_path: Path, architecture: str
):
    name = "llama" if architecture.startswith("Llama") else "bert-mean"
    folder = changed(tiny_model(name), tmp_path / "m", architectures=[architecture])
    with pytest.raises(ConfigError, match="a classifier or a cross-encoder; score compares vectors: use an embedding"):
        LLM(folder)


@pytest.mark.parametrize("fixture", ["bert", "llm"])
def test_a_text_too_long_to_embed_is_cut_only_on_request(fixture: str, request: pytest.FixtureRequest):
    model: LLM = request.getfixturevalue(fixture)
    text, size = "the value is and " * 60, model.llm_engine.config.model.max_model_len
    with pytest.raises(ContextLengthError):
        model.embed(text, use_tqdm=False)
    ids = model.get_tokenizer().encode(text, add_special_tokens=False)
    [cut] = model.embed(text, truncate_prompt_tokens=-1, use_tqdm=False)
    assert len(cut.prompt_token_ids) == size and len(ids) > size
    [same] = model.embed({"prompt_token_ids": cut.prompt_token_ids}, use_tqdm=False)
    assert cut.outputs.embedding == pytest.approx(same.outputs.embedding, abs=UNIT_LENGTH_ATOL)
    [pair] = model.score(text, "and", truncate_prompt_tokens=5, use_tqdm=False)
    assert len(pair.prompt_token_ids) == 5 + len(model.get_tokenizer().encode("and"))


def test_what_sentence_transformers_says_of_a_model_counts(tiny_model: Callable[[str], Path], tmp_path: Path):
    """The longest text is shorter than the positions, and may be made longer; capitals must not get lost."""
    folder = changed(tiny_model("bert-mean"), tmp_path / "m")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    assert LLM(folder).llm_engine.config.model.max_model_len == 40
    assert LLM(folder, max_model_len=100).llm_engine.config.model.max_model_len == 100
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(ConfigError, match="do_lower_case"):
        LLM(folder)


def test_scores_stay_within_one(bert: LLM):
    """Rounding puts the product of a vector with itself above 1 now and then."""
    texts = ["the value is " * n for n in range(1, 12)]
    assert all(-1.0 <= pair.outputs.score <= 1.0 for pair in bert.score(texts, texts, use_tqdm=False))


@pytest.mark.parametrize(
    "ask",
    [
        lambda llm: llm.generate("the", GREEDY, use_tqdm=False),
        lambda llm: next(llm.stream("the", GREEDY)),
        lambda llm: llm.beam_search("the", BeamSearchParams(2)),
    ],
    ids=["generate", "stream", "beam_search"],
)
def test_an_embedding_model_generates_nothing_and_says_what_it_can_do(bert: LLM, ask: Callable[[LLM], Any]):
    with pytest.raises(InvalidRequestError, match="is an embedding model: use embed or score"):
        ask(bert)
