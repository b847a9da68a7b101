"""Every decoder family against transformers: same weights, float32, eager attention."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers.models.gemma3 import modeling_gemma3

from tests.models.paged import PagedRun
from tests.models.tiny import ours_from, prompt, tiny_config, tiny_hf
from tests.tolerances import HF_LOGPROB_ATOL, HF_TIE_GAP

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_FULL = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 4.0, "beta_slow": 2.0, "truncate": False}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
GEMMA = {"head_dim": 16, "layer_types": GEMMA_LAYERS, "sliding_window": 6, "rope_parameters": GEMMA_ROPES}

# name -> (configuration class, what differs from tiny.SHAPE). Prompts are up to 23 tokens: windows are shorter.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_gqa_1": ("LlamaConfig", {"num_key_value_heads": 6}),
    "llama_gqa_3": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("LlamaConfig", {"head_dim": 24}),
    "llama_rope_linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "llama_rope_llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama_rope_yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "llama_rope_yarn_full": ("LlamaConfig", {"rope_parameters": YARN_FULL}),
    "llama_rope_yarn_factor": ("LlamaConfig", {"rope_parameters": {**YARN, "attention_factor": 1.7}}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral_window": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_tied_biases": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "tie_word_embeddings": True, "query_pre_attn_scalar": 24}),
    "gemma3_capped_logits": ("Gemma3TextConfig", {**GEMMA, "final_logit_softcapping": 4.0}),
}
PROMPTS = {"long": prompt(23), "one": prompt(1), "block": prompt(8), "odd": prompt(13)}


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """transformers' network and ours."""
    config_class, changes = CASES[request.param]
    network = tiny_hf(tiny_config(config_class, **changes))
    return network, ours_from(network)


def hf_logprobs(network: Any, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), vocab_size]"""
    return log_softmax(network(torch.tensor([token_ids])).logits[0].float(), -1)


def assert_close_to_hf(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """logits against log-probabilities, both [num_rows, vocab_size]."""
    difference = (log_softmax(logits, -1) - expected).abs().max()
    assert difference <= HF_LOGPROB_ATOL, f"log-probabilities differ from transformers' by {float(difference):.2e}"


def test_a_ragged_prefill_gives_the_logits_of_transformers(pair: tuple[Any, Any]) -> None:
    network, model = pair
    logits = PagedRun(model).logits(PROMPTS)
    for name, token_ids in PROMPTS.items():
        assert_close_to_hf(logits[name], hf_logprobs(network, token_ids))


def test_number_one_cached_chunked_decoding_equals_one_full_forward(pair: tuple[Any, Any]) -> None:
    network, model = pair
    token_ids, other = prompt(30, seed=1), prompt(9, seed=2)
    run, rows = PagedRun(model), []
    sizes = [7, 1, 4, 5, 1, 1, 3, 8]  # chunks and single tokens, cutting blocks of 4 everywhere
    for number, size in enumerate(sizes):
        start = sum(sizes[:number])
        neighbour = {"other": other[number : number + 1]}  # decodes beside it all the time
        rows.append(run.logits({**neighbour, "mine": token_ids[start : start + size]})["mine"])
    chunked = torch.cat(rows)
    assert_close_to_hf(chunked, hf_logprobs(network, token_ids))
    whole = PagedRun(model).logits({"mine": token_ids})["mine"]
    assert_close_to_hf(chunked, log_softmax(whole, -1))


def test_greedy_decoding_gives_the_tokens_of_transformers(pair: tuple[Any, Any]) -> None:
    network, model = pair
    run, num_new = PagedRun(model), 12
    texts = {name: list(PROMPTS[name]) for name in ("one", "odd", "block")}
    new = {name: list(token_ids) for name, token_ids in texts.items()}
    for _ in range(num_new):
        for name, logits in run.logits(new).items():
            new[name] = [int(logits[-1].argmax())]
            texts[name] += new[name]
    for name, token_ids in texts.items():
        start = len(PROMPTS[name])
        expected = hf_logprobs(network, token_ids)
        for position in range(start, start + num_new):
            best, second = expected[position - 1].topk(2).values
            if best - second < HF_TIE_GAP:
                break  # a tie: either is right, and what follows may differ
            assert token_ids[position] == int(expected[position - 1].argmax()), f"{name} at position {position}"


def test_gemma3_caps_scores_where_the_configuration_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_hf(tiny_config("Gemma3TextConfig", **GEMMA, attn_logit_softcapping=1.5))
    uncapped = hf_logprobs(network, PROMPTS["long"])
    # transformers' Gemma-3 does not pass the configured cap on to its attention function, which knows it
    capped = functools.partial(modeling_gemma3.eager_attention_forward, softcap=1.5)
    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", capped)
    expected = hf_logprobs(network, PROMPTS["long"])
    assert (expected - uncapped).abs().max() > 100 * HF_LOGPROB_ATOL  # the cap bites
    assert_close_to_hf(PagedRun(ours_from(network)).logits({"r": PROMPTS["long"]})["r"], expected)


def test_layers_ask_for_the_cache_that_the_configuration_describes() -> None:
    config = tiny_config("Gemma3TextConfig", **GEMMA)
    model = ours_from(tiny_hf(config))
    assert [spec.sliding_window for spec in model.kv_cache_specs] == [6, None, 6]
    assert {(spec.num_kv_heads, spec.head_size) for spec in model.kv_cache_specs} == {(2, 16)}
    assert (model.vocab_size, model.hidden_size) == (97, 48)
