"""decoder_step: all layers in one call are right against float64, write their caches, and touch nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from minivllm.kernels.decoder_step import DecoderLayer, DecoderShape, DecoderWeights, decoder_step
from minivllm.kernels.packed_matmul.reference import pack, pack_codes, unpack
from minivllm.kernels.paged_attention import AttentionMetadata
from minivllm.kernels.quant_matmul import quantise_int4, unpack_int4
from tests.kernels.helpers import Batch, Request, Shape, as_bits, assert_kernel_is_right, make_batch, random_values

BF16 = torch.bfloat16
SHAPE = DecoderShape(
    hidden_size=96, num_heads=6, num_kv_heads=2, head_size=64, intermediate_size=160, eps=1e-5, scale=0.125
)
REQUESTS = [Request(40, seed=1), Request(300, seed=2), Request(1, seed=3), Request(83, num_rows=37, seed=4)]


def make_weights(
    batch: Batch, *, shape: DecoderShape = SHAPE, biases: bool = False, head_norms: bool = False, num_layers: int = 2
) -> DecoderWeights:
    """Random weights; every layer has a copy of the batch's caches."""

    def weight(seed: int, out_features: int, in_features: int) -> torch.Tensor:
        return pack(random_values(out_features, in_features, dtype=BF16, seed=seed, size=in_features**-0.5))

    def vector(seed: int, size: int) -> torch.Tensor:
        return 1 + random_values(size, dtype=BF16, seed=seed, size=0.2)

    query_size = shape.num_heads * shape.head_size
    sizes = {"qkv": shape.qkv_size, "o": shape.hidden_size}
    sizes |= {"gate_up": 2 * shape.intermediate_size, "down": shape.hidden_size}
    layers = []
    for seed in range(0, 100 * num_layers, 100):
        layers.append(
            DecoderLayer(
                input_norm=vector(seed, shape.hidden_size),
                post_norm=vector(seed + 1, shape.hidden_size),
                q_norm=vector(seed + 2, shape.head_size) if head_norms else None,
                k_norm=vector(seed + 3, shape.head_size) if head_norms else None,
                k_cache=batch.k_cache.clone(),
                v_cache=batch.v_cache.clone(),
                qkv=weight(seed + 4, shape.qkv_size, shape.hidden_size),
                o=weight(seed + 5, shape.hidden_size, query_size),
                gate_up=weight(seed + 6, 2 * shape.intermediate_size, shape.hidden_size),
                down=weight(seed + 7, shape.hidden_size, shape.intermediate_size),
                **{
                    f"{name}_bias": vector(seed + 8 + i, size) if biases else None
                    for i, (name, size) in enumerate(sizes.items())
                },
            )
        )
    return DecoderWeights(tuple(layers), vector(99, shape.hidden_size), shape)


def in_codes(weights: DecoderWeights, *names: str) -> DecoderWeights:
    """The same, some matrices rounded to 4 bits."""

    def convert(layer: DecoderLayer) -> DecoderLayer:
        changes: dict[str, torch.Tensor] = {}
        for name in names:
            strips = getattr(layer, name)
            codes, scales, minimums = quantise_int4(unpack(strips, 32 * len(strips)).float(), 32)
            changes[name], changes[f"{name}_levels"] = pack_codes(unpack_int4(codes, 32), scales, minimums)
        return dataclasses.replace(layer, **changes)

    return DecoderWeights(tuple(map(convert, weights.layers)), weights.last_norm, weights.shape)


def copied(weights: DecoderWeights, dtype: torch.dtype = BF16) -> DecoderWeights:
    """The same weights and caches in other memory."""

    def convert(layer: DecoderLayer) -> DecoderLayer:
        fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
        return DecoderLayer(
            **{name: x if x is None or x.dtype == torch.uint8 else x.to(dtype, copy=True) for name, x in fields.items()}
        )

    return DecoderWeights(tuple(map(convert, weights.layers)), weights.last_norm.to(dtype), weights.shape)


def run(weights: DecoderWeights, batch: Batch, impl: str, dtype: torch.dtype = BF16) -> torch.Tensor:
    """The step on random hidden states, at the positions of the batch. # [num_tokens, hidden_size]"""
    m = batch.metadata
    metadata = AttentionMetadata(m.query_start_loc, m.seq_lens, m.block_table, m.slot_mapping, m.block_size)
    positions = [p for r in batch.requests for p in range(r.seq_len - r.num_rows, r.seq_len)]
    angles = torch.tensor(positions)[:, None] * 10000 ** (-torch.arange(0, 1, 2 / weights.shape.head_size))
    cos, sin = angles.cos(), angles.sin()  # [num_tokens, head_size / 2]
    hidden_states = random_values(len(positions), weights.shape.hidden_size, dtype=BF16, seed=7).to(dtype)
    return decoder_step(
        hidden_states, torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1), weights, metadata, impl=impl
    )


def batch_of(requests: list[Request], block_size: int = 16, head_size: int = 64) -> Batch:
    return make_batch(requests, Shape(2, 3, head_size, block_size, BF16))


