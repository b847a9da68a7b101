"""top_k_top_p_sample in the interpreter: the float64 reference's tokens and sets, and the shares of each token."""

import pytest
import torch

from minivllm.kernels.top_k_top_p import Sampled, top_k_top_p_sample
from tests.kernels.helpers import poisoned_memory
from tests.kernels.sampling_helpers import VOCAB_SIZES, GuardedLogits, Settings, random_settings
from tests.tolerances import PROBABILITY_ATOL


def run(logits: torch.Tensor, settings: Settings) -> Sampled:
    """The kernel, on poisoned memory. logits: [num_reqs, vocab_size]"""
    with poisoned_memory():
        return top_k_top_p_sample(logits, *settings, impl="triton")


def assert_agree(logits: torch.Tensor, settings: Settings) -> Sampled:
    """Returns what the kernel gave. logits: [num_reqs, vocab_size].

    Where a sum of weights meets its limit up to rounding, the next token may be the one: the reference with a slightly
    smaller or larger share, or uniform number, must then agree.
    """
    kernel = run(logits, settings)
    lower, exact, upper = (
        top_k_top_p_sample(logits.double(), *settings.moved_by(step * PROBABILITY_ATOL), impl="reference")
        for step in (-1, 0, 1)
    )
    for row in range(len(logits)):
        ids = {int(found.token_ids[row]) for found in (lower, exact, upper)}
        assert int(kernel.token_ids[row]) in ids, row
        assert int(lower.num_kept[row]) <= int(kernel.num_kept[row]) <= int(upper.num_kept[row]), row
    return kernel


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("which", ["none", "top_k", "top_p", "min_p", "all"])
def test_every_vocabulary_and_restriction(vocab_size: int, which: str):
    num_reqs = 2 if vocab_size > 10000 else 6
    assert_agree(GuardedLogits(num_reqs, vocab_size).logits, random_settings(num_reqs, which))


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 50.0])
def test_every_temperature(temperature: float):
    settings = random_settings(4, "all")._replace(temperature=torch.full((4,), temperature, dtype=torch.float64))
    assert_agree(GuardedLogits(4, 8193).logits, settings)
    free = random_settings(4, "none")._replace(temperature=settings.temperature)
    assert_agree(GuardedLogits(4, 8193).logits, free)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_only_differences_of_logits_count(offset: float):
    """Weights are taken from the largest logit: nothing overflows."""
    logits = (GuardedLogits(3, 500).logits * 8).round() / 8 + offset  # exact in fp32
    found = assert_agree(logits, random_settings(3, "all"))
    assert found.token_ids.tolist() == run(logits - offset, random_settings(3, "all")).token_ids.tolist()


def test_a_flat_row_needs_every_token_as_a_candidate():
    """No lane's maximum weighs enough here, and the candidates are more than are looked at together."""
    logits = GuardedLogits(3, 5000).logits / 1000
    settings = random_settings(3, "none")
    settings = settings._replace(top_p=torch.tensor([0.999, 0.5, 0.01], dtype=torch.float64))
    found = assert_agree(logits, settings)
    assert found.num_kept.tolist() == pytest.approx([4995, 2500, 50], abs=len(logits[0]) // 200)


def test_ties_at_the_edge():
    """Eight values of 50 tokens: top_k keeps all equals of the k-th, top_p the lower ids first."""
    logits = GuardedLogits(4, 50).logits.round().clamp(-4, 3)
    logits[3] = 0.0
    logits[3, ::2] = -0.0
    for k, p in ((1, 1.0), (7, 1.0), (0, 0.25), (20, 0.3), (0, 0.0)):
        settings = random_settings(4, "none")._replace(
            top_k=torch.full((4,), k, dtype=torch.int32), top_p=torch.full((4,), p, dtype=torch.float64)
        )
        uniform = torch.tensor([0.0, 0.37, 0.8, 1 - 2.0**-53], dtype=torch.float64)
        assert_agree(logits, settings._replace(uniform=uniform))


def test_an_edge_that_is_met_exactly_belongs_to_one_side():
    """Four equal tokens: half the weight is two of them, and the number 1/2 draws the third."""
    logits = torch.full((3, 9), -torch.inf)
    logits[:, 3:7] = 1.0
    settings = random_settings(3, "none")._replace(
        top_p=torch.tensor([0.5, 1.0, 0.75], dtype=torch.float64),
        top_k=torch.tensor([0, 4, 0], dtype=torch.int32),
        uniform=torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64),
    )
    found = run(logits, settings)
    assert found.num_kept.tolist() == [2, 4, 3]
    assert found.token_ids.tolist() == [4, 5, 3]


