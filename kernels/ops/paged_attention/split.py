"""How one attention launch is cut: rows per tile, keys per tile, and splits of long contexts.

    tiles x KV heads programs fill the device      -> no splits
    fewer than two per multiprocessor              -> contexts are cut until there are about two

A split costs a second kernel and a round trip of its partial results through memory, so no split is shorter than
MIN_SPLIT_LEN keys. The rule looks at the multiprocessors and the longest context, not at the batch alone: cut by
batch size, a step falls off a cliff where one more request switches splitting off.

Knows no Triton and no tensor but shapes; the report reads it too. Called by kernel.py. Twin in vLLM:
v1/attention/backends/triton_attn.py (where the choice is made).
"""

from dataclasses import dataclass

import torch

MIN_SPLIT_LEN = 256  # keys
MAX_SPLITS = 64
PROGRAMS_PER_MULTIPROCESSOR = 2
MIN_BLOCK_M = 16  # rows of the smallest matrix product that tensor cores do


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
) -> Launch:
    """The launch for one step."""
    is_decode = num_tokens == num_reqs
    block_m = max(MIN_BLOCK_M, next_power_of_2(group))
    if not is_decode or batch_invariant:  # one tile for both, so that a decode's bits equal a prefill's
        block_m = max(block_m, 16 if batch_invariant else 64)
    block_q = block_m // group
    # Decodes only wait for memory: a longer tile has more loads in flight. Beside 64 rows of 128 dimensions a tile of
    # 64 keys does not fit into the registers of sm_80 (40 bytes per thread spilled).
    wide = head_size > 128 if is_decode else head_size >= 128
    tile = 32 if wide or batch_invariant else 64
    num_tiles = num_tokens // block_q + num_reqs
    split_len = -(-max_seq_len // tile) * tile
    num_splits = 1
    if is_decode and not batch_invariant:
        wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // max(1, num_reqs * num_kv_heads)
        wanted = max(1, min(wanted, MAX_SPLITS, max_seq_len // MIN_SPLIT_LEN))
        split_len = -(-max_seq_len // (wanted * tile)) * tile
        num_splits = -(-max_seq_len // split_len)
    return Launch(block_m, block_q, tile, num_tiles, num_splits, split_len, num_warps=4)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 where there is none, so that the interpreter splits only what is asked for."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
