"""top_k_top_p_sample: the reference by hand, against the engine's sampler, and by chi-square; the contract."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from minivllm.kernels.top_k_top_p import top_k_top_p_sample
from minivllm.sample.metadata import SamplingMetadata
from minivllm.sample.random import uniform as uniform_of
from minivllm.sample.sampler import final_probabilities, sample
from tests.kernels.sampling_helpers import GuardedLogits, Settings, random_settings
from tests.tolerances import CHI_SQUARE_DEVIATIONS

WHICH = ("none", "top_k", "top_p", "min_p", "all")


def one_row(u: float, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Settings:
    """Settings of a single request."""
    values = (temperature, float(top_k), top_p, min_p, u)
    settings = Settings(*(torch.tensor([value], dtype=torch.float64) for value in values))
    return settings._replace(top_k=settings.top_k.int())


@pytest.mark.parametrize(
    ("settings", "token", "num_kept"),
    [
        (one_row(0.05), 0, 5),  # by id: 1 | 4 | 2 | 2 | 1 tenths
        (one_row(0.2), 1, 5),
        (one_row(0.95), 4, 5),
        (one_row(0.95, temperature=0.0), 1, 1),
        (one_row(0.95, top_k=1), 1, 1),
        (one_row(0.6, top_k=2), 2, 3),  # 4 | 2 | 2: both equals are kept
        (one_row(0.8, top_k=2), 3, 3),
        (one_row(0.99, top_p=0.45), 2, 2),  # 4 | 2: the lower id of the equals
        (one_row(0.99, top_p=0.0), 1, 1),
        (one_row(0.99, min_p=0.3), 3, 3),
        (one_row(0.99, top_p=0.7), 3, 3),  # less than 7 of 10 lies before the third
        (one_row(0.99, top_k=2, top_p=0.7), 2, 2),  # less than 5.6 of the 8 that top_k left: not before the third
        (one_row(0.05, top_k=5), 0, 5),  # as many as there are: off
    ],
    ids=lambda value: "-".join(f"{float(part):g}" for part in value) if isinstance(value, Settings) else str(value),
)
def test_five_tokens_by_hand(settings: Settings, token: int, num_kept: int):
    logits = torch.tensor([[1.0, 4.0, 2.0, 2.0, 1.0]], dtype=torch.float64).log()
    found = top_k_top_p_sample(logits, *settings)
    assert (found.token_ids.tolist(), found.num_kept.tolist()) == ([token], [num_kept])


def engine_metadata(settings: Settings, seeds: list[int], positions: list[int]) -> SamplingMetadata:
    """The same settings for the engine's sampler."""
    temperature, top_k, top_p, min_p, _ = (values.tolist() for values in settings)
    return SamplingMetadata(temperature, top_k, top_p, min_p, seeds, positions, [None] * len(seeds))


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("vocab_size", [1, 33, 8193])
@pytest.mark.parametrize("greedy", [False, True])
def test_the_engine_draws_the_same_tokens_from_the_same_sets(which: str, vocab_size: int, greedy: bool):
    """With the engine's uniform number of each seed and position."""
    logits, seeds, positions = GuardedLogits(20, vocab_size).logits.clone(), list(range(20)), list(range(5, 25))
    logits[3, vocab_size // 2 :] = -torch.inf
    logits[4] = logits[4].round()
    settings = random_settings(20, which)._replace(
        uniform=torch.tensor([uniform_of(*pair) for pair in zip(seeds, positions, strict=True)], dtype=torch.float64)
    )
    if greedy:
        settings = settings._replace(temperature=torch.zeros(20, dtype=torch.float64))
    metadata = engine_metadata(settings, seeds, positions)
    found = top_k_top_p_sample(logits, *settings)
    possible = final_probabilities(logits, metadata)  # [20, vocab_size]
    assert found.token_ids.tolist() == sample(logits.clone(), metadata).sampled_token_ids
    if greedy or which != "none":
        assert found.num_kept.tolist() == (possible > 0).sum(dim=1).tolist()
    else:
        assert found.num_kept.tolist() == [0 if row.isnan().all() else vocab_size for row in possible]


def test_rows_without_a_distribution():
    logits = torch.zeros(4, 5)
    logits[0, 2], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    found = top_k_top_p_sample(logits, *random_settings(4, "all"))
    assert found.token_ids.tolist()[:3] == [-1] * 3
    assert found.num_kept.tolist()[:3] == [0] * 3
    assert found.token_ids[3] >= 0


@pytest.mark.parametrize(("top_k", "weights"), [(0, [1, 2, 3, 4]), (3, [0, 2, 3, 4])])
def test_draws_follow_the_distribution(top_k: int, weights: list[int]):
    """20,000 draws with the engine's uniform numbers."""
    num_draws = 20_000
    numbers = [uniform_of(11, position) for position in range(num_draws)]
    settings = random_settings(num_draws, "none")._replace(
        temperature=torch.full((num_draws,), 2.0, dtype=torch.float64),
        top_k=torch.full((num_draws,), top_k, dtype=torch.int32),
        uniform=torch.tensor(numbers, dtype=torch.float64),
    )
    logits = (2.0 * torch.arange(1.0, 5.0).log()).repeat(num_draws, 1)
    observed = np.bincount(top_k_top_p_sample(logits, *settings).token_ids.numpy(), minlength=4)
    expected = num_draws * np.array(weights) / sum(weights)
    possible = expected > 0
    assert (observed[~possible] == 0).all()
    chi_square = float(((observed - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + CHI_SQUARE_DEVIATIONS * math.sqrt(2 * freedom)


def arguments(**changes: Any) -> dict[str, Any]:
    """A call that fits, with changes."""
    return {"logits": torch.zeros(2, 40), **random_settings(2, "all")._asdict(), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(40)}, r"logits: expected \[num_reqs, vocab_size\] float32 .*, got \[40\]"),
        ({"logits": torch.zeros(2, 40).half()}, r"logits: expected .*, got \[2, 40\] torch.float16"),
        ({"logits": torch.zeros(40, 2).T}, r"logits: expected .* side by side, .* with strides \(1, 2\)"),
        ({"logits": torch.zeros(2, 0)}, r"logits: expected at least one token, got \[2, 0\]"),
        ({"temperature": torch.ones(2)}, r"temperature: expected \[2\] torch.float64, got \[2\] torch.float32"),
        ({"top_k": torch.ones(2)}, r"top_k: expected \[2\] torch.int32, got \[2\] torch.float32"),
        ({"top_p": torch.ones(3).double()}, r"top_p: expected \[2\] torch.float64, got \[3\]"),
        ({"min_p": torch.ones(2)}, r"min_p: expected \[2\] torch.float64, got \[2\] torch.float32"),
        ({"uniform": torch.ones(1).double()}, r"uniform: expected \[2\] torch.float64, got \[1\]"),
        ({"impl": "fast"}, r"impl: expected one of .*, got 'fast'"),
    ],
    ids=["dimensions", "dtype", "columns", "no tokens", "temperature", "top_k", "top_p", "min_p", "uniform", "impl"],
)
def test_every_wrong_argument_is_named_with_both_sides(changes: dict[str, Any], message: str):
    top_k_top_p_sample(**arguments())
    with pytest.raises(ValueError, match=message):
        top_k_top_p_sample(**arguments(**changes))
