"""BERT against transformers: flat rows here, a padded batch with a mask there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minivllm.errors import ConfigError
from minivllm.kernels.paged_attention import AttentionMetadata
from minivllm.models.bert import BertModel
from minivllm.models.layers import ModelOptions
from tests.models.tiny import FP32, prompt, tiny_config, tiny_hf, weights_of
from tests.tolerances import HF_HIDDEN_ATOL

LENGTHS = [9, 1, 23, 4]


@pytest.fixture(scope="module")
def network() -> Any:
    return tiny_hf(tiny_config("BertConfig", type_vocab_size=2), hf_class="BertModel")


def loaded(network: Any, options: ModelOptions = FP32, prefix: str = "", **extra: torch.Tensor) -> BertModel:
    model = BertModel(network.config, options)
    model.load_weights((prefix + name, tensor) for name, tensor in {**weights_of(network), **extra}.items())
    return model


def run(model: BertModel, requests: list[list[int]], token_types: list[list[int]] | None = None) -> list[torch.Tensor]:
    """Hidden states [length, hidden_size] of each request, computed in one step."""
    lengths = [len(request) for request in requests]
    starts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    metadata = AttentionMetadata(
        query_start_loc=starts,
        seq_lens=lengths,
        block_table=torch.zeros(len(lengths), 1, dtype=torch.int32),
        slot_mapping=torch.full((starts[-1],), -1),
        block_size=16,
        causal=False,
    )
    positions = torch.cat([torch.arange(length) for length in lengths])
    types = None if token_types is None else torch.tensor(sum(token_types, []))
    with torch.inference_mode():
        rows = model(torch.tensor(sum(requests, [])), positions, [], metadata, types)
    return list(rows.split(lengths))


def hf_rows(network: Any, requests: list[list[int]], token_types: list[list[int]] | None = None) -> list[torch.Tensor]:
    width = max(map(len, requests))
    pad = network.config.pad_token_id
    inputs = {
        "input_ids": torch.tensor([request + [pad] * (width - len(request)) for request in requests]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in requests]),
    }
    if token_types is not None:
        inputs["token_type_ids"] = torch.tensor([types + [0] * (width - len(types)) for types in token_types])
    rows = network(**inputs).last_hidden_state
    return [rows[number, : len(request)] for number, request in enumerate(requests)]


def assert_all_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        assert (mine - expected).abs().max() <= HF_HIDDEN_ATOL


def test_a_flat_batch_gives_the_hidden_states_of_a_padded_one(network: Any) -> None:
    requests = [prompt(length) for length in LENGTHS]
    assert_all_close(run(loaded(network), requests), hf_rows(network, requests))


def test_token_types_are_added_where_they_are_given(network: Any) -> None:
    requests = [prompt(length) for length in LENGTHS]
    types = [[int(place > length // 2) for place in range(length)] for length in LENGTHS]
    assert_all_close(run(loaded(network), requests, types), hf_rows(network, requests, types))


def test_a_request_is_the_same_alone_and_in_company(network: Any) -> None:
    requests = [prompt(length) for length in LENGTHS]
    model = loaded(network, ModelOptions(torch.float32, batch_invariant=True))
    together = run(model, requests)
    for request, rows in zip(requests, together, strict=True):
        assert torch.equal(run(model, [request])[0], rows)


def test_checkpoints_with_a_prefix_a_pooler_and_heads_load(network: Any) -> None:
    extra = {"embeddings.position_ids": torch.arange(128)[None]}
    model = loaded(network, prefix="bert.", **extra)
    model.load_weights(
        [*weights_of(network).items(), ("cls.predictions.bias", torch.zeros(97)), ("pooler.x", torch.zeros(1))]
    )
    requests = [prompt(5)]
    assert_all_close(run(model, requests), hf_rows(network, requests))


def test_an_encoder_has_no_cache_and_no_logits(network: Any) -> None:
    model = loaded(network)
    assert model.kv_cache_specs == []
    with pytest.raises(ConfigError, match="encoder"):
        model.compute_logits(torch.zeros(1, 48))


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {"is_decoder": True}], ids=str)
def test_other_kinds_of_bert_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        BertModel(tiny_config("BertConfig", **changes), FP32)
