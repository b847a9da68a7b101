"""The sampler for logits on a device against the one for logits on the host, by the operations' references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.outputs import NO_TOKEN_LEFT
from minivllm.sample.metadata import SamplingMetadata, SamplingRow
from minivllm.sample.sampler import SamplerOutput, sample
from minivllm.sampling_params import SamplingParams
from minivllm.worker import gpu_sampler
from minivllm.worker.gpu_sampler import sample_on_device
from tests.kernels.sampling_chain import assert_same_output

VOCAB_SIZE = 70
ALL = -1  # a word of a bitmask that allows everything


def metadata_of(*params: SamplingParams, bitmask: torch.Tensor | None = None, vocab_size: int = VOCAB_SIZE) -> Any:
    rows = [
        SamplingRow(one, seed=index, vocab_size=vocab_size, prompt_token_ids=[1, 2, 3], output_token_ids=[2, 2, 5])
        for index, one in enumerate(params)
    ]
    return SamplingMetadata.from_requests(rows, bitmask)


def both(logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
    """The device's output, which is the host's. logits: [num_reqs, vocab_size]"""
    found = sample_on_device(logits.clone(), metadata)
    assert_same_output(found, sample(logits.clone(), metadata))
    return found


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.6]),
        "top_k": st.sampled_from([0, 1, 5, 69, 100]),
        "top_p": st.sampled_from([0.3, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "logit_bias": st.sampled_from([None, {3: 5.0}, {69: -100.0, 2: 1.0}]),
        "allowed_token_ids": st.sampled_from([None, [4, 5, 6], [69]]),
        "logprobs": st.sampled_from([None, 0, 1, 20]),
    }
)


@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 2**16), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_mixture_of_requests_draws_what_the_host_draws(params: list[dict[str, Any]], seed: int, has_grammar: bool):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(len(params), VOCAB_SIZE, generator=generator)
    bitmask = torch.full((len(params), 3), ALL, dtype=torch.int32)
    bitmask[::2] = 0b0111_0100  # ids 2, 4, 5, 6 of every 32
    both(logits, metadata_of(*(SamplingParams(**one) for one in params), bitmask=bitmask if has_grammar else None))


def test_a_broken_row_is_an_error_with_its_reason_and_the_others_are_not_affected():
    logits = torch.randn(4, VOCAB_SIZE)
    logits[1, 7], logits[2, 8] = torch.nan, torch.inf
    bitmask = torch.full((4, 3), ALL, dtype=torch.int32)
    bitmask[3] = 0
    found = both(logits, metadata_of(*[SamplingParams(logprobs=1)] * 4, bitmask=bitmask))
    assert found.errors[1].startswith("The model produced logits that are not numbers")
    assert (found.errors[2], found.errors[3]) == ("The model produced an infinite logit.", NO_TOKEN_LEFT)
    assert found.sampled_token_ids[1:] == [-1] * 3 and found.sampled_token_ids[0] >= 0


def test_a_nan_that_a_mask_hides_from_the_draw_is_found_by_the_logprobs():
    logits = torch.randn(2, VOCAB_SIZE)
    logits[0, 7] = torch.nan
    found = both(logits, metadata_of(SamplingParams(allowed_token_ids=[3], logprobs=0), SamplingParams()))
    assert list(found.errors) == [0] and found.logprobs[0] is None


def test_a_vocabulary_smaller_than_the_logprobs_that_are_asked_for():
    found = both(torch.randn(1, 5), metadata_of(SamplingParams(logprobs=9), vocab_size=5))
    assert found.logprobs[0] is not None and len(found.logprobs[0].token_ids) == 1 + 5


def test_what_no_request_asks_for_is_not_computed(monkeypatch: pytest.MonkeyPatch):
    """A greedy step is one operation and one copy."""
    for name in ("token_bitmask", "logit_bias", "penalties", "logprobs", "top_k_top_p_sample"):
        monkeypatch.setattr(gpu_sampler, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    both(torch.randn(3, VOCAB_SIZE), metadata_of(*[SamplingParams(temperature=0.0)] * 3))


def test_a_greedy_step_takes_the_first_of_equals_and_finds_broken_rows():
    logits = torch.zeros(6, VOCAB_SIZE)
    logits[1, [9, 40, 69]] = 2.0
    logits[2] = -torch.inf
    logits[3, 11], logits[4, 12] = torch.nan, torch.inf
    logits[5, :] = -torch.inf
    logits[5, 33] = -3.0
    found = both(logits, metadata_of(*[SamplingParams(temperature=0.0)] * 6))
    assert found.sampled_token_ids == [0, 9, -1, -1, -1, 33] and sorted(found.errors) == [2, 3, 4]
