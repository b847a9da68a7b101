"""Groups of codes: GGUF's blocks become them without a change, and their rows are rows."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from minivllm.models.gguf import grouped_bits, read_gguf, read_grouped, read_tensor
from minivllm.models.grouped import GGUF_KINDS, GROUP_SIZE, from_gguf_blocks, join, round_to_int4

from .checkpoints import random_blocks, write_gguf
from .test_linear import random

ROWS, COLUMNS = 24, 512


def blocks_of(name: str, rows: int = ROWS, seed: int = 0) -> torch.Tensor:
    kind = GGMLQuantizationType[name]
    elements, num_bytes = GGML_QUANT_SIZES[kind]
    blocks = random_blocks(kind, rows * COLUMNS // elements, seed)
    return torch.from_numpy(blocks.reshape(rows, COLUMNS // elements * num_bytes))


@pytest.mark.parametrize("name", GGUF_KINDS)
def test_blocks_of_a_file_keep_every_bit(name: str):
    blocks = blocks_of(name)
    weight = from_gguf_blocks(name, blocks)
    exact = gguf.dequantize(blocks.numpy(), GGMLQuantizationType[name])
    assert weight.shape == (ROWS, COLUMNS) and weight.bits == (8 if name == "Q8_0" else 4)
    assert torch.equal(weight.dequantise(), torch.from_numpy(exact))
    codes = weight.integers()
    assert codes.shape == (ROWS, COLUMNS) and codes.max() == (127 if weight.bits == 8 else 15)


@pytest.mark.parametrize("name", GGUF_KINDS)
def test_rows_may_be_joined_and_reordered(name: str):
    first, second = (from_gguf_blocks(name, blocks_of(name, rows, seed)) for rows, seed in ((24, 1), (8, 2)))
    both = join([first, second])
    assert torch.equal(both.dequantise(), torch.cat([first.dequantise(), second.dequantise()]))
    turned = both.map_rows(lambda rows: rows.flip(0))
    assert torch.equal(turned.dequantise(), both.dequantise().flip(0))


def test_rounding_moves_a_value_by_half_a_step_at_most():
    weight = random(48, 96)
    rounded = round_to_int4(weight)
    steps = rounded.scales.repeat_interleave(GROUP_SIZE, dim=1)
    assert torch.all((rounded.dequantise() - weight).abs() <= 0.501 * steps)


def test_a_file_says_which_of_its_tensors_are_groups(tmp_path):
    kinds = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q8_0": 8, "Q5_0": None, "Q6_K": None}
    raw = {name: (blocks_of(name).numpy(), GGMLQuantizationType[name]) for name in kinds}
    plain = {"norm": np.ones(8, np.float32), "plain": np.ones((8, 32), np.float32)}
    file = read_gguf(write_gguf(tmp_path / "m.gguf", tensors=plain, raw=raw))
    found = {name: grouped_bits(tensor) for name, tensor in file.tensors.items()}
    assert found == kinds | {"norm": None, "plain": None}
    for name in GGUF_KINDS:
        assert torch.equal(read_grouped(file, name).dequantise(), read_tensor(file, name))
