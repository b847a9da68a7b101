"""SamplingParams: every bound of every field, and a refusal that names the field for everything else."""

import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.errors import InvalidRequestError, show
from minivllm.sampling_params import BeamSearchParams, SamplingParams

INT32, INT64 = 2**31 - 1, 2**63
HUGE = 10**5000  # more digits than Python prints


def refused(parameter: str, **fields: object) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**fields)
    assert caught.value.parameter == parameter
    assert caught.value.status == 400
    message = str(caught.value)
    assert message.startswith(f"{parameter} must be ") and ", got " in message and len(message) < 400
    return message


# ------------------------------------------------------------------ numbers
# field: (lowest, highest, just outside)
NUMBERS = {
    "temperature": (0.0, 2.0, (-1e-9, 2.0000001, -1)),
    "top_p": (1e-300, 1.0, (0.0, -0.1, 1.0000001)),
    "min_p": (0.0, 1.0, (-1e-9, 1.0000001)),
    "presence_penalty": (-2.0, 2.0, (-2.0000001, 2.0000001)),
    "frequency_penalty": (-2.0, 2.0, (-2.0000001, 2.0000001)),
    "repetition_penalty": (1e-300, 10.0, (0.0, -1.0, 10.0000001)),
    "n": (1, 64, (0, -1, 65)),
    "best_of": (1, 64, (0, -1, 65)),
    "top_k": (-1, INT32, (-2, INT32 + 1)),
    "max_tokens": (1, INT32, (0, -5, INT32 + 1)),
    "min_tokens": (0, 16, (-1, 17)),  # max_tokens is 16
    "logprobs": (0, 20, (-1, 21)),
    "prompt_logprobs": (0, 20, (-1, 21)),
    "seed": (-INT64, INT64 - 1, (-INT64 - 1, INT64)),
}
REALS = list(NUMBERS)[:6]
MAY_BE_NONE = ("best_of", "max_tokens", "logprobs", "prompt_logprobs", "seed")
FLAGS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "detokenize",
)


@pytest.mark.parametrize("field", NUMBERS)
def test_both_bounds_are_accepted(field: str):
    for value in NUMBERS[field][:2]:
        SamplingParams(**{field: value})


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in NUMBERS for value in NUMBERS[field][2]])
def test_a_value_just_outside_is_refused_by_name(field: str, value: Any):
    assert f"got {value!r}" in refused(field, **{field: value})


@pytest.mark.parametrize(
    "junk",
    [math.nan, math.inf, -math.inf, True, False, "1", "", b"1", [1], (1,), {}, 1j, HUGE, -HUGE, 2**200, np.float32(1)],
    ids=lambda junk: show(junk, 30),
)
@pytest.mark.parametrize("field", NUMBERS)
def test_no_number_takes_junk(field: str, junk: Any):
    """An integer of 5000 digits was a ValueError of Python's: the message tried to print it."""
    refused(field, **{field: junk})


@pytest.mark.parametrize("field", NUMBERS)
def test_none_means_not_given_or_is_refused(field: str):
    if field in MAY_BE_NONE:
        assert getattr(SamplingParams(**{field: None}), field) is None
    else:
        refused(field, **{field: None})


@pytest.mark.parametrize("field", sorted(NUMBERS.keys() - set(REALS)))
def test_a_count_is_no_float(field: str):
    refused(field, **{field: 1.0})


@pytest.mark.parametrize("field", REALS)
def test_a_real_takes_an_integer_and_keeps_a_float(field: str):
    value = getattr(SamplingParams(**{field: 1}), field)
    assert type(value) is float and value == 1.0


@pytest.mark.parametrize("field", FLAGS)
def test_a_flag_is_true_or_false_and_nothing_else(field: str):
    """The string "false" was true."""
    for value in (True, False):
        assert getattr(SamplingParams(**{field: value}), field) is value
    for junk in ("false", 0, 1, None, [], 1.0):
        refused(field, **{field: junk})


# ------------------------------------------------------------------ temperature and what hangs on it
@pytest.mark.parametrize("temperature", [0, 0.0, -0.0, 1e-300, 9.99e-6])
def test_below_1e_minus_5_it_is_greedy_and_the_filters_are_off(temperature: float):
    params = SamplingParams(temperature=temperature, top_p=0.5, top_k=7, min_p=0.3)
    assert params.is_greedy and (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)


