"""A model folder that an enemy packed: every file of it is refused with one clear error, at once, before use."""

from __future__ import annotations

import json
import os
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minivllm.errors import ConfigError, show
from minivllm.models import model_folder
from minivllm.models.model_folder import (
    MAX_DEPTH,
    MAX_ENTRY_BYTES,
    MAX_HEADER_BYTES,
    MiB,
    check_tokenizer_files,
    list_tensors,
    read_json,
    read_safetensors_header,
)

SHARD = "model.safetensors"


def refused(message: str, call: Any, folder: Path, *arguments: Any) -> str:
    """The error of call(folder, ...): it names the folder, says what is wrong and what to do."""
    with pytest.raises(ConfigError, match=message) as caught:
        call(folder, *arguments)
    text = str(caught.value)
    assert text.startswith(f"Model folder {folder.name!r} cannot be used: ") and caught.value.parameter == "model"
    assert re.search(r"\. (Fetch the model again|minivllm never (runs|opens)|Use )", text) and len(text) < 800
    return text


def write_sparse(path: Path, num_bytes: int, start: bytes = b"") -> None:
    """A file of that size that takes no room on the disk."""
    with path.open("wb") as handle:
        handle.write(start)
        handle.truncate(num_bytes)


# ------------------------------------------------------------------ JSON files
def test_a_missing_file_is_none_and_a_good_one_is_its_object(tmp_path: Path):
    assert read_json(tmp_path, "config.json") is None
    (tmp_path / "config.json").write_text('{"a": [1, {"b": null}]}')
    assert read_json(tmp_path, "config.json") == {"a": [1, {"b": None}]}
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')  # as Windows editors save it
    assert read_json(tmp_path, "config.json") == {"a": "é"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"a": 1,}', "Expecting property name|Illegal trailing comma"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
        (b"{'a': 1}", "Expecting property name"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"\0" * 100, "Expecting value|codec can't decode"),
    ],
    ids=["empty", "cut", "comma", "two objects", "quotes", "bytes", "5000 digits", "zeros"],
)
def test_what_is_not_json_is_refused(tmp_path: Path, content: Any, reason: str):
    (tmp_path / "config.json").write_bytes(content)
    refused(f"config.json is not valid JSON .*({reason})", read_json, tmp_path, "config.json")


@pytest.mark.parametrize(
    ("content", "kind"), [("[]", "list"), ("5", "int"), ('"a"', "str"), ("null", "NoneType"), ("NaN", "float")]
)
def test_json_that_is_no_object_is_refused(tmp_path: Path, content: Any, kind: str):
    (tmp_path / "config.json").write_text(content)
    refused(f"config.json must hold a JSON object, got {kind}", read_json, tmp_path, "config.json")


@pytest.mark.parametrize("opening", ['{"a":', "["])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500, 950, 100_000])
def test_deep_json_is_refused(tmp_path: Path, opening: str, depth: int):
    """From 300 levels on, code that reads the object later ran into Python's limit: a RecursionError at start-up."""
    nested = opening * depth + "1" + {"[": "]", "{": "}"}[opening[0]] * depth
    (tmp_path / "config.json").write_text('{"x": ' + nested + "}")
    refused("config.json is not valid JSON .nested too deeply", read_json, tmp_path, "config.json")


def test_json_of_an_honest_depth_is_read(tmp_path: Path):
    depth = MAX_DEPTH - 2
    (tmp_path / "config.json").write_text('{"x": ' + "[" * depth + "]" * depth + "}")
    assert read_json(tmp_path, "config.json") is not None


def test_a_huge_json_file_is_refused_unread(tmp_path: Path):
    write_sparse(tmp_path / "config.json", MiB + 1)
    tracemalloc.start()
    refused("config.json has 1048577 bytes, at most 1048576 are accepted", read_json, tmp_path, "config.json")
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    (tmp_path / "config.json").write_text('{"a": "' + "x" * (MiB - 9) + '"}')  # as large as it may be
    assert len(read_json(tmp_path, "config.json")["a"]) == MiB - 9


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_not_read(tmp_path: Path, make: Any):
    """Opening a pipe would wait for ever."""
    make(tmp_path / "config.json")
    assert read_json(tmp_path, "config.json") is None


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text("{}")

    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    refused(r"config.json cannot be read \(Permission denied\)", read_json, tmp_path, "config.json")


