"""Workloads of random token ids: the lengths of benchmarks/workload.py, cut to what the model's context holds.

Knows no engine. Called by measure.py and profile.py. Twin in vLLM: vllm/benchmarks/datasets.py (RandomDataset).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that come together. prompt, output: tokens, uniform in the closed range."""

    name: str
    num_requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "single": Workload("single", 1, (64, 64), (128, 128)),
        "w32": Workload("w32", 32, (16, 256), (32, 128)),
    }
)


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt, and how many tokens are drawn behind it."""

    prompt_token_ids: list[int]
    num_output_tokens: int


def jobs_of(workload: Workload, round_index: int, vocab_size: int, max_model_len: int) -> list[Job]:
    """The same lengths in each round, and other ids, so that no prefix cache answers from an earlier one."""
    lengths, ids = random.Random(workload.name), random.Random(f"{workload.name} {round_index}")

    def cut(range_: tuple[int, int]) -> int:
        return min(lengths.randint(*range_), max_model_len // 2)

    return [
        Job([ids.randrange(vocab_size) for _ in range(cut(workload.prompt))], cut(workload.output))
        for _ in range(workload.num_requests)
    ]
