"""GGUF to Hugging Face: the same tensors and configuration that transformers gets out of the same file, bit for bit."""

from __future__ import annotations

import functools
import math
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minivllm.errors import ConfigError
from minivllm.hub import ModelSource, resolve_model
from minivllm.models.gguf import read_gguf
from minivllm.models.gguf_to_hf import hf_config_dict, hf_names
from minivllm.models.loader import check_shapes, iterate_weights, load_hf_config, weight_shapes

from .checkpoints import HEAD_SIZE, HIDDEN, VOCAB, hf_weights, metadata, write_gguf, write_gguf_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3"]
# What transformers leaves out, or fills with its own bookkeeping.
NOT_COMPARED = {"architectures", "dtype", "quantization_config", "_name_or_path", "_model_name_or_path", "head_dim"}


def source_of(path: Path) -> ModelSource:
    return ModelSource("gguf", path, path.stem)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype == torch.float32 and torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_tensors_and_config_are_transformers_own(architecture, tied, tmp_path):
    weights = hf_weights(architecture, tied=tied)
    ids = {f"tokenizer.ggml.{name}_token_id": 3 + i for i, name in enumerate(("bos", "eos", "padding", "unknown"))}
    values = metadata(architecture) | ids
    source = source_of(write_gguf_model(tmp_path / "tiny.gguf", architecture, weights, values))
    config = load_hf_config(source)
    ours = dict(iterate_weights(source, config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if tied else set())
    for name, weight in ours.items():
        assert same_bits(weight, theirs[name]), name
        if architecture != "gemma3" or not name.endswith("norm.weight"):  # 1 + w has rounded w
            assert same_bits(weight, torch.from_numpy(weights[name])), name
    left, right = config.to_dict(), model.config.to_dict()
    different = {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)} - NOT_COMPARED
    if architecture == "gemma3":
        different -= {"query_pre_attn_scalar"}  # transformers keeps 256 whatever the size of a head is
    assert not different, {key: (left.get(key), right.get(key)) for key in different}
    assert config.architectures == [type(model).__name__]
    assert config.head_dim == HEAD_SIZE[architecture]
    assert config.tie_word_embeddings == tied
    check_shapes(source, config, weight_shapes(source))


