"""The sampler's four operations one after the other (worker/gpu_sampler.py), and what minivllm/sample says of it."""

from __future__ import annotations

import numpy as np
import torch

from minivllm.sample.metadata import SamplingMetadata, SamplingRow
from minivllm.sample.sampler import SamplerOutput, sample
from minivllm.sampling_params import SamplingParams
from minivllm.worker.gpu_sampler import sample_on_device
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


def assert_the_engine_says_the_same(vocab_size: int, impl: str) -> None:
    """Tokens, ids and ranks are equal, log-probabilities up to rounding."""
    logits, metadata = step(vocab_size)
    expected = sample(logits.clone(), metadata)
    found = sample_on_device(logits, metadata, impl=impl)
    assert len(expected.errors) == 1
    assert_same_output(found, expected)


def assert_same_output(found: SamplerOutput, expected: SamplerOutput) -> None:
    """Equal, log-probabilities up to rounding."""
    assert found.sampled_token_ids == expected.sampled_token_ids
    assert found.errors == expected.errors
    for got, wanted in zip(found.logprobs, expected.logprobs, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert (got.token_ids, got.rank) == (wanted.token_ids, wanted.rank)
            numbers = (torch.tensor(entry.logprobs, dtype=torch.float64) for entry in (got, wanted))
            torch.testing.assert_close(*numbers, atol=LOGPROB_ATOL, rtol=0)
