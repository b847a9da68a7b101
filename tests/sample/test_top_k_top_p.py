"""The final distribution of a row: against loops, a full sort and transformers; ties, edges, odd widths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from minivllm.sample import final_probabilities
from minivllm.sample.top_k_top_p import by_likelihood, dense_weights, inverse_cdf, kth_largest_bound, restrict
from tests.sample.helpers import llm_like_logits, make_row, metadata_of, oracle_probabilities
from tests.tolerances import PROBABILITY_ATOL

WIDTHS = [8193, 10000, 49152, 151936]


def final_row(values, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """restrict() as a distribution over the whole row."""
    row = np.asarray(values, dtype=np.float32)
    ids, weights = restrict(row, float(row.max()), temperature, top_k, top_p, min_p)
    probabilities = np.zeros(len(row))
    probabilities[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return probabilities


def kept(values, **limits):
    return np.flatnonzero(final_row(values, **limits)).tolist()


@settings(max_examples=250, deadline=None)
@given(
    values=st.lists(st.integers(-48, 48).map(lambda n: n / 8) | st.just(-math.inf), min_size=1, max_size=40),
    temperature=st.sampled_from([0.01, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 39, 40, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.77, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 1e-9, 0.07, 0.6, 1.0]),
)
def test_the_distribution_equals_the_plain_loop(values, temperature, top_k, top_p, min_p):
    assume(max(values) > -math.inf)
    expected, margin = oracle_probabilities(values, temperature, top_k, top_p, min_p)
    assume(margin > 1e-6 or min_p == 1.0)
    got = final_row(values, temperature, top_k, top_p, min_p)
    np.testing.assert_allclose(got, expected, rtol=0, atol=PROBABILITY_ATOL)
    assert ((got > 0) <= (np.array(expected) > 0)).all()


@pytest.mark.parametrize("vocab_size", WIDTHS)
@pytest.mark.parametrize("decay", [1.6, 0.9], ids=["peaked", "flat"])
@pytest.mark.parametrize(
    "limits",
    [
        {"top_p": 0.9},
        {"top_p": 0.99, "temperature": 1.4},
        {"top_p": 1e-6},
        {"top_k": 50},
        {"top_k": 1},
        {"top_k": 5000, "top_p": 0.9},
        {"top_k": 40, "top_p": 0.5, "min_p": 0.05, "temperature": 0.7},
        {"min_p": 0.001},
    ],
    ids=str,
)
def test_candidates_give_what_a_full_sort_gives(vocab_size, decay, limits):
    values = llm_like_logits(1, vocab_size, decay, seed=vocab_size)[0].numpy()
    limits = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **limits}
    order = np.argsort(-values, kind="stable")
    weights = np.exp((values[order].astype(np.float64) - values.max()) / limits["temperature"])
    num_kept = int((weights >= limits["min_p"]).sum())
    num_kept = min(num_kept, limits["top_k"] or num_kept)
    before = np.concatenate([[0.0], np.cumsum(weights[:num_kept])])
    num_kept = int((before[:-1] < limits["top_p"] * before[-1]).sum()) if limits["top_p"] < 1 else num_kept
    expected = np.zeros(vocab_size)
    expected[order[:num_kept]] = weights[:num_kept] / weights[:num_kept].sum()
    got = final_row(values, **limits)
    # float32 and float64 sums may disagree about one token at the edge of a nucleus of hundreds
    edge = 1 if num_kept > 100 else 0
    assert abs(np.count_nonzero(got) - np.count_nonzero(expected)) <= edge
    np.testing.assert_allclose(got, expected, rtol=0, atol=PROBABILITY_ATOL + edge * expected[expected > 0].min())


@pytest.mark.parametrize("vocab_size", [100, 8193, 49152])
@pytest.mark.parametrize(
    ("temperature", "min_p", "top_k", "top_p"),
    [(1.0, 0.0, 50, 1.0), (0.7, 0.0, 0, 0.9), (1.3, 0.02, 0, 1.0), (0.8, 0.01, 40, 0.9), (1.0, 0.2, 1, 1.0)],
)
def test_the_distribution_equals_transformers_processors_in_our_order(vocab_size, temperature, min_p, top_k, top_p):
    """transformers' generate applies min_p last; vLLM and we apply it before top_k and top_p."""
    logits = llm_like_logits(3, vocab_size, 1.6, seed=7)
    scores = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1.0 else logits
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    row = make_row(vocab_size, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    got = final_probabilities(logits, metadata_of(row, row, row))
    torch.testing.assert_close(got, torch.softmax(scores, -1).double(), rtol=0, atol=PROBABILITY_ATOL)
    assert torch.equal(got > 0, torch.isfinite(scores))


def test_min_p_before_top_p_is_not_the_same_as_after_it():
    values = np.log([0.5, 0.2, 0.1, 0.1, 0.1])
    assert kept(values, min_p=0.3, top_p=0.7) == [0]  # 0.5 of the 0.7 that min_p left is already more than 0.7
    assert kept(values, top_p=0.7) == [0, 1]


def test_top_k_keeps_all_ties_at_the_kth():
    values = [1.0, 3.0, 2.0, 2.0, 2.0, 0.0]
    assert kept(values, top_k=1) == [1]
    assert kept(values, top_k=2) == kept(values, top_k=3) == kept(values, top_k=4) == [1, 2, 3, 4]
    assert kept(values, top_k=5) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_smallest_set_and_lower_ids_of_equal_tokens():
    assert kept([0.0, 0.0, 0.0, 0.0], top_p=0.5) == [0, 1]
    assert kept([0.0, 0.0, 0.0, 0.0], top_p=0.5000001) == [0, 1, 2]
    assert kept([0.0, 5.0, 5.0, 0.0], top_p=1e-6) == [1]
    assert kept([0.0] * 10000, top_p=1e-6) == [0]
    assert kept([0.0] * 10000, top_p=0.25) == list(range(2500))


def test_bf16_logits_with_thousands_of_ties_are_cut_exactly():
    values = llm_like_logits(1, 49152, 1.1, seed=3)[0].bfloat16().float().numpy()
    for top_k in (1, 7, 50, 600):
        threshold = np.sort(values)[-top_k]
        assert kept(values, top_k=top_k) == np.flatnonzero(values >= threshold).tolist()


@pytest.mark.parametrize("top_k", [8193, 8194, 2**31 - 1])
def test_top_k_of_the_vocabulary_or_more_is_off(top_k):
    values = llm_like_logits(1, 8193, 1.0, seed=1)[0].numpy()
    np.testing.assert_array_equal(final_row(values, top_k=top_k), final_row(values))


def test_top_p_near_zero_and_top_k_one_are_the_argmax():
    for values in llm_like_logits(5, 10000, 0.5, seed=2).numpy():
        assert kept(values, top_p=1e-6) == kept(values, top_k=1) == kept(values, min_p=1.0) == [values.argmax()]


def test_masked_tokens_are_never_kept():
    values = np.full(49152, -np.inf, dtype=np.float32)
    values[[5, 77, 40000]] = [1.0, 0.5, 0.25]
    for limits in ({}, {"top_k": 50}, {"top_p": 0.999999}, {"min_p": 1e-9}, {"top_k": 2000, "top_p": 0.9999999}):
        assert kept(values, **limits) == [5, 77, 40000]


@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.0])
def test_huge_logits_do_not_overflow(temperature):
    values = np.array([3e38, -3e38, 3e38, 0.0], dtype=np.float32)
    for limits in ({}, {"top_k": 3}, {"min_p": 0.1}, {"top_p": 0.9}):
        np.testing.assert_array_equal(final_row(values, temperature, **limits), [0.5, 0.0, 0.5, 0.0])


