"""A Hugging Face model folder, read as if an enemy had packed it.

Checked here, before any library sees a file: JSON files are small, flat, objects and name no code (`auto_map`);
weights are safetensors, never pickles; a shard's name is a plain name inside the folder; a safetensors header fits its
file and its tensors fill the file exactly. Each failure is one ConfigError that says what was expected, what came and
what to do. The anchors are CVE-2025-24357 (pickles), CVE-2025-66448 and CVE-2026-22807 (`auto_map`).

Knows no architecture and no torch; reads headers, never tensor data. Called by: models/loader.py,
engine/tokenizer.py (`check_tokenizer_files`). Twin in vLLM: vllm/model_executor/model_loader/weight_utils.py.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minivllm.errors import ConfigError

MiB = 1 << 20
# Largest honest files known: config.json 20 kB, tokenizer_config.json 1.2 MB, index 9 MB, tokenizer.json 33 MB.
MAX_CONFIG_BYTES = 1 * MiB
MAX_TOKENIZER_CONFIG_BYTES = 16 * MiB
MAX_INDEX_BYTES = 64 * MiB
MAX_TOKENIZER_BYTES = 256 * MiB
MAX_ENTRY_BYTES = 1 * MiB  # one string in a tokenizer file; the longest honest ones are tables of 0.4 MB
MAX_HEADER_BYTES = 100 * MiB  # the limit of the safetensors library
MAX_DEPTH = 100  # of nested JSON: who reads it later may recurse, too
MAX_DIMENSIONS = 8

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")

_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class FolderTensor:
    """One tensor as its shard's header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling: "F32", "BF16", ...
    shard: Path


def refuse(folder: Path, what: str, do: str = "Fetch the model again, or use another one.") -> ConfigError:
    """The error for a folder that cannot be used: what was expected and got, and what to do."""
    return ConfigError(f"Model folder {folder.name!r} cannot be used: {what}. {do}", parameter="model")


def read_json(folder: Path, name: str, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file.

    Raises ConfigError when it is too large, no JSON object, nested too deeply, or names code to run.
    """
    content: dict[str, Any] | None = _read_value(folder, name, max_bytes, dict, "object")
    return content


def read_json_list(folder: Path, name: str, max_bytes: int = MAX_CONFIG_BYTES) -> list[Any] | None:
    """As read_json, for a file that holds a list."""
    content: list[Any] | None = _read_value(folder, name, max_bytes, list, "list")
    return content


def check_tokenizer_files(folder: Path) -> None:
    """Refuse tokenizer files that are too large, name code, or hold one absurdly long entry. Reads, returns nothing."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"):
        read_json(folder, name, MAX_TOKENIZER_CONFIG_BYTES)
    _read_small(folder, "chat_template.jinja", MAX_ENTRY_BYTES)
    _read_small(folder, "tokenizer.model", MAX_TOKENIZER_BYTES)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json"):
        raw = _read_small(folder, name, MAX_TOKENIZER_BYTES)
        if raw is not None and _longest_entry(raw, b'"' if name.endswith(".json") else b"\n") > MAX_ENTRY_BYTES:
            raise refuse(folder, f"{name} has an entry of more than {MAX_ENTRY_BYTES} bytes")


def list_tensors(folder: Path) -> dict[str, FolderTensor]:
    """Every tensor of the folder's safetensors files by name, after checking index, shard names and all headers."""
    index = read_json(folder, "model.safetensors.index.json", MAX_INDEX_BYTES)
    if index is None:
        shards = _shards_without_index(folder)
        weight_map = None
    else:
        weight_map = _check_index(folder, index)
        shards = sorted(set(weight_map.values()))
    tensors: dict[str, FolderTensor] = {}
    for shard in shards:
        for tensor in read_safetensors_header(folder, shard).values():
            if weight_map is not None and weight_map.get(tensor.name) != shard:
                continue  # a copy that the index does not count
            if tensor.name in tensors:
                raise refuse(folder, f"tensor {tensor.name[:200]!r} is in two shards")
            tensors[tensor.name] = tensor
    for name, shard in (weight_map or {}).items():
        if name not in tensors:
            raise refuse(folder, f"the index places tensor {name[:200]!r} in {shard}, which does not hold it")
    return tensors


def read_safetensors_header(folder: Path, shard: str) -> dict[str, FolderTensor]:
    """The header of one shard: 8 bytes of length, then JSON {name: {dtype, shape, data_offsets}}, then the data.

    Raises ConfigError unless the header fits the file and the tensors fill the rest without gap or overlap.
    """
    path = folder / shard
    if not path.is_file():
        raise refuse(folder, f"the shard {shard[:200]!r} is missing")
    file_bytes = path.stat().st_size
    with path.open("rb") as handle:
        header_bytes = int.from_bytes(handle.read(8), "little")
        if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
            raise refuse(
                folder,
                f"{shard} has {file_bytes} bytes and claims a header of {header_bytes} bytes, "
                f"at most {min(max(file_bytes - 8, 0), MAX_HEADER_BYTES)} are possible",
            )
        raw = handle.read(header_bytes)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
        if not isinstance(header, dict):
            raise ValueError(f"expected an object, got {type(header).__name__}")
        header.pop("__metadata__", None)
        tensors = {name: _tensor_entry(name, entry, path) for name, entry in header.items()}
        _check_tiling([entry["data_offsets"] for entry in header.values()], file_bytes - 8 - header_bytes)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise refuse(folder, f"the header of {shard} is broken ({type(error).__name__}: {str(error)[:200]})") from error
    return tensors


