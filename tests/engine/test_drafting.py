"""Speculative decoding in the whole engine: the same answers as without it, for everything a request can ask."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, BeamSearchParams, ConfigError, SamplingParams, StructuredOutputsParams
from minivllm.engine.stats import SpecDecodeStats
from minivllm.outputs import CompletionOutput
from minivllm.speculative.acceptance import PAUSE_TOKENS
from minivllm.speculative.ngram import NgramTable
from tests.structured_output.helpers import closing_bias, long_tiny_llm, thing

LOOP = {"prompt_token_ids": [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]}
PROSE = {"prompt_token_ids": list(range(20, 60))}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "disable_by_batch_size": 64}
ALWAYS = {"min_acceptance_rate": 0.0}
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def plain(folder: Path) -> LLM:
    return long_tiny_llm(folder, batch_invariant=True)


@pytest.fixture(scope="module", params=["ngram", "draft_model"])
def guessing(request: pytest.FixtureRequest, folder: Path, plain: LLM) -> Iterator[LLM]:
    """The same model, guessed for. `plain` has written the folder. As its own draft model it is right most of the time:
    it knows of no mask, no penalty and no chance."""
    config = NGRAM | ALWAYS
    if request.param == "draft_model":
        config = {name: config[name] for name in config if not name.startswith("prompt")}
        config |= {"method": "draft_model", "model": str(folder)}
    llm = long_tiny_llm(folder, batch_invariant=True, speculative_config=config)
    yield llm
    assert stats_of(llm).num_accepted_tokens > 0


def stats_of(llm: LLM) -> SpecDecodeStats:
    assert llm.llm_engine.stats.spec_decode is not None
    return llm.llm_engine.stats.spec_decode


def picture(output: CompletionOutput) -> tuple[Any, ...]:
    """Everything but floats in a form that can be compared: batch-invariant logits are the same bits."""
    logprobs = None
    if output.logprobs is not None:
        logprobs = [
            {token_id: (entry.logprob, entry.rank) for token_id, entry in position.items()}
            for position in output.logprobs
        ]
    return output.token_ids, output.text, output.finish_reason, output.stop_reason, logprobs


def same(plain: LLM, guessing: LLM, prompt: Any, params: SamplingParams) -> list[CompletionOutput]:
    """The answer, which must be the same bits with and without guesses."""
    before = stats_of(guessing).num_drafts
    expected, found = (llm.generate(prompt, params, use_tqdm=False)[0] for llm in (plain, guessing))
    assert [picture(o) for o in found.outputs] == [picture(o) for o in expected.outputs]
    speculative = guessing.llm_engine.config.speculative
    assert speculative is not None
    assert stats_of(guessing).num_drafts > before or speculative.method == "ngram", "nothing was tried"
    return found.outputs


# ------------------------------------------------------------------ the same answers
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1},
        {"temperature": 0.7, "seed": 3, "logprobs": 0},
        {"temperature": 1.0, "seed": 4, "top_k": 5, "top_p": 0.9},
        {"temperature": 0.8, "seed": 5, "min_p": 0.05, "n": 3},
        {"temperature": 0.9, "seed": 9, "allowed_token_ids": list(range(5, 25)), "logprobs": 2},
        {"temperature": 0.0, "logit_bias": {7: 4.0, 8: 3.5}},
        {"temperature": 0.0, "allowed_token_ids": [5, 6, 7, 8], "bad_words": ["e"]},
        {"temperature": 0.0, "prompt_logprobs": 1},
        {"temperature": 0.6, "seed": 2, "n": 1, "best_of": 3},
        {"temperature": 0.0, "max_tokens": 7},
        {"temperature": 0.5, "seed": 8, "min_tokens": 30, "allowed_token_ids": [0, 5, 6, 7, 118], "ignore_eos": False},
    ],
    ids=lambda fields: ", ".join(f"{name} {value}" for name, value in fields.items()),
)
def test_whatever_a_request_asks_it_gets_the_same_bits(plain: LLM, guessing: LLM, fields: dict[str, Any]):
    same(plain, guessing, LOOP, SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **fields}))


def test_a_stop_among_accepted_drafts_ends_where_it_would(plain: LLM, guessing: LLM):
    """The text repeats itself, so the stop is first drawn, and then guessed."""
    [answer] = plain.generate(LOOP, GREEDY, use_tqdm=False)
    token_ids, text = answer.outputs[0].token_ids, answer.outputs[0].text
    for token_id in (token_ids[11], token_ids[17], token_ids[23]):
        [output] = same(plain, guessing, LOOP, SamplingParams(**fields_of(GREEDY), stop_token_ids=[token_id]))
        assert output.stop_reason == token_id
    words = re.findall("[a-zA-Z0-9]{2,}", text)
    for word in words[1:4]:
        [output] = same(plain, guessing, LOOP, SamplingParams(**fields_of(GREEDY), stop=[word]))
        assert output.stop_reason == word


def fields_of(params: SamplingParams) -> dict[str, Any]:
    return {"temperature": params.temperature, "max_tokens": params.max_tokens, "ignore_eos": params.ignore_eos}


def test_sampling_draws_each_token_as_often(plain: LLM, guessing: LLM):
    """64 seeds: every one gives the tokens that it gives without guesses, so no distribution can have changed."""
    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=8, n=64, seed=1000, ignore_eos=True)
    outputs = same(plain, guessing, {"prompt_token_ids": [5, 5, 5, 5]}, params)
    assert len({tuple(output.token_ids) for output in outputs}) > 50


def test_a_batch_that_comes_and_goes_gets_the_same_bits(plain: LLM, guessing: LLM):
    prompts = [{"prompt_token_ids": (LOOP["prompt_token_ids"] * 4)[: 5 + 3 * index]} for index in range(8)]
    params = [
        SamplingParams(temperature=0.5 * (i % 2), seed=i, max_tokens=6 + 5 * i, ignore_eos=True) for i in range(8)
    ]
    expected, found = (llm.generate(prompts, params, use_tqdm=False) for llm in (plain, guessing))
    assert [picture(o.outputs[0]) for o in found] == [picture(o.outputs[0]) for o in expected]
    pool = guessing.llm_engine.scheduler.kv_cache.pool
    assert pool.num_free_blocks == pool.num_blocks - 1


def test_beams_are_the_same(plain: LLM, guessing: LLM):
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    expected, found = (llm.beam_search([LOOP], params)[0].sequences for llm in (plain, guessing))
    assert [beam.tokens for beam in found] == [beam.tokens for beam in expected]


# ------------------------------------------------------------------ grammars
COLOURS = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 4, "maxItems": 8}
GRAMMARS: list[dict[str, Any]] = [
    {"json": thing(a=COLOURS, b={"type": "boolean"})},
    {"regex": r"(ab|cd){3,20}x"},
    {"choice": ["abababab", "abababac"]},
    {"regex": r"[a-d]{30}"},
]


@pytest.mark.parametrize("spec", GRAMMARS, ids=str)
@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 6}, {"temperature": 1.0, "seed": 7, "min_tokens": 35}]
)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_grammar_is_followed_through_the_drafts(
    plain: LLM, guessing: LLM, spec: dict[str, Any], fields: dict[str, Any], ignore_eos: bool
):
    params = SamplingParams(
        max_tokens=80,
        logit_bias=closing_bias(plain.get_tokenizer()),
        structured_outputs=StructuredOutputsParams(**spec),
        ignore_eos=ignore_eos,
        logprobs=0,
        **fields,
    )
    expected, found = (llm.generate(LOOP, params, use_tqdm=False)[0].outputs[0] for llm in (plain, guessing))
    assert found.finish_reason != "error"
    assert picture(found)[:4] == picture(expected)[:4]
    assert len(found.logprobs or ()) == len(found.token_ids)
    assert len(guessing.llm_engine.structured_output) == 0


def test_drafts_that_the_grammar_refuses_are_not_verified(folder: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch):
    """In the prompt every digit is followed by q; the grammar wants digits only."""
    llm = long_tiny_llm(folder, speculative_config=NGRAM | ALWAYS)
    engine, tokenizer = llm.llm_engine, plain.get_tokenizer()
    prompt = [token_id for digit in "0123456789" for token_id in tokenizer.encode(digit + "q")]
    params = SamplingParams(max_tokens=12, structured_outputs=StructuredOutputsParams(regex=r"\d{12}"), temperature=1.0)
    proposed: list[int] = []
    propose = NgramTable.propose
    monkeypatch.setattr(NgramTable, "propose", lambda *args: proposed.extend(propose(*args)) or propose(*args))
    engine.add_request({"prompt_token_ids": prompt}, params)
    verified: list[int] = []
    while engine.has_unfinished_requests():
        engine.step()
        verified += [token_id for drafts in engine.last_step.draft_token_ids.values() for token_id in drafts]
    assert "q" in tokenizer.decode(proposed)
    assert re.fullmatch(r"\d*", tokenizer.decode(verified))


# ------------------------------------------------------------------ when it guesses
def test_a_model_that_drafts_for_itself_is_always_right(folder: Path, plain: LLM):
    config = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    llm = long_tiny_llm(folder, speculative_config=config)
    output = llm.generate(PROSE, GREEDY, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == plain.generate(PROSE, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    stats = stats_of(llm)
    assert stats.num_accepted_tokens == stats.num_draft_tokens
    # One token from the prompt's step, four from each verification, and room for the last draft and one behind it.
    assert stats.num_drafts == 10 and stats.num_accepted_tokens_per_pos == [10, 10, 9]
    assert llm.llm_engine.last_step is not None and llm.llm_engine.last_step.step == 11


def drafts_of_steps(llm: LLM, prompts: list[Any], params: SamplingParams) -> list[int]:
    """How many drafts each step verified, in all."""
    engine, found = llm.llm_engine, []
    for prompt in prompts:
        engine.add_request(prompt, params)
    while engine.has_unfinished_requests():
        engine.step()
        found.append(sum(map(len, engine.last_step.draft_token_ids.values())))
    return found


def test_more_than_four_requests_are_not_guessed_for(folder: Path, plain: LLM):
    config = {name: value for name, value in NGRAM.items() if name != "disable_by_batch_size"} | ALWAYS
    llm = long_tiny_llm(folder, speculative_config=config)
    assert sum(drafts_of_steps(llm, [LOOP] * 4, GREEDY)) > 0
    assert sum(drafts_of_steps(llm, [LOOP] * 5, GREEDY)) == 0


def test_wrong_guesses_pause_and_are_tried_again(folder: Path, plain: LLM, tiny_model: Callable[[str], Path]):
    """Another model of the same vocabulary: wrong all the time. Seven misses, a pause, a probe, a pause, ..."""
    config = {"method": "draft_model", "model": str(tiny_model("llama")), "num_speculative_tokens": 2}
    llm = long_tiny_llm(folder, speculative_config=config, max_model_len=128)
    params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True, logit_bias={7: 100.0, 8: 100.0})
    steps = drafts_of_steps(llm, [LOOP], params)
    probes = [index for index, num_drafts in enumerate(steps) if num_drafts]
    assert len(probes) < 12 and probes[-1] > PAUSE_TOKENS
    assert all(later - earlier in (1, PAUSE_TOKENS + 1) for earlier, later in zip(probes, probes[1:], strict=False))


def test_an_ended_or_aborted_request_leaves_nothing(guessing: LLM):
    engine = guessing.llm_engine
    request_id = engine.add_request(LOOP, GREEDY)
    for _ in range(4):
        engine.step()
    engine.abort_request(request_id)
    guessing.generate(LOOP, GREEDY, use_tqdm=False)
    assert engine._drafting is not None and not engine._drafting._drafted
    engine.scheduler.check_integrity()


# ------------------------------------------------------------------ start-up
@pytest.mark.parametrize(
    ("draft", "options", "message"),
    [
        ("qwen2", {}, "must have the vocabulary of .*, 320 tokens; .* has 307"),
        ("bert-mean", {}, "is an embedding model"),
        ("llama", {"max_model_len": 512}, "is for 128. Set max_model_len to 128 or less"),
    ],
)
def test_a_draft_model_that_does_not_fit_is_refused(
    folder: Path, plain: LLM, tiny_model: Callable[[str], Path], draft: str, options: dict[str, Any], message: str
):
    config = {"method": "draft_model", "model": str(tiny_model(draft)), "num_speculative_tokens": 2}
    with pytest.raises(ConfigError, match=message) as caught:
        LLM(folder, dtype="float32", speculative_config=config, **{"max_model_len": 64, **options})
    assert caught.value.parameter == "speculative_config"


def test_an_embedding_model_has_nothing_to_guess(tiny_model: Callable[[str], Path]):
    with pytest.raises(ConfigError, match="is an embedding model and generates no text"):
        LLM(tiny_model("bert-mean"), speculative_config={"method": "ngram", "num_speculative_tokens": 2})


def test_the_plan_counts_both_models(folder: Path, plain: LLM):
    config = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
    plan = long_tiny_llm(folder, batch_invariant=True, speculative_config=config).llm_engine.plan
    alone = plain.llm_engine.plan
    assert plan.bytes_per_token == 2 * alone.bytes_per_token and plan.weight_bytes >= 2 * alone.weight_bytes
