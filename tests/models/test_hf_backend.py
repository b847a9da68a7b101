"""transformers' own networks on our paged cache: served exactly, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers.models.phi import modeling_phi

from minivllm.errors import ConfigError
from minivllm.models.hf_backend import TransformersForCausalLM
from minivllm.models.layers import KVCacheSpec, Linear, ModelOptions
from minivllm.models.linear import weight_bytes
from tests.models.paged import PagedRun
from tests.models.tiny import FP32, SHAPE, ours_from, prompt, tiny_config, tiny_hf, weights_of
from tests.tolerances import HF_LOGPROB_ATOL

MOE = {"intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"n_positions": 64, "tie_word_embeddings": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2),
    "opt": ("OPTConfig", {"ffn_dim": 56, "word_embed_proj_dim": 32, "tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "phi3_window": ("Phi3Config", {"sliding_window": 5}),
    "mixtral": ("MixtralConfig", MOE),
    "olmoe": ("OlmoeConfig", MOE),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 2.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
}
# What cannot be served -> a part of the reason
SMALL_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
CHUNKED = {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 32}
YARN = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "encoder_decoder": ("T5Config", {"d_model": 48, "d_kv": 8, "num_layers": 2, "num_heads": 6}, "encoder-decoder"),
    "encoder": ("BertConfig", {}, "is_causal=False"),
    "state_space": ("RwkvConfig", {}, "0 of its 3 layers attend"),
    "linear_attention": ("MambaConfig", {}, "layers of type linear_attention"),
    "hybrid": ("FalconH1Config", SMALL_MAMBA, "layers of type hybrid"),
    "own_attention": ("BloomConfig", {"n_layer": 3, "n_head": 6}, "0 of its 3 layers attend"),
    "alibi": ("FalconConfig", {"alibi": True}, "dry run"),
    "sinks": ("GptOssConfig", {**MOE, "head_dim": 8}, "its attention uses s_aux"),
    "chunked": ("Llama4TextConfig", CHUNKED, "chunked_attention"),
    "moving_rope": ("PhiConfig", {"rope_parameters": YARN}, "longest request"),
    "kwargs_dropped": ("StableLmConfig", {}, "does not hand the step's arguments on"),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    config_class, changes = CASES[request.param]
    network = tiny_hf(tiny_config(config_class, **changes))
    return network, ours_from(network)


def test_chunks_beside_other_requests_give_the_logits_of_transformers(pair: tuple[Any, Any]) -> None:
    network, model = pair
    assert isinstance(model, TransformersForCausalLM)
    token_ids, other = prompt(21), prompt(6, seed=1)
    run, rows = PagedRun(model), []
    for number, (start, stop) in enumerate([(0, 6), (6, 7), (7, 8), (8, 17), (17, 21)]):
        neighbour = {"other": other[number : number + 1]}
        rows.append(run.logits({**neighbour, "mine": token_ids[start:stop]})["mine"])
    expected = log_softmax(network(torch.tensor([token_ids])).logits[0], -1)
    difference = (log_softmax(torch.cat(rows), -1) - expected).abs().max()
    assert difference <= HF_LOGPROB_ATOL, f"log-probabilities differ by {float(difference):.2e}"


def test_every_layer_says_what_it_caches() -> None:
    network = tiny_hf(tiny_config("Gemma2Config", head_dim=16, sliding_window=5))
    model = TransformersForCausalLM(network.config, FP32)
    assert model.kv_cache_specs == [KVCacheSpec(2, 16, 5), KVCacheSpec(2, 16, None), KVCacheSpec(2, 16, 5)]


def test_the_linear_layers_are_ours_and_a_tied_head_shares_the_embedding() -> None:
    network = tiny_hf(tiny_config("GPT2Config", **GPT2))
    model = ours_from(network)
    linears = [module for module in model.network.modules() if isinstance(module, Linear)]
    assert len(linears) == 3 * 4 + 1  # qkv, output and two of the MLP in each layer, and the head
    assert weight_bytes(model) <= 1.35 * weight_bytes(network)  # tiny widths are padded to tiles; the table is not
    head = model.network.get_output_embeddings()
    assert head.weight.data_ptr() == model.network.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(name: str) -> None:
    config_class, changes, reason = REFUSED[name]
    with pytest.raises(ConfigError, match="cannot be served: .*" + reason):
        TransformersForCausalLM(tiny_config(config_class, **changes), FP32)


def test_a_state_beside_the_cache_is_found_by_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_phi.PhiMLP.forward  # now sees the tokens before it, and would start anew in every chunk
    monkeypatch.setattr(modeling_phi.PhiMLP, "forward", lambda mlp, rows: original(mlp, rows.cumsum(1)))
    network = tiny_hf(tiny_config("PhiConfig"))
    model = TransformersForCausalLM(network.config, FP32)  # every layer calls our attention
    with pytest.raises(ConfigError, match="keeps a state or a mask that the cache does not hold"):
        model.load_weights(weights_of(network).items())


def test_an_architecture_that_is_no_language_model_is_refused() -> None:
    config = tiny_config("LlamaConfig", architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification cannot be served"):
        TransformersForCausalLM(config, FP32)


def test_experts_refuse_batch_invariance() -> None:
    with pytest.raises(ConfigError, match="batch_invariant"):
        TransformersForCausalLM(tiny_config("MixtralConfig", **MOE), ModelOptions(torch.float32, batch_invariant=True))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_wrong_weights_are_named(fault: str) -> None:
    network = tiny_hf(tiny_config("PhiConfig"))
    weights = weights_of(network)
    name = "model.layers.1.mlp.fc1.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        name = "model.layers.1.mlp.fc9.weight"
        weights[name] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(SHAPE["hidden_size"], 3)
    with pytest.raises(ConfigError, match=f"{fault} {name}"):
        TransformersForCausalLM(network.config, FP32).load_weights(weights.items())
