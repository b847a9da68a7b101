"""uniform(seed, position): reproducible for ever, uniform along every axis that requests use."""

from __future__ import annotations

import pytest

from minivllm.sample.random import mix64, uniform
from tests.sample.helpers import chi_square_deviation
from tests.tolerances import CHI_SQUARE_DEVIATIONS

NUM_DRAWS = 20_000


def test_mix64_reproduces_the_published_splitmix64_sequence():
    gamma = 0x9E3779B97F4A7C15
    outputs = [mix64(1234567 + step * gamma) for step in range(1, 6)]
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_draws_never_change_from_release_to_release():
    drawn = [uniform(seed, position).hex() for seed, position in ((0, 0), (0, 1), (1, 0), (42, 1000), (-5, 7))]
    assert drawn == [
        "0x1.c4415072f63b9p-1",
        "0x1.b9e279aa86e58p-2",
        "0x1.7fdf0061bb85ap-1",
        "0x1.b021712762231p-1",
        "0x1.c1eca984a74d4p-3",
    ]


def test_any_64_bit_seed_gives_numbers_in_the_half_open_unit_interval():
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, 10**30]
    assert all(0.0 <= uniform(seed, position) < 1.0 for seed in seeds for position in (0, 1, 2**31))
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)


@pytest.mark.parametrize(
    "axis",
    [
        lambda i: (17, i),  # one request, token after token
        lambda i: (i, 0),  # first tokens of requests with consecutive seeds
        lambda i: (i, i),
        lambda i: (2**40 * i, 5),  # seeds that differ in high bits only
        lambda i: (i * 0x9E3779B97F4A7C15, 3),  # seeds a stream's step apart
    ],
    ids=["positions", "seeds", "both", "high-bits", "gamma-apart"],
)
def test_draws_are_uniform_along(axis):
    counts = [0] * 100
    for i in range(NUM_DRAWS):
        counts[int(100 * uniform(*axis(i)))] += 1
    assert abs(chi_square_deviation(counts, [0.01] * 100)) < CHI_SQUARE_DEVIATIONS


@pytest.mark.parametrize(
    "neighbour",
    [lambda i: (5, i + 1), lambda i: (6, i), lambda i: (5 + 0x9E3779B97F4A7C15, i), lambda i: (i, 5)],
    ids=["next-position", "next-seed", "gamma-apart", "swapped"],
)
def test_neighbouring_draws_are_independent(neighbour):
    counts = [0] * 256
    for i in range(NUM_DRAWS):
        counts[16 * int(16 * uniform(5, i)) + int(16 * uniform(*neighbour(i)))] += 1
    assert abs(chi_square_deviation(counts, [1 / 256] * 256)) < CHI_SQUARE_DEVIATIONS


def test_every_bit_of_the_mantissa_is_fair():
    bits = [[0, 0] for _ in range(53)]
    for i in range(NUM_DRAWS):
        mantissa = int(uniform(9, i) * 2**53)
        for bit in range(53):
            bits[bit][mantissa >> bit & 1] += 1
    worst = max(abs(chi_square_deviation(pair, [0.5, 0.5])) for pair in bits)
    assert worst < CHI_SQUARE_DEVIATIONS
