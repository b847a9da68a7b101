"""The only source of chance in the engine: one uniform number for (seed, position), and nothing else.

A counter-based generator has no state to carry: the number for the 7th output token of a request is the same
alone, in a batch, after a preemption and in any order of evaluation. Plain Python integers; a device kernel can
repeat it with 64-bit multiplications.

It does NOT know requests, batches or logits. Called by sample/sampler.py.
Twin in vLLM: the per-request torch.Generator of v1/worker, and the (seed, position, token) hash of its V2 sampler.
Source: SplitMix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd


def mix64(value: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit integers in which every input bit moves every output bit."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2**-53: output `position` (0-based) of the SplitMix64 stream of mix64(seed).

    The seed is mixed first because the children of one request use seed, seed + 1, ...; without it two seeds that
    differ by a multiple of the increment would share one stream. Any integers are accepted, taken modulo 2**64.
    """
    state = mix64(seed) + (position + 1) * _GAMMA
    return (mix64(state) >> 11) * 2.0**-53