@pytest.mark.parametrize(("asked", "used"), [(1e-5, 0.01), (0.00999, 0.01), (0.01, 0.01), (0.011, 0.011), (2.0, 2.0)])
def test_a_tiny_temperature_that_samples_is_raised_so_that_logits_stay_finite(asked: Any, used: float):
    params = SamplingParams(temperature=asked, top_p=0.5, top_k=7, min_p=0.3)
    assert params.temperature == used and not params.is_greedy
    assert (params.top_p, params.top_k, params.min_p) == (0.5, 7, 0.3)


def test_greedy_has_one_candidate():
    assert refused("n", temperature=0, n=2) == "n must be 1 with temperature 0 (all candidates would be equal), got 2."
    assert "best_of must be 1 with temperature 0" in refused("best_of", temperature=0, best_of=3)
    assert SamplingParams(temperature=0, n=1, best_of=1).num_candidates == 1


def test_top_k_minus_one_is_off():
    assert SamplingParams(top_k=-1).top_k == 0


def test_seed_minus_one_is_no_seed():
    assert SamplingParams(seed=-1).seed is None
    assert [SamplingParams(seed=seed).seed for seed in (0, -2, 7)] == [0, -2, 7]


# ------------------------------------------------------------------ counts that depend on each other
def test_best_of_is_at_least_n():
    assert "best_of must be an integer in [n, 64], got 3" in refused("best_of", n=4, best_of=3)
    assert SamplingParams(n=4, best_of=4).num_candidates == 4
    assert SamplingParams(n=2, best_of=9).num_candidates == 9
    assert SamplingParams(n=5).num_candidates == 5


def test_min_tokens_is_at_most_max_tokens():
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3
    refused("min_tokens", max_tokens=3, min_tokens=4)
    assert SamplingParams(max_tokens=None, min_tokens=INT32).min_tokens == INT32
    refused("min_tokens", max_tokens=None, min_tokens=INT32 + 1)


def test_penalties_are_in_use_when_one_of_them_does_something():
    assert not SamplingParams(presence_penalty=0, frequency_penalty=0.0, repetition_penalty=1).uses_penalties
    for name, value in (("presence_penalty", 0.1), ("frequency_penalty", -0.1), ("repetition_penalty", 0.9)):
        assert SamplingParams(**{name: value}).uses_penalties


# ------------------------------------------------------------------ strings
@pytest.mark.parametrize(("field", "max_items"), [("stop", 4), ("bad_words", 128)])
def test_lists_of_strings(field: str, max_items: int):
    def given_as(value: object) -> object:
        return getattr(SamplingParams(**{field: value}), field)

    assert given_as(None) == [] and given_as([]) == []
    assert given_as("one") == ["one"] and given_as(("a", "b")) == ["a", "b"]
    assert len(given_as(["x"] * max_items)) == max_items
    assert given_as("y" * 256) == ["y" * 256]
    for junk in (["x"] * (max_items + 1), "", [""], ["a", ""], "y" * 257, [5], [None], ["a", True], [b"a"], [["a"]]):
        refused(field, **{field: junk})
    for junk in (5, 1.5, {"a"}, {}, b"a", True):
        refused(field, **{field: junk})


def test_a_very_long_stop_string_is_not_repeated_in_the_message():
    assert len(refused("stop", stop="x" * 1_000_000)) < 400


def test_stop_strings_need_text():
    refused("stop", stop=["end"], detokenize=False)
    assert SamplingParams(stop=[], detokenize=False).stop == []


# ------------------------------------------------------------------ token ids
@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
def test_lists_of_token_ids(field: str):
    def given_as(value: object) -> object:
        return getattr(SamplingParams(**{field: value}), field)

    assert given_as([0, 5, INT32]) == [0, 5, INT32]
    assert given_as((7, 8)) == [7, 8] and sorted(given_as({3, 4})) == [3, 4]
    for junk in ([-1], [INT32 + 1], [1.0], [True], ["1"], [None], [HUGE], 5, "12", {1: 2}, range(3), b"ab", math.nan):
        refused(field, **{field: junk})