def test_top_k_counts_tokens_that_a_coarse_bound_cannot_tell_apart():
    logits = 100 + torch.arange(300.0).flip(0)[None] / 1024
    for k in (1, 5, 37):
        settings = random_settings(1, "none")._replace(
            top_k=torch.tensor([k], dtype=torch.int32), uniform=torch.tensor([1 - 2.0**-53], dtype=torch.float64)
        )
        found = run(logits, settings)
        assert (found.num_kept.tolist(), found.token_ids.tolist()) == ([k], [k - 1])


@pytest.mark.parametrize("which", ["none", "top_k", "top_p", "min_p", "all"])
def test_masked_and_broken_rows(which: str):
    """NaN, +inf and nothing left give -1; a masked token is never drawn; no row spoils another."""
    logits = GuardedLogits(7, 8193).logits
    logits[1, 77], logits[2, 8192], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, :8190] = -torch.inf
    logits[5, 1:] = -torch.inf
    found = run(logits, random_settings(7, which))
    assert found.token_ids[1:4].tolist() == [-1] * 3
    assert found.num_kept[1:4].tolist() == [0] * 3
    kept = torch.tensor([0, 4, 5, 6])
    settings = Settings(*(values[kept] for values in random_settings(7, which)))
    assert assert_agree(logits[kept], settings).token_ids.tolist() == found.token_ids[kept].tolist()


@pytest.mark.parametrize("largest_uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_uniform_numbers_draw_a_real_token(largest_uniform: float):
    """The last token of the last tile weighs nothing: exp underflows."""
    logits = torch.zeros(1, 8193)
    logits[0, 5:] = -1e30
    for which in ("none", "top_p"):
        settings = random_settings(1, which)._replace(
            uniform=torch.tensor([largest_uniform], dtype=torch.float64),
            top_p=torch.tensor([1.0 if which == "none" else 0.99999], dtype=torch.float64),
            temperature=torch.ones(1, dtype=torch.float64),
        )
        assert run(logits, settings).token_ids.tolist() == [4 if largest_uniform else 0]


@pytest.mark.parametrize("which", ["none", "top_k", "top_p", "min_p", "all"])
def test_a_row_draws_the_same_alone_and_in_a_batch(which: str):
    logits, settings = GuardedLogits(5, 500).logits, random_settings(5, which)
    together = run(logits, settings)
    for row in range(5):
        alone = run(logits[row : row + 1].clone(), Settings(*(values[row : row + 1].clone() for values in settings)))
        assert [values.tolist() for values in alone] == [values[row : row + 1].tolist() for values in together]


@pytest.mark.parametrize(("top_k", "expected"), [(0, [3, 6, 9, 12]), (3, [0, 20 / 3, 10, 40 / 3])])
def test_even_uniform_numbers_draw_each_token_by_its_share(top_k: int, expected: list[float]):
    """Four tokens of weights 1 to 4, 30 numbers evenly over [0, 1): the counts are known up to one draw."""
    num_draws = 30
    settings = random_settings(num_draws, "none")._replace(
        temperature=torch.full((num_draws,), 2.0, dtype=torch.float64),
        top_k=torch.full((num_draws,), top_k, dtype=torch.int32),
        uniform=(torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws,
    )
    logits = (2.0 * torch.arange(1.0, 5.0).log()).repeat(num_draws, 1)
    counts = run(logits, settings).token_ids.bincount(minlength=4).tolist()
    assert all(abs(count - share) < 1 for count, share in zip(counts, expected, strict=True)), counts


def test_offsets_beyond_two_to_the_31_are_right():
    """Rows that lie 2^27 values apart: only the touched pages exist."""
    stride, num_reqs = 2**27, 18
    memory = torch.empty((num_reqs - 1) * stride + 64)
    assert memory.numel() > 2**31
    logits = memory.as_strided((num_reqs, 64), (stride, 1))
    logits.copy_(GuardedLogits(num_reqs, 64).logits)
    assert_agree(logits, random_settings(num_reqs, "none"))


def test_an_id_that_does_not_fit_into_a_key_is_refused():
    with pytest.raises(ValueError, match="at most 1048576 tokens, got 1048577"):
        run(torch.zeros(1, 2**20 + 1), random_settings(1, "none"))


def test_no_rows_are_no_launch():
    assert [list(values.shape) for values in run(torch.empty(0, 8), random_settings(0, "all"))] == [[0], [0]]
