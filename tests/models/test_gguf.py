"""The GGUF container: formats against a scalar reading of ggml's definition, and forged files."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from minivllm.errors import ConfigError
from minivllm.models import gguf as container
from minivllm.models.gguf import read_gguf, read_tensor

from .checkpoints import metadata, random_blocks, write_gguf

KINDS = {kind.name: kind for kind in container.SUPPORTED_TYPES}
QUANTIZED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


# ------------------------------------------------------------------ formats


def half(block: np.ndarray, at: int) -> np.float32:
    return np.float32(block[at : at + 2].view(np.float16)[0])


def decode_32(name: str, block: np.ndarray) -> list[np.float32]:
    """One block of 32 values, value by value, as ggml's dequantize_row_* defines them."""
    with_minimum = name.endswith("_1")
    scale, minimum = half(block, 0), half(block, 2) if with_minimum else np.float32(0)
    if name == "Q8_0":
        return [scale * np.float32(q) for q in block[2:].view(np.int8)]
    quants = block[-16:]
    high = int(block[-20:-16].view("<u4")[0]) if name.startswith("Q5") else 0
    offset = 0 if with_minimum else (16 if name.startswith("Q5") else 8)
    values = []
    for j in range(32):
        low = int(quants[j % 16]) >> (4 * (j // 16)) & 15
        quant = np.float32((low | (high >> j & 1) << 4) - offset)
        values.append(scale * quant + minimum if with_minimum else scale * quant)
    return values


def k_scale(packed: np.ndarray, j: int) -> tuple[int, int]:
    """The j-th 6-bit scale and minimum out of 12 bytes."""
    q = [int(byte) for byte in packed]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return q[j + 4] & 15 | q[j - 4] >> 6 << 4, q[j + 4] >> 4 | q[j] >> 6 << 4


def decode_k(name: str, block: np.ndarray) -> list[np.float32]:
    """One super-block of 256 values in Q4_K or Q5_K."""
    quants = block[-128:]
    high = block[16:48] if name == "Q5_K" else np.zeros(32, np.uint8)
    values = []
    for j in range(256):
        group, position = j // 32, j % 32
        scale, minimum = k_scale(block[4:16], group)
        low = int(quants[group // 2 * 32 + position]) >> (4 * (group % 2)) & 15
        quant = np.float32(low + (16 if int(high[position]) >> group & 1 else 0))
        values.append(half(block, 0) * np.float32(scale) * quant - half(block, 2) * np.float32(minimum))
    return values


def decode_q6_k(block: np.ndarray) -> list[np.float32]:
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    values = []
    for j in range(256):
        part, row, position = j // 128, j % 128 // 32, j % 32
        quant = int(low[part * 64 + row % 2 * 32 + position]) >> (4 * (row // 2)) & 15
        quant |= (int(high[part * 32 + position]) >> (2 * row) & 3) << 4
        scale = half(block, 208) * np.float32(scales[part * 8 + row * 2 + position // 16])
        values.append(scale * np.float32(quant - 32))
    return values


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    function = decode_q6_k if name == "Q6_K" else lambda block: (decode_k if "K" in name else decode_32)(name, block)
    return np.array([function(block) for block in blocks], np.float32)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_tensor_has_the_values_of_ggmls_definition(name, tmp_path, monkeypatch):
    monkeypatch.setattr(container, "CHUNK_ELEMENTS", 512)  # so that a tensor is decoded in several pieces
    kind = KINDS[name]
    rows, columns = 7, 768
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = random_blocks(kind, rows * columns // block_elements, seed=1)
    file = read_gguf(
        write_gguf(tmp_path / "x.gguf", raw={"w": (blocks.reshape(rows, -1), kind), "v": (blocks[:24], kind)})
    )
    expected = decode(name, blocks).reshape(rows, columns)
    found = read_tensor(file, "w")
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), expected)
    assert torch.equal(read_tensor(file, "w", torch.bfloat16), found.bfloat16())
    assert file.is_quantized


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_written_tensor_comes_back_as_the_package_decodes_it(name, tmp_path):
    weight = np.random.default_rng(2).standard_normal((5, 64)).astype(np.float32)
    file = read_gguf(write_gguf(tmp_path / "x.gguf", tensors={"w": weight}, kind=KINDS[name]))
    expected = gguf.dequantize(gguf.quantize(weight, KINDS[name]), KINDS[name])
    assert np.array_equal(read_tensor(file, "w").numpy(), expected)
    if name == "F32":
        assert np.array_equal(expected, weight)
    assert file.is_quantized == name.startswith("Q")


def test_a_transform_is_applied_before_rounding(tmp_path):
    weight = (1 + np.arange(1, 65, dtype=np.float32) / 1024).reshape(2, 32)
    file = read_gguf(write_gguf(tmp_path / "x.gguf", tensors={"w": weight}))
    found = read_tensor(file, "w", torch.bfloat16, lambda values: values - 1)
    assert torch.equal(found, torch.from_numpy(weight - 1).bfloat16())
    assert not torch.equal(found, torch.from_numpy(weight).bfloat16() - 1)


# ------------------------------------------------------------------ metadata


def test_metadata_is_what_the_packages_reader_finds(tmp_path):
    values = metadata("llama") | {
        "general.name": "tiny Ünï",
        "a.flag": True,
        "a.float": 0.1,
        "a.strings": ["x", "", "日本語"],
        "a.ints": [1, -2, 3],
        "a.floats": [0.5, 1.5],
    }
    path = write_gguf(tmp_path / "x.gguf", values=values, tensors={"w": np.ones((2, 3), np.float32)})
    found = read_gguf(path).metadata
    theirs = {k: f.contents() for k, f in GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    assert found == theirs
    assert found["a.flag"] is True and found["a.strings"] == ["x", "", "日本語"]


def test_shapes_are_in_torchs_order(tmp_path):
    file = read_gguf(write_gguf(tmp_path / "x.gguf", tensors={"w": np.ones((2, 3), np.float32)}))
    assert file.tensors["w"].shape == (2, 3)
    assert not file.is_quantized


# ------------------------------------------------------------------ truncated and forged files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> bytes:
    values = metadata("llama") | {"tokenizer.ggml.tokens": ["a", "bc", "def"], "tokenizer.ggml.scores": [0.0, 1.0, 2.0]}
    tensors = {
        "one": np.ones((2, 32), np.float32),
        "two": np.ones((3, 32), np.float32),
        "three": np.ones(5, np.float32),
    }
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, values=values, tensors=tensors, kind=KINDS["Q8_0"]).read_bytes()


def test_a_file_cut_at_any_byte_is_a_config_error(tiny, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny)
    end = max(tensor.offset + tensor.num_bytes for tensor in read_gguf(path).tensors.values())
    for size in range(end):
        path.write_bytes(tiny[:size])
        with pytest.raises(ConfigError, match="cut.gguf"):
            read_gguf(path)


def test_any_changed_byte_gives_a_file_or_a_config_error(tiny, tmp_path):
    path = tmp_path / "changed.gguf"
    rng = np.random.default_rng(3)
    outcomes = {True: 0, False: 0}
    for _ in range(1500):
        forged = bytearray(tiny)
        for position in rng.integers(4, 900, rng.integers(1, 4)):
            forged[position] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
        path.write_bytes(forged)
        try:
            file = read_gguf(path)
            for name in file.tensors:
                read_tensor(file, name)
            outcomes[True] += 1
        except ConfigError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 50, outcomes  # both happen, so the test means something


def forge(tiny: bytes, position: int, code: str, value: int) -> bytes:
    packed = struct.pack("<" + code, value)
    return tiny[:position] + packed + tiny[position + len(packed) :]


def tensor_table_at(tiny: bytes) -> int:
    return tiny.index(struct.pack("<Q", 3) + b"one")


FORGERIES = {
    "not the magic number": lambda b: b"GGML" + b[4:],
    "version 1": lambda b: forge(b, 4, "I", 1),
    "big-endian": lambda b: b[:4] + b[4:8][::-1] + b[8:],
    "10^18 tensors": lambda b: forge(b, 8, "Q", 10**18),
    "10^18 metadata entries": lambda b: forge(b, 16, "Q", 10**18),
    "a key of 2^63 bytes": lambda b: forge(b, 24, "Q", 2**63),
    "a key of 2^64 - 8 bytes": lambda b: forge(b, 24, "Q", 2**64 - 8),
    "an array of 2^61 strings": lambda b: forge(b, b.index(b"ggml.tokens") + 11 + 8, "Q", 2**61),
    "an array of 2^62 floats": lambda b: forge(b, b.index(b"ggml.scores") + 11 + 8, "Q", 2**62),
    "an array of arrays": lambda b: forge(b, b.index(b"ggml.tokens") + 11 + 4, "I", 9),
    "an unknown value type": lambda b: forge(b, b.index(b"ggml.tokens") + 11, "I", 77),
    "a string that is not UTF-8": lambda b: b.replace(b"def", b"d\xff\xfe"),
    "2^31 dimensions": lambda b: forge(b, tensor_table_at(b) + 11, "I", 2**31),
    "no dimensions": lambda b: forge(b, tensor_table_at(b) + 11, "I", 0),
    "a dimension of 0": lambda b: forge(b, tensor_table_at(b) + 15, "Q", 0),
    "a dimension of 2^63": lambda b: forge(b, tensor_table_at(b) + 15, "Q", 2**63),
    "a product of 2^64": lambda b: forge(
        forge(b, tensor_table_at(b) + 15, "Q", 2**32), tensor_table_at(b) + 23, "Q", 2**32
    ),
    "a row of half a block": lambda b: forge(b, tensor_table_at(b) + 15, "Q", 16),
    "an unknown tensor type": lambda b: forge(b, tensor_table_at(b) + 31, "I", 999),
    "an unsupported tensor type": lambda b: forge(b, tensor_table_at(b) + 31, "I", GGMLQuantizationType.IQ1_S),
    "an offset past the end": lambda b: forge(b, tensor_table_at(b) + 35, "Q", 2**40),
    "an offset that overflows": lambda b: forge(b, tensor_table_at(b) + 35, "Q", 2**64 - 32),
    "two tensors of one name": lambda b: b.replace(b"two", b"one"),
    "tensors inside each other": lambda b: forge(b, b.index(b"\3\0\0\0\0\0\0\0two") + 35, "Q", 32),
    "two values of one key": lambda b: b.replace(b"ggml.scores", b"ggml.tokens"),
    "empty": lambda b: b"",
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_file_is_refused_without_taking_memory(what, tiny, tmp_path):
    path = tmp_path / "forged.gguf"
    path.write_bytes(FORGERIES[what](tiny))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="forged.gguf is not a usable GGUF file: .+ Fetch the file again"):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_absurdly_long_metadata_string_is_refused(tmp_path):
    values = metadata("llama") | {"tokenizer.ggml.tokens": ["a", "b" * (10 << 20)]}
    path = write_gguf(tmp_path / "x.gguf", values=values)
    with pytest.raises(ConfigError, match="tokenizer.ggml.tokens"):
        read_gguf(path)


@pytest.mark.parametrize("alignment", [0, 1 << 30])
def test_an_impossible_alignment_is_refused(alignment, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", values=metadata("llama") | {"general.align_ment": 32})
    key, value = b"general.align_ment", struct.pack("<I", alignment)
    data = path.read_bytes().replace(struct.pack("<Q", 18) + key, struct.pack("<Q", 17) + b"general.alignment")
    at = data.index(b"general.alignment") + 17 + 4
    path.write_bytes(data[:at] + value + data[at + 4 :])
    with pytest.raises(ConfigError, match="general.alignment"):
        read_gguf(path)


def test_one_part_of_a_split_model_is_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", values=metadata("llama") | {"split.count": 3})
    with pytest.raises(ConfigError, match="split model"):
        read_gguf(path)


def test_a_file_that_shrinks_while_it_is_read_is_a_config_error(tiny, tmp_path):
    path = tmp_path / "shrinking.gguf"
    path.write_bytes(tiny)
    file = read_gguf(path)
    path.write_bytes(tiny[:500])
    with pytest.raises(ConfigError, match="shorter"):
        read_tensor(file, "three")


@pytest.mark.parametrize("name", ["missing.gguf", "."])
def test_a_path_that_is_no_file_is_a_config_error(name, tmp_path):
    with pytest.raises(ConfigError, match="cannot be opened"):
        read_gguf(Path(tmp_path / name))
