"""Tiny random models, complete folders that transformers and minivllm load: config and seed in, files out.

    write_tiny_model("llama", folder)  ->  config.json, generation_config.json, model.safetensors,
                                           tokenizer.json, tokenizer_config.json

The weights are generated, never stored: the same name gives the same bytes everywhere. Each tensor has its own
random stream (seed, tensor name), so that a new tensor shifts no other one. Shapes and names are written out
per family as real checkpoints have them; config.json is written in the form real checkpoints have, too.

Does not know transformers, torch or minivllm. Called by make.py and by everybody's tests.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

MAX_POSITION_EMBEDDINGS = 128
HEAD_SIZE = 16

Shapes = dict[str, tuple[int, ...]]


class TinyModel(NamedTuple):
    """config: the content of config.json. eos_token_ids: generation_config.json's list; the second one is a token
    that the model really emits, so that stopping can be seen. pooling: CLS, MEAN or LAST for embedding models."""

    config: dict[str, Any]
    seed: int
    eos_token_ids: tuple[int, ...] = (0,)
    pooling: str | None = None


def _decoder(architecture: str, model_type: str, **config: Any) -> dict[str, Any]:
    """The fields that the Llama-shaped families share."""
    common = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": 320,
        "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    return common | config


_BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}

_QWEN3 = _decoder(
    "Qwen3ForCausalLM",
    "qwen3",
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,  # 6 heads of 16 are twice the hidden size
    num_key_value_heads=2,
    head_dim=HEAD_SIZE,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    tie_word_embeddings=True,
)

TINY: dict[str, TinyModel] = {
    # grouped-query ratio 3, tied embeddings: the shape of SmolLM2
    "llama": TinyModel(
        _decoder(
            "LlamaForCausalLM",
            "llama",
            hidden_size=48,
            intermediate_size=112,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        ),
        seed=101,
        eos_token_ids=(0, 118),
    ),
    # the three branches of llama3 scaling: kept, blended and stretched frequencies
    "llama-rope-llama3": TinyModel(
        _decoder(
            "LlamaForCausalLM",
            "llama",
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        seed=102,
        eos_token_ids=(0, 277),
    ),
    "llama-rope-yarn": TinyModel(
        _decoder(
            "LlamaForCausalLM",
            "llama",
            hidden_size=80,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=5,
            num_key_value_heads=1,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        seed=103,
        eos_token_ids=(0, 199),
    ),
    # ratio 7, heads wider than the hidden size, a window that is no multiple of a block
    "mistral": TinyModel(
        _decoder(
            "MistralForCausalLM",
            "mistral",
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=7,
            num_key_value_heads=1,
            head_dim=HEAD_SIZE,
            sliding_window=24,
        ),
        seed=104,
        eos_token_ids=(0, 190),
    ),
    # biases on q, k, v; every head has its own keys; an odd vocabulary
    "qwen2": TinyModel(
        _decoder(
            "Qwen2ForCausalLM",
            "qwen2",
            vocab_size=307,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
            tie_word_embeddings=True,
            use_sliding_window=False,
        ),
        seed=105,
        eos_token_ids=(0, 228),
    ),
    "qwen3": TinyModel(_QWEN3, seed=106, eos_token_ids=(0, 238)),
    # every third layer sees everything, the others a window; a query scale that is not the head size
    "gemma3": TinyModel(
        _decoder(
            "Gemma3ForCausalLM",
            "gemma3_text",
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=HEAD_SIZE,
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
            rope_local_base_freq=10000.0,
            sliding_window=20,
            sliding_window_pattern=3,
            query_pre_attn_scalar=24,
            hidden_activation="gelu_pytorch_tanh",
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=False,
            tie_word_embeddings=True,
        ),
        seed=307,
        eos_token_ids=(0, 286),
    ),
    "gpt2": TinyModel(
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": 320,
            "n_embd": 48,
            "n_layer": 3,
            "n_head": 3,
            "n_positions": MAX_POSITION_EMBEDDINGS,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "torch_dtype": "float32",
        },
        seed=108,
        eos_token_ids=(0, 295),
    ),
    "opt": TinyModel(
        {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "vocab_size": 320,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "torch_dtype": "float32",
        },
        seed=409,
        eos_token_ids=(0, 175),
    ),
    "gpt-neox": TinyModel(
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "torch_dtype": "float32",
        },
        seed=410,
        eos_token_ids=(0, 132),
    ),
    "phi3": TinyModel(
        _decoder(
            "Phi3ForCausalLM",
            "phi3",
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            original_max_position_embeddings=MAX_POSITION_EMBEDDINGS,
            rope_scaling=None,
            sliding_window=None,
        ),
        seed=111,
        eos_token_ids=(0, 219),
    ),
    "mixtral": TinyModel(
        _decoder(
            "MixtralForCausalLM",
            "mixtral",
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
        seed=112,
        eos_token_ids=(0, 81),
    ),
    "bert-cls": TinyModel(_BERT, seed=113, pooling="CLS"),  # the shape of bge
    "bert-mean": TinyModel(_BERT, seed=114, pooling="MEAN"),  # the shape of MiniLM
    # saved from the bare model: tensor names without "model.", as the published Qwen3-Embedding has them
    "qwen3-embedding": TinyModel(_QWEN3, seed=115, pooling="LAST"),
}

EMBEDDERS = tuple(name for name, model in TINY.items() if model.pooling)
DECODERS = tuple(name for name, model in TINY.items() if not model.pooling)
NATIVE_DECODERS = ("llama", "llama-rope-llama3", "llama-rope-yarn", "mistral", "qwen2", "qwen3", "gemma3")
BACKEND_DECODERS = tuple(name for name in DECODERS if name not in NATIVE_DECODERS)  # through transformers' modules


# ------------------------------------------------------------------ names and shapes, as in real checkpoints
def _with_bias(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, size: int, *, bias: bool = False) -> Shapes:
    parts = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{part}": (size,) for part in parts}


def _llama_attention(config: dict[str, Any], layer: str) -> Shapes:
    hidden = config["hidden_size"]
    head_size = config.get("head_dim", hidden // config["num_attention_heads"])
    rows = config["num_attention_heads"] * head_size
    kv_rows = config["num_key_value_heads"] * head_size
    family = config["model_type"]
    shapes: Shapes = {f"{layer}.self_attn.o_proj.weight": (hidden, rows)}
    if family == "phi3":
        shapes[f"{layer}.self_attn.qkv_proj.weight"] = (rows + 2 * kv_rows, hidden)
        return shapes
    for part, size in (("q", rows), ("k", kv_rows), ("v", kv_rows)):
        shapes[f"{layer}.self_attn.{part}_proj.weight"] = (size, hidden)
        if family == "qwen2":
            shapes[f"{layer}.self_attn.{part}_proj.bias"] = (size,)
    if family in ("qwen3", "gemma3_text"):
        shapes |= _norm(f"{layer}.self_attn.q_norm", head_size) | _norm(f"{layer}.self_attn.k_norm", head_size)
    return shapes


def _llama_mlp(config: dict[str, Any], layer: str) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if config["model_type"] == "mixtral":
        moe = f"{layer}.block_sparse_moe"
        shapes: Shapes = {f"{moe}.gate.weight": (config["num_local_experts"], hidden)}
        for expert in range(config["num_local_experts"]):
            for part, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                shapes[f"{moe}.experts.{expert}.{part}.weight"] = shape
        return shapes
    shapes = {f"{layer}.mlp.down_proj.weight": (hidden, inner)}
    if config["model_type"] == "phi3":
        return shapes | {f"{layer}.mlp.gate_up_proj.weight": (2 * inner, hidden)}
    return shapes | {f"{layer}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}


def _llama_shapes(config: dict[str, Any]) -> Shapes:
    hidden = config["hidden_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)} | _norm("model.norm", hidden)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config["model_type"] == "gemma3_text":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= _llama_attention(config, layer) | _llama_mlp(config, layer)
        for norm in norms:
            shapes |= _norm(f"{layer}.{norm}", hidden)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _gpt2_shapes(config: dict[str, Any]) -> Shapes:
    hidden = config["n_embd"]
    shapes: Shapes = {
        "transformer.wte.weight": (config["vocab_size"], hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
    } | _norm("transformer.ln_f", hidden, bias=True)
    for index in range(config["n_layer"]):
        layer = f"transformer.h.{index}"
        shapes |= _norm(f"{layer}.ln_1", hidden, bias=True) | _norm(f"{layer}.ln_2", hidden, bias=True)
        # GPT-2 stores [in, out], the other way round than everybody else
        for part, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 4 * hidden),
            ("mlp.c_proj", 4 * hidden, hidden),
        ):
            shapes |= {f"{layer}.{part}.weight": (rows, columns), f"{layer}.{part}.bias": (columns,)}
    return shapes


def _opt_shapes(config: dict[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["ffn_dim"]
    shapes: Shapes = {
        "model.decoder.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.decoder.embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),  # OPT's offset
    } | _norm("model.decoder.final_layer_norm", hidden, bias=True)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.decoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _with_bias(f"{layer}.self_attn.{part}", hidden, hidden)
        shapes |= _with_bias(f"{layer}.fc1", inner, hidden) | _with_bias(f"{layer}.fc2", hidden, inner)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= _norm(f"{layer}.{norm}", hidden, bias=True)
    return shapes


def _gpt_neox_shapes(config: dict[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "gpt_neox.embed_in.weight": (config["vocab_size"], hidden),
        "embed_out.weight": (config["vocab_size"], hidden),
    } | _norm("gpt_neox.final_layer_norm", hidden, bias=True)
    for index in range(config["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{index}"
        shapes |= _with_bias(f"{layer}.attention.query_key_value", 3 * hidden, hidden)
        shapes |= _with_bias(f"{layer}.attention.dense", hidden, hidden)
        shapes |= _with_bias(f"{layer}.mlp.dense_h_to_4h", inner, hidden)
        shapes |= _with_bias(f"{layer}.mlp.dense_4h_to_h", hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= _norm(f"{layer}.{norm}", hidden, bias=True)
    return shapes


def _bert_shapes(config: dict[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
    }
    shapes |= _norm("embeddings.LayerNorm", hidden, bias=True) | _with_bias("pooler.dense", hidden, hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _with_bias(f"{layer}.attention.{part}", hidden, hidden)
        shapes |= _with_bias(f"{layer}.intermediate.dense", inner, hidden)
        shapes |= _with_bias(f"{layer}.output.dense", hidden, inner)
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= _norm(f"{layer}.{norm}", hidden, bias=True)
    return shapes


_SHAPES: dict[str, Callable[[dict[str, Any]], Shapes]] = {
    "gpt2": _gpt2_shapes,
    "opt": _opt_shapes,
    "gpt_neox": _gpt_neox_shapes,
    "bert": _bert_shapes,
}


def tensor_shapes(name: str) -> Shapes:
    """Every tensor of the model's checkpoint, sorted by name."""
    config = TINY[name].config
    shapes = _SHAPES.get(config["model_type"], _llama_shapes)(config)
    if name == "qwen3-embedding":
        shapes = {key.removeprefix("model."): shape for key, shape in shapes.items()}
    return dict(sorted(shapes.items()))


