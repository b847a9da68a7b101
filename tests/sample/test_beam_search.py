"""beam_search() on tiny models that are tables: against all sequences there are, and by hand where it must choose."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest

from minivllm.outputs import BeamSearchSequence, Logprob
from minivllm.sample.beam_search import beam_search, score
from minivllm.sampling_params import BeamSearchParams

EOS = 0
PROMPT = [7, 8]
Model = Callable[[tuple[int, ...]], dict[int, float]]  # tokens so far, without the prompt -> logprob of each next one


def random_model(vocab_size: int, seed: int) -> Model:
    """Every prefix has its own distribution."""

    def logprobs(prefix: tuple[int, ...]) -> dict[int, float]:
        weights = [random.Random(f"{seed}{prefix}{token}").random() + 0.01 for token in range(vocab_size)]
        return {token: math.log(weight / sum(weights)) for token, weight in enumerate(weights)}

    return logprobs


def table(rows: dict[tuple[int, ...], dict[int, float]]) -> Model:
    """A model written down: prefix -> {token: probability}."""
    return lambda prefix: {token: math.log(probability) for token, probability in rows[prefix].items()}


def search(
    model: Model, width: int, max_tokens: int, *, num_logprobs: int | None = None, eos=frozenset({EOS}), **params
) -> list[BeamSearchSequence]:
    """As llm.py does it: the 2 * width likeliest tokens of every beam."""

    def expand(sequences: Sequence[list[int]]) -> list[dict[int, Logprob]]:
        assert sequences, "nobody is to be expanded"
        found = []
        for tokens in sequences:
            assert tokens[: len(PROMPT)] == PROMPT
            logprobs = model(tuple(tokens[len(PROMPT) :]))
            best = sorted(logprobs, key=lambda token: -logprobs[token])[: num_logprobs or 2 * width]
            found.append({token: Logprob(logprobs[token]) for token in best})
        return found

    return beam_search(PROMPT, BeamSearchParams(width, max_tokens, **params), max_tokens, eos, expand)


def outputs(sequences: Sequence[BeamSearchSequence]) -> list[list[int]]:
    """What was generated."""
    return [sequence.tokens[len(PROMPT) :] for sequence in sequences]


def every_sequence(model: Model, vocab_size: int, max_tokens: int, penalty: float) -> list[tuple[float, list[int]]]:
    """All there is: (score, tokens) of every sequence that ends in eos or is max_tokens long, best first."""
    found = []
    for length in range(1, max_tokens + 1):
        for tokens in itertools.product(range(vocab_size), repeat=length):
            ended = tokens[-1] == EOS
            if EOS in tokens[:-1] or (not ended and length < max_tokens):
                continue
            total = sum(model(tokens[:index])[token] for index, token in enumerate(tokens))
            counted = len(PROMPT) + length - ended  # the prompt counts, the closing eos does not
            found.append((total / counted**penalty, list(tokens)))
    return sorted(found, key=lambda pair: -pair[0])


# ------------------------------------------------------------------ against everything
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_that_is_wide_enough_finds_the_best_of_all_sequences_in_order(seed: int, penalty: float):
    """Three tokens beside eos, three steps: 27 open sequences at most, so that a width of 27 loses none."""
    model = random_model(4, seed)
    expected = every_sequence(model, 4, 3, penalty)
    found = search(model, 27, 3, length_penalty=penalty)
    assert outputs(found) == [tokens for _, tokens in expected[:27]]
    assert [score(sequence, penalty) for sequence in found] == pytest.approx([best for best, _ in expected[:27]])


@pytest.mark.parametrize("seed", range(4))
def test_a_narrow_beam_returns_real_sequences_with_their_true_scores_in_order(seed: int):
    model = random_model(4, seed)
    truth = {tuple(tokens): best for best, tokens in every_sequence(model, 4, 5, 1.0)}
    found = search(model, 3, 5)
    scores = [score(sequence, 1.0) for sequence in found]
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx([truth[tuple(tokens)] for tokens in outputs(found)])
    assert len({tuple(tokens) for tokens in outputs(found)}) == 3


@pytest.mark.parametrize("seed", range(4))
def test_a_single_beam_is_the_greedy_choice(seed: int):
    model = random_model(6, seed)
    greedy: tuple[int, ...] = ()
    for _ in range(4):
        logprobs = model(greedy)
        greedy += (max(logprobs, key=logprobs.__getitem__),)
    assert outputs(search(model, 1, 4, ignore_eos=True)) == [list(greedy)]


# ------------------------------------------------------------------ by hand
TRAP = {  # greedy takes 1 and finds only weak continuations; 2 is better in the end
    (): {1: 0.6, 2: 0.4},
    (1,): {1: 0.4, 2: 0.3},
    (2,): {1: 0.9, 2: 0.1},
}


def test_two_beams_find_the_path_behind_the_second_best_token():
    assert outputs(search(table(TRAP), 1, 2)) == [[1, 1]]
    found = search(table(TRAP), 2, 2)
    assert outputs(found) == [[2, 1], [1, 1]]
    assert [math.exp(sequence.cum_logprob) for sequence in found] == pytest.approx([0.36, 0.24])


def test_a_sequence_keeps_the_logprobs_of_each_of_its_tokens_and_of_their_rivals():
    first = search(table(TRAP), 2, 2)[0]
    assert [list(position) for position in first.logprobs] == [[1, 2], [1, 2]]
    assert sum(position[token].logprob for position, token in zip(first.logprobs, [2, 1], strict=True)) == (
        pytest.approx(first.cum_logprob)
    )


ENDING = {  # the likeliest first token is eos
    (): {EOS: 0.5, 1: 0.3, 2: 0.2},
    (1,): {EOS: 0.1, 1: 0.9},
    (2,): {EOS: 0.8, 1: 0.2},
}


def test_a_finished_sequence_takes_no_beam_from_the_others():
    """Width 2: both open beams go on beside the one that ended, and the best two of all are returned."""
    found = search(table(ENDING), 2, 2, length_penalty=0.0)
    assert outputs(found) == [[EOS], [1, 1]]  # 0.5, 0.27; then [2, eos] with 0.16
    assert [sequence.finish_reason for sequence in found] == ["stop", "length"]
    assert outputs(search(table(ENDING), 3, 2, length_penalty=0.0))[2] == [2, EOS]


def test_ignore_eos_makes_it_a_token_like_any_other():
    rows = {(): {EOS: 0.6, 1: 0.4}, (EOS,): {EOS: 0.5, 1: 0.5}, (1,): {EOS: 1.0, 1: 1e-9}}
    found = search(table(rows), 2, 2, ignore_eos=True)
    assert outputs(found) == [[1, EOS], [EOS, EOS]]
    assert [sequence.finish_reason for sequence in found] == ["length", "length"]


def test_when_every_continuation_ends_the_search_is_over():
    """A model may have several eos ids (Llama-3 has three). Width 1 looks at two tokens: when both were eos nobody was
    left, and the search asked for the continuations of nobody."""
    rows = {(): {EOS: 0.5, 9: 0.4, 1: 0.1}}
    found = search(table(rows), 1, 5, eos=frozenset({EOS, 9}))
    assert outputs(found) == [[EOS]] and found[0].finish_reason == "stop"


def test_the_search_stops_at_max_tokens():
    asked: list[int] = []

    def expand(sequences: Sequence[list[int]]) -> list[dict[int, Logprob]]:
        asked.append(len(sequences))
        return [{1: Logprob(-1.0), 2: Logprob(-2.0), 3: Logprob(-3.0)} for _ in sequences]

    found = beam_search(PROMPT, BeamSearchParams(2, 99), 3, frozenset({EOS}), expand)
    assert asked == [1, 2, 2]  # the prompt once, then both beams
    assert [len(tokens) for tokens in outputs(found)] == [3, 3]
    assert PROMPT == [7, 8]  # the caller's list is not changed


# ------------------------------------------------------------------ scores
@pytest.mark.parametrize(
    ("penalty", "best"),
    [(0.0, [EOS]), (0.5, [EOS]), (1.0, [1, 1])],  # ln 0.27 / 4 = -0.33 > ln 0.5 / 2 = -0.35
)
def test_a_larger_length_penalty_favours_longer_sequences(penalty: float, best: list[int]):
    assert outputs(search(table(ENDING), 2, 2, length_penalty=penalty))[0] == best


def test_the_length_counts_the_prompt_and_not_the_closing_eos():
    ended = BeamSearchSequence(tokens=[7, 8, 1, EOS], cum_logprob=-6.0, finish_reason="stop")
    cut_off = BeamSearchSequence(tokens=[7, 8, 1, EOS], cum_logprob=-6.0)  # ignore_eos: a token like any other
    assert score(ended, 1.0) == -2.0 and score(cut_off, 1.0) == -1.5
    assert score(ended, 0.0) == score(cut_off, 0.0) == -6.0
    assert score(ended, -1.0) == -18.0


# ------------------------------------------------------------------ ties
def test_equal_scores_keep_the_order_in_which_they_were_found():
    """Four tokens of one probability: the first beam's first tokens stay, whatever their ids."""
    probabilities = {4: 0.25, 2: 0.25, 3: 0.25, 1: 0.25}
    rows = {prefix: probabilities for length in range(3) for prefix in itertools.product([1, 2, 3, 4], repeat=length)}
    found = search(table(rows), 2, 3)
    assert outputs(found) == [[4, 4, 4], [4, 4, 2]]
    assert outputs(search(table(rows), 2, 3)) == outputs(found)


def test_of_equal_sequences_the_one_that_ended_comes_before_one_that_was_cut_off():
    rows = {(): {1: 0.5, EOS: 0.25}, (1,): {1: 0.5, EOS: 0.5}}
    found = search(table(rows), 3, 2, length_penalty=0.0)
    assert outputs(found) == [[EOS], [1, EOS], [1, 1]]  # all of probability 0.25
