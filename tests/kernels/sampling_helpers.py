"""Rows of logits inside larger memory, and what surrounds them must stay as it is. For the sampler's operations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from tests.kernels.helpers import as_bits

VOCAB_SIZES = (1, 31, 32, 33, 8193, 10000, 49152, 151936)
GUARD = 48  # values in front of and behind each row


class GuardedLogits:
    """`logits` [num_reqs, vocab_size] fp32, normal values of size 5, between guards of NaN with a payload."""

    def __init__(self, num_reqs: int, vocab_size: int, seed: int = 0):
        self.memory = torch.full((num_reqs, vocab_size + 2 * GUARD), 0x7FC0BEEF, dtype=torch.int32).view(torch.float32)
        self.logits = self.memory[:, GUARD : GUARD + vocab_size]
        values = 5 * np.random.default_rng(seed).standard_normal((num_reqs, vocab_size), dtype=np.float32)
        self.logits.copy_(torch.from_numpy(values))

    def assert_guards_are_untouched(self) -> None:
        for guard in (self.memory[:, :GUARD], self.memory[:, -GUARD:]):
            assert (as_bits(guard) == 0x7FC0BEEF).all(), "something was written beside a row"


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:  # [...], [...]
    assert torch.equal(as_bits(got), as_bits(expected))


def random_bitmask(num_reqs: int, vocab_size: int, seed: int = 0) -> torch.Tensor:  # [num_reqs, num_words] int32
    """All densities of bits: every row and stretch has its own."""
    generator = np.random.default_rng(seed)
    num_words = -(-vocab_size // 32)
    density = generator.random((num_reqs, num_words, 1))
    bits = generator.random((num_reqs, num_words, 32)) < density
    return torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little").view(np.int32)[..., 0])


def seen_lists(
    num_reqs: int, vocab_size: int, max_seen: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # [num_reqs, max_seen] int32 twice, [num_reqs] int32
    """Distinct ids, one of them outside the vocabulary; row 0 is full, row 1 has none, behind the lists is poison."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, vocab_size, (num_reqs, max_seen))  # poison: ids that would be in range
    counts = generator.integers(1, 9, (num_reqs, max_seen))
    num_seen = generator.integers(0, min(max_seen, vocab_size) + 1, num_reqs)
    num_seen[:2] = min(max_seen, vocab_size), 0
    for row, size in enumerate(num_seen):
        ids[row, :size] = generator.permutation(vocab_size)[:size]
        counts[row, : size // 2] = 0  # of the prompt only
        if size > 2:
            ids[row, :3] = (vocab_size, -1, 2**31 - 1)
    return tuple(torch.from_numpy(array).int() for array in (ids, counts, num_seen))  # type: ignore[return-value]


class Settings(NamedTuple):
    """What top_k_top_p_sample takes beside the logits."""

    temperature: torch.Tensor  # [num_reqs] float64
    top_k: torch.Tensor  # [num_reqs] int32
    top_p: torch.Tensor  # [num_reqs] float64
    min_p: torch.Tensor  # [num_reqs] float64
    uniform: torch.Tensor  # [num_reqs] float64

    def moved_by(self, step: float) -> Settings:
        """Slightly more (step > 0) or less is kept, and the uniform numbers move."""
        share = (self.top_p * (1 + step)).clamp(0, 1 - 2.0**-53)
        return self._replace(
            top_p=torch.where(self.top_p < 1, share, self.top_p),
            min_p=self.min_p * (1 - step),
            uniform=(self.uniform + step).clamp(0, 1 - 2.0**-53),
        )


def random_settings(num_reqs: int, which: str, seed: int = 0) -> Settings:
    """`which` restriction is on: none, top_k, top_p, min_p or all."""
    generator = np.random.default_rng(seed)
    on = {name: which in (name, "all") for name in ("top_k", "top_p", "min_p")}
    top_k = generator.integers(1, 60, num_reqs) if on["top_k"] else np.zeros(num_reqs)
    return Settings(
        temperature=torch.from_numpy(generator.uniform(0.5, 2.0, num_reqs)),
        top_k=torch.from_numpy(top_k).int(),
        top_p=torch.from_numpy(generator.uniform(0.05, 0.99, num_reqs) if on["top_p"] else np.ones(num_reqs)),
        min_p=torch.from_numpy(generator.uniform(1e-3, 0.3, num_reqs) if on["min_p"] else np.zeros(num_reqs)),
        uniform=torch.from_numpy(generator.random(num_reqs)),
    )