def test_no_stop_token_ids_and_none_are_the_same_but_nothing_allowed_is_an_error():
    assert SamplingParams(stop_token_ids=None).stop_token_ids == []
    assert SamplingParams(allowed_token_ids=None).allowed_token_ids is None
    refused("allowed_token_ids", allowed_token_ids=[])


def test_stop_token_ids_are_at_most_128_and_allowed_ones_are_a_whole_vocabulary():
    assert len(SamplingParams(stop_token_ids=list(range(128))).stop_token_ids) == 128
    refused("stop_token_ids", stop_token_ids=list(range(129)))
    assert len(SamplingParams(allowed_token_ids=list(range(300_000))).allowed_token_ids) == 300_000


def test_logit_bias_is_clamped_to_100_and_empty_is_none():
    assert SamplingParams(logit_bias={3: 1e30, 4: -101, 5: 100, 6: -0.5}).logit_bias == {
        3: 100,
        4: -100,
        5: 100,
        6: -0.5,
    }
    assert SamplingParams(logit_bias={}).logit_bias is None
    assert len(SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0)).logit_bias) == 1024


BAD_BIAS_KEYS = (-1, INT32 + 1, "3", True, 1.0, None, HUGE)
BAD_BIASES = (math.nan, math.inf, -math.inf, "1", True, None, [1], HUGE)


@pytest.mark.parametrize(
    "junk",
    [{key: 1.0} for key in BAD_BIAS_KEYS]
    + [{3: bias} for bias in BAD_BIASES]
    + [dict.fromkeys(range(1025), 1.0), [(3, 1)], 5, "3"],
    ids=lambda junk: show(junk, 30),
)
def test_a_bad_logit_bias_is_refused(junk: Any):
    refused("logit_bias", logit_bias=junk)


# ------------------------------------------------------------------ the caller's own objects
def test_later_changes_of_the_callers_lists_change_nothing():
    lists = {"stop": ["a"], "stop_token_ids": [1], "bad_words": ["b"], "allowed_token_ids": [2], "logit_bias": {3: 1.0}}
    params = SamplingParams(**lists)
    before = copy.deepcopy(params)
    lists["stop"].append("x")
    lists["stop_token_ids"].append(9)
    lists["bad_words"].append("y")
    lists["allowed_token_ids"].append(9)
    lists["logit_bias"][9] = 9.0
    assert params == before


def test_two_defaults_share_no_list():
    first, second = SamplingParams(), SamplingParams()
    first.stop.append("x")
    assert second.stop == []


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "field", [*NUMBERS, *FLAGS, "stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words"]
)
def test_a_value_that_cannot_be_printed_is_refused_like_any_other(field: str):
    assert "an unprintable Unprintable" in refused(field, **{field: Unprintable()})


# ------------------------------------------------------------------ beam search
def test_the_bounds_of_beam_search():
    assert BeamSearchParams(1, max_tokens=1, length_penalty=-10).length_penalty == -10.0
    assert BeamSearchParams(64, max_tokens=INT32, length_penalty=10).beam_width == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [("beam_width", value) for value in (0, 65, -1, 1.0, True, None, "2", HUGE)]
    + [("max_tokens", value) for value in (0, -1, INT32 + 1, None, 1.5, False)]
    + [("length_penalty", value) for value in (-10.1, 10.1, math.nan, math.inf, True, "1", None)]
    + [
        (name, value)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
        for value in (1, "no")
    ],
    ids=lambda value: show(value, 30),
)
def test_a_bad_beam_search_is_refused_by_name(field: str, value: Any):
    with pytest.raises(InvalidRequestError) as caught:
        BeamSearchParams(**({"beam_width": 2} | {field: value}))
    assert caught.value.parameter == field


