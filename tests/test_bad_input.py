"""Bad input through the public API and the command line: one clear error, and the engine is as it was before.

After every single refusal a canary request must answer exactly as before, nothing may run or wait, and every block
must be free.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minivllm import (
    LLM,
    BeamSearchParams,
    ClientError,
    ConfigError,
    ContextLengthError,
    InvalidRequestError,
    LLMEngine,
    ModelNotFoundError,
    SamplingParams,
    cli,
)
from minivllm.errors import show
from tests.models.checkpoints import hf_weights, write_gguf_model

VOCAB_SIZE, MAX_MODEL_LEN = 320, 128
HUGE = 10**5000  # more digits than Python prints
CANARY = SamplingParams(temperature=0, max_tokens=6, logprobs=2, ignore_eos=True)
ONE = SamplingParams(temperature=0, max_tokens=1)
SURROGATE = "half a pair: \ud83d"


class Watched:
    """An engine whose canary answer is known."""

    def __init__(self, llm: LLM):
        self.llm, self.engine = llm, llm.llm_engine
        self.answer = self.canary()

    def canary(self) -> Any:
        if self.engine.config.model.is_pooling:
            return self.llm.embed("the value is", use_tqdm=False)[0].outputs.embedding
        completion = self.llm.generate("the value is", CANARY, use_tqdm=False)[0].outputs[0]
        return completion.text, completion.token_ids, completion.logprobs, completion.finish_reason

    def assert_unharmed(self) -> None:
        scheduler, pool = self.engine.scheduler, self.engine.scheduler.kv_cache.pool
        assert (len(scheduler.running), len(scheduler.waiting), scheduler.requests) == (0, 0, {})
        assert self.engine.output_processor.num_requests == 0
        assert pool.num_free_blocks == pool.num_blocks - 1  # all but the null block
        scheduler.check_integrity()
        assert self.canary() == self.answer


@pytest.fixture(scope="module")
def watched(tiny_model: Callable[[str], Path]) -> Watched:
    options = {"dtype": "float32", "num_gpu_blocks_override": 64, "seed": 7}
    watched = Watched(LLM(tiny_model("llama"), batch_invariant=True, **options))  # an answer is compared bit for bit
    assert watched.canary() == watched.answer  # also when its prompt comes out of the prefix cache
    return watched


@pytest.fixture(scope="module")
def watched_bert(tiny_model: Callable[[str], Path]) -> Watched:
    return Watched(LLM(tiny_model("bert-mean"), dtype="float32"))


@pytest.fixture
def llm(watched: Watched) -> Iterator[LLM]:
    """For one test of the engine that generates; after it nothing must have changed."""
    yield watched.llm
    watched.assert_unharmed()


@pytest.fixture
def engine(llm: LLM) -> LLMEngine:
    return llm.llm_engine


@pytest.fixture
def bert(watched_bert: Watched) -> Iterator[LLM]:
    yield watched_bert.llm
    watched_bert.assert_unharmed()


def refused(parameter: str | None, call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(*arguments, **options)
    assert caught.value.parameter == parameter
    message = str(caught.value)
    assert 10 < len(message) < 800 and message.isprintable()
    return message


def show_id(value: Any) -> str:
    return show(value, 30)


# ------------------------------------------------------------------ prompts
BAD_PROMPTS = [
    # prompt, the parameter that is named, part of the message
    ("", "prompt", "must not be empty"),
    ({"prompt": ""}, "prompt", "must not be empty"),
    ({"prompt_token_ids": []}, "prompt_token_ids", "must not be empty"),
    ([[]], "prompt", "must not be empty"),
    ({}, "prompt", "must be text or token ids, got neither"),
    (None, "prompt", "must be text or token ids"),
    (5, "prompt", "must be text or a list of token ids, got int"),
    (1.5, "prompt", "got float"),
    (b"bytes", "prompt", "got bytes"),
    ([None], "prompt", "got neither|must be text"),
    ([1, True], "prompt", "got int|got bool"),
    ([1, 2.0], "prompt", "got int|got float"),
    ([[1, True]], "prompt", "must hold integers only, got True"),
    ([[1, 2.0]], "prompt", "must hold integers only, got 2.0"),
    ([[1, math.nan]], "prompt", "must hold integers only, got nan"),
    ([["a"]], "prompt", "must hold integers only, got 'a'"),
    ([-1], "prompt_token_ids", rf"in \[0, {VOCAB_SIZE - 1}\], got -1"),
    ([VOCAB_SIZE], "prompt_token_ids", f"got {VOCAB_SIZE}"),
    ({"prompt_token_ids": [2**63]}, "prompt_token_ids", "got 9223372036854775808"),
    ({"prompt_token_ids": [HUGE]}, "prompt_token_ids", "got an integer of 16610 bits"),
    ({"prompt_token_ids": [-5, 400, 401, 402, 403, 404, 405]}, "prompt_token_ids", "and 2 more"),
    ({"prompt_token_ids": "123"}, "prompt_token_ids", "must be a list of token ids, got str"),
    ({"prompt_token_ids": {1: 2}}, "prompt_token_ids", "got dict"),
    ({"prompt_token_ids": 5}, "prompt_token_ids", "got int"),
    ({"prompt": 5}, "prompt", "got int"),
    ({"prompt": ["a"]}, "prompt", "got list"),
    ({"text": "a"}, "prompt", "got text"),
    ({"prompt": "a", "multi_modal_data": {}}, "prompt", "got multi_modal_data"),
    ({1: 2}, "prompt", "got 1"),
    (SURROGATE, "prompt", "lone surrogate at character 13"),
    ({"prompt": SURROGATE}, "prompt", "lone surrogate"),
    ({"prompt": "a", "cache_salt": SURROGATE}, "cache_salt", "lone surrogate"),
    ({"prompt": "a", "cache_salt": ""}, "cache_salt", "1 to 128 characters, got 0"),
    ({"prompt": "a", "cache_salt": 5}, "cache_salt", "got int"),
    ([5] * MAX_MODEL_LEN, "prompt", "your prompt has 128 tokens: shorten it by 1"),
    ([5] * 5000, "prompt", "your prompt has 5000 tokens: shorten it by 4873"),
    ("x" * 1_000_000, "prompt", "1000000 characters, which cannot fit"),
]
PROMPT_IDS = [show_id(case[0]) for case in BAD_PROMPTS]


@pytest.mark.parametrize(("prompt", "parameter", "message"), BAD_PROMPTS, ids=PROMPT_IDS)
def test_a_bad_prompt_is_refused_alone_among_good_ones_and_by_beam_search(
    llm: LLM, prompt: Any, parameter: str, message: str
):
    assert re.search(message, refused(parameter, llm.generate, prompt, ONE, use_tqdm=False))
    if not isinstance(prompt, list):
        assert re.search(message, refused(parameter, llm.generate, ["the value is", prompt], ONE, use_tqdm=False))
    if parameter != "cache_salt":
        assert re.search(message, refused(parameter, llm.beam_search, prompt, BeamSearchParams(2, max_tokens=2)))


@pytest.mark.parametrize(
    ("prompt", "parameter"),
    [
        ("", "prompt"),
        (None, "prompt"),
        ([[]], "prompt"),
        ([1, True], "prompt"),
        ([VOCAB_SIZE], "prompt_token_ids"),
        ([[1, -1]], "prompt"),
        (SURROGATE, "prompt"),
        ([5] * (MAX_MODEL_LEN + 1), "prompt"),
        ("x" * 1_000_000, "prompt"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
        ({"text": "a"}, "prompt"),
    ],
    ids=show_id,
)
def test_a_bad_prompt_gives_no_vector(llm: LLM, bert: LLM, prompt: Any, parameter: str):
    refused(parameter, llm.embed, prompt, use_tqdm=False)
    refused(parameter, bert.embed, prompt, use_tqdm=False)
    refused(parameter, bert.score, "the", prompt, use_tqdm=False)


def test_an_empty_list_of_prompts_is_refused(llm: LLM):
    refused("prompts", llm.generate, [], ONE, use_tqdm=False)
    refused("prompts", llm.embed, [], use_tqdm=False)
    refused("prompts", llm.score, "the", [], use_tqdm=False)


def test_one_bad_prompt_of_many_starts_none(llm: LLM, engine: LLMEngine):
    steps = engine.last_step
    refused("prompt", llm.generate, ["the", "value", "", "is"], ONE, use_tqdm=False)
    assert engine.last_step is steps


def test_characters_that_are_odd_but_legal_are_no_bad_input(llm: LLM):
    for text in (
        "\0",
        "\x1b[31m",
        "\ufeff",
        "\u202e",
        "\U0010ffff",
        "e\u0301",
        " ",
        "\n" * 50,
        "<|endoftext|>",
        "{}%s",
    ):
        assert len(llm.generate(text, ONE, use_tqdm=False)[0].outputs[0].token_ids) == 1


# ------------------------------------------------------------------ conversations
@pytest.mark.parametrize(
    "messages",
    [
        [],
        [[]],
        None,
        5,
        "hello",
        {},
        [5],
        ["hello"],
        [{}],
        [{"role": "user"}],
        [{"content": "a"}],
        [{"role": 5, "content": "a"}],
        [{"role": "", "content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": SURROGATE}],
        [{"role": "user", "content": "x" * 1_000_000}],
        [{"role": "user", "content": "a"}] * 3000,
        [{"role": "assistant", "tool_calls": 5}],
        [[{"role": "user", "content": "a"}], 5],
    ],
    ids=show_id,
)
def test_a_bad_conversation_is_refused(llm: LLM, messages: Any):
    refused("messages", llm.chat, messages, ONE, use_tqdm=False)


# ------------------------------------------------------------------ sampling parameters
MANY_WORDS = [f"{index} words of many tokens " * 8 for index in range(100)]
BAD_PARAMS: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (-1.0, -1e-9, 2.5, math.nan, math.inf, -math.inf, True, "1", None)],
    *[("top_p", value) for value in (0.0, -0.5, 1.5, math.nan, "0.5")],
    *[("top_k", value) for value in (-2, 1.5, math.nan, HUGE)],
    *[("min_p", value) for value in (-0.1, 1.1, math.nan)],
    *[(f"{kind}_penalty", value) for kind in ("presence", "frequency") for value in (-2.1, 2.1, math.nan)],
    *[("repetition_penalty", value) for value in (0.0, -1.0, 11.0, math.nan, math.inf)],
    *[("max_tokens", value) for value in (0, -1, 1.5, True, "16", HUGE)],
    *[("min_tokens", value) for value in (-1, 17, 1.0)],
    *[("n", value) for value in (0, -1, 65, 10**9, HUGE, 1.0, True)],
    *[("best_of", value) for value in (0, 65, "2")],
    *[("logprobs", value) for value in (-1, 21, True)],
    *[("prompt_logprobs", value) for value in (-1, 21, 1.0)],
    *[("seed", value) for value in (2**63, -(2**63) - 1, 1.0, "1")],
    *[("stop", value) for value in (5, [5], [""], "", ["x"] * 5, ["x" * 257], {"a"}, b"a", SURROGATE)],
    *[("bad_words", value) for value in (5, [None], [""], ["x"] * 129, "x" * 257, SURROGATE, MANY_WORDS)],
    *[("stop_token_ids", value) for value in (5, ["5"], [-1], [VOCAB_SIZE], [1.0], [HUGE], list(range(129)))],
    *[("allowed_token_ids", value) for value in ([], [-1], [VOCAB_SIZE], [5, 10**9], "5", [True])],
    *[("logit_bias", {token_id: 1.0}) for token_id in (-1, VOCAB_SIZE, 10**9, "5", 5.0)],
    *[("logit_bias", {5: bias}) for bias in (math.nan, math.inf, "x")],
    *[("logit_bias", value) for value in ([5], dict.fromkeys(range(1025), 1.0))],
    *[(name, value) for name in ("ignore_eos", "skip_special_tokens", "detokenize") for value in (1, "false", None)],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_PARAMS, ids=[f"{name} {show_id(value)}" for name, value in BAD_PARAMS])
def test_a_bad_parameter_is_refused_by_name(llm: LLM, engine: LLMEngine, name: str, value: Any):
    refused(name, lambda: llm.generate("the", SamplingParams(**{name: value}), use_tqdm=False))
    refused(name, lambda: next(llm.stream("the", SamplingParams(**{name: value}))))
    refused(name, lambda: engine.add_request("the", SamplingParams(**{name: value})))


@pytest.mark.parametrize(
    "junk", [5, "greedy", {"temperature": 0}, SamplingParams, object, BeamSearchParams(2), 1.5, True], ids=show_id
)
def test_parameters_that_are_no_sampling_params_are_refused(llm: LLM, engine: LLMEngine, junk: Any):
    """They were an AttributeError, and one came from deep inside."""
    refused("sampling_params", llm.generate, "the", junk, use_tqdm=False)
    refused("sampling_params", llm.generate, ["the", "value"], [ONE, junk], use_tqdm=False)
    refused("sampling_params", llm.chat, [{"role": "user", "content": "the"}], junk, use_tqdm=False)
    refused("sampling_params", lambda: next(llm.stream("the", junk)))
    refused("sampling_params", engine.add_request, "the", junk)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_parameters_and_priorities_as_prompts(llm: LLM, count: int):
    prompts = ["the", "value"]
    message = refused("sampling_params", llm.generate, prompts, [ONE] * count, use_tqdm=False)
    assert f"one or as many as the prompts (2), got {count}" in message
    refused("priority", llm.generate, prompts, ONE, priority=[0] * count, use_tqdm=False)


def test_more_minimum_than_there_is_room_is_refused(llm: LLM):
    message = refused(
        "min_tokens", llm.generate, [5] * 120, SamplingParams(max_tokens=100, min_tokens=20), use_tqdm=False
    )
    assert "at most 8, the room that is left behind 120 prompt tokens, got 20" in message


# ------------------------------------------------------------------ beam search and scores
@pytest.mark.parametrize(
    ("name", "value"),
    [("beam_width", 0), ("beam_width", 65), ("beam_width", True), ("max_tokens", 0), ("length_penalty", math.nan)],
)
def test_a_bad_beam_search_is_refused(llm: LLM, name: str, value: Any):
    refused(name, lambda: llm.beam_search("the", BeamSearchParams(**({"beam_width": 2} | {name: value}))))


def test_scores_of_unequal_numbers_of_texts_are_refused(llm: LLM):
    refused("text_1", llm.score, ["the", "value"], ["the", "value", "is"], use_tqdm=False)


# ------------------------------------------------------------------ requests of the engine
@pytest.mark.parametrize("priority", [1.5, "1", True, math.nan, 2**63, -(2**63) - 1, [], HUGE], ids=show_id)
def test_a_priority_is_a_64_bit_integer(engine: LLMEngine, priority: Any):
    refused("priority", engine.add_request, "the", ONE, priority=priority)


@pytest.mark.parametrize("salt", [5, "", True, b"salt", [], "x" * 129, SURROGATE], ids=show_id)
def test_a_cache_salt_is_a_short_text(engine: LLMEngine, salt: Any):
    refused("cache_salt", engine.add_request, "the", ONE, cache_salt=salt)


def test_a_request_id_in_use_is_refused_and_the_first_request_goes_on(engine: LLMEngine):
    """The second one was a ValueError without a parameter."""
    engine.add_request("the", CANARY, request_id="same")
    for _ in range(2):
        assert "'same' is in use" in refused("request_id", engine.add_request, "value", CANARY, request_id="same")
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"same"} and outputs[-1].prompt == "the"
    assert len(outputs[-1].outputs[0].token_ids) == 6
    assert engine.add_request("the", ONE, request_id="same") == "same"  # it is free again
    engine.abort_request("same")


@pytest.mark.parametrize("value", [5, True, b"x", "", [], {}, "x" * 257, SURROGATE], ids=show_id)
def test_a_request_id_is_a_short_text(engine: LLMEngine, value: Any):
    """Anything was taken, and "" for none: a list ended in a TypeError when it was queued."""
    refused("request_id", engine.add_request, "the", ONE, request_id=value)
    refused("request_id", engine.process_input, "the", request_id=value, embed=True)


def test_numbers_as_request_ids_do_not_meet_those_that_the_engine_gives(engine: LLMEngine):
    """They did: a caller who named nothing was told that "2" is in use."""
    given = [engine.add_request("the", SamplingParams(n=2, max_tokens=1)) for _ in range(20)]
    candidates = {f"{index}_{request_id}" for request_id in given for index in range(2)}
    numbers = {str(number) for number in range(10**5)}
    assert len(set(given)) == 20 and not numbers & {*given, *candidates}
    assert not {f"{index}_{number}" for index in range(2) for number in numbers} & candidates
    for request_id in given:
        engine.abort_request(request_id)


def test_a_request_id_that_a_candidate_of_another_request_has_is_refused(engine: LLMEngine):
    """Candidates of "x" are called "0_x", "1_x": a request of that name would be mixed up with one."""
    engine.add_request("the", SamplingParams(n=2, max_tokens=4), request_id="x")
    refused("request_id", engine.add_request, "value", ONE, request_id="1_x")
    engine.abort_request("x")
    engine.add_request("value", ONE, request_id="1_x")
    refused("request_id", engine.add_request, "the", SamplingParams(n=2, max_tokens=4), request_id="x")
    engine.abort_request("1_x")


def test_giving_up_a_request_that_is_not_there_does_nothing(engine: LLMEngine):
    assert engine.abort_request("nobody") == []


def test_a_refusal_between_running_requests_disturbs_none(engine: LLMEngine, watched: Watched):
    """Every kind of refusal while others run: their answers are those of a quiet engine."""
    first = engine.add_request("the value is", CANARY)
    second = engine.add_request("the value is", CANARY)
    outputs = {}
    bad = iter(BAD_PROMPTS)
    while engine.has_unfinished_requests():
        for prompt, _, _ in (next(bad), next(bad), next(bad)):
            if not (isinstance(prompt, list) and type(prompt[0]) is not int):  # a list of prompts is LLM's
                with pytest.raises(ClientError):
                    engine.add_request(prompt, ONE)
        outputs.update((output.request_id, output.outputs[0]) for output in engine.step())
    for request_id in (first, second):
        completion = outputs[request_id]
        assert (completion.text, completion.token_ids, completion.logprobs, completion.finish_reason) == watched.answer


# ------------------------------------------------------------------ what can never fit
@pytest.fixture(scope="module")
def small_pool(tiny_model: Callable[[str], Path]) -> Watched:
    """Three blocks of 16 tokens for a context of 128."""
    return Watched(LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=4))


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "parameter", "arithmetic"),
    [
        (
            40,
            9,
            "max_tokens",
            "40 prompt tokens + 9 max_tokens = 49 tokens need 4 blocks of 16, and the pool has 3 (48 tokens)",
        ),
        (48, 1, "prompt", "48 prompt tokens + 1 max_tokens = 49 tokens need 4 blocks of 16"),
        (100, 28, "prompt", "100 prompt tokens + 28 max_tokens = 128 tokens need 8 blocks of 16"),
        (1, 127, "max_tokens", "1 prompt tokens + 127 max_tokens = 128 tokens need 8 blocks of 16"),
        (
            1,
            10**6,
            "max_tokens",
            "1 prompt tokens + 127 max_tokens = 128 tokens need 8 blocks of 16",
        ),  # the context's room
    ],
)
def test_what_can_never_fit_the_pool_is_refused_with_the_arithmetic(
    small_pool: Watched, num_prompt: int, max_tokens: int, parameter: str, arithmetic: str
):
    prompt, params = [5] * num_prompt, SamplingParams(max_tokens=max_tokens, n=3)
    with pytest.raises(ContextLengthError) as caught:
        small_pool.llm.generate(prompt, params, use_tqdm=False)
    assert arithmetic in str(caught.value) and caught.value.parameter == parameter
    assert caught.value.code == "context_length_exceeded"
    assert f"at most {max(48 - num_prompt, 0)} output tokens" in str(caught.value)
    small_pool.assert_unharmed()


def test_what_just_fits_the_pool_runs(small_pool: Watched):
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    outputs = small_pool.llm.generate([[5] * 40, [6] * 40], params, use_tqdm=False)  # one after the other
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 8]
    small_pool.assert_unharmed()


# ------------------------------------------------------------------ the wrong kind of model
def test_an_embedding_model_generates_nothing(bert: LLM):
    for call in (
        lambda: bert.generate("the", ONE, use_tqdm=False),
        lambda: bert.chat([{"role": "user", "content": "the"}], ONE, use_tqdm=False),
        lambda: next(bert.stream("the", ONE)),
        lambda: bert.beam_search("the", BeamSearchParams(2)),
        lambda: bert.llm_engine.add_request("the", ONE),
    ):
        with pytest.raises(InvalidRequestError, match="embedding model|no chat template"):
            call()


def test_a_generating_model_embeds_and_then_generates_as_before(llm: LLM):
    vector = llm.embed("the value is", use_tqdm=False)[0].outputs.embedding
    assert len(vector) == 48 and all(map(math.isfinite, vector))


# ------------------------------------------------------------------ models
@pytest.fixture(scope="module")
def bad_models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Path:
    """A folder of models that are none."""
    folder = tmp_path_factory.mktemp("bad")
    whole = write_gguf_model(folder / "whole.gguf", "llama", hf_weights("llama")).read_bytes()
    for name, size in (("header", 100), ("table", 1500), ("data", len(whole) - 1000)):
        (folder / f"cut-in-{name}.gguf").write_bytes(whole[:size])
    (folder / "empty.gguf").touch()
    (folder / "text.gguf").write_text("this is no model")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    (folder / "notes.txt").write_text("notes")
    (folder / "empty").mkdir()
    good = tiny_model("llama")
    for name in ("no-weights", "cut-weights", "no-config", "bad-config", "bad-tokenizer"):
        (folder / name).mkdir()
        for file in good.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "no-weights" / "model.safetensors").unlink()
    os.truncate(folder / "cut-weights" / "model.safetensors", 50_000)
    (folder / "no-config" / "config.json").unlink()
    (folder / "bad-config" / "config.json").write_text('{"model_type": "llama", ')
    (folder / "bad-tokenizer" / "tokenizer.json").write_text("[]")
    return folder


BAD_MODELS = [
    ("cut-in-header.gguf", "cut-in-header.gguf is not a usable GGUF file"),
    ("cut-in-table.gguf", "cut-in-table.gguf is not a usable GGUF file"),
    ("cut-in-data.gguf", "cut-in-data.gguf is not a usable GGUF file"),
    ("empty.gguf", "empty.gguf is not a usable GGUF file"),
    ("text.gguf", "text.gguf is not a usable GGUF file"),
    ("pytorch_model.bin", "can run code when opened"),
    ("notes.txt", "notes.txt is not a model"),
    ("empty", "it has no config.json"),
    ("no-weights", "it has no *.safetensors file"),
    ("cut-weights", "the header of model.safetensors is broken"),
    ("no-config", "it has no config.json"),
    ("bad-config", "config.json is not valid JSON"),
    ("bad-tokenizer", "cannot be read"),
    ("no-such-model", "was not found"),
    ("../bad/no/such/model", "there is no such folder or file"),
]


@pytest.mark.parametrize(("name", "message"), BAD_MODELS, ids=[name for name, _ in BAD_MODELS])
def test_a_bad_model_is_refused_at_start_up(bad_models: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str):
    monkeypatch.chdir(bad_models)
    for start in (LLM, LLMEngine.from_model):
        with pytest.raises((ConfigError, ModelNotFoundError)) as caught:
            start(name)
        assert message in str(caught.value) and len(str(caught.value)) < 800


def test_a_bad_tokenizer_is_refused_at_start_up(tiny_model: Callable[[str], Path], bad_models: Path):
    with pytest.raises((ConfigError, ModelNotFoundError), match="cannot be read"):
        LLM(tiny_model("llama"), tokenizer=bad_models / "bad-tokenizer")
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        LLM(tiny_model("llama"), tokenizer="owner/no-such-model")


BAD_SETTINGS: list[tuple[str, Any]] = [
    *[("dtype", value) for value in ("float16", "int4", "", None, 5)],
    *[("max_model_len", value) for value in (0, -1, 129, 10**9, 1.5, "64", True, HUGE)],
    *[("block_size", value) for value in (0, -16, 1025, 16.0, None)],
    *[("max_num_seqs", value) for value in (0, 65537, 1.5)],
    *[("max_num_batched_tokens", value) for value in (0, -1, "1024")],
    *[("gpu_memory_utilization", value) for value in (0, -0.1, 1.01, math.nan, math.inf, True, "0.5", 1e-12)],
    *[("kv_cache_memory_bytes", value) for value in (0, -1, 1, 1.5, "1GB", HUGE)],
    *[("num_gpu_blocks_override", value) for value in (0, 1, -1, 1.5, HUGE)],
    *[("scheduling_policy", value) for value in ("lifo", "", None, [])],
    *[("long_prefill_token_threshold", value) for value in (-1, 1.5)],
    *[("seed", value) for value in (2**63, 1.5, "7", None)],
    *[("speculative_config", value) for value in ({"method": "ngram"}, {}, [], "ngram", 5, {"method": HUGE})],
    ("speculative_config", {"method": "draft_model", "num_speculative_tokens": 2}),
    ("speculative_config", {"method": "ngram", "num_speculative_tokens": HUGE}),
    ("speculative_config", {"method": "ngram", "num_speculative_tokens": 2, HUGE: 1}),
]


@pytest.mark.parametrize(
    ("name", "value"), BAD_SETTINGS, ids=[f"{name} {show_id(value)}" for name, value in BAD_SETTINGS]
)
def test_a_bad_setting_is_refused_by_name(tiny_model: Callable[[str], Path], name: str, value: Any):
    with pytest.raises(ConfigError) as caught:
        LLM(tiny_model("llama"), **{name: value})
    assert caught.value.parameter == name and name in str(caught.value) and len(str(caught.value)) < 800


# ------------------------------------------------------------------ the command line
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `minivllm WORDS`, blanks and frames taken out of the last."""
    monkeypatch.setattr("sys.argv", ["minivllm", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code, captured.out, " ".join(captured.err.replace("│", " ").split())


BAD_COMMANDS = [
    # words (MODEL: a good one, SMALL: with a small cache, BAD/x: one of bad_models), part of the message
    ("generate the -m SMALL -t -1", "temperature must be a number in [0, 2], got -1.0"),
    ("generate the -m SMALL -t nan", "temperature must be a number in [0, 2], got nan"),
    ("generate the -m SMALL --top-p 0", "top_p must be a number in (0, 1]"),
    ("generate the -m SMALL --top-k -5", "top_k must be 0 or -1 (off), or at least 1"),
    ("generate the -m SMALL --max-tokens 0", "max_tokens must be at least 1, got 0"),
    ("generate the -m SMALL --max-tokens -3 --json", "max_tokens must be at least 1, got -3"),
    ("generate the -m SMALL --seed 99999999999999999999", "seed must be an integer in ["),
    ("generate the -m SMALL --stop a --stop b --stop c --stop d --stop e", "stop must be"),
    ("generate EMPTY -m SMALL", "prompt must not be empty"),
    ("generate SURROGATE -m SMALL", "must be valid Unicode, got a lone surrogate"),
    ("generate LONG -m SMALL", "which cannot fit this model's context"),
    ("generate the -m SMALL --max-model-len 0", "max_model_len must be an integer in"),
    (
        "generate the -m SMALL --max-model-len 4096",
        "max_model_len must be at most 128, the context this model was made for",
    ),
    ("generate the -m SMALL --dtype float16", "dtype must be auto, float32 or bfloat16"),
    ("generate the -m SMALL --gpu-memory-utilization 2", "gpu_memory_utilization must be a share in (0, 1]"),
    ("generate the -m MODEL --kv-cache-memory-bytes 10", "no room for the key/value cache"),
    ("generate the -m BERT", "embedding model"),
    ("chat the -m BERT", "embedding model"),
    ("generate the -m BAD/cut-in-data.gguf", "is not a usable GGUF file"),
    ("generate the -m BAD/pytorch_model.bin", "can run code when opened"),
    ("generate the -m BAD/empty", "it has no config.json"),
    ("embed the -m BAD/cut-weights", "the header of model.safetensors is broken"),
    ("embed the EMPTY -m BERT", "prompt must not be empty"),
    ("plan BAD/no-weights", "it has no *.safetensors file"),
    ("plan BAD/cut-in-table.gguf --json", "is not a usable GGUF file"),
    ("plan MODEL --block-size 0", "block_size must be an integer in [1, 1024], got 0"),
    ("plan MODEL --max-num-seqs 0", "max_num_seqs must be an integer in [1, 65536], got 0"),
    ("pull owner/no-such-model", "'owner/no-such-model' was not found"),
    ("pull BAD/notes.txt", "notes.txt is not a model"),
    ("run-batch BAD/no-such-file -m MODEL", "cannot read"),
    ("run-batch BAD/notes.txt -m BAD/empty", "it has no config.json"),
]


@pytest.mark.parametrize(("command", "message"), BAD_COMMANDS, ids=[command for command, _ in BAD_COMMANDS])
def test_a_bad_command_is_one_clear_error_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Callable[[str], Path],
    bad_models: Path,
    command: str,
    message: str,
):
    monkeypatch.setenv("COLUMNS", "300")
    special = {"EMPTY": "", "SURROGATE": SURROGATE, "LONG": "x" * 100_000}
    special |= {"MODEL": str(tiny_model("llama")), "BERT": str(tiny_model("bert-cls"))}
    command = command.replace("SMALL", "MODEL --kv-cache-memory-bytes 400000").replace("BAD/", f"{bad_models}/")
    words = [special.get(word, word) for word in command.split()]
    code, out, err = run_cli(monkeypatch, capsys, *words)
    assert (code, out) == (1, "")
    assert message in err and "Traceback" not in err and len(err) < 1500


@pytest.mark.parametrize(
    "command",
    [
        "generate",
        "generate the --no-such-option",
        "generate the --max-tokens many",
        "generate the -t hot",
        "generate the --max-model-len 1.5",
        "generate the surplus",
        "embed",
        "plan --block-size big",
        "no-such-command",
        "--no-such-option",
    ],
)
def test_wrong_usage_is_exit_code_2_before_any_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
):
    def load(*arguments: Any, **settings: Any) -> Any:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(LLMEngine, "from_model", load)
    code, out, err = run_cli(monkeypatch, capsys, *command.split())
    assert (code, out) == (2, "")
    assert "Usage: minivllm" in err and "Traceback" not in err


def test_a_batch_file_of_nothing_but_junk_answers_every_line_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
):
    bodies = [
        {"prompt": ""},
        {"prompt": [5, -1]},
        {"prompt": "the", "temperature": -1},
        {"prompt": "the", "n": 10**9},
        {},
        5,
    ]
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": b})
        for i, b in enumerate(bodies)
    ]
    lines += ["", "{", "[]", "\ud83d".encode("utf-8", "surrogatepass").decode("latin-1"), '{"custom_id": "\\ud83d"}']
    (tmp_path / "junk.jsonl").write_text("\n".join(lines))
    words = (
        "run-batch",
        str(tmp_path / "junk.jsonl"),
        "-m",
        str(tiny_model("llama")),
        "--num-gpu-blocks-override",
        "64",
    )
    code, out, err = run_cli(monkeypatch, capsys, *words)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(answers) == 10 and "10 failed" in err  # the empty line is none
    assert all(answer["error"]["message"] for answer in answers)
