"""The GGUF container: a table of metadata, a table of tensors, then the bytes.

    "GGUF" version  num_tensors num_metadata
    key, type, value                            ... num_metadata times
    name, dimensions, ggml type, offset         ... num_tensors times
    padding to general.alignment, then the data

A model file is hostile input (Ollama's CVE-2026-7482, llama.cpp's integer overflows): every length is compared
with what is left of the file before anything is read or allocated, so a truncated or forged file is one ConfigError.
The quantised formats are decoded by the `gguf` package; its GGUFReader is not used, because it needs seven
seconds of CPU for a vocabulary of 49,152 tokens and checks no bounds.

This module does not know what the names mean (models/gguf_to_hf.py does) nor which model they build.
Called by: models/loader.py, engine/tokenizer.py (vocabulary and merges). Twin in vLLM:
vllm/model_executor/model_loader/gguf_loader.py.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from minivllm.errors import ConfigError
from minivllm.models.grouped import GGUF_KINDS, GroupedWeight, from_gguf_blocks

SUPPORTED_VERSIONS = (2, 3)
SUPPORTED_TYPES = tuple(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
)
UNQUANTIZED_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)

# Far above what any model has, far below what would hurt.
MAX_STRING_BYTES = 1 << 20  # the longest honest strings are chat templates, below 64 KiB
MAX_ARRAY_LENGTH = 1 << 22  # the largest vocabularies have about 2**18 tokens and twice as many merges
MAX_METADATA = 1 << 16
MAX_TENSORS = 1 << 20
MAX_DIMENSIONS = 4  # ggml's own limit

# Elements decoded at a time: small enough for the CPU cache, four times as fast as the whole tensor at once.
CHUNK_ELEMENTS = 1 << 17  # a multiple of every block size (32, 256)

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies in the file."""

    name: str
    shape: tuple[int, ...]  # torch's order: slowest dimension first
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A parsed header. The data stays in the file until `read_tensor`."""

    path: Path
    metadata: dict[str, Any]  # scalars as int, float, bool, str; arrays as lists of those
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, for example "llama". ConfigError when the file has none."""
        return self.require("general.architecture", str)

    @property
    def is_quantized(self) -> bool:
        """True when some tensor is stored in blocks of a few bits."""
        return any(tensor.type not in UNQUANTIZED_TYPES for tensor in self.tensors.values())

    def require(self, key: str, kind: type) -> Any:
        """The metadata value under `key`. ConfigError when it is missing or not a `kind` (int, float, str, list)."""
        value = self.metadata.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            got = "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
            raise _bad_file(self.path, f"expected metadata {key} of type {kind.__name__}, got {got}")
        return value


