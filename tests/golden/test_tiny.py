"""Tiny models of every architecture, through the public API, against transformers: tokens, logprobs, text, vectors."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from golden.cases import Case, read_cases
from golden.tiny import DECODERS, EMBEDDERS
from minivllm import LLM, SamplingParams
from minivllm.sample import SamplingMetadata, SamplingRow, final_probabilities
from tests.golden.compare import compare_case, sampling_params
from tests.sample.helpers import chi_square_deviation
from tests.tolerances import CHI_SQUARE_DEVIATIONS, HF_HIDDEN_ATOL, PROBABILITY_ATOL

DRAWS_PER_REQUEST = 64  # children of one request: seeds s, s + 1, ...
REQUESTS_PER_DISTRIBUTION = 8


@pytest.fixture(scope="module")
def load(tiny_model: Callable[[str], Path]) -> Iterator[Callable[[str], LLM]]:
    loaded: dict[str, LLM] = {}

    def get(name: str) -> LLM:
        if name not in loaded:
            loaded[name] = LLM(model=str(tiny_model(name)), dtype="float32", kv_cache_memory_bytes=16 << 20)
        return loaded[name]

    yield get


def ids_of(case: Case) -> dict[str, list[int]]:
    return {"prompt_token_ids": case["prompt"]}


@pytest.mark.parametrize("name", DECODERS)
def test_tokens_and_logprobs_of_every_sampling_path_are_those_of_transformers(
    name: str, load: Callable[[str], LLM]
) -> None:
    cases = read_cases(name, "greedy") + read_cases(name, "text")
    params = [sampling_params(case) for case in cases]
    outputs = load(name).generate([ids_of(case) for case in cases], params, use_tqdm=False)
    for case, output in zip(cases, outputs, strict=True):
        tie = compare_case(case, output)
        if tie is not None:
            print(tie)


@pytest.mark.parametrize("name", DECODERS)
def test_text_and_chat_become_the_ids_of_transformers_and_their_answers_its_text(
    name: str, load: Callable[[str], LLM]
) -> None:
    for case in read_cases(name, "text"):
        params = sampling_params(case)
        if "messages" in case:
            output = load(name).chat(case["messages"], params, use_tqdm=False)[0]
        else:
            output = load(name).generate(case["prompt_text"], params, use_tqdm=False)[0]
        assert compare_case(case, output) is None


@pytest.mark.parametrize("name", DECODERS)
def test_what_can_be_drawn_and_how_likely_is_what_transformers_processors_leave(name: str) -> None:
    for case in read_cases(name, "distribution"):
        logits = torch.tensor([case["logits"]], dtype=torch.float32)  # [1, vocab_size]
        for entry in case["combinations"]:
            params = SamplingParams(**entry["params"])
            row = SamplingRow(params, seed=0, vocab_size=logits.shape[1], prompt_token_ids=case["prompt"])
            ours = final_probabilities(logits, SamplingMetadata.from_requests([row]))[0]
            expected = torch.zeros(logits.shape[1], dtype=torch.float64)
            expected[entry["ids"]] = torch.tensor(entry["probabilities"], dtype=torch.float64)
            assert set(ours.nonzero().flatten().tolist()) == set(entry["ids"]), (case["id"], entry["params"])
            assert (ours - expected).abs().max() <= PROBABILITY_ATOL, (case["id"], entry["params"])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_drawn_tokens_pass_a_chi_square_test_against_transformers_distribution(
    name: str, load: Callable[[str], LLM]
) -> None:
    for case in read_cases(name, "distribution"):
        for index, entry in enumerate(case["combinations"]):
            params = [
                SamplingParams(
                    **entry["params"], max_tokens=1, n=DRAWS_PER_REQUEST, seed=100_000 * index + 1000 * request
                )
                for request in range(REQUESTS_PER_DISTRIBUTION)
            ]
            outputs = load(name).generate([ids_of(case)] * len(params), params, use_tqdm=False)
            drawn = [candidate.token_ids[0] for output in outputs for candidate in output.outputs]
            assert len(drawn) == DRAWS_PER_REQUEST * REQUESTS_PER_DISTRIBUTION
            assert set(drawn) <= set(entry["ids"]), entry["params"]
            counts = [drawn.count(token_id) for token_id in entry["ids"]]
            deviation = chi_square_deviation(counts, entry["probabilities"])
            assert abs(deviation) <= CHI_SQUARE_DEVIATIONS, (case["id"], entry["params"], deviation)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_sentence_vectors_are_those_of_transformers_for_ids_and_for_text(name: str, load: Callable[[str], LLM]) -> None:
    cases = read_cases(name, "embedding")
    llm = load(name)
    outputs = llm.embed([ids_of(case) for case in cases], use_tqdm=False)
    texts = [case for case in cases if "prompt_text" in case]
    outputs += llm.embed([case["prompt_text"] for case in texts], use_tqdm=False)
    for case, output in zip([*cases, *texts], outputs, strict=True):
        assert output.prompt_token_ids == case["prompt"], case["id"]
        difference = (torch.tensor(output.outputs.embedding) - torch.tensor(case["embedding"])).abs().max()
        assert difference <= HF_HIDDEN_ATOL, (case["id"], difference)
