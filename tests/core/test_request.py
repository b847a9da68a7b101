"""Request: what ends it, in which order, and its counters."""

from __future__ import annotations

import pytest

from minivllm.core.request import FinishReason, Request, RequestStatus
from tests.core.helpers import EOS, make_request

STOP_ID = 9
PLAIN = 5


def ending(token_id: int, num_before: int = 0, max_model_len: int = 64, **fields) -> tuple[FinishReason, int | None]:
    """(finish_reason, stop_reason) after `num_before` plain tokens and this one; (None, None) while it runs on."""
    fields = {"eos_token_ids": frozenset({EOS}), "stop_token_ids": frozenset({STOP_ID}), **fields}
    request = make_request("r", [1, 2, 3], **fields)
    for _ in range(num_before):
        assert not request.append_output_token(PLAIN, max_model_len)
    ended = request.append_output_token(token_id, max_model_len)
    assert ended == request.is_finished == (request.finish_reason is not None)
    assert request.output_token_ids == [PLAIN] * num_before + [token_id]  # the token that ends it is part of it
    return request.finish_reason, request.stop_reason


# ------------------------------------------------------------------ the order: eos, stop ids, length
def test_eos_ends_silently():
    assert ending(EOS) == (FinishReason.STOP, None)


def test_a_stop_token_id_ends_and_is_named():
    assert ending(STOP_ID) == (FinishReason.STOP, STOP_ID)


def test_an_eos_that_is_also_a_stop_id_counts_as_eos():
    assert ending(EOS, stop_token_ids=frozenset({EOS})) == (FinishReason.STOP, None)


def test_every_eos_of_the_model_ends():
    eos_token_ids = frozenset({EOS, 11})  # generation_config may name several
    assert ending(11, eos_token_ids=eos_token_ids) == (FinishReason.STOP, None)
    assert ending(EOS, eos_token_ids=eos_token_ids) == (FinishReason.STOP, None)


def test_without_eos_ids_only_the_others_end():
    """ignore_eos: the engine gives no eos ids."""
    assert ending(EOS, eos_token_ids=frozenset()) == (None, None)


def test_max_tokens_ends_with_length():
    assert ending(PLAIN, num_before=2, max_tokens=4) == (None, None)
    assert ending(PLAIN, num_before=3, max_tokens=4) == (FinishReason.LENGTH, None)


def test_the_context_ends_with_length():
    assert ending(PLAIN, num_before=1, max_model_len=6) == (None, None)  # 3 + 2 tokens
    assert ending(PLAIN, num_before=2, max_model_len=6) == (FinishReason.LENGTH, None)


@pytest.mark.parametrize(("token_id", "stop_reason"), [(EOS, None), (STOP_ID, STOP_ID)])
def test_a_stop_on_the_very_last_token_is_a_stop_and_not_a_length(token_id: int, stop_reason: int | None):
    assert ending(token_id, num_before=3, max_tokens=4) == (FinishReason.STOP, stop_reason)
    assert ending(token_id, num_before=2, max_model_len=6) == (FinishReason.STOP, stop_reason)


@pytest.mark.parametrize("token_id", [EOS, STOP_ID])
def test_nothing_stops_below_min_tokens(token_id: int):
    assert ending(token_id, num_before=1, min_tokens=3) == (None, None)
    assert ending(token_id, num_before=2, min_tokens=3)[0] is FinishReason.STOP  # the third token may


def test_the_length_ends_even_below_min_tokens():
    assert ending(EOS, num_before=1, min_tokens=60, max_model_len=5) == (FinishReason.LENGTH, None)


# ------------------------------------------------------------------ state
def test_the_counters_follow_the_tokens():
    prompt = [1, 2, 3]
    request = make_request("r", prompt)
    assert (request.num_tokens, request.num_prompt_tokens, request.num_output_tokens) == (3, 3, 0)
    request.append_output_token(7, 64)
    request.append_output_token(8, 64)
    assert (request.num_tokens, request.num_prompt_tokens, request.num_output_tokens) == (5, 3, 2)
    assert request.all_token_ids == [1, 2, 3, 7, 8] and request.output_token_ids == [7, 8]
    assert prompt == [1, 2, 3]  # the caller's list is not ours to extend


def test_a_new_request_waits_and_has_nothing():
    request = make_request("r", [1])
    assert request.status is RequestStatus.WAITING and not request.is_finished
    assert (request.num_computed_tokens, request.num_cached_tokens, request.num_preemptions) == (0, 0, 0)
    assert request.block_hashes == [] and request.finish_reason is None


def test_a_request_without_sampling_params_is_a_pooling_request():
    assert Request("r", [1, 2], None).is_pooling
    assert not make_request("r", [1, 2]).is_pooling


def test_finish_reasons_are_the_words_of_the_wire():
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort", "error"]


def test_a_request_tells_where_it_is():
    request = make_request("r7", [1, 2, 3])
    assert repr(request) == "Request('r7', waiting, computed 0 of 3 tokens, prompt 3)"
    request.num_computed_tokens = 3
    request.append_output_token(EOS, max_model_len=4)
    assert repr(request) == "Request('r7', finished, computed 3 of 4 tokens, prompt 3)"