@pytest.mark.parametrize(
    "content",
    [
        {"auto_map": {"AutoModel": "evil.Evil"}},
        {"auto_map": None},
        {"text_config": {"auto_map": {"AutoConfig": "owner/repo--evil.Evil"}}},
        {"a": [1, [{"b": {"auto_map": []}}]]},
    ],
    ids=["top", "null", "nested", "in lists"],
)
def test_auto_map_is_refused_wherever_it_stands(tmp_path: Path, content: Any):
    (tmp_path / "config.json").write_text(json.dumps(content))
    text = refused("config.json has an auto_map entry", read_json, tmp_path, "config.json")
    assert "minivllm never runs it. If transformers itself knows the architecture, remove the entry." in text


# ------------------------------------------------------------------ tokenizer files
def test_tokenizer_files_that_are_fine_or_missing_pass(tmp_path: Path):
    check_tokenizer_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"\\"": 0, "a": 1}}}')
    (tmp_path / "merges.txt").write_text("a b\nab c\n")
    check_tokenizer_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"]
)
def test_auto_map_in_a_tokenizer_file_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_text('{"auto_map": {"AutoTokenizer": [null, "evil.Evil"]}}')
    refused(f"{name} has an auto_map entry", check_tokenizer_files, tmp_path)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("tokenizer_config.json", 16 * MiB),
        ("special_tokens_map.json", 16 * MiB),
        ("added_tokens.json", 16 * MiB),
        ("chat_template.json", 16 * MiB),
        ("chat_template.jinja", 1 * MiB),
        ("tokenizer.model", 256 * MiB),
        ("tokenizer.json", 256 * MiB),
        ("vocab.json", 256 * MiB),
        ("merges.txt", 256 * MiB),
        ("vocab.txt", 256 * MiB),
    ],
)
def test_a_huge_tokenizer_file_is_refused_unread(tmp_path: Path, name: str, most: int):
    write_sparse(tmp_path / name, most + 1)
    refused(f"{name} has {most + 1} bytes, at most {most} are accepted", check_tokenizer_files, tmp_path)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("tokenizer.json", '{"a": "', '"}'),
        ("vocab.json", '{"', '": 1}'),
        ("tokenizer_config.json", '{"bos_token": "', '"}'),
        ("merges.txt", "a b\n", "\nc d"),
        ("vocab.txt", "", "\nend"),
    ],
)
@pytest.mark.parametrize("filler", ["x", '\\"', "\\\\"], ids=["letters", "quotes", "backslashes"])
def test_one_absurdly_long_entry_is_refused(tmp_path: Path, name: str, before: str, after: str, filler: str):
    """A token of megabytes makes the tokenizer library take quadratic time."""
    (tmp_path / name).write_text(before + filler * (MAX_ENTRY_BYTES // len(filler) + 1) + after)
    refused(f"{name} has an entry of more than {MAX_ENTRY_BYTES} bytes", check_tokenizer_files, tmp_path)
    (tmp_path / name).write_text(before + filler * ((MAX_ENTRY_BYTES - 16) // len(filler)) + after)
    check_tokenizer_files(tmp_path)


# ------------------------------------------------------------------ headers of safetensors
def write_shard(path: Path, header: Any, data: bytes = b"", *, header_bytes: int | None = None) -> None:
    """Length, header, data. A header that is not bytes is written as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if header_bytes is None else header_bytes) + raw + data)


def entry(dtype: Any, shape: Any, start: Any, stop: Any, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


GOOD = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [5], 24, 34)}


def test_a_good_header_is_read_as_it_is(tmp_path: Path):
    write_shard(tmp_path / SHARD, {"__metadata__": {"format": "pt"}} | GOOD, bytes(34))
    tensors = read_safetensors_header(tmp_path, SHARD)
    assert {name: (t.shape, t.dtype, t.shard) for name, t in tensors.items()} == {
        "a": ((2, 3), "F32", tmp_path / SHARD),
        "b": ((5,), "BF16", tmp_path / SHARD),
    }


def test_scalars_empty_tensors_and_any_order_are_honest(tmp_path: Path):
    header = {"z": entry("I64", [], 4, 12), "empty": entry("F32", [0, 7], 4, 4), "a": entry("F32", [1], 0, 4)}
    write_shard(tmp_path / SHARD, header, bytes(12))
    assert {name: t.shape for name, t in read_safetensors_header(tmp_path, SHARD).items()} == {
        "z": (),
        "empty": (0, 7),
        "a": (1,),
    }


def test_what_the_library_writes_is_read_with_the_same_shapes(tmp_path: Path):
    dtypes = [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
        torch.int64,
        torch.bool,
        torch.float64,
    ]
    tensors = {f"t{index}": torch.zeros(index, 3, dtype=dtype) for index, dtype in enumerate(dtypes)}
    save_file(tensors, tmp_path / SHARD)
    found = read_safetensors_header(tmp_path, SHARD)
    assert {name: t.shape for name, t in found.items()} == {name: tuple(t.shape) for name, t in tensors.items()}


# what: (header, data, part of the message)
FORGED: dict[str, tuple[Any, bytes, str]] = {
    "no json": (b"{]", b"", "Expecting property name"),
    "a list": ([], b"", "expected an object, got list"),
    "bytes that are no text": (b'{"\xff": 1}', b"", "codec can't decode"),
    "deep": (b"[" * 50_000, b"", "RecursionError"),
    "5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", b"", "Exceeds the limit"),
    "one name twice": (b'{"a": {}, "a": {}}', b"", "a key occurs twice"),
    "one key of an entry twice": (
        b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 4]}}',
        bytes(4),
        "a key occurs twice",
    ),
    "a gap in front": ({"a": entry("F32", [1], 4, 8)}, bytes(8), "starts at 4, expected 0"),
    "a gap between": (
        {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)},
        bytes(12),
        "starts at 8, expected 4",
    ),
    "a gap at the end": ({"a": entry("F32", [1], 0, 4)}, bytes(8), "take 4 bytes, the file holds 8"),
    "past the end": ({"a": entry("F32", [2], 0, 8)}, bytes(4), "take 8 bytes, the file holds 4"),
    "an overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12), "starts at 4, expected 8"),
    "the same bytes twice": ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, bytes(4), "expected 4"),
    "backwards": ({"a": entry("F32", [1], 4, 0)}, bytes(4), "does not take -4 bytes"),
    "too few bytes": ({"a": entry("F32", [2], 0, 4)}, bytes(4), r"shape \[2\] in F32 does not take 4 bytes"),
    "too many bytes": ({"a": entry("BF16", [2], 0, 8)}, bytes(8), r"shape \[2\] in BF16 does not take 8 bytes"),
    "another dtype's size": ({"a": entry("I64", [2], 0, 8)}, bytes(8), "does not take 8 bytes"),
    "a negative size": ({"a": entry("F32", [-1, -1], 0, 4)}, bytes(4), "a size or offset that is no count"),
    "a huge size": ({"a": entry("F32", [2**63], 0, 4)}, bytes(4), "no count"),
    "a product beyond 64 bits": ({"a": entry("U8", [2**32, 2**32], 0, 0)}, b"", "does not take 0 bytes"),
    "nothing times huge": ({"a": entry("U8", [0, 2**64], 0, 0)}, b"", "no count"),
    "a float size": ({"a": entry("F32", [1.0], 0, 4)}, bytes(4), "no count"),
    "a bool size": ({"a": entry("F32", [True], 0, 4)}, bytes(4), "no count"),
    "a string size": ({"a": entry("F32", ["1"], 0, 4)}, bytes(4), "no count"),
    "a string shape": ({"a": entry("F32", "1", 0, 4)}, bytes(4), "no count"),
    "no shape": ({"a": entry("F32", None, 0, 4)}, bytes(4), "TypeError"),
    "a float offset": ({"a": entry("F32", [1], 0, 4.0)}, bytes(4), "no count"),
    "a negative offset": ({"a": entry("F32", [1], -4, 0)}, bytes(4), "no count"),
    "nine dimensions": ({"a": entry("F32", [1] * 9, 0, 4)}, bytes(4), "no count"),
    "a million dimensions": ({"a": entry("F32", [1] * 1_000_000, 0, 4)}, bytes(4), "no count"),
    "an unknown dtype": ({"a": entry("F8_E4M3", [4], 0, 4)}, bytes(4), "unsupported dtype 'F8_E4M3'"),
    "a dtype in lower case": ({"a": entry("f32", [1], 0, 4)}, bytes(4), "unsupported dtype 'f32'"),
    "a dtype that is a list": ({"a": entry(["F32"], [1], 0, 4)}, bytes(4), "TypeError"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4), "KeyError"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "KeyError"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(4), "too many values"),
    "an entry that is a list": ({"a": [1]}, b"", "TypeError"),
    "an entry that is text": ({"a": "F32"}, b"", "TypeError"),
    "an entry that is null": ({"a": None}, b"", "TypeError"),
    "a very long name": ({"x" * 100_000: entry("F32", [2], 0, 4)}, bytes(4), "does not take 4 bytes"),
    "data without a tensor": ({}, bytes(4), "take 0 bytes, the file holds 4"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_header_is_refused(tmp_path: Path, what: str):
    header, data, message = FORGED[what]
    write_shard(tmp_path / SHARD, header, data)
    refused(f"the header of {SHARD} is broken .*{message}", read_safetensors_header, tmp_path, SHARD)


@pytest.mark.parametrize("claimed", [35, 1000, 2**31, 2**63, 2**64 - 1, 2**64 - 8])
def test_a_header_that_does_not_fit_the_file_is_refused_without_taking_memory(tmp_path: Path, claimed: int):
    write_shard(tmp_path / SHARD, b"{}", bytes(32), header_bytes=claimed)
    tracemalloc.start()
    text = refused(f"42 bytes and claims a header of {claimed} bytes", read_safetensors_header, tmp_path, SHARD)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert "at most 34 are possible" in text


def test_a_header_beyond_100_mib_is_refused_unread_even_if_the_file_has_it(tmp_path: Path):
    write_sparse(tmp_path / SHARD, 2 * MAX_HEADER_BYTES, struct.pack("<Q", MAX_HEADER_BYTES + 1))
    tracemalloc.start()
    refused(f"claims a header of {MAX_HEADER_BYTES + 1} bytes, at most {MAX_HEADER_BYTES}",
            read_safetensors_header, tmp_path, SHARD)  # fmt: skip
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, tmp_path / SHARD)
    whole = (tmp_path / SHARD).read_bytes()
    for size in range(len(whole)):
        (tmp_path / SHARD).write_bytes(whole[:size])
        refused(SHARD, read_safetensors_header, tmp_path, SHARD)


# ------------------------------------------------------------------ which files are the model
def save(folder: Path, file: str, *names: str) -> None:
    save_file({name: torch.zeros(2) for name in names}, folder / file)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "files",
    [
        ["model.safetensors"],
        ["weights.safetensors"],  # the only one
        ["model.safetensors", "adapter.safetensors"],
        ["model-00001-of-00001.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    ],
)
def test_weights_without_an_index_are_found(tmp_path: Path, files: list[str]):
    for number, file in enumerate(files):
        save(tmp_path, file, f"t{number}")
    expected = ["t0"] if files[0] == "model.safetensors" else [f"t{number}" for number in range(len(files))]
    assert sorted(list_tensors(tmp_path)) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model-00001-of-00002.safetensors"], "00002 shards are needed, found only model-00001"),
        (["model-00002-of-00002.safetensors"], "00002 shards are needed"),
        (["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], "00003 shards are needed"),
        (["a-00001-of-00002.safetensors", "b-00002-of-00002.safetensors"], "no model.safetensors and no index"),
        (["a.safetensors", "b.safetensors"], "no model.safetensors and no index among a.safetensors, b.safetensors"),
        ([], r"it has no \*.safetensors file"),
    ],
)
def test_weights_that_are_not_complete_or_not_clear_are_refused(tmp_path: Path, files: list[str], message: str):
    for number, file in enumerate(files):
        save(tmp_path, file, f"t{number}")
    refused(message, list_tensors, tmp_path)


@pytest.mark.parametrize("suffix", model_folder.PICKLE_SUFFIXES)
def test_a_folder_of_pickles_is_refused_with_the_reason(tmp_path: Path, suffix: str):
    (tmp_path / f"pytorch_model{suffix}").write_bytes(b"\x80\x04.")
    text = refused(f"found only pytorch_model{suffix}, which can run code when opened", list_tensors, tmp_path)
    assert "minivllm never opens them. Use a safetensors copy" in text


def test_two_shards_with_one_tensor_are_refused_without_an_index(tmp_path: Path):
    for number in (1, 2):
        save(tmp_path, f"model-0000{number}-of-00002.safetensors", "same", f"own{number}")
    refused("tensor 'same' is in two shards", list_tensors, tmp_path)


def test_an_index_says_which_copy_counts(tmp_path: Path):
    save(tmp_path, "one.safetensors", "same", "own")
    save(tmp_path, "two.safetensors", "same")
    write_index(tmp_path, {"same": "two.safetensors", "own": "one.safetensors"})
    assert {name: t.shard.name for name, t in list_tensors(tmp_path).items()} == {
        "same": "two.safetensors",
        "own": "one.safetensors",
    }


OUTSIDE = (
    "../secret.safetensors",
    "/etc/x.safetensors",
    "sub/x.safetensors",
    "a\\b.safetensors",
    "~x.safetensors",
    "..",
)
NO_SHARD = ("", ".hidden.safetensors", "pytorch_model.bin", "x.safetensors\n", "x.safetensors\0", "x" * 5000)


@pytest.mark.parametrize(
    "shard", [*OUTSIDE, *NO_SHARD, 5, None, ["x.safetensors"], {}], ids=lambda shard: show(shard, 24)
)
def test_an_index_may_name_plain_safetensors_files_only(tmp_path: Path, shard: Any):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "sub"):
        save(place, "secret.safetensors", "t")
        save(place, "x.safetensors", "t")
    write_index(folder, {"t": shard})
    refused("the index names the shard .*expected a plain", list_tensors, folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"t": "gone.safetensors"}, "the index names the shard 'gone.safetensors', which is missing"),
        (
            {"t": "x.safetensors", "lost": "x.safetensors"},
            "places tensor 'lost' in x.safetensors, which does not hold it",
        ),
        ({}, "has no weight_map object"),
        (None, "has no weight_map object"),
        (["x.safetensors"], "has no weight_map object"),
        ("x.safetensors", "has no weight_map object"),
    ],
)
def test_an_index_that_does_not_fit_the_files_is_refused(tmp_path: Path, weight_map: Any, message: str):
    save(tmp_path, "x.safetensors", "t")
    write_index(tmp_path, weight_map)
    refused(message, list_tensors, tmp_path)


def test_a_broken_index_does_not_fall_back_to_guessing(tmp_path: Path):
    save(tmp_path, SHARD, "t")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refused("model.safetensors.index.json is not valid JSON", list_tensors, tmp_path)


def test_a_huge_index_is_refused_unread(tmp_path: Path):
    write_sparse(tmp_path / "model.safetensors.index.json", 64 * MiB + 1)
    refused("model.safetensors.index.json has 67108865 bytes", list_tensors, tmp_path)


def test_a_shard_that_is_a_folder_or_a_pipe_is_missing(tmp_path: Path):
    write_index(tmp_path, {"t": "x.safetensors"})
    os.mkfifo(tmp_path / "x.safetensors")
    refused("'x.safetensors', which is missing", list_tensors, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "x.safetensors").unlink()
    (tmp_path / SHARD).mkdir()
    refused("the shard 'model.safetensors' is missing", list_tensors, tmp_path)


def test_a_shard_may_be_a_link_as_in_hugging_face_s_cache(tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save(tmp_path / "blobs", "x.safetensors", "t")
    (tmp_path / "snapshot" / SHARD).symlink_to(tmp_path / "blobs" / "x.safetensors")
    assert list(list_tensors(tmp_path / "snapshot")) == ["t"]
    (tmp_path / "blobs" / "x.safetensors").unlink()
    refused("the shard 'model.safetensors' is missing", list_tensors, tmp_path / "snapshot")