def _read_small(folder: Path, name: str, max_bytes: int) -> bytes | None:
    path = folder / name
    if not path.is_file():  # also a device or a pipe, which could block for ever
        return None
    size = path.stat().st_size
    if size > max_bytes:
        raise refuse(folder, f"{name} has {size} bytes, at most {max_bytes} are accepted")
    try:
        return path.read_bytes()
    except OSError as error:
        raise refuse(folder, f"{name} cannot be read ({error.strerror})") from error


def _read_value(folder: Path, name: str, max_bytes: int, expected: type, word: str) -> Any:
    raw = _read_small(folder, name, max_bytes)
    if raw is None:
        return None
    try:
        content = json.loads(raw)
        if not isinstance(content, expected):
            raise refuse(folder, f"{name} must hold a JSON {word}, got {type(content).__name__}")
        _refuse_code(folder, name, content)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise refuse(folder, f"{name} is not valid JSON ({reason})") from error
    return content


def _refuse_code(folder: Path, name: str, content: Any, depth: int = 1) -> None:
    """`auto_map` tells transformers to import Python files of the folder; minivllm never does."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "auto_map":
                raise refuse(
                    folder,
                    f"{name} has an auto_map entry, which asks to run Python code of the model folder",
                    "minivllm never runs it. If transformers itself knows the architecture, remove the entry.",
                )
            _refuse_code(folder, name, value, depth + 1)
    elif isinstance(content, list):
        for value in content:
            _refuse_code(folder, name, value, depth + 1)


def _longest_entry(raw: bytes, separator: bytes) -> int:
    """The largest distance between two separators that no backslash escapes: cheaper than parsing 33 MB of JSON."""
    data = np.frombuffer(raw, np.uint8)
    positions = np.flatnonzero(data == separator[0])
    positions = positions[(positions == 0) | (data[positions - 1] != ord("\\"))]
    edges = np.concatenate(([0], positions, [len(raw)]))
    return int(np.diff(edges).max())


def _check_index(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refuse(folder, "model.safetensors.index.json has no weight_map object")
    for shard in set(map(str, weight_map.values())):
        # A plain name: "../x", "/x" or "a/b" could reach files outside the folder.
        if not re.fullmatch(r"[A-Za-z0-9_.+-]+\.safetensors", shard) or shard.startswith("."):
            raise refuse(folder, f"the index names the shard {shard[:200]!r}, expected a plain *.safetensors file name")
        if not (folder / shard).is_file():
            raise refuse(folder, f"the index names the shard {shard[:200]!r}, which is missing")
    return {name: str(shard) for name, shard in weight_map.items()}


def _shards_without_index(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if len(names) == 1 and not _SHARD.fullmatch(names[0]):
        return names
    parts = [match for match in map(_SHARD.fullmatch, names) if match]
    if parts and len(parts) == len(names) and len({(part[1], part[3]) for part in parts}) == 1:
        if [int(part[2]) for part in parts] == list(range(1, int(parts[0][3]) + 1)):
            return names
        raise refuse(folder, f"{parts[0][3]} shards are needed, found only {', '.join(names[:8])}")
    if names:
        raise refuse(folder, f"no model.safetensors and no index among {', '.join(names[:8])}")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise refuse(
            folder,
            f"expected *.safetensors, found only {', '.join(pickles[:4])}, which can run code when opened",
            "minivllm never opens them. Use a safetensors copy of the model, or convert it where that is safe.",
        )
    raise refuse(folder, "it has no *.safetensors file")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _tensor_entry(name: str, entry: dict[str, Any], path: Path) -> FolderTensor:
    shape, dtype, (start, stop) = entry["shape"], entry["dtype"], entry["data_offsets"]
    if dtype not in _DTYPE_BYTES:
        raise ValueError(f"tensor {name[:80]!r} has the unsupported dtype {str(dtype)[:40]!r}")
    sizes = [*shape, start, stop]
    if len(shape) > MAX_DIMENSIONS or any(type(size) is not int or not 0 <= size < 2**63 for size in sizes):
        raise ValueError(f"tensor {name[:80]!r} has a size or offset that is no count")
    if math.prod(shape) * _DTYPE_BYTES[dtype] != stop - start:
        raise ValueError(f"tensor {name[:80]!r}: shape {shape} in {dtype} does not take {stop - start} bytes")
    return FolderTensor(name, tuple(shape), dtype, path)


def _check_tiling(offsets: list[list[int]], data_bytes: int) -> None:
    position = 0
    for start, stop in sorted(offsets):
        if start != position:
            raise ValueError(f"a tensor starts at {start}, expected {position}")
        position = stop
    if position != data_bytes:
        raise ValueError(f"the tensors take {position} bytes, the file holds {data_bytes}")