# ------------------------------------------------------------------ any value at all
def is_count(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def is_real(value: object, low: float, high: float, low_is_out: bool = False) -> bool:
    if type(value) not in (int, float):
        return False
    return low <= value <= high and not (low_is_out and value == low)


def are_strings(value: object, max_items: int) -> bool:
    items = [value] if isinstance(value, str) else value
    if items is None:
        return True
    if type(items) not in (list, tuple) or len(items) > max_items:
        return False
    return all(isinstance(item, str) and 1 <= len(item) <= 256 for item in items)


def are_ids(value: object, max_items: float) -> bool:
    if not isinstance(value, list | tuple | set | frozenset):
        return False
    return len(value) <= max_items and all(is_count(item, 0, INT32) for item in value)


def is_bias(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    top = 1.7976931348623157e308  # the largest float
    return all(is_count(key, 0, INT32) and is_real(bias, -top, top) for key, bias in value.items())


# The documented ranges, written a second time.
DOCUMENTED = {
    "n": lambda v: is_count(v, 1, 64),
    "best_of": lambda v: v is None or is_count(v, 1, 64),
    "temperature": lambda v: is_real(v, 0, 2),
    "top_p": lambda v: is_real(v, 0, 1, low_is_out=True),
    "top_k": lambda v: is_count(v, -1, INT32),
    "min_p": lambda v: is_real(v, 0, 1),
    "presence_penalty": lambda v: is_real(v, -2, 2),
    "frequency_penalty": lambda v: is_real(v, -2, 2),
    "repetition_penalty": lambda v: is_real(v, 0, 10, low_is_out=True),
    "seed": lambda v: v is None or is_count(v, -INT64, INT64 - 1),
    "max_tokens": lambda v: v is None or is_count(v, 1, INT32),
    "min_tokens": lambda v: is_count(v, 0, 16),
    "logprobs": lambda v: v is None or is_count(v, 0, 20),
    "prompt_logprobs": lambda v: v is None or is_count(v, 0, 20),
    "stop": lambda v: are_strings(v, 4),
    "bad_words": lambda v: are_strings(v, 128),
    "stop_token_ids": lambda v: v is None or are_ids(v, 128),
    "allowed_token_ids": lambda v: v is None or (are_ids(v, math.inf) and len(v) > 0),
    "logit_bias": lambda v: v is None or is_bias(v),
    "structured_outputs": lambda v: v is None,  # a StructuredOutputsParams is tested in tests/structured_output
} | dict.fromkeys(FLAGS, lambda v: isinstance(v, bool))

ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.sampled_from([INT32, INT32 + 1, INT64, -INT64, INT64 - 1, HUGE, -HUGE]),
    st.floats(),
    st.floats(-3, 11),
    st.text(max_size=4),
    st.sampled_from(["x" * 256, "x" * 257, "\ud800"]),
    st.binary(max_size=2),
    st.complex_numbers(),
    st.builds(object),
    st.builds(Unprintable),
)
IDS = st.integers(-1, 400)
VALUES = st.one_of(
    ATOMS,
    st.lists(ATOMS, max_size=5),
    st.lists(IDS, max_size=140),
    st.lists(st.text(min_size=1, max_size=3), max_size=6),
    st.sets(IDS, max_size=5),
    st.tuples(ATOMS),
    st.dictionaries(IDS, ATOMS, max_size=4),
    st.dictionaries(st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=2)), ATOMS, max_size=2),
)


def test_every_field_has_its_range_written_down():
    assert set(SamplingParams.__dataclass_fields__) == set(DOCUMENTED)


@pytest.mark.parametrize("field", DOCUMENTED)
@settings(max_examples=60, deadline=None)
@given(value=VALUES)
def test_any_value_is_accepted_exactly_when_it_is_in_the_documented_range(field: str, value: Any):
    try:
        SamplingParams(**{field: value})
    except InvalidRequestError as error:
        assert error.parameter == field and not DOCUMENTED[field](value)
    else:
        assert DOCUMENTED[field](value)


@settings(max_examples=300, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(sorted(DOCUMENTED)), VALUES, max_size=6))
def test_of_many_values_a_bad_one_is_named_and_nothing_else_is_raised(fields: dict[str, Any]):
    try:
        params = SamplingParams(**fields)
    except InvalidRequestError as error:
        assert error.parameter in fields
    else:
        assert all(DOCUMENTED[name](value) for name, value in fields.items() if name != "min_tokens")
        assert params.num_candidates >= params.n
