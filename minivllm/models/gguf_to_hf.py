"""What llama.cpp calls things, in Hugging Face's words: configuration, tensor names, tensor layout.

llama.cpp's converter changes three things that are undone here:
1. names: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`;
2. Llama's query and key rows are interleaved for its kind of rotary embedding (`_undo_rotary_permutation`);
3. Gemma's norm weights are stored as 1 + w.

Known architectures: llama (also Mistral, SmolLM2, TinyLlama), qwen2, qwen3, gemma3 (text). transformers can read
these too, and tests hold both equal, but it needs eight seconds of CPU to read one vocabulary, ignores the rotary
scaling of Llama-3.1 (`rope_freqs.weight`), and leaves `architectures` empty.

Knows neither the bytes of the file (models/gguf.py) nor transformers. Called by: models/loader.py.
Twin in vLLM: GGUFModelLoader._get_gguf_weights_map in vllm/model_executor/model_loader/gguf_loader.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from minivllm.errors import ConfigError
from minivllm.models.gguf import GGUFFile, grouped_bits, read_grouped, read_tensor
from minivllm.models.grouped import GroupedWeight


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How one of llama.cpp's architectures is called and stored."""

    model_type: str
    hf_class: str
    layer_names: dict[str, str]  # leaf in GGUF -> leaf in Hugging Face, inside one layer
    permuted: bool = False  # query and key rows are interleaved
    norm_offset: float = 0.0  # what the converter added to every norm weight


_DECODER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", _DECODER, permuted=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", _DECODER),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", _DECODER | _QK_NORM),
    "gemma3": _Architecture("gemma3_text", "Gemma3ForCausalLM", _DECODER | _QK_NORM | _FOUR_NORMS, norm_offset=1.0),
}

ROPE_FREQS = "rope_freqs.weight"  # [head_size / 2]: Llama-3.1's rotary scaling, spelled out
_LAYER_NAME = re.compile(r"blk\.(\d{1,4})\.([a-z_]+)\.(weight|bias)")
_OUTER_NAME = re.compile(r"([a-z_]+)\.(weight|bias)")


def hf_config_dict(file: GGUFFile) -> dict[str, Any]:
    """The content of the config.json that this file's model would have.

    Raises ConfigError for an unknown architecture, a missing or impossible number, an unknown rotary scaling.
    """
    architecture = _architecture(file)
    prefix = file.architecture
    num_heads = _positive(file, f"{prefix}.attention.head_count")
    hidden_size = _positive(file, f"{prefix}.embedding_length")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.hf_class],
        "hidden_size": hidden_size,
        "intermediate_size": _positive(file, f"{prefix}.feed_forward_length"),
        "num_hidden_layers": _positive(file, f"{prefix}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _positive(file, f"{prefix}.attention.head_count_kv", num_heads),
        "head_dim": _head_size(file, hidden_size // num_heads),
        "max_position_embeddings": _positive(file, f"{prefix}.context_length"),
        "rms_norm_eps": _number(file, f"{prefix}.attention.layer_norm_rms_epsilon", None),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_parameters(file),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        config[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if prefix == "gemma3":
        config |= _gemma3_extras(file, config)
    elif prefix == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    return config


def hf_names(file: GGUFFile) -> dict[str, str]:
    """GGUF tensor name -> Hugging Face name, in the order of the file.

    `rope_freqs.weight` has no twin (it went into the configuration). ConfigError for any other unknown name:
    a tensor that is not understood must not be dropped silently.
    """
    architecture = _architecture(file)
    names = {}
    for name in file.tensors:
        if name == ROPE_FREQS:
            continue
        layer = _LAYER_NAME.fullmatch(name)
        outer = _OUTER_NAME.fullmatch(name)
        if layer and layer[2] in architecture.layer_names:
            names[name] = f"model.layers.{int(layer[1])}.{architecture.layer_names[layer[2]]}.{layer[3]}"
        elif outer and outer[1] in _OUTSIDE_LAYERS:
            names[name] = f"{_OUTSIDE_LAYERS[outer[1]]}.{outer[2]}"
        else:
            raise ConfigError(
                f"{file.path.name}: tensor {name!r} is not part of the {file.architecture!r} architecture as minivllm "
                "knows it. Use the model's Hugging Face folder instead.",
                parameter="model",
            )
    return names


def iterate_hf_weights(
    file: GGUFFile, hf_config: Any, dtype: torch.dtype, *, own_bits: bool = False
) -> Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
    """Every tensor under its Hugging Face name, decoded to `dtype`, with llama.cpp's changes of layout undone.

    own_bits: matrices that are groups of codes stay so. `hf_config` gives num_attention_heads and
    num_key_value_heads. One tensor is held at a time.
    """
    architecture = _architecture(file)
    num_heads = {"attn_q": hf_config.num_attention_heads, "attn_k": hf_config.num_key_value_heads}
    for gguf_name, hf_name in hf_names(file).items():
        leaf = gguf_name.split(".")[-2]
        weight: torch.Tensor | GroupedWeight
        if own_bits and grouped_bits(file.tensors[gguf_name]) is not None:
            weight = read_grouped(file, gguf_name)
        elif architecture.norm_offset and leaf.endswith("norm"):
            # The offset is taken off before rounding: 1 + w has few digits left for a small w.
            weight = read_tensor(file, gguf_name, dtype, lambda values: values - architecture.norm_offset)
        else:
            weight = read_tensor(file, gguf_name, dtype)
        if architecture.permuted and leaf in num_heads:
            undo = partial(_undo_rotary_permutation, file, gguf_name, num_heads[leaf])
            weight = weight.map_rows(undo) if isinstance(weight, GroupedWeight) else undo(weight)
        yield hf_name, weight


def _undo_rotary_permutation(
    file: GGUFFile,
    name: str,
    num_heads: int,
    weight: torch.Tensor,  # [num_heads * head_size, ...]
) -> torch.Tensor:
    """llama.cpp rotates neighbours (0,1), (2,3)...; Hugging Face rotates halves (0, d/2), (1, d/2+1)...

    Its converter therefore sorts each head's rows as 0, d/2, 1, d/2+1, ...; this sorts them back.
    """
    rows = weight.shape[0]
    if rows % (2 * num_heads):
        raise ConfigError(
            f"{file.path.name}: tensor {name!r} has {rows} rows, expected {num_heads} heads of an even size.",
            parameter="model",
        )
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, *weight.shape[1:])
    return paired.transpose(1, 2).reshape(weight.shape)


def _architecture(file: GGUFFile) -> _Architecture:
    name = file.architecture
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path.name} holds a model of architecture {name[:80]!r}; from a GGUF file minivllm reads "
            f"{', '.join(ARCHITECTURES)}. Use the model's Hugging Face folder instead.",
            parameter="model",
        )
    return ARCHITECTURES[name]


