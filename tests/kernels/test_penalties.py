"""penalties and logit_bias: the reference against a loop in Python and, bit for bit, against the engine's sampler."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels.penalties import logit_bias, penalties
from minivllm.sample.penalties import PenaltyState, apply_logit_bias, apply_penalties
from minivllm.sampling_params import SamplingParams
from tests.kernels.sampling_helpers import GuardedLogits, assert_same_bits, seen_lists

FLOAT32_MAX = float(np.finfo(np.float32).max)


def row_values(*values: float) -> torch.Tensor:  # [num_reqs] float64
    return torch.tensor(values, dtype=torch.float64)


def in_python(x: float, count: int, repetition: float, frequency: float, presence: float) -> float:
    """One logit, in Python's floats, rounded to fp32 by numpy."""
    if not math.isfinite(x):
        return x
    x = x / repetition if x > 0 else x * repetition
    x -= frequency * count + (presence if count > 0 else 0.0)
    return float(np.float32(min(max(x, -FLOAT32_MAX), FLOAT32_MAX)))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_every_logit_as_python_computes_it(data: st.DataObject):
    num_reqs, vocab_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    max_seen = data.draw(st.integers(1, 40))
    rows = [
        [data.draw(st.floats(0.1, 3.0)) for _ in range(num_reqs)],
        *([data.draw(st.floats(-2.0, 2.0)) for _ in range(num_reqs)] for _ in range(2)),
    ]
    guarded = GuardedLogits(num_reqs + 2, vocab_size, seed=data.draw(st.integers(0, 9)))
    logits = guarded.logits[:num_reqs]
    ids, counts, num_seen = (tensor[:num_reqs] for tensor in seen_lists(num_reqs + 2, vocab_size, max_seen))
    expected = logits.clone()
    for row in range(num_reqs):
        for token, count in zip(ids[row].tolist()[: num_seen[row]], counts[row].tolist(), strict=False):
            if 0 <= token < vocab_size:
                expected[row, token] = in_python(float(logits[row, token]), count, *(row_of[row] for row_of in rows))
    penalties(logits, ids.contiguous(), counts.contiguous(), num_seen, *(row_values(*row_of) for row_of in rows))
    assert_same_bits(logits, expected)
    guarded.assert_guards_are_untouched()


