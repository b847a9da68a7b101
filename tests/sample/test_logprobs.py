"""Logprobs: values against log_softmax, order and rank against loops, ids outside, masked and broken rows."""

from __future__ import annotations

import math

import pytest
import torch

from minivllm.sample import prompt_logprobs, sample
from minivllm.sample.logprobs import top_token_ids
from tests.sample.helpers import llm_like_logits, make_row, metadata_of
from tests.tolerances import LOGPROB_ATOL


@pytest.mark.parametrize("vocab_size", [3, 100, 8193, 49152, 151936])
@pytest.mark.parametrize("num_logprobs", [0, 1, 5, 20])
def test_prompt_logprobs_equal_log_softmax(vocab_size, num_logprobs):
    logits = llm_like_logits(4, vocab_size, 1.2, seed=1)
    token_ids = [0, vocab_size - 1, int(logits[2].argmax()), vocab_size // 2]
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, entry in enumerate(prompt_logprobs(logits, token_ids, num_logprobs)):
        top = expected[row].topk(min(num_logprobs, vocab_size))
        assert entry.token_ids == [token_ids[row], *top.indices.tolist()]
        wanted = [expected[row, token_ids[row]].item(), *top.values.tolist()]
        assert entry.logprobs == pytest.approx(wanted, abs=LOGPROB_ATOL)
        assert entry.rank == int((logits[row] >= logits[row, token_ids[row]]).sum())


def test_prompt_logprobs_leave_the_logits_alone():
    logits = llm_like_logits(2, 1000, 1.0, seed=0)
    before = logits.clone()
    prompt_logprobs(logits, [1, 2], 5)
    assert torch.equal(logits, before)


def test_equal_logits_are_listed_by_id_and_make_the_rank_larger():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]])
    entry = prompt_logprobs(logits, [2], 4)[0]
    assert entry.token_ids == [2, 1, 3, 0, 2]
    assert entry.rank == 5
    assert prompt_logprobs(logits, [1], 0)[0].rank == 2


def test_masked_tokens_fill_the_list_with_minus_infinity():
    logits = torch.full((1, 49152), -math.inf)
    logits[0, [7, 40000]] = torch.tensor([1.0, 2.0])
    entry = prompt_logprobs(logits, [7], 4)[0]
    assert entry.token_ids == [7, 40000, 7, 0, 1]
    assert entry.logprobs[3:] == [-math.inf, -math.inf]
    assert sum(math.exp(logprob) for logprob in entry.logprobs[1:]) == pytest.approx(1.0)


@pytest.mark.parametrize("token_id", [-1, 100, 2**31])
def test_a_token_outside_the_logits_has_no_probability(token_id):
    entry = prompt_logprobs(llm_like_logits(1, 100, 1.0, seed=0), [token_id], 2)[0]
    assert (entry.token_ids[0], entry.logprobs[0], entry.rank) == (token_id, -math.inf, 100)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_row_gives_nan_and_the_next_row_is_right(poison):
    logits = llm_like_logits(2, 100, 1.0, seed=0)
    alone = prompt_logprobs(logits[1:], [5], 3)
    logits[0, 50] = poison
    broken, healthy = prompt_logprobs(logits, [5, 5], 3)
    assert math.isnan(broken.logprobs[0])
    assert [healthy] == alone


def test_top_token_ids_never_returns_more_than_the_vocabulary():
    row = llm_like_logits(1, 4, 1.0, seed=0)[0].numpy()
    assert sorted(top_token_ids(row, 20).tolist()) == [0, 1, 2, 3]
    assert top_token_ids(row, 0).tolist() == []


def test_sampled_logprobs_are_raw_after_the_grammar_and_before_everything_else():
    logits = llm_like_logits(1, 64, 1.0, seed=4)
    bitmask = torch.tensor([[-1, 0]], dtype=torch.int32)  # tokens 0..31
    expected = torch.log_softmax(logits[:, :32].double(), dim=-1)[0]
    row = make_row(64, temperature=0.5, logit_bias={3: 100.0}, logprobs=3, prompt=[1, 2], repetition_penalty=2.0)
    output = sample(logits, metadata_of(row, grammar_bitmask=bitmask))
    entry = output.logprobs[0]
    assert output.sampled_token_ids == [3]
    assert entry.token_ids == [3, *expected.topk(3).indices.tolist()]
    assert entry.logprobs == pytest.approx([expected[3].item(), *expected.topk(3).values.tolist()], abs=LOGPROB_ATOL)