def _positive(file: GGUFFile, key: str, default: int | None = None) -> int:
    if default is not None and key not in file.metadata:
        return default
    value: int = file.require(key, int)
    if not 1 <= value < 2**31:
        raise ConfigError(f"{file.path.name}: {key} must be in [1, {2**31 - 1}], got {value}.", parameter="model")
    return value


def _number(file: GGUFFile, key: str, default: float | None) -> float:
    """A finite number above 0. No default (None): the key is required."""
    value = default if default is not None and key not in file.metadata else file.require(key, float)
    if not 0.0 < value < math.inf:
        raise ConfigError(f"{file.path.name}: {key} must be a positive number, got {value}.", parameter="model")
    return float(value)


def _head_size(file: GGUFFile, default: int) -> int:
    prefix = file.architecture
    head_size = _positive(file, f"{prefix}.attention.key_length", max(default, 1))
    for key, reason in (("attention.value_length", "equal keys and values"), ("rope.dimension_count", "full rotation")):
        if _positive(file, f"{prefix}.{key}", head_size) != head_size:
            raise ConfigError(
                f"{file.path.name}: {prefix}.{key} is {file.metadata[f'{prefix}.{key}']}, expected {head_size}, the "
                f"size of a head ({reason}).",
                parameter="model",
            )
    return head_size


def _vocab_size(file: GGUFFile) -> int:
    """The embedding decides: some vocabularies list fewer tokens than the padded table has rows."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConfigError(f"{file.path.name}: tensor token_embd.weight [vocab, hidden] is missing.", parameter="model")
    return embedding.shape[0]


def _rope_parameters(file: GGUFFile) -> dict[str, Any]:
    prefix = file.architecture
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _number(file, f"{prefix}.rope.freq_base", 10000.0),  # llama.cpp's default too
    }
    scaling = file.metadata.get(f"{prefix}.rope.scaling.type", "none")
    if scaling == "none" and f"{prefix}.rope.scale_linear" in file.metadata:  # how files of 2023 said it
        rope |= {"rope_type": "linear", "factor": _number(file, f"{prefix}.rope.scale_linear", None)}
    elif scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": _number(file, f"{prefix}.rope.scaling.factor", None)}
    elif scaling != "none":
        raise ConfigError(
            f"{file.path.name}: {prefix}.rope.scaling.type must be none, linear or yarn, got {str(scaling)[:40]!r}.",
            parameter="model",
        )
    if scaling == "yarn":
        original = _positive(file, f"{prefix}.rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = original
    if ROPE_FREQS in file.tensors:
        rope |= _llama3_scaling(file, rope)
    return rope


def _llama3_scaling(file: GGUFFile, rope: dict[str, Any]) -> dict[str, Any]:
    """Find the parameters of Llama-3.1's rotary scaling from the factors they lead to.

    All Llama-3.x models share low_freq_factor 1, high_freq_factor 4 and an original context of 8192; `factor` is
    the largest divisor. The factors are computed again and compared, so that a wrong guess is an error, not a
    quietly worse model.
    """
    factors = read_tensor(file, ROPE_FREQS).double()  # [head_size / 2]
    if bool((factors == 1.0).all()):
        return {}
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    steps = torch.arange(factors.numel(), dtype=torch.float64) / factors.numel()
    wavelengths = 2 * math.pi * rope["rope_theta"] ** steps
    smooth = ((8192 / wavelengths - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
    if rope["rope_type"] != "default" or not torch.allclose(expected, factors, rtol=1e-4, atol=0.0):
        raise ConfigError(
            f"{file.path.name}: {ROPE_FREQS} holds a rotary scaling other than Llama-3's. Use the model's Hugging "
            "Face folder instead.",
            parameter="model",
        )
    return scaling


def _gemma3_extras(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """What Gemma-3 has and the others have not: two kinds of layers, each with its own rotary embedding."""
    pattern = _positive(file, "gemma3.attention.sliding_window_pattern", 6)
    num_layers = config["num_hidden_layers"]
    kinds = ("sliding_attention", "full_attention")
    # llama.cpp has no key for the scale of the scores: 27B (62 layers) divides by hidden_size / num_heads.
    by_width = num_layers == 62
    return {
        "sliding_window": _positive(file, "gemma3.attention.sliding_window"),
        "layer_types": [kinds[(layer + 1) % pattern == 0] for layer in range(num_layers)],
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if by_width else config["head_dim"]
        ),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": _number(file, "gemma3.rope.freq_base_swa", 10000.0),
            },
        },
    }
