"""The tile of the output that one program computes.

Knows no Triton and no tensor; the report reads it too. Called by kernel.py and builds.py. Twin in vLLM: the tables of
tile sizes in model_executor/layers/quantization.
"""

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Tile:
    """block_m rows, block_n outputs, block_k columns at a time; 4 bits: a multiple of every group size."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int  # tiles of codes that are loaded ahead


# Rows up to -> tile; 0: any more. Up to 16 rows, the fewest of a tensor instruction, a product only waits for its
# weights: narrow tiles make many programs (128 for 4,096 outputs), long columns keep loads 128 bits wide (gfx942 and
# its 256 threads need 256 columns of 4 bits for that), four tiles are on their way. Up to 64 rows one tile of rows
# reads each weight once, and half as many programs will do. Beyond, products count: a tile as large as registers allow
# without spills on any target of `python -m minivllm.kernels.report`. 4 bits become values in registers: that is paid
# once for 128 rows, and 128 x 128 spills on sm_80.
INT8 = MappingProxyType({16: Tile(16, 32, 128, 4, 4), 64: Tile(64, 64, 64, 4, 3), 0: Tile(128, 128, 64, 8, 3)})
INT4 = MappingProxyType({16: Tile(16, 32, 256, 4, 4), 64: Tile(64, 64, 128, 4, 2), 0: Tile(128, 64, 128, 8, 2)})


def choose_tile(num_tokens: int, *, is_int4: bool) -> Tile:
    """By the number of rows alone."""
    table = INT4 if is_int4 else INT8
    return table[next((limit for limit in (16, 64) if num_tokens <= limit), 0)]