@settings(max_examples=100, deadline=None)
@given(
    vocab_size=st.sampled_from([1, 2, 100, 8193, 20000]),
    seed=st.integers(0, 10),
    share=st.floats(0, 1),
    coarse=st.booleans(),
)
def test_at_least_k_tokens_reach_the_bound(vocab_size, seed, share, coarse):
    values = np.random.default_rng(seed).standard_normal(vocab_size).astype(np.float32)
    values = np.round(values) if coarse else values
    k = max(1, int(share * share * vocab_size))
    assert np.count_nonzero(values >= np.float32(kth_largest_bound(values, k))) >= k


@pytest.mark.parametrize("num_ids", [1, 512, 513, 5000])
def test_small_and_large_sorts_agree_and_break_ties_by_id(num_ids):
    generator = np.random.default_rng(num_ids)
    row = np.round(generator.standard_normal(20000), 1).astype(np.float32)  # many ties, 0.0 and -0.0 among them
    ids = np.sort(generator.choice(20000, num_ids, replace=False))
    expected = sorted(ids.tolist(), key=lambda token_id: (-row[token_id], token_id))
    assert by_likelihood(row, ids).tolist() == expected


def test_dense_weights_are_exactly_one_at_the_maximum():
    for values in llm_like_logits(4, 10001, 1.0, seed=5).numpy():
        weights = dense_weights(values, float(values.max()), 0.7)
        assert weights.max() == weights[values.argmax()] == 1.0


# ------------------------------------------------------------------ inverse CDF
LAST = 1.0 - 2.0**-53


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-300, 1e-20, 0.1, 1.0, 3.0]) | st.floats(0, 1), min_size=1, max_size=30),
    u=st.sampled_from([0.0, 2.0**-53, 0.5, LAST]) | st.floats(0, LAST),
    repeat=st.sampled_from([1, 100]),  # 100 repetitions take the two-level path
)
def test_the_index_is_in_range_and_its_weight_is_not_zero(weights, u, repeat):
    assume(sum(weights) > 0)
    array = np.array(weights * repeat)
    index = inverse_cdf(array, u)
    assert 0 <= index < len(array)
    assert array[index] > 0


@pytest.mark.parametrize("num_tokens", [1, 3, 1024, 1025, 5000, 8193])
def test_edges_of_u_give_the_first_and_the_last_token_that_has_weight(num_tokens):
    weights = np.full(num_tokens + 4, 0.3, dtype=np.float32)
    weights[[0, 1, -2, -1]] = 0.0
    assert inverse_cdf(weights, 0.0) == 2
    assert inverse_cdf(weights, LAST) == num_tokens + 1


@pytest.mark.parametrize("num_tokens", [7, 3000])
def test_each_token_owns_exactly_its_share_of_the_unit_interval(num_tokens):
    weights = np.random.default_rng(num_tokens).integers(0, 1000, num_tokens).astype(np.float64)
    edges = np.concatenate([[0.0], np.cumsum(weights)]) / weights.sum()
    for index in np.flatnonzero(weights)[:: max(1, num_tokens // 200)]:
        low, high = edges[index], edges[index + 1]
        step = 1e-6 * (high - low)
        assert inverse_cdf(weights, low + step) == index
        assert inverse_cdf(weights, high - step) == index
