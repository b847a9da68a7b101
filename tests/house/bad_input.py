"""Wrong input of many kinds, and what comes of it, as a JSON list: `python -O -m tests.house.bad_input MODEL_FOLDER`.

Run with and without -O, the two must be equal: an assert that guards something shows as a difference.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minivllm import LLM, BeamSearchParams, SamplingParams
from minivllm.kernels.paged_attention import AttentionMetadata, paged_attention
from minivllm.kernels.reshape_and_cache import reshape_and_cache
from minivllm.kernels.rms_norm import rms_norm

BAD_PARAMS: tuple[dict[str, Any], ...] = (
    {"n": 0},
    {"best_of": 0},
    {"temperature": math.nan},
    {"temperature": "hot"},
    {"top_p": 0.0},
    {"top_k": -2},
    {"min_p": 1.5},
    {"repetition_penalty": 0.0},
    {"max_tokens": 0},
    {"max_tokens": 3, "min_tokens": 4},
    {"logprobs": -1},
    {"seed": 2**63},
    {"stop": ["", "x"]},
    {"stop_token_ids": [-1]},
    {"bad_words": 7},
    {"allowed_token_ids": []},
    {"logit_bias": {1: math.inf}},
    {"logit_bias": {1_000_000: 1.0}},  # beyond the vocabulary, like the next two
    {"allowed_token_ids": [1_000_000]},
    {"stop_token_ids": [1_000_000]},
)
BAD_PROMPTS: tuple[Any, ...] = (
    "",
    [],
    [-1],
    [1_000_000],
    ["a", 1],
    {"prompt_token_ids": [1.5]},
    {"prompt": None},
    {"text": "x"},
    list(range(10, 300)),  # longer than the context of 128
    7,
)
BAD_SETTINGS: tuple[dict[str, Any], ...] = (
    {"dtype": "int3"},
    {"block_size": 0},
    {"max_model_len": 0},
    {"max_model_len": 10_000},
    {"max_num_seqs": -1},
    {"max_num_batched_tokens": 0},
    {"num_gpu_blocks_override": 1},
    {"gpu_memory_utilization": 2.0},
    {"scheduling_policy": "luck"},
    {"model": "no/such/folder"},
)


def what_comes_of(call: Callable[[], Any]) -> str:
    """The exception with its parameter and message, or the value."""
    try:
        value = call()
    except Exception as error:
        return f"{type(error).__name__}({getattr(error, 'parameter', None)}): {error}"
    return f"no error: {value!r}"


def answers(folder: Path) -> list[str]:
    """One line for each wrong call; after them the number of free blocks and the answer to a good call."""

    def load(settings: dict[str, Any]) -> LLM:
        return LLM(**{"model": folder, **settings})

    def generate(prompt: Any, **params: Any) -> list[int]:
        output = llm.generate(prompt, SamplingParams(**params), use_tqdm=False)[0]
        return output.outputs[0].token_ids

    lines = [what_comes_of(partial(load, settings)) for settings in BAD_SETTINGS]
    llm = LLM(folder, dtype="float32", num_gpu_blocks_override=32)
    lines += [what_comes_of(partial(generate, "the value", **params)) for params in BAD_PARAMS]
    lines += [what_comes_of(partial(generate, prompt)) for prompt in BAD_PROMPTS]
    lines.append(what_comes_of(lambda: llm.beam_search("the value", BeamSearchParams(0))))
    lines.append(what_comes_of(lambda: llm.embed("", use_tqdm=False)))
    lines.append(what_comes_of(lambda: llm.chat([{"role": "user"}], SamplingParams(), use_tqdm=False)))
    lines += _kernels()
    scheduler = llm.llm_engine.scheduler
    scheduler.check_integrity()
    lines.append(f"free blocks: {scheduler.kv_cache.pool.num_free_blocks}")
    lines.append(what_comes_of(lambda: generate("the value", temperature=0, max_tokens=5, ignore_eos=True)))
    return lines


def _kernels() -> list[str]:
    rows, cache, slots = torch.zeros(2, 2, 8), torch.zeros(2, 4, 4, 8), torch.tensor([4, 99])
    metadata = AttentionMetadata([0, 2], [2], torch.tensor([[1]], dtype=torch.int32), torch.tensor([4, 5]), 4)
    outside = replace(metadata, block_table=torch.tensor([[9]], dtype=torch.int32))
    return [
        what_comes_of(lambda: reshape_and_cache(rows, rows, cache, cache, slots)),
        what_comes_of(lambda: paged_attention(rows, cache, cache, outside, scale=1.0)),
        what_comes_of(lambda: paged_attention(rows, cache, cache, metadata, scale=1.0, sliding_window=0)),
        what_comes_of(lambda: rms_norm(rows, torch.ones(7), 1e-5)),
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(answers(Path(sys.argv[1]))))
