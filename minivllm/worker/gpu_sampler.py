"""The sampler for logits that live on a GPU: sample/sampler.py's steps, in its order, by minivllm.kernels.

    grammar bitmask ─▶ raw logits kept ─▶ allowed and banned ids ─▶ logit_bias ─▶ penalties ─▶ draw ─▶ logprobs

Logits stay on the device. What goes there is as long as what requests ask for, a greedy step's is five numbers per row;
what comes back is one small tensor.
The uniform numbers are the host's (sample/random.py), so both samplers draw the same tokens up to rounding.

Knows no request. Called by gpu.py. Twin in vLLM: vllm/v1/worker/gpu/sample/sampler.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from minivllm.kernels.logprobs import logprobs
from minivllm.kernels.penalties import logit_bias, penalties
from minivllm.kernels.token_bitmask import token_bitmask
from minivllm.kernels.top_k_top_p import top_k_top_p_sample
from minivllm.outputs import TokenLogprobs
from minivllm.sample.metadata import SamplingMetadata
from minivllm.sample.random import uniform
from minivllm.sample.sampler import NO_TOKEN, SamplerOutput, reason


def sample_on_device(logits: torch.Tensor, metadata: SamplingMetadata, *, impl: str = "auto") -> SamplerOutput:
    """sample/sampler.py's `sample`: the same contract, the same tokens up to rounding.

    logits: [num_reqs, vocab_size] fp32, spent afterwards
    """
    if metadata.grammar_bitmask is not None:
        token_bitmask(logits, metadata.grammar_bitmask.to(logits.device), impl=impl)
    wants_logprobs = any(number is not None for number in metadata.num_logprobs)
    is_changed = any(map(metadata.changes_logits, range(len(logits))))
    raw = logits.clone() if wants_logprobs and is_changed else logits
    _change(logits, metadata, impl)
    token_ids = _draw(logits, metadata, impl)
    columns = [token_ids[:, None]]
    num_top = min(max(number or 0 for number in metadata.num_logprobs), logits.shape[1])
    if wants_logprobs:
        found = logprobs(raw, token_ids, num_top, impl=impl)
        columns += [found.ranks[:, None], found.logprobs[:, None], found.top_token_ids, found.top_logprobs]
    rows = torch.cat([column.double() for column in columns], dim=1).tolist()  # the one copy; ids are exact in it
    return _output(logits, rows, metadata, num_top)


# ------------------------------------------------------------------ from the host
def _change(logits: torch.Tensor, metadata: SamplingMetadata, impl: str) -> None:  # [num_reqs, vocab_size]
    """Masks, bias and penalties, in place; what no request asks for costs nothing."""
    if metadata.allowed_token_ids or metadata.banned_token_ids:
        token_bitmask(logits, _allowed_bits(metadata, logits.shape[1]).to(logits.device), impl=impl)
    if metadata.logit_bias:
        logit_bias(logits, *_lists(logits, metadata.logit_bias, torch.float32), impl=impl)
    states = metadata.penalties
    if states:
        seen = {row: (state.token_ids, state.output_counts) for row, state in states.items()}
        settings = np.ones((3, len(logits)))  # of rows without penalties nothing is read
        for row, state in states.items():
            settings[:, row] = state.repetition, state.frequency, state.presence
        on_device = torch.from_numpy(settings).to(logits.device)
        penalties(logits, *_lists(logits, seen, torch.int32), *on_device, impl=impl)


def _draw(
    logits: torch.Tensor,  # [num_reqs, vocab_size]
    metadata: SamplingMetadata,
    impl: str,
) -> torch.Tensor:  # [num_reqs] int64, NO_TOKEN where there is no distribution
    """Where every row is greedy the largest logit is all that is looked for: torch spreads a row over many programs,
    the kernel gives it one (0.1 ms for 128,000 tokens on an H100, of a step of 1.4). Both take the first of equals."""
    if not any(metadata.temperature):
        largest, token_ids = logits.max(dim=1)  # NaN is the largest of all
        return torch.where(largest.isfinite(), token_ids, NO_TOKEN)
    temperature, top_k, top_p, min_p, numbers = _settings(metadata).to(logits.device)  # [num_reqs] each
    return top_k_top_p_sample(logits, temperature, top_k.int(), top_p, min_p, numbers, impl=impl).token_ids


def _settings(metadata: SamplingMetadata) -> torch.Tensor:  # [5, num_reqs] float64: one copy for all of them
    numbers = [uniform(*pair) for pair in zip(metadata.seeds, metadata.positions, strict=True)]
    columns = (metadata.temperature, metadata.top_k, metadata.top_p, metadata.min_p, numbers)
    return torch.tensor(columns, dtype=torch.float64)


def _allowed_bits(metadata: SamplingMetadata, vocab_size: int) -> torch.Tensor:  # [num_reqs, num_words] int32
    """What allowed_token_ids and the banned ids leave."""
    bits = np.ones((len(metadata.seeds), -(-vocab_size // 32) * 32), dtype=bool)
    for row, ids in metadata.allowed_token_ids.items():
        bits[row] = False
        bits[row, ids] = True
    for row, banned in metadata.banned_token_ids.items():
        bits[row, banned] = False
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32))


def _lists(
    logits: torch.Tensor,  # [num_reqs, vocab_size]
    rows: Mapping[int, tuple[np.ndarray, np.ndarray]],  # row -> ids [num_ids], values [num_ids]
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # [num_reqs, longest] int32 and `dtype`, [num_reqs] int32
    longest = max(len(ids) for ids, _ in rows.values())
    padded_ids = torch.full((len(logits), longest), -1, dtype=torch.int32)
    padded_values = torch.zeros(len(logits), longest, dtype=dtype)
    sizes = torch.zeros(len(logits), dtype=torch.int32)
    for row, (ids, values) in rows.items():
        sizes[row] = len(ids)
        padded_ids[row, : len(ids)] = torch.from_numpy(ids)
        padded_values[row, : len(ids)] = torch.from_numpy(values)
    return padded_ids.to(logits.device), padded_values.to(logits.device), sizes.to(logits.device)


# ------------------------------------------------------------------ back to the host
def _output(
    logits: torch.Tensor,  # [num_reqs, vocab_size] as they were drawn from
    rows: list[list[float]],
    metadata: SamplingMetadata,
    num_top: int,
) -> SamplerOutput:
    """rows: token id, and where logprobs were wanted rank, logprob, num_top ids, num_top logprobs."""
    tokens = [int(row[0]) for row in rows]
    broken = [index for index, token_id in enumerate(tokens) if token_id == NO_TOKEN]
    errors: dict[int, str] = {}
    if broken:  # only now: the largest logit of such a row says what is wrong with it
        errors = {index: reason(value) for index, value in zip(broken, logits[broken].amax(1).tolist(), strict=True)}
    entries: list[TokenLogprobs | None] = [None] * len(tokens)
    for index, number in enumerate(metadata.num_logprobs):
        if number is None or index in errors:
            continue
        rank, own, *best = rows[index][1:]
        kept = min(number, num_top)
        if own != own:  # NaN: NaN or +inf that a mask has hidden from the draw
            errors[index], tokens[index] = reason(own), NO_TOKEN
            continue
        ids = [tokens[index], *map(int, best[:kept])]
        entries[index] = TokenLogprobs(ids, [own, *best[num_top : num_top + kept]], int(rank))
    return SamplerOutput(tokens, entries, errors)