@pytest.mark.parametrize("vocab_size", [50, 8193, 10000])
def test_the_engines_sampler_gives_the_same_bits(vocab_size: int):
    generator = np.random.default_rng(3)
    logits = GuardedLogits(4, vocab_size).logits.clone()
    logits[0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, FLOAT32_MAX, -FLOAT32_MAX, -0.0])
    states = {}
    wanted = {0: (1.7, 2.0, -2.0), 1: (0.3, -1.1, 0.7), 3: (1.0, 0.5, 0.0)}
    for row, (repetition, frequency, presence) in wanted.items():
        params = SamplingParams(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
        prompt = [*range(6), *generator.integers(0, vocab_size + 9, 40).tolist()]
        states[row] = PenaltyState(params, vocab_size, prompt)
        for token in [0, 1, 2, 3, 3, *generator.integers(0, vocab_size, 30).tolist()]:
            states[row].append(token)

    ids, counts = (torch.full((4, 128), -7, dtype=torch.int32) for _ in range(2))
    num_seen, values = torch.zeros(4, dtype=torch.int32), torch.ones(3, 4, dtype=torch.float64)
    for row, state in states.items():
        num_seen[row] = size = len(state.token_ids)
        ids[row, :size] = torch.from_numpy(state.token_ids)
        counts[row, :size] = torch.from_numpy(state.output_counts)
        values[:, row] = row_values(state.repetition, state.frequency, state.presence)
    expected = logits.numpy().copy()
    apply_penalties(expected, states)
    penalties(logits, ids, counts, num_seen, *values)
    assert_same_bits(logits, torch.from_numpy(expected))


def test_neutral_penalties_change_nothing():
    guarded = GuardedLogits(2, 64)
    before = guarded.logits.clone()
    ids = torch.arange(64, dtype=torch.int32).repeat(2, 1)
    penalties(
        guarded.logits,
        ids,
        torch.ones_like(ids),
        torch.full((2,), 64, dtype=torch.int32),
        row_values(1, 1),
        row_values(0, 0),
        row_values(0, 0),
    )
    assert_same_bits(guarded.logits, before)


def test_the_bias_is_added_as_the_engine_does():
    logits = GuardedLogits(3, 100).logits.clone()
    ids = torch.tensor([[5, 99, 100], [0, 1, 2], [-1, 7, 8]], dtype=torch.int32)
    bias = torch.tensor([[1.5, -100.0, 9.0], [9.0, 9.0, 9.0], [9.0, 0.1, 9.0]])
    expected = logits.numpy().copy()
    apply_logit_bias(
        expected,
        {
            0: (np.array([5, 99]), np.array([1.5, -100.0], np.float32)),
            2: (np.array([7]), np.array([0.1], np.float32)),
        },
    )
    logit_bias(logits, ids, bias, torch.tensor([3, 0, 2], dtype=torch.int32))
    assert_same_bits(logits, torch.from_numpy(expected))


# ------------------------------------------------------------------ the contract
def lists(columns: int = 3, rows: int = 2) -> torch.Tensor:  # [rows, columns] int32
    return torch.full((rows, columns), -1, dtype=torch.int32)


def arguments(**changes: Any) -> dict[str, Any]:
    """A call that fits, with changes."""
    call = {
        "logits": torch.zeros(2, 40),
        "seen_token_ids": lists(),
        "output_counts": lists(),
        "num_seen": torch.zeros(2, dtype=torch.int32),
        **{name: row_values(1, 1) for name in ("repetition", "frequency", "presence")},
    }
    return {**call, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(2, 40).half()}, r"logits: expected .*, got \[2, 40\] torch.float16"),
        ({"logits": torch.zeros(40, 2).T}, r"logits: expected .* side by side, .* with strides \(1, 2\)"),
        ({"seen_token_ids": lists(3, 1)}, r"seen_token_ids: expected \[2, any\] int32, got \[1, 3\]"),
        ({"seen_token_ids": lists().long()}, r"seen_token_ids: expected .*, got \[2, 3\] torch.int64"),
        ({"output_counts": lists(4)}, r"output_counts: expected \[2, 3\] .* as seen_token_ids, got \[2, 4\]"),
        ({"output_counts": lists().float()}, r"output_counts: expected .*, got \[2, 3\] torch.float32"),
        ({"output_counts": lists(6)[:, ::2]}, r"seen_token_ids, output_counts: expected contiguous rows, got"),
        ({"num_seen": torch.zeros(3, dtype=torch.int32)}, r"num_seen: expected \[2\] torch.int32, got \[3\]"),
        ({"repetition": torch.ones(2)}, r"repetition: expected \[2\] torch.float64, got \[2\] torch.float32"),
        ({"frequency": row_values(1)}, r"frequency: expected \[2\] torch.float64, got \[1\]"),
        ({"presence": torch.ones(2)}, r"presence: expected \[2\] torch.float64, got \[2\] torch.float32"),
        ({"impl": "fast"}, r"impl: expected one of .*, got 'fast'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_every_wrong_argument_is_named_with_both_sides(changes: dict[str, Any], message: str):
    penalties(**arguments())
    with pytest.raises(ValueError, match=message):
        penalties(**arguments(**changes))


@pytest.mark.parametrize(
    ("ids", "bias", "num_ids", "message"),
    [
        (lists().long(), torch.zeros(2, 3), 2, r"token_ids: expected \[2, any\] int32, got \[2, 3\] torch.int64"),
        (lists(), torch.zeros(2, 4), 2, r"bias: expected \[2, 3\] torch.float32 as token_ids, got \[2, 4\]"),
        (lists(), torch.zeros(2, 3).double(), 2, r"bias: expected .*, got \[2, 3\] torch.float64"),
        (lists(), torch.zeros(2, 3), 1, r"num_ids: expected \[2\] torch.int32, got \[1\]"),
    ],
    ids=["ids", "columns", "dtype", "rows"],
)
def test_a_wrong_bias_is_named_with_both_sides(ids: torch.Tensor, bias: torch.Tensor, num_ids: int, message: str):
    with pytest.raises(ValueError, match=message):
        logit_bias(torch.zeros(2, 40), ids, bias, torch.zeros(num_ids, dtype=torch.int32))