# ------------------------------------------------------------------ weights
def _scale(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(mean, standard deviation) of a tensor's entries.

    Chosen so that logits spread over several units (no near-ties between the best two), attention prefers some
    positions clearly, and the layers outweigh the input's own embedding (else a tied model repeats its input).
    """
    family = config["model_type"]
    is_norm = "norm" in name.lower() or ".ln_" in name
    if is_norm and family == "gemma3_text":  # multiplies by 1 + w, and scales its embeddings by sqrt(hidden_size)
        means = {"model.norm.": 3.0, "post_": 2.0, "q_norm": 1.0, "k_norm": 1.0}
        return next((mean for part, mean in means.items() if part in name), 0.0), 0.2
    if is_norm:
        return 0.0 if name.endswith(".bias") else 1.0, 0.2
    if len(shape) == 1:
        return 0.0, 0.2
    hidden = config["n_embd" if family == "gpt2" else "hidden_size"]
    if shape[0] == config["vocab_size"]:
        tied = config.get("tie_word_embeddings", False)
        is_head = "lm_head" in name or "embed_out" in name
        spread = 1.0 if family == "gemma3_text" else 4.0
        return 0.0, spread / math.sqrt(hidden) if is_head or tied else 1.0
    if "embed_positions" in name or "wpe" in name or "position_embeddings" in name:
        return 0.0, 0.5
    fan_in = shape[0] if family == "gpt2" else shape[1]
    is_query_or_key = any(part in name for part in ("q_proj", "k_proj", "self.query", "self.key"))
    writes_residual = any(part in name for part in ("c_proj", "out_proj", "fc2", "attention.dense", "4h_to_h"))
    gain = 1.5 if is_query_or_key else 4.0 if writes_residual else 2.0
    return 0.0, gain / math.sqrt(fan_in)


def draw_weights(name: str) -> dict[str, np.ndarray]:
    """All tensors of a tiny model, float32, uniform around the mean: uniform streams are the most stable of numpy's."""
    model = TINY[name]
    weights = {}
    for tensor_name, shape in tensor_shapes(name).items():
        digest = hashlib.sha256(tensor_name.encode()).digest()
        stream = np.random.Generator(np.random.PCG64([model.seed, int.from_bytes(digest[:8], "little")]))
        mean, deviation = _scale(model.config, tensor_name, shape)
        half_width = deviation * math.sqrt(3.0)
        weights[tensor_name] = (mean + half_width * (2.0 * stream.random(shape) - 1.0)).astype(np.float32)
    return weights


# ------------------------------------------------------------------ tokenizer
CORPUS = (
    "The quick brown fox jumps over the lazy dog while the other dogs are sleeping in the garden.",
    "A block holds sixteen tokens. The table of a request maps its blocks to places in the cache.",
    "def add(first, second):\n    return first + second\n",
    "for index in range(10):\n    print(index, index * index)\n",
    "In 2024 there were 366 days; 1024 is 2 to the power of 10 and 3.14159 is close to pi.",
    "Der Zug fährt über die Brücke. El niño comió una manzana. Le garçon est déjà là.",
    "the the the and and and with with that that this this is is in in on on to to",
    "Answer the question: what is the capital of the country? The capital is the city.",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

DECODER_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
BERT_SPECIALS = ("[PAD]", "[CLS]", "[SEP]")
NUM_SPECIALS = 3


def train_tokenizer(vocab_size: int, specials: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE with exactly vocab_size entries: specials, 256 bytes, then merges learnt from CORPUS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, expected {vocab_size}")
    return tokenizer


def _write_tokenizer(config: dict[str, Any], folder: Path) -> None:
    is_bert = config["model_type"] == "bert"
    specials = BERT_SPECIALS if is_bert else DECODER_SPECIALS
    tokenizer = train_tokenizer(config["vocab_size"], specials)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITION_EMBEDDINGS,
        "pad_token": specials[0],
    }
    if is_bert:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        settings |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        settings |= {"bos_token": specials[1], "eos_token": specials[0], "chat_template": CHAT_TEMPLATE}
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", settings)


# ------------------------------------------------------------------ files
def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_pooling(pooling: str, hidden_size: int, folder: Path) -> None:
    """What the sentence-transformers library puts into an embedding model's folder."""
    modes = {"CLS": "pooling_mode_cls_token", "MEAN": "pooling_mode_mean_tokens", "LAST": "pooling_mode_lasttoken"}
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    _write_json(
        folder / "modules.json",
        [
            {"idx": int(index), "name": index, "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, path, kind in modules
        ],
    )
    settings = {"word_embedding_dimension": hidden_size} | dict.fromkeys(modes.values(), False)
    _write_json(folder / "1_Pooling" / "config.json", settings | {modes[pooling]: True})


def write_tiny_model(name: str, folder: Path | str) -> Path:
    """Write the named tiny model into `folder` (made if missing) and return it. The same bytes every time.

    Raises KeyError for a name that is not in TINY.
    """
    model = TINY[name]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", model.config)
    if model.pooling:
        _write_pooling(model.pooling, model.config["hidden_size"], folder)
    else:
        generation = {"bos_token_id": 1, "eos_token_id": list(model.eos_token_ids), "pad_token_id": 0}
        _write_json(folder / "generation_config.json", generation)
    _write_tokenizer(model.config, folder)
    save_file(draw_weights(name), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config_hash(folder: Path) -> str:
    """SHA-256 of config.json."""
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()


def weights_hash(folder: Path) -> str:
    """SHA-256 of model.safetensors."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