def read_gguf(path: str | Path, *, with_vocabulary: bool = True) -> GGUFFile:
    """Parse and check the header of a GGUF file; no tensor data is read.

    with_vocabulary=False leaves arrays of strings empty, which saves two thirds of the 0.1 s.

    Raises ConfigError, with the place in the file, for anything that is not a whole, little-endian GGUF of
    version 2 or 3 with tensors of SUPPORTED_TYPES.
    """
    path = Path(path)
    cursor = _Cursor(path, _map(path), with_vocabulary)
    if cursor.take(4, "the magic number") != b"GGUF":
        raise _bad_file(path, "expected a file that begins with the bytes 'GGUF'")
    version = cursor.scalar("I", "the version")
    if version not in SUPPORTED_VERSIONS:
        hint = " (a big-endian file)" if version and version & 0xFFFF == 0 else ""
        raise _bad_file(path, f"expected GGUF version {' or '.join(map(str, SUPPORTED_VERSIONS))}, got {version}{hint}")
    num_tensors = cursor.count("Q", MAX_TENSORS, 24, "the number of tensors")
    num_metadata = cursor.count("Q", MAX_METADATA, 13, "the number of metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(num_metadata):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise _bad_file(path, f"metadata {key[:80]!r} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I", key), key)
    if metadata.get("split.count", 1) not in (0, 1):
        raise _bad_file(path, "it is one part of a split model (join the parts with llama-gguf-split --merge)")
    tensors = _read_tensor_table(cursor, num_tensors, metadata.get("general.alignment", 32))
    return GGUFFile(path, metadata, tensors)


def read_tensor(
    file: GGUFFile,
    name: str,
    dtype: torch.dtype = torch.float32,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Decode one tensor to `dtype`, a piece at a time, so that the float32 values are never held all at once.

    `transform` is applied element by element to the float32 values, before they are rounded to `dtype`.
    Returns a tensor of the shape in `file.tensors[name]`; ConfigError when the file has become shorter since.
    """
    tensor = file.tensors[name]
    block_elements, block_bytes = GGML_QUANT_SIZES[tensor.type]
    raw = _raw_bytes(file, tensor)
    out = torch.empty(math.prod(tensor.shape), dtype=dtype)
    for start in range(0, out.numel(), CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, out.numel())
        blocks = raw[start // block_elements * block_bytes : stop // block_elements * block_bytes]
        # One long row: the package decodes 16 rows at a time, which for short rows is mostly overhead.
        with np.errstate(all="ignore"):  # a NaN or infinite scale is the model's business, not a warning
            values = torch.from_numpy(dequantize(np.array(blocks).reshape(1, -1), tensor.type).reshape(-1))
        out[start:stop] = values if transform is None else transform(values)
    return out.reshape(tensor.shape)


def grouped_bits(tensor: GGUFTensor) -> int | None:
    """4 or 8 where `read_grouped` can read the tensor, else None."""
    is_grouped = tensor.type.name in GGUF_KINDS and len(tensor.shape) == 2
    return {"Q4": 4, "Q8": 8}[tensor.type.name[:2]] if is_grouped else None


def read_grouped(file: GGUFFile, name: str) -> GroupedWeight:
    """A tensor that has `grouped_bits`, in the bits of the file. ConfigError when the file has become shorter since."""
    tensor = file.tensors[name]
    blocks = np.array(_raw_bytes(file, tensor)).reshape(tensor.shape[0], -1)  # [out_features, row_bytes]
    return from_gguf_blocks(tensor.type.name, torch.from_numpy(blocks))


def _raw_bytes(file: GGUFFile, tensor: GGUFTensor) -> np.ndarray:  # -> [num_bytes] uint8, a view of the file
    data = _map(file.path)
    if tensor.offset + tensor.num_bytes > len(data):
        raise _bad_file(file.path, f"it became shorter while it was read (tensor {tensor.name!r})")
    return np.frombuffer(data, np.uint8, tensor.num_bytes, tensor.offset)


def _bad_file(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path.name} is not a usable GGUF file: {what}. Fetch the file again or give another one.", parameter="model"
    )


def _map(path: Path) -> mmap.mmap:
    """The file as read-only memory: pages are fetched when they are touched."""
    try:
        with path.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise _bad_file(path, f"it cannot be opened ({error})") from error


class _Cursor:
    """Reads forward through the header; `take` is the only place that touches the file, and it checks the bounds."""

    def __init__(self, path: Path, data: mmap.mmap, keep_strings: bool):
        self.path = path
        self.keep_strings = keep_strings  # of arrays
        self.data = data
        self.size = len(data)
        self.position = 0

    def take(self, num_bytes: int, what: str) -> bytes:
        stop = self.position + num_bytes
        if stop > self.size:
            missing = f"{what[:80]} needs {num_bytes} bytes at {self.position}, the file ends at {self.size}"
            raise _bad_file(self.path, missing)
        piece = self.data[self.position : stop]
        self.position = stop
        return piece

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, code: str, limit: int, min_bytes_each: int, what: str) -> int:
        """A count of things of at least `min_bytes_each` bytes: so many must still fit into the file."""
        count = self.scalar(code, what)
        possible = (self.size - self.position) // min_bytes_each
        if count > min(limit, possible):
            raise _bad_file(self.path, f"{what[:80]} is {count}, expected at most {min(limit, possible)}")
        return int(count)

    def string(self, what: str) -> str:
        length = self.count("Q", MAX_STRING_BYTES, 1, f"the length of {what}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _bad_file(self.path, f"{what[:80]} is not UTF-8 text") from error

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise _bad_file(self.path, f"{what[:80]} has the unknown type {kind}")
        element = self.scalar("I", what)
        if element in _SCALARS:
            code = _SCALARS[element]
            width = struct.calcsize("<" + code)
            count = self.count("Q", MAX_ARRAY_LENGTH, width, f"the length of {what}")
            return list(struct.unpack(f"<{count}{code}", self.take(count * width, what)))
        if element != _STRING:  # arrays of arrays exist in the specification, not in any model
            raise _bad_file(self.path, f"{what[:80]} is an array of the unsupported type {element}")
        return self.strings(self.count("Q", MAX_ARRAY_LENGTH, 8, f"the length of {what}"), what)

    def strings(self, count: int, what: str) -> list[str]:
        """What `count` calls of `string` give, five times as fast: a vocabulary has 10**5 of them."""
        unpack, data, position, strings = struct.Struct("<Q").unpack_from, self.data, self.position, []
        try:
            for _ in range(count):
                (length,) = unpack(data, position)
                position += 8 + length
                if length > MAX_STRING_BYTES or position > self.size:
                    raise _bad_file(self.path, f"{what[:80]} has a string of {length} bytes, which does not fit")
                if self.keep_strings:
                    strings.append(data[position - length : position].decode("utf-8"))
        except (UnicodeDecodeError, struct.error) as error:
            raise _bad_file(self.path, f"{what[:80]} ends too early or is not UTF-8 text") from error
        self.position = position
        return strings


def _read_tensor_table(cursor: _Cursor, num_tensors: int, alignment: Any) -> dict[str, GGUFTensor]:
    if isinstance(alignment, bool) or not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise _bad_file(cursor.path, f"general.alignment must be in [1, {1 << 20}], got {str(alignment)[:40]}")
    entries = [_read_tensor_entry(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    end_of_previous = 0
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(shape) // block_elements * block_bytes
        if name in tensors:
            raise _bad_file(cursor.path, f"tensor {name!r} occurs twice")
        if offset < end_of_previous:
            raise _bad_file(cursor.path, f"tensor {name!r} lies inside another tensor")
        end_of_previous = offset + num_bytes
        if data_start + end_of_previous > cursor.size:
            raise _bad_file(
                cursor.path,
                f"tensor {name!r} ends at byte {data_start + end_of_previous}, the file at {cursor.size}: it was cut",
            )
        tensors[name] = GGUFTensor(name, shape, kind, data_start + offset, num_bytes)
    return tensors


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.string("a tensor name")[:200]
    num_dimensions = cursor.count("I", MAX_DIMENSIONS, 8, f"the number of dimensions of {name!r}")
    shape = tuple(reversed([cursor.scalar("Q", name) for _ in range(num_dimensions)]))
    code = cursor.scalar("I", name)
    offset = cursor.scalar("Q", name)
    kind = next((supported for supported in SUPPORTED_TYPES if supported == code), None)
    if kind is None:
        names = ", ".join(supported.name for supported in SUPPORTED_TYPES)
        known = GGMLQuantizationType(code).name if code in set(GGMLQuantizationType) else f"number {code}"
        raise _bad_file(cursor.path, f"tensor {name!r} has the unsupported format {known}; supported: {names}")
    block_elements = GGML_QUANT_SIZES[kind][0]
    # Python's integers do not overflow: a forged shape is a huge number here, and too large for the file.
    if not shape or min(shape) < 1 or shape[-1] % block_elements:
        raise _bad_file(cursor.path, f"tensor {name!r} has shape {list(shape)}, not rows of whole {kind.name} blocks")
    return name, shape, kind, offset
