"""sample(): the order of the steps, independence of rows, errors per row, and draws that follow the distribution."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from minivllm.sample import SamplingMetadata, final_probabilities, sample
from minivllm.sample.random import uniform
from minivllm.sample.sampler import stages
from minivllm.sample.top_k_top_p import inverse_cdf, restrict
from tests.sample.helpers import chi_square_deviation, llm_like_logits, make_row, metadata_of
from tests.tolerances import CHI_SQUARE_DEVIATIONS

NOT_A_NUMBER = math.nan


def draws(logits_row, num_draws: int, *, seed: int = 0, rows_per_call: int = 1000, **params) -> list[int]:
    """num_draws tokens of one request whose logits never change: positions 0, 1, 2, ..."""
    logits = torch.as_tensor(logits_row, dtype=torch.float32)
    one = metadata_of(make_row(len(logits), seed=seed, **params))
    tokens: list[int] = []
    for start in range(0, num_draws, rows_per_call):
        metadata = SamplingMetadata(
            one.temperature * rows_per_call,
            one.top_k * rows_per_call,
            one.top_p * rows_per_call,
            one.min_p * rows_per_call,
            one.seeds * rows_per_call,
            list(range(start, start + rows_per_call)),
            [None] * rows_per_call,
        )
        tokens += sample(logits.repeat(rows_per_call, 1), metadata).sampled_token_ids
    return tokens


# ------------------------------------------------------------------ order and greedy
def test_greedy_rows_take_the_lowest_id_of_the_largest_logit_whatever_the_seed():
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 1.0, 1.0]])
    rows = [make_row(4, temperature=0.0, seed=seed) for seed in (1, 2)]
    assert sample(logits, metadata_of(*rows)).sampled_token_ids == [1, 0]


def test_greedy_looks_at_the_logits_after_bias_penalties_and_masks():
    def token(**params):
        return sample(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), metadata_of(make_row(4, temperature=0, **params)))

    assert token().sampled_token_ids == [0]
    assert token(logit_bias={3: 4.0}).sampled_token_ids == [3]
    assert token(prompt=[0], repetition_penalty=2.0).sampled_token_ids == [1]
    assert token(output=[0, 0], frequency_penalty=0.6).sampled_token_ids == [1]
    assert token(output=[0, 0], presence_penalty=1.5).sampled_token_ids == [1]
    assert token(allowed_token_ids=[2, 3]).sampled_token_ids == [2]
    assert token(bad_words=[(0,)]).sampled_token_ids == [1]
    assert token(stops=[0], min_tokens=1).sampled_token_ids == [1]


def test_bias_comes_before_the_repetition_penalty_and_cannot_lift_a_mask():
    logits = torch.tensor([[2.0, 3.5]])
    biased_then_halved = make_row(2, temperature=0, prompt=[0], logit_bias={0: 4.0}, repetition_penalty=2.0)
    assert sample(logits, metadata_of(biased_then_halved)).sampled_token_ids == [1]  # (2 + 4) / 2 < 3.5 < 2 / 2 + 4
    masked = make_row(2, temperature=0, bad_words=[(1,)], logit_bias={1: 100.0})
    assert sample(torch.tensor([[2.0, 3.5]]), metadata_of(masked)).sampled_token_ids == [0]


def test_final_probabilities_of_a_greedy_row_are_one_hot_and_the_logits_are_kept():
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    row = make_row(3, temperature=0, logit_bias={2: 9.0})
    assert final_probabilities(logits, metadata_of(row)).tolist() == [[0.0, 0.0, 1.0]]
    assert logits.tolist() == [[1.0, 2.0, 0.0]]


def test_an_empty_batch_gives_an_empty_output():
    output = sample(torch.zeros(0, 100), metadata_of())
    assert (output.sampled_token_ids, output.logprobs, output.errors) == ([], [], {})


def test_logits_for_another_number_of_rows_are_refused():
    with pytest.raises(ValueError, match=r"must be \[1, vocab_size\], got \[2, 10\]"):
        sample(torch.zeros(2, 10), metadata_of(make_row(10)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_strided_logits_give_the_same_tokens_as_fp32(dtype):
    logits = llm_like_logits(2, 500, 1.0, seed=0).to(dtype)
    rows = [make_row(500, seed=3), make_row(500, temperature=0)]
    expected = sample(logits.float(), metadata_of(*rows))
    assert sample(logits, metadata_of(*rows)) == expected
    assert sample(logits.float().T.contiguous().T, metadata_of(*rows)) == expected
    assert sample(logits.float().requires_grad_(), metadata_of(*rows)) == expected


# ------------------------------------------------------------------ errors stay in their row
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize(
    ("poison", "reason"),
    [(NOT_A_NUMBER, "NaN"), (math.inf, "infinite"), (-math.inf, "No token can be drawn")],
)
@pytest.mark.parametrize("vocab_size", [40, 8193])
def test_a_row_that_cannot_be_sampled_is_an_error_and_the_others_go_on(params, poison, reason, vocab_size):
    logits = llm_like_logits(3, vocab_size, 1.0, seed=1)
    rows = [make_row(vocab_size, seed=seed, logprobs=2, **params) for seed in range(3)]
    healthy = sample(logits.clone(), metadata_of(*rows))
    if poison == -math.inf:
        logits[1] = poison
    else:
        logits[1, vocab_size - 3] = poison
    output = sample(logits, metadata_of(*rows))
    assert list(output.errors) == [1]
    assert reason in output.errors[1]
    assert (output.sampled_token_ids[1], output.logprobs[1]) == (-1, None)
    for row in (0, 2):
        assert output.sampled_token_ids[row] == healthy.sampled_token_ids[row]
        assert output.logprobs[row] == healthy.logprobs[row]


def test_masks_that_leave_nothing_are_an_error():
    rows = [make_row(10, allowed_token_ids=[10, 11]), make_row(10, allowed_token_ids=[3], bad_words=[(3,)])]
    output = sample(torch.zeros(2, 10), metadata_of(*rows))
    assert sorted(output.errors) == [0, 1]
    assert final_probabilities(torch.zeros(2, 10), metadata_of(*rows)).isnan().all()


def test_nan_behind_a_mask_is_reported_when_logprobs_would_show_it():
    logits = torch.zeros(2, 10)
    logits[:, 9] = NOT_A_NUMBER
    rows = [make_row(10, allowed_token_ids=[1], logprobs=logprobs) for logprobs in (None, 0)]
    output = sample(logits, metadata_of(*rows))
    assert output.sampled_token_ids == [1, -1]
    assert list(output.errors) == [1]


# ------------------------------------------------------------------ one row never depends on another
def mixed_rows(vocab_size: int) -> list:
    """64 requests, each with its own mixture of parameters."""
    generator = random.Random(0)
    rows = []
    for seed in range(64):
        some_ids = [generator.randrange(vocab_size) for _ in range(30)]
        optional = {
            "temperature": generator.choice([0.0, 0.5, 1.0, 1.5]),
            "top_k": generator.choice([0, 1, 40, 3000]),
            "top_p": generator.choice([1.0, 0.3, 0.9, 0.99]),
            "min_p": generator.choice([0.0, 0.0, 0.05]),
            "repetition_penalty": generator.choice([1.0, 1.2]),
            "frequency_penalty": generator.choice([0.0, 0.5]),
            "logit_bias": generator.choice([None, {some_ids[0]: 5.0}]),
            "allowed_token_ids": generator.choice([None, None, None, some_ids]),
            "logprobs": generator.choice([None, 5]),
        }
        rows.append(make_row(vocab_size, seed=seed, prompt=some_ids, output=some_ids[: seed % 20], **optional))
    return rows


@pytest.mark.parametrize(("vocab_size", "num_threads"), [(8193, 1), (8193, 2), (10000, 1), (49152, 2)])
def test_a_row_is_bit_identical_alone_and_in_a_batch_of_64(vocab_size, num_threads):
    rows = mixed_rows(vocab_size)
    logits = llm_like_logits(8, vocab_size, 1.1, seed=6).repeat(8, 1)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = sample(logits.clone(), metadata_of(*rows))
        distributions = final_probabilities(logits, metadata_of(*rows))
        order = list(range(64))
        random.Random(1).shuffle(order)
        shuffled = sample(logits[order], metadata_of(*[rows[row] for row in order]))
        for row in range(64):
            alone = sample(logits[row : row + 1].clone(), metadata_of(rows[row]))
            assert alone.sampled_token_ids[0] == together.sampled_token_ids[row]
            assert alone.logprobs[0] == together.logprobs[row]
            assert shuffled.sampled_token_ids[order.index(row)] == together.sampled_token_ids[row]
            assert torch.equal(
                final_probabilities(logits[row : row + 1], metadata_of(rows[row]))[0], distributions[row]
            )
    finally:
        torch.set_num_threads(threads_before)


def test_a_request_that_resumes_draws_what_it_would_have_drawn():
    vocab_size = 500
    logits = llm_like_logits(30, vocab_size, 0.8, seed=9)
    params = {"top_p": 0.95, "repetition_penalty": 1.3, "presence_penalty": 0.2, "bad_words": [(4, 5)], "seed": 11}
    row = make_row(vocab_size, prompt=[1, 2, 3], **params)
    whole: list[int] = []
    for step in range(30):
        whole += sample(logits[step : step + 1].clone(), metadata_of(row)).sampled_token_ids
        row.append(whole[-1])
    resumed = make_row(vocab_size, prompt=[1, 2, 3], output=whole[:17], **params)
    rest: list[int] = []
    for step in range(17, 30):
        rest += sample(logits[step : step + 1].clone(), metadata_of(resumed)).sampled_token_ids
        resumed.append(rest[-1])
    assert whole[17:] == rest


def test_seeds_and_positions_give_different_draws():
    logits = torch.zeros(1000)
    assert draws(logits, 1000, seed=1) == draws(logits, 1000, seed=1, rows_per_call=10)
    same = sum(a == b for a, b in zip(draws(logits, 1000, seed=1), draws(logits, 1000, seed=2), strict=True))
    assert same < 10  # one in a thousand is expected


# ------------------------------------------------------------------ draws follow the distribution
SMALL = np.log([0.4, 0.2, 0.1, 0.1, 0.08, 0.05, 0.04, 0.02, 0.009, 0.001])


@pytest.mark.parametrize(
    ("num_draws", "params"),
    [
        (100_000, {"temperature": 0.8, "top_k": 7, "top_p": 0.95, "min_p": 0.1}),
        (10_000, {}),
        (10_000, {"temperature": 2.0}),
        (10_000, {"top_k": 3}),
        (10_000, {"top_p": 0.75}),
        (10_000, {"min_p": 0.15, "temperature": 1.5}),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(num_draws, params):
    expected = final_probabilities(torch.tensor(SMALL[None], dtype=torch.float32), metadata_of(make_row(10, **params)))
    counts = np.bincount(draws(SMALL, num_draws, seed=123, **params), minlength=10)
    deviation = chi_square_deviation(counts.tolist(), expected[0].tolist())
    assert abs(deviation) < CHI_SQUARE_DEVIATIONS


@pytest.mark.parametrize(
    ("decay", "params"),
    [
        (1.5, {}),  # inverse CDF over the whole vocabulary
        (1.5, {"top_p": 0.9}),  # a few candidates
        (0.9, {"top_p": 0.9}),  # tens of thousands
        (1.5, {"top_k": 50, "temperature": 1.2}),
    ],
    ids=["whole", "peaked-nucleus", "flat-nucleus", "top-k"],
)
def test_draws_from_a_large_vocabulary_follow_the_exact_distribution(decay, params):
    row = llm_like_logits(1, 49152, decay, seed=8)[0]
    exact = np.exp(row.double().numpy() / params.get("temperature", 1.0))
    exact /= exact.sum()
    order = np.argsort(-exact)
    num_kept = params.get("top_k", 49152)
    if "top_p" in params:
        num_kept = 1 + int(np.searchsorted(np.cumsum(exact[order]), params["top_p"]))
    exact[order[num_kept:]] = 0.0
    exact /= exact.sum()
    limits = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **params}
    ids, weights = restrict(row.numpy(), float(row.max()), *limits.values())
    tokens = [inverse_cdf(weights, uniform(77, position)) for position in range(20_000)]
    tokens = tokens if ids is None else ids[tokens]
    counts = np.bincount(tokens, minlength=49152)
    assert (counts[exact == 0.0] == 0).all()
    common = order[:60]  # the likeliest tokens one by one, the others by region of the vocabulary
    regions = np.arange(49152) // 1024
    rare_counts, rare_exact = counts.copy(), exact.copy()
    rare_counts[common], rare_exact[common] = 0, 0.0
    cells = [*counts[common], *np.bincount(regions, rare_counts)]
    probabilities = [*exact[common], *np.bincount(regions, rare_exact)]
    assert abs(chi_square_deviation(cells, probabilities)) < CHI_SQUARE_DEVIATIONS


# ------------------------------------------------------------------ stage by stage
def test_the_stages_end_in_the_distribution_that_is_drawn_from_and_name_what_changes():
    logits = llm_like_logits(3, 700, 1.1, seed=5)
    before = logits.clone()
    rows = [
        make_row(700, seed=4, temperature=0.7, top_p=0.8, top_k=10, min_p=0.001, logit_bias={3: 5.0}),
        make_row(700, seed=5, temperature=1.0),
        make_row(700, temperature=0.0, prompt=[1, 2], repetition_penalty=1.5),
    ]
    metadata = metadata_of(*rows)
    found, chances = stages(logits, metadata)
    assert torch.equal(logits, before)  # looking changes nothing
    assert [name for name, _ in found] == [
        *("model", "grammar", "allowed_token_ids", "bad_words, min_tokens", "logit_bias", "penalties"),
        *("temperature", "min_p", "top_k", "top_p"),
    ]
    probabilities, drawn = final_probabilities(logits, metadata).numpy(), sample(logits, metadata).sampled_token_ids
    for row in (0, 1):
        chance = chances[row]
        ids = np.arange(700) if chance.ids is None else chance.ids
        weights = chance.weights / chance.weights.sum(dtype=np.float64)
        assert np.array_equal(weights, probabilities[row][ids])
        assert set(np.flatnonzero(found[-1][1][row] > -np.inf)) == set(ids.tolist())
        assert ids[inverse_cdf(chance.weights, chance.u)] == drawn[row]
    assert chances[2] is None and int(found[-1][1][2].argmax()) == drawn[2]
    changed = [
        {after[0] for before, after in zip(found, found[1:], strict=False) if (before[1][r] != after[1][r]).any()}
        for r in range(3)
    ]
    assert changed == [{"logit_bias", "temperature", "min_p", "top_k", "top_p"}, set(), {"penalties"}]


def test_the_stages_of_a_row_without_a_number_are_shown_and_nothing_is_drawn_from_it():
    logits = torch.tensor([[NOT_A_NUMBER, 1.0], [0.0, 1.0]])
    found, chances = stages(logits, metadata_of(make_row(2), make_row(2)))
    assert chances[0] is None and chances[1] is not None
    assert math.isnan(found[-1][1][0, 0])
