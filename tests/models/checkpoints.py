"""Tiny checkpoints, made from a seed: GGUF files as llama.cpp's converter would write them, and Hugging Face folders.

The GGUF side is written here from llama.cpp's rules, not with the code under test: names, interleaved query and key
rows (Llama), norm weights stored as 1 + w (Gemma).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, LAYERS, VOCAB = 64, 4, 2, 96, 2, 80
HEAD_SIZE = {"llama": 16, "qwen2": 16, "qwen3": 128, "gemma3": 32}  # transformers assumes 128 for a Qwen3 GGUF

HF_TO_GGUF = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def hf_weights(architecture: str, *, tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face names."""
    head_size = HEAD_SIZE[architecture]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        inside = {
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (HEADS * head_size, HIDDEN),
            "self_attn.k_proj.weight": (KV_HEADS * head_size, HIDDEN),
            "self_attn.v_proj.weight": (KV_HEADS * head_size, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, HEADS * head_size),
            "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
        if architecture == "qwen2":
            inside |= {f"self_attn.{n}_proj.bias": (inside[f"self_attn.{n}_proj.weight"][0],) for n in "qkv"}
        if architecture in ("qwen3", "gemma3"):
            inside |= {"self_attn.q_norm.weight": (head_size,), "self_attn.k_norm.weight": (head_size,)}
        if architecture == "gemma3":
            inside |= {f"{name}.weight": (HIDDEN,) for name in GEMMA_NORMS}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) / 8 for name, shape in shapes.items()}


def gguf_name(architecture: str, name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    _, _, layer, leaf = stem.split(".", 3)
    table = HF_TO_GGUF | (GEMMA_NORMS if architecture == "gemma3" else {})
    return f"blk.{layer}.{table[leaf]}.{kind}"


def to_llama_cpp(architecture: str, name: str, weight: np.ndarray) -> np.ndarray:
    """The change of layout that llama.cpp's converter makes."""
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return weight + 1
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if architecture == "llama" and heads:  # rows 0..d/2-1, d/2..d-1 of a head become 0, d/2, 1, d/2+1, ...
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
    return weight


def metadata(architecture: str, **changes: Any) -> dict[str, Any]:
    """The keys that describe the tiny model; `changes` replaces some, None leaves one out."""
    values = {
        "context_length": 256,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_SIZE[architecture],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50000.0,
        "vocab_size": VOCAB,
    }
    if architecture == "llama":
        values["rope.dimension_count"] = HEAD_SIZE["llama"]
    if architecture == "gemma3":
        values["attention.sliding_window"] = 32
    return {f"{architecture}.{key}": value for key, value in (values | changes).items() if value is not None}


def write_gguf(
    path: Path,
    architecture: str = "llama",
    tensors: dict[str, np.ndarray] | None = None,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    values: dict[str, Any] | None = None,
    raw: dict[str, tuple[np.ndarray, GGMLQuantizationType]] | None = None,
) -> Path:
    """Write a GGUF: `tensors` under GGUF names (matrices as `kind`, vectors as F32), `raw` as quantised bytes."""
    writer = GGUFWriter(str(path), architecture)
    for key, value in (metadata(architecture) if values is None else values).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, tensor in (tensors or {}).items():
        stored = kind if tensor.ndim > 1 else GGMLQuantizationType.F32
        if stored in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            writer.add_tensor(name, gguf.quantize(tensor, stored))
        else:
            writer.add_tensor(name, gguf.quantize(tensor, stored), raw_dtype=stored)
    for name, (data, stored) in (raw or {}).items():
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gguf_model(
    path: Path, architecture: str, weights: dict[str, np.ndarray], values: dict[str, Any] | None = None
) -> Path:
    """A whole model in float32, from Hugging Face weights."""
    tensors = {gguf_name(architecture, n): to_llama_cpp(architecture, n, w) for n, w in weights.items()}
    return write_gguf(path, architecture, tensors, values=values)


def random_blocks(kind: GGMLQuantizationType, num_blocks: int, seed: int) -> np.ndarray:
    """[num_blocks, block_bytes] random quants with small finite scales; the package cannot make K-quants itself."""
    rng = np.random.default_rng(seed)
    block_bytes = GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
    half_at = {"Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q4_1": [0, 2], "Q5_1": [0, 2]}.get(kind.name, [0])
    for start in half_at:
        scales = rng.uniform(-0.1, 0.1, num_blocks).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


HF_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 50000.0,
}


def write_folder(folder: Path, *, num_shards: int = 1, weights: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A tiny Llama folder. `changes` go into config.json; a value of None takes the key out."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in (HF_CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: torch.as_tensor(w) for n, w in (hf_weights("llama") if weights is None else weights).items()}
    names = sorted(tensors)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
