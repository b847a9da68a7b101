"""How one attention launch is cut: rows per tile, keys per tile, and splits of long contexts.

    tiles x KV heads programs fill the device      -> no splits
    fewer than four per multiprocessor             -> contexts are cut until there are about four

A split costs a second kernel and a round trip of its partial results through memory, so no split is shorter than
MIN_SPLIT_LEN keys. The rule looks at the multiprocessors and the longest context, not at the batch alone: cut by
batch size, a step falls off a cliff where one more request switches splitting off.

Knows no Triton and no tensor but shapes; the report reads it too. Called by kernel.py. Twin in vLLM:
v1/attention/backends/triton_attn.py (where the choice is made).
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch

MIN_SPLIT_LEN = 128  # keys: two tiles, so that one is loaded while the other is multiplied
MAX_SPLITS = 64
PROGRAMS_PER_MULTIPROCESSOR = 4  # 8 requests of 8,192 keys on an H200: 81 us, with two 93
MIN_BLOCK_M = 16  # rows of the smallest matrix product that tensor cores do
PREFILL_BLOCK_M = 64

# Head size up to -> (keys per tile, warps, stages). Each row compiles without spills on all targets of
# `python -m minivllm.kernels.report`. A decode only waits for memory: long tiles. On an H200 two of them loading beat
# three (64 requests of 8,192 keys: 507 against 639 us): more programs fit side by side. A prefill multiplies:
# its 64 rows fill the registers, so tiles are shorter, and from 256 dimensions on eight warps share them. (64 keys at
# 128 dimensions are 10 % faster on an H200, and spill on an A100.)
DECODE = MappingProxyType({64: (64, 4, 2), 128: (64, 4, 2), 256: (32, 4, 3)})
PREFILL = MappingProxyType({64: (64, 4, 2), 128: (32, 4, 2), 256: (32, 8, 2)})
# Codes wait in registers to become values: the tiles above spill on sm_80 (prefill 64) and gfx942 (256), two stages on
# sm_80 and sm_90.
QUANTISED_DECODE = MappingProxyType({64: (64, 4, 3), 128: (64, 4, 3), 256: (32, 4, 3)})
QUANTISED_PREFILL = MappingProxyType({64: (32, 4, 3), 128: (32, 4, 2), 256: (16, 8, 2)})
FIXED = MappingProxyType(
    {64: (32, 4, 2), 128: (32, 4, 2), 256: (32, 4, 2)}
)  # batch-invariant: one for decode and prefill
MAX_HEAD_SIZE = 256


@dataclass(frozen=True)
class Launch:
    """The shape of one launch.

    block_m: query rows of a program, heads of one KV head side by side; block_q: tokens among them.
    split_len: keys per split, a multiple of tile; num_splits 1: none.
    """

    block_m: int
    block_q: int
    tile: int
    num_tiles: int
    num_splits: int
    split_len: int
    num_warps: int
    num_stages: int  # tiles of keys that are loaded ahead


def choose_launch(
    num_tokens: int,
    num_reqs: int,
    max_seq_len: int,
    num_kv_heads: int,
    group: int,
    head_size: int,
    *,
    multiprocessors: int,
    batch_invariant: bool = False,
    has_slopes: bool = False,
    is_quantised: bool = False,
) -> Launch:
    """The launch for one step."""
    is_decode = num_tokens == num_reqs
    block_m = max(MIN_BLOCK_M, next_power_of_2(group))
    if not is_decode and not batch_invariant:  # invariant rows have one tile in every step
        block_m = max(block_m, PREFILL_BLOCK_M)
    block_q = block_m // group
    decode, prefill = (QUANTISED_DECODE, QUANTISED_PREFILL) if is_quantised else (DECODE, PREFILL)
    config = FIXED if batch_invariant else decode if is_decode else prefill
    size = next(limit for limit in sorted(config) if head_size <= limit)
    tile, num_warps, num_stages = config[size]
    if has_slopes and config is prefill and size == 128:
        tile = 16  # the slopes take the registers of half a tile on sm_80
    split_len, num_splits = -(-max_seq_len // tile) * tile, 1
    if is_decode and not batch_invariant:
        wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // (num_reqs * num_kv_heads)
        wanted = max(1, min(wanted, MAX_SPLITS, max_seq_len // MIN_SPLIT_LEN))
        split_len = -(-max_seq_len // (wanted * tile)) * tile
        num_splits = -(-max_seq_len // split_len)
    num_tiles = num_tokens // block_q + num_reqs
    return Launch(block_m, block_q, tile, num_tiles, num_splits, split_len, num_warps, num_stages)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 where there is none, so that the interpreter splits only what is asked for."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