@pytest.mark.parametrize(
    ("options", "head_size", "block_size"),
    [
        ({}, 64, 16),
        ({"biases": True}, 64, 16),
        ({"head_norms": True}, 64, 16),
        ({}, 128, 16),
        ({}, 64, 8),
        ({"biases": True, "head_norms": True}, 128, 32),
    ],
    ids=str,
)
@pytest.mark.parametrize("sliding_window", [None, 33])
def test_a_step_is_right(options: dict[str, Any], head_size: int, block_size: int, sliding_window: int | None):
    batch = batch_of(REQUESTS, block_size, head_size)
    shape = dataclasses.replace(SHAPE, head_size=head_size, sliding_window=sliding_window)
    weights = make_weights(batch, shape=shape, **options)
    plain, exact_weights = copied(weights), copied(weights, torch.float64)
    kernel = run(weights, batch, "cpu")
    reference, exact = run(plain, batch, "reference"), run(exact_weights, batch, "reference", torch.float64)
    assert_kernel_is_right(kernel, reference, exact)
    slots = batch.metadata.slot_mapping
    for ours, theirs, right in zip(weights.layers, plain.layers, exact_weights.layers, strict=True):
        for name in ("k_cache", "v_cache"):
            written = [getattr(layer, name).flatten(1, 2)[:, slots] for layer in (ours, theirs, right)]
            assert_kernel_is_right(*written)


@pytest.mark.parametrize("num_requests", [1, 16, 17, 64, 100])
def test_any_number_of_rows_is_right(num_requests: int):
    batch = batch_of([Request(20 + 3 * i, seed=i) for i in range(num_requests)])
    weights = make_weights(batch)
    plain, exact = copied(weights), copied(weights, torch.float64)
    kernel = run(weights, batch, "cpu")
    assert_kernel_is_right(kernel, run(plain, batch, "reference"), run(exact, batch, "reference", torch.float64))


@pytest.mark.parametrize("names", [("qkv", "o", "gate_up", "down"), ("o", "gate_up")], ids=str)
@pytest.mark.parametrize("num_requests", [1, 40])
def test_a_step_over_weights_in_4_bits_is_right(names: tuple[str, ...], num_requests: int):
    """Few rows and many, all matrices or some."""
    batch = batch_of([Request(20 + 3 * i, seed=i) for i in range(num_requests)])
    weights = in_codes(make_weights(batch, biases=True), *names)
    plain, exact = copied(weights), copied(weights, torch.float64)
    kernel = run(weights, batch, "cpu")
    assert_kernel_is_right(kernel, run(plain, batch, "reference"), run(exact, batch, "reference", torch.float64))


def test_nothing_but_the_tokens_slots_is_written():
    batch = batch_of(REQUESTS)
    weights = make_weights(batch)
    run(weights, batch, "cpu")
    others = torch.ones(batch.k_cache.shape[1] * batch.k_cache.shape[2], dtype=torch.bool)
    others[batch.metadata.slot_mapping] = False
    for layer in weights.layers:
        for now, before in ((layer.k_cache, batch.k_cache), (layer.v_cache, batch.v_cache)):
            assert torch.equal(as_bits(now.flatten(1, 2)[:, others]), as_bits(before.flatten(1, 2)[:, others]))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_token_without_a_slot_is_not_kept(impl: str):
    batch = batch_of([Request(40, seed=1), Request(18, seed=2)])
    batch.metadata.slot_mapping[1] = -1
    weights = make_weights(batch)
    out = run(weights, batch, impl)
    assert out.isfinite().all()
    kept = batch.metadata.slot_mapping[0]
    for now, before in ((layer.k_cache, batch.k_cache) for layer in weights.layers):
        changed = (as_bits(now) != as_bits(before)).any(-1).any(0).flatten().nonzero().flatten()
        assert changed.tolist() == [kept]


def test_a_row_has_the_same_bits_alone_and_in_a_batch():
    batch = batch_of([Request(40, seed=1), Request(300, seed=2), Request(23, seed=3)])
    together = run(make_weights(batch), batch, "cpu")
    alone = batch_of([Request(40, seed=1)])
    assert torch.equal(as_bits(run(make_weights(alone), alone, "cpu")), as_bits(together[:1]))


@pytest.mark.parametrize("sliding_window", [None, 33])
def test_prompts_of_any_length_beside_decodes_are_right(sliding_window: int | None):
    lengths = [(17, 17), (32, 32), (1, 70), (33, 33), (64, 90), (16, 16), (300, 300), (65, 600), (31, 287), (1, 2)]
    batch = batch_of([Request(end, num_rows=n, seed=n) for n, end in lengths])
    weights = make_weights(batch, shape=dataclasses.replace(SHAPE, sliding_window=sliding_window))
    plain, exact = copied(weights), copied(weights, torch.float64)
    kernel = run(weights, batch, "cpu")
    assert_kernel_is_right(kernel, run(plain, batch, "reference"), run(exact, batch, "reference", torch.float64))


def test_wrong_arguments_are_named_and_nothing_is_written():
    batch = batch_of([Request(40, seed=1)])
    weights, m = make_weights(batch), batch.metadata
    hidden, angles = torch.zeros(1, 96, dtype=BF16), torch.zeros(1, 64)
    for arguments, message in [
        ((torch.zeros(2, 96, dtype=BF16), angles, angles), r"hidden_states: expected \[1, 96\], got \[2, 96\]"),
        ((hidden, torch.zeros(1, 32), angles), r"cos: expected \[1, 64\], got \[1, 32\]"),
        ((hidden, angles, torch.zeros(2, 64)), r"sin: expected \[1, 64\], got \[2, 64\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoder_step(*arguments, weights, m)
    beyond = torch.tensor([batch.k_cache.shape[1] * 16])
    wrong = AttentionMetadata(m.query_start_loc, m.seq_lens, m.block_table, beyond, m.block_size)
    with pytest.raises(ValueError, match=f"slot_mapping: .* got {int(beyond)}"):
        decoder_step(hidden, angles, angles, weights, wrong)
    for layer in weights.layers:
        assert torch.equal(as_bits(layer.k_cache), as_bits(batch.k_cache))
