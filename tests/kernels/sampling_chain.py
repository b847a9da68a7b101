"""The sampler's four operations one after the other, from the engine's own metadata: minivllm/sample in kernels.

grammar mask ─▶ raw logits kept ─▶ mask of allowed and banned ids ─▶ logit_bias ─▶ penalties ─▶ draw ─▶ logprobs
"""

from __future__ import annotations

import numpy as np
import torch

from minivllm.kernels.logprobs import Logprobs, logprobs
from minivllm.kernels.penalties import logit_bias, penalties
from minivllm.kernels.token_bitmask import token_bitmask
from minivllm.kernels.top_k_top_p import Sampled, top_k_top_p_sample
from minivllm.sample.metadata import SamplingMetadata, SamplingRow
from minivllm.sample.random import uniform
from minivllm.sample.sampler import sample
from minivllm.sampling_params import SamplingParams
from tests.kernels.sampling_helpers import GuardedLogits, random_bitmask
from tests.tolerances import LOGPROB_ATOL

NUM_TOP = 3
REQUESTS = (
    SamplingParams(temperature=0.0, logprobs=NUM_TOP),
    SamplingParams(temperature=0.8, logprobs=NUM_TOP),
    SamplingParams(top_k=20, repetition_penalty=1.3, logprobs=NUM_TOP),
    SamplingParams(top_p=0.8, frequency_penalty=0.7, presence_penalty=-0.4, logprobs=NUM_TOP),
    SamplingParams(min_p=0.02, logit_bias={5: 9.0, 7: -100.0, 9: 4.5}, logprobs=NUM_TOP),
    SamplingParams(allowed_token_ids=[3, 5, 8, 40, 41], min_tokens=40, max_tokens=50, logprobs=NUM_TOP),
    SamplingParams(
        temperature=1.4, top_k=30, top_p=0.9, min_p=1e-3, repetition_penalty=0.9, logit_bias={2: 3.0}, logprobs=NUM_TOP
    ),
    SamplingParams(logprobs=NUM_TOP),  # its logits are broken
)


def step(vocab_size: int) -> tuple[torch.Tensor, SamplingMetadata]:
    """Logits [num_reqs, vocab_size] and the metadata of requests that have produced 30 tokens."""
    generator = np.random.default_rng(5)
    rows = [
        SamplingRow(
            params,
            seed=100 + index,
            vocab_size=vocab_size,
            prompt_token_ids=generator.integers(0, vocab_size, 50).tolist(),
            output_token_ids=generator.integers(0, min(vocab_size, 60), 30).tolist(),
            stop_token_ids=[40],
            bad_words_token_ids=[[1], [2]] if index == 1 else [],
        )
        for index, params in enumerate(REQUESTS)
    ]
    bitmask = random_bitmask(len(rows), vocab_size) | 0b1000_1010_1000
    bitmask[::2] = -1  # requests without a grammar
    logits = GuardedLogits(len(rows), vocab_size).logits.clone()
    logits[-1, 3] = torch.nan
    return logits, SamplingMetadata.from_requests(rows, bitmask)


def sample_with_kernels(
    logits: torch.Tensor,  # [num_reqs, vocab_size], spent afterwards
    metadata: SamplingMetadata,
    impl: str,
) -> tuple[Sampled, Logprobs]:
    """sampler.sample, by the operations of minivllm.kernels."""
    assert metadata.grammar_bitmask is not None
    token_bitmask(logits, metadata.grammar_bitmask, impl=impl)
    raw = logits.clone()
    token_bitmask(logits, _allowed_bits(metadata, logits.shape[1]), impl=impl)
    biases = {row: (ids, bias) for row, (ids, bias) in metadata.logit_bias.items()}
    logit_bias(logits, *_lists(len(logits), biases, torch.float32), impl=impl)
    states = metadata.penalties
    seen = {row: (state.token_ids, state.output_counts) for row, state in states.items()}
    settings = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64).repeat(1, len(logits))
    for row, state in states.items():
        values = (state.repetition, state.frequency, state.presence)
        settings[:, row] = torch.tensor(values, dtype=torch.float64)
    penalties(logits, *_lists(len(logits), seen, torch.int32), *settings, impl=impl)
    numbers = [uniform(*pair) for pair in zip(metadata.seeds, metadata.positions, strict=True)]
    sampled = top_k_top_p_sample(
        logits,
        torch.tensor(metadata.temperature, dtype=torch.float64),
        torch.tensor(metadata.top_k, dtype=torch.int32),
        torch.tensor(metadata.top_p, dtype=torch.float64),
        torch.tensor(metadata.min_p, dtype=torch.float64),
        torch.tensor(numbers, dtype=torch.float64),
        impl=impl,
    )
    return sampled, logprobs(raw, sampled.token_ids, NUM_TOP, impl=impl)


def assert_the_engine_says_the_same(vocab_size: int, impl: str) -> None:
    """Tokens, ids and ranks are equal, log-probabilities up to rounding."""
    logits, metadata = step(vocab_size)
    expected = sample(logits.clone(), metadata)
    sampled, found = sample_with_kernels(logits, metadata, impl)
    assert sampled.token_ids.tolist() == expected.sampled_token_ids
    assert len(expected.errors) == 1
    for row, entry in enumerate(expected.logprobs):
        if entry is not None:
            assert [int(sampled.token_ids[row]), *found.top_token_ids[row].tolist()] == entry.token_ids
            assert int(found.ranks[row]) == entry.rank
            got = torch.cat([found.logprobs[row : row + 1], found.top_logprobs[row]]).double()
            wanted = torch.tensor(entry.logprobs, dtype=torch.float64)
            torch.testing.assert_close(got, wanted, atol=LOGPROB_ATOL, rtol=0)


def _allowed_bits(metadata: SamplingMetadata, vocab_size: int) -> torch.Tensor:  # [num_reqs, num_words] int32
    """What allowed_token_ids and the banned ids leave."""
    bits = np.ones((len(metadata.seeds), -(-vocab_size // 32) * 32), dtype=bool)
    for row, ids in metadata.allowed_token_ids.items():
        bits[row] = False
        bits[row, ids] = True
    for row, banned in metadata.banned_token_ids.items():
        bits[row, banned] = False
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32))


def _lists(
    num_reqs: int, rows: dict[int, tuple[np.ndarray, np.ndarray]], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # [num_reqs, longest] int32 and `dtype`, [num_reqs] int32
    """rows: {row: (ids [num_ids], values [num_ids])}"""
    longest = max(len(ids) for ids, _ in rows.values())
    padded_ids = torch.full((num_reqs, longest), -1, dtype=torch.int32)
    padded_values = torch.zeros(num_reqs, longest, dtype=dtype)
    sizes = torch.zeros(num_reqs, dtype=torch.int32)
    for row, (ids, values) in rows.items():
        sizes[row] = len(ids)
        padded_ids[row, : len(ids)] = torch.from_numpy(ids)
        padded_values[row, : len(ids)] = torch.from_numpy(values)
    return padded_ids, padded_values, sizes
