"""Weights come in by name: what is missing, unexpected, doubled or misshapen is named and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minivllm.errors import ConfigError
from minivllm.models.linear import weight_bytes
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.registry import MODELS, model_class
from tests.models.paged import PagedRun
from tests.models.tiny import FP32, ours_from, prompt, tiny_config, tiny_hf, weights_of
from tests.tolerances import HF_HIDDEN_ATOL

SHARD = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def llama() -> tuple[Any, dict[str, torch.Tensor]]:
    network = tiny_hf(tiny_config("LlamaConfig"))
    return network.config, weights_of(network)


def load(config: Any, weights: Any) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config, FP32)
    model.load_weights(weights)
    return model


def test_a_missing_tensor_is_named(llama: Any) -> None:
    config, weights = llama
    with pytest.raises(ConfigError, match=rf"missing tensor '{SHARD}' of shape \[16, 48\]\."):
        load(config, [(name, tensor) for name, tensor in weights.items() if name != SHARD])


def test_many_missing_tensors_are_counted(llama: Any) -> None:
    config, weights = llama
    with pytest.raises(ConfigError, match=r"missing tensor 'model\.embed_tokens\.weight' of shape .* and 29 others"):
        load(config, [])


def test_an_unexpected_tensor_is_named(llama: Any) -> None:
    config, weights = llama
    extra = {**weights, "model.layers.9.mlp.up_proj.weight": torch.zeros(3)}
    with pytest.raises(ConfigError, match=r"unexpected tensor 'model\.layers\.9\.mlp\.up_proj\.weight' of shape \[3\]"):
        load(config, extra.items())


def test_a_wrong_shape_is_named_with_both_shapes(llama: Any) -> None:
    config, weights = llama
    wrong = {**weights, SHARD: torch.zeros(48, 48)}
    with pytest.raises(ConfigError, match=rf"'{SHARD}' must have shape \[16, 48\], got \[48, 48\]"):
        load(config, wrong.items())


def test_a_tensor_that_comes_twice_is_named(llama: Any) -> None:
    config, weights = llama
    with pytest.raises(ConfigError, match=f"'{SHARD}' comes twice"):
        load(config, [*weights.items(), (SHARD, weights[SHARD])])


def test_integers_are_refused(llama: Any) -> None:
    config, weights = llama
    wrong = {**weights, SHARD: torch.zeros(16, 48, dtype=torch.int8)}
    with pytest.raises(ConfigError, match=f"'{SHARD}' must be floating-point, got torch.int8"):
        load(config, wrong.items())


def test_the_order_of_the_tensors_does_not_matter(llama: Any) -> None:
    config, weights = llama
    token_ids = prompt(9)
    forward, backward = (
        PagedRun(load(config, items)).logits({"r": token_ids})["r"]
        for items in (list(weights.items()), list(weights.items())[::-1])
    )
    assert torch.equal(forward, backward)


def test_tensors_of_another_dtype_are_converted(llama: Any) -> None:
    config, weights = llama
    model = load(config, [(name, tensor.double()) for name, tensor in weights.items()])
    assert torch.equal(model.model.norm.weight, weights["model.norm.weight"])


def test_a_tied_checkpoint_may_repeat_its_head_and_hold_old_buffers() -> None:
    network = tiny_hf(tiny_config("LlamaConfig", tie_word_embeddings=True))
    weights = weights_of(network)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    load(network.config, weights.items())


def test_an_untied_head_is_required(llama: Any) -> None:
    config, weights = llama
    with pytest.raises(ConfigError, match=r"missing tensor 'lm_head\.weight'"):
        load(config, [(name, tensor) for name, tensor in weights.items() if name != "lm_head.weight"])


def test_every_weight_is_in_memory_once() -> None:
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 128}
    for tied in (True, False):
        network = tiny_hf(tiny_config("LlamaConfig", **wide, tie_word_embeddings=tied))
        model = ours_from(network)
        buffers = sum(rope.frequencies.nbytes for rope in model.ropes.values())
        assert weight_bytes(model) - buffers == sum(tensor.nbytes for tensor in weights_of(network).values())


@pytest.mark.parametrize("config_class", ["LlamaConfig", "Qwen3Config"])
def test_a_network_saved_without_its_head_gives_hidden_states_only(config_class: str) -> None:
    network = tiny_hf(tiny_config(config_class, head_dim=8), hf_class="AutoModel")
    model = ours_from(network)
    token_ids = prompt(11)
    expected = network(torch.tensor([token_ids])).last_hidden_state[0]
    hidden_states = PagedRun(model).step({"r": token_ids})["r"]
    assert (hidden_states - expected).abs().max() <= HF_HIDDEN_ATOL * expected.abs().max()
    with pytest.raises(ConfigError, match="no language-model head"):
        model.compute_logits(hidden_states)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}}, "rope_type.*'dynamic'"),
        ({"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "relu"}, "hidden_act.*'relu'"),
    ],
)
def test_what_a_configuration_asks_and_we_lack_is_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        LlamaForCausalLM(tiny_config("LlamaConfig", **changes), FP32)


def test_a_bidirectional_gemma_is_refused() -> None:
    config = tiny_config("Gemma3TextConfig", use_bidirectional_attention=True, architectures=["Gemma3ForCausalLM"])
    with pytest.raises(ConfigError, match="use_bidirectional_attention"):
        model_class(config)(config, FP32)


def test_the_registry_knows_its_names_and_sends_the_rest_to_transformers() -> None:
    assert all(isinstance(value, type) for value in MODELS.values())
    assert model_class(tiny_config("LlamaConfig", architectures=["LlamaForCausalLM"])) is LlamaForCausalLM
    for names in (["PhiForCausalLM"], ["Nonsense"], None):
        config = tiny_config("PhiConfig", architectures=names)
        assert model_class(config).__name__ == "TransformersForCausalLM"
