"""Masks, bias and penalties against one-token-at-a-time oracles; ids from users never leave the row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from minivllm.sample.penalties import PenaltyState, apply_grammar_bitmask, apply_penalties
from minivllm.sample.sampler import _process
from minivllm.sampling_params import SamplingParams
from tests.sample.helpers import make_row, metadata_of, oracle_logits
from tests.tolerances import LOGIT_RTOL

VOCAB = 12
any_id = st.integers(0, VOCAB + 3)  # the last four are outside the logits
logit = st.one_of(st.integers(-80, 80).map(lambda n: n / 8), st.just(-math.inf), st.floats(-30, 30, width=32))


@st.composite
def requests(draw):
    """(logits, the request's SamplingRow arguments, params)."""
    params = {
        "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 0.5, 1.3, 10.0])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.0, -2.0, 0.5, 2.0])),
        "presence_penalty": draw(st.sampled_from([0.0, 0.0, -1.0, 1.5])),
        "min_tokens": draw(st.integers(0, 6)),
        "logit_bias": draw(st.none() | st.dictionaries(any_id, st.floats(-100, 100), max_size=4)),
        "allowed_token_ids": draw(st.none() | st.lists(any_id, min_size=1, max_size=8)),
    }
    state = {
        "prompt": draw(st.lists(any_id, max_size=8)),
        "output": draw(st.lists(st.integers(0, 3), max_size=8)),  # few ids, so that words repeat
        "stops": draw(st.lists(any_id, max_size=3)),
        "bad_words": draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=4)),
    }
    return draw(st.lists(logit, min_size=VOCAB, max_size=VOCAB)), state, params


@settings(max_examples=120, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=4), st.booleans())
def test_every_row_equals_the_plain_loop(batch, token_by_token):
    rows = []
    for _, state, params in batch:
        if token_by_token:
            row = make_row(VOCAB, **{**state, "output": ()}, **params)
            for token_id in state["output"]:
                row.append(token_id)
        else:
            row = make_row(VOCAB, **state, **params)
        rows.append(row)
    values = np.array([logits for logits, _, _ in batch], dtype=np.float32)
    expected = [
        oracle_logits([float(value) for value in values[i]], rows[i].params, **state)
        for i, (_, state, _) in enumerate(batch)
    ]
    _process(values, metadata_of(*rows))
    np.testing.assert_allclose(values, np.array(expected), rtol=LOGIT_RTOL, atol=LOGIT_RTOL)


@pytest.mark.parametrize("vocab_size", [64, 8193, 49152])
def test_repetition_penalty_equals_transformers(vocab_size):
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)) * 5
    prompt, output = [1, 2, 3, 2, 63], [5, 5, 0]
    row = make_row(vocab_size, prompt=prompt, output=output, repetition_penalty=1.7)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits.clone())
    _process(logits.numpy(), metadata_of(row))
    torch.testing.assert_close(logits, expected, rtol=LOGIT_RTOL, atol=0)


def test_counts_grow_with_the_output_and_are_never_rebuilt():
    params = SamplingParams(frequency_penalty=0.25, repetition_penalty=1.5)
    state = PenaltyState(params, 1000, range(300))
    for token_id in [5, 999, 5, 1000, 5, *range(400, 800)]:
        state.append(token_id)
    counts = dict(zip(state.token_ids.tolist(), state.output_counts.tolist(), strict=True))
    assert len(counts) == len(state.token_ids) == 300 + 1 + 400
    assert (counts[5], counts[999], counts[0], counts[799]) == (3.0, 1.0, 0.0, 1.0)


def test_the_prompt_is_not_remembered_without_a_repetition_penalty():
    state = PenaltyState(SamplingParams(presence_penalty=0.5), 1000, range(300))
    assert len(state.token_ids) == 0


def test_what_a_row_remembers_does_not_grow_with_the_length_of_the_output():
    row = make_row(1000, prompt=range(50), repetition_penalty=1.1, bad_words=[(1, 2, 3), (4,)])
    for step in range(10_000):
        row.append(7 + step % 2)
    assert len(row.penalties.token_ids) == 50
    assert len(row.bad_words._recent) == 2


def test_extreme_penalties_stay_finite_and_masked_tokens_stay_masked():
    logits = np.array([[3e38, -3e38, 0.0, -math.inf, math.nan, 1.0]], dtype=np.float32)
    row = make_row(6, prompt=range(5), output=range(5), repetition_penalty=1e-300, frequency_penalty=-2.0)
    apply_penalties(logits, {0: row.penalties})
    assert np.isfinite(logits[0, :3]).all()
    assert logits[0, 3] == -math.inf
    assert math.isnan(logits[0, 4])
    assert logits[0, 5] == 1.0


def test_ids_outside_the_logits_change_nothing_not_even_the_next_row():
    vocab_size = 10
    outside = [10, 11, 19, 20, 2**31 - 1]
    row = make_row(
        vocab_size,
        prompt=outside,
        output=[*outside, -1],
        stops=outside,
        bad_words=[[token_id] for token_id in outside] + [[-1], [20, 10]],
        min_tokens=100,
        logit_bias=dict.fromkeys(outside, 100.0),
        repetition_penalty=2.0,
        presence_penalty=2.0,
    )
    values = np.arange(30, dtype=np.float32).reshape(3, vocab_size)
    before = values.copy()
    _process(values, metadata_of(row, make_row(vocab_size), row))
    np.testing.assert_array_equal(values, before)


def test_bad_words_match_the_output_only_and_only_at_its_end():
    def banned(output):
        return sorted(make_row(20, prompt=[1, 2], output=output, bad_words=[(9,), (1, 2, 3), (2, 4)]).banned_now())

    assert banned([]) == [9]
    assert banned([1, 2]) == [3, 4, 9]
    assert banned([1, 2, 5]) == [9]
    assert banned([2]) == [4, 9]


def test_min_tokens_forbids_stops_until_the_output_is_long_enough():
    row = make_row(20, stops=[3, 4], min_tokens=2)
    seen = []
    for _ in range(3):
        seen.append(row.banned_now())
        row.append(0)
    assert seen == [[3, 4], [3, 4], []]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 8193, 49152])
def test_the_grammar_bitmask_is_applied_bit_by_bit(vocab_size):
    generator = np.random.default_rng(vocab_size)
    allowed = generator.random((3, vocab_size)) < 0.5
    allowed[1] = True
    bitmask = np.zeros((3, -(-vocab_size // 32)), dtype=np.int64)
    for row, token_id in zip(*np.nonzero(allowed), strict=True):
        bitmask[row, token_id // 32] |= 1 << (token_id % 32)
    bitmask[1] = 0xFFFFFFFF
    logits = generator.standard_normal((3, vocab_size)).astype(np.float32)
    expected = np.where(allowed, logits, -np.inf)
    apply_grammar_bitmask(logits, bitmask.astype(np.uint32).view(np.int32))
    np.testing.assert_array_equal(logits, expected)


def test_a_bitmask_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"must have shape \(2, 2\)"):
        apply_grammar_bitmask(np.zeros((2, 33), dtype=np.float32), np.zeros((2, 1), dtype=np.int32))