def without_vocabulary(path: Path, target: Path) -> Path:
    """The same file without tokens and merges: transformers spends seconds of CPU on reading those."""
    file = read_gguf(path)
    kept = {k: v for k, v in file.metadata.items() if not k.startswith("tokenizer.ggml.") and k != "general.languages"}
    write_gguf(target, values={k: v for k, v in kept.items() if k != "general.architecture"})
    first = min(tensor.offset for tensor in file.tensors.values())
    head = bytearray(target.read_bytes()[: -(-target.stat().st_size // 32) * 32])
    table = b""
    for tensor in file.tensors.values():
        name = tensor.name.encode()
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        table += struct.pack("<Q", len(name)) + name + sizes + struct.pack("<IQ", tensor.type, tensor.offset - first)
    head[8:16] = struct.pack("<Q", len(file.tensors))
    head = head[: end_of_metadata(target)] + table
    with path.open("rb") as source, target.open("wb") as out:
        out.write(head + bytes(-len(head) % 32))
        source.seek(first)
        shutil.copyfileobj(source, out)
    return target


def end_of_metadata(path: Path) -> int:
    """Where the tensor table would begin in a file without tensors: behind the last key's value."""
    data = path.read_bytes()
    last = list(read_gguf(path).metadata)[-1]
    value = read_gguf(path).metadata[last]
    at = data.rindex(last.encode()) + len(last) + 4
    return at + (8 + len(value.encode()) if isinstance(value, str) else 1 if isinstance(value, bool) else 4)


def test_the_default_models_tensors_are_transformers_own_bit_for_bit(tmp_path, monkeypatch):
    # transformers asks for the same table once per submodule, 397 times: 9 seconds
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    source = resolve_model(show_progress=False)
    small = source_of(without_vocabulary(source.path, tmp_path / "small.gguf"))
    config = load_hf_config(source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    theirs = model.state_dict()
    count = 0
    for name, weight in iterate_weights(source, config):
        assert same_bits(weight, theirs[name]), name
        count += 1
    assert count == 272 == len(theirs) - 1  # lm_head is the embedding
    assert config.tie_word_embeddings and config.vocab_size == 49152
    assert read_gguf(small.path).metadata.items() <= read_gguf(source.path).metadata.items()


# ------------------------------------------------------------------ configuration


def config_of(tmp_path: Path, architecture: str = "llama", rope_freqs: np.ndarray | None = None, **changes):
    tensors = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    if rope_freqs is not None:
        tensors["rope_freqs.weight"] = rope_freqs.astype(np.float32)
    path = write_gguf(tmp_path / "x.gguf", architecture, tensors, values=metadata(architecture, **changes))
    return hf_config_dict(read_gguf(path))


def llama3_factors(factor: float, head_size: int, theta: float) -> np.ndarray:
    """The loop of llama.cpp's converter for Llama-3.1."""
    factors = []
    for i in range(0, head_size, 2):
        wavelength = 2 * math.pi / (1.0 / theta ** (i / head_size))
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_freqs_become_llama3_scaling(factor, tmp_path):
    freqs = llama3_factors(factor, 64, 500000.0)
    changes = {"rope.freq_base": 500000.0, "attention.key_length": 64, "rope.dimension_count": 64}
    rope = config_of(tmp_path, rope_freqs=freqs, **changes)["rope_parameters"]
    assert rope == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_rope_freqs_of_ones_change_nothing(tmp_path):
    assert config_of(tmp_path, rope_freqs=np.ones(8))["rope_parameters"]["rope_type"] == "default"


def test_rope_freqs_of_another_scaling_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="rope_freqs.weight"):
        config_of(tmp_path, rope_freqs=np.linspace(1, 4, 8))


def test_rope_scaling_is_read(tmp_path):
    linear = config_of(tmp_path, **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert linear["rope_parameters"] == {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}
    assert config_of(tmp_path, **{"rope.scale_linear": 4.0})["rope_parameters"] == linear["rope_parameters"]
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 128}
    found = config_of(tmp_path, "qwen2", **yarn)["rope_parameters"]
    assert found["rope_type"] == "yarn" and found["original_max_position_embeddings"] == 128
    assert config_of(tmp_path, **{"rope.freq_base": None})["rope_parameters"]["rope_theta"] == 10000.0


def test_gemma3_has_two_kinds_of_layers(tmp_path):
    config = config_of(
        tmp_path, "gemma3", block_count=12, **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    )
    assert [kind[0] for kind in config["layer_types"]] == list("sssssfsssssf")
    assert config["rope_parameters"]["full_attention"]["factor"] == 8.0
    assert config["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["query_pre_attn_scalar"] == HEAD_SIZE["gemma3"]
    assert config_of(tmp_path, "gemma3", block_count=62)["query_pre_attn_scalar"] == 16  # 27B: hidden / heads


def test_the_embedding_decides_the_vocabulary(tmp_path):
    assert config_of(tmp_path, vocab_size=VOCAB - 7)["vocab_size"] == VOCAB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_length": None}, "llama.embedding_length of type int, got nothing"),
        ({"block_count": 0}, "llama.block_count must be in"),
        ({"feed_forward_length": 4294967295}, "llama.feed_forward_length must be in"),
        ({"context_length": "long"}, "llama.context_length of type int"),
        ({"attention.head_count_kv": [1, 2]}, "llama.attention.head_count_kv of type int"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon of type float, got nothing"),
        ({"attention.layer_norm_rms_epsilon": math.nan}, "must be a positive number"),
        ({"rope.freq_base": math.inf}, "must be a positive number"),
        ({"rope.dimension_count": 8}, "full rotation"),
        ({"attention.value_length": 8}, "equal keys and values"),
        ({"rope.scaling.type": "longrope"}, "none, linear or yarn"),
    ],
)
def test_an_impossible_description_is_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, **changes)


def test_an_unknown_architecture_is_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", "mamba", {"w": np.zeros((2, 2), np.float32)}, values={})
    with pytest.raises(ConfigError, match="architecture 'mamba'.+llama, qwen2, qwen3, gemma3"):
        load_hf_config(source_of(path))


def test_a_tensor_that_is_not_understood_is_not_dropped(tmp_path):
    tensors = {
        "token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32),
        "blk.0.ffn_gate_inp.weight": np.zeros((4, 32)),
    }
    path = write_gguf(tmp_path / "x.gguf", "llama", {n: t.astype(np.float32) for n, t in tensors.items()})
    with pytest.raises(ConfigError, match="blk.0.ffn_gate_inp.weight"):
        hf_names(read_gguf(path))


def test_rows_that_are_not_whole_heads_are_refused(tmp_path):
    tensors = {"token_embd.weight": np.zeros((VOCAB, HIDDEN)), "blk.0.attn_q.weight": np.zeros((60, HIDDEN))}
    path = write_gguf(tmp_path / "x.gguf", "llama", {n: t.astype(np.float32) for n, t in tensors.items()})
    source = source_of(path)
    with pytest.raises(ConfigError, match="blk.0.attn_q.weight.+60 rows"):
        dict(iterate_weights(source, load_hf_config(source)))
