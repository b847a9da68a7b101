"""From a model on disk to a module in memory: configuration, dtype, weights.

    ModelSource -> load_hf_config -> resolve_dtype -> load_model

Both kinds of source look the same from here on: a transformers configuration, and a stream of (Hugging Face name,
tensor) pairs. The stream holds one tensor at a time, already in the dtype the model keeps, so loading needs the
model's memory and one tensor more. No code of the model's author is ever run, no pickle opened.

Does not know how a model uses its weights (models/*.py) nor where the source came from (hub.py). Called by:
engine/llm_engine.py, cli/models.py (plan). Twin in vLLM: vllm/model_executor/model_loader/default_loader.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.hub import ModelSource
from minivllm.models.gguf import GGUFFile, grouped_bits, read_gguf
from minivllm.models.gguf_to_hf import hf_config_dict, hf_names, iterate_hf_weights
from minivllm.models.grouped import GroupedWeight
from minivllm.models.model_folder import FolderTensor, check_tokenizer_files, list_tensors, read_json, refuse

if TYPE_CHECKING:
    from minivllm.models.linear import ModelOptions
    from minivllm.models.parallel import TensorParallel

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Counts that size memory: a forged one must fail here and not in the allocator.
_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip

# Not for transformers to see. Which code computes attention is the engine's choice: it would fetch a kernel that is
# named here. num_labels is a classifier's: it would make a table of that length, whatever the length.
_DROPPED_KEY = re.compile(r"_?(attn|experts)_implementation(_internal)?|num_labels")
MAX_LAYERS = 10_000  # transformers makes lists with an entry per layer


def load_hf_config(source: ModelSource) -> PretrainedConfig:
    """The model's configuration as transformers' class for its model_type.

    What config.json leaves out or gets wrong is completed from the stored tensors: `architectures` when there is none,
    or when the bare network was saved under its full name (Qwen3-Embedding: no `model.` in front of its tensors, no
    head); `tie_word_embeddings` is off where an lm_head of its own is stored (transformers decides so too).
    Raises ConfigError for a folder or file that is hostile, incomplete or unknown; runs none of its code.
    """
    if source.kind == "gguf":
        content = hf_config_dict(read_gguf(source.path, with_vocabulary=False))
    else:
        content = _read_config_json(source)
        check_tokenizer_files(source.path)
        tensors = list_tensors(source.path)  # early: a folder without usable weights is refused here
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"Model {source.name!r}: model_type must be one that transformers knows, got {str(model_type)[:80]!r}. "
            "A newer transformers may know it.",
            parameter="model",
        )
    _check_layers(source, content)
    try:
        config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(content)
        if not isinstance(config.get_text_config(), PretrainedConfig):
            raise TypeError("it has a text_config that this model_type does not know")
    except Exception as error:  # whatever a configuration class raises for odd values
        raise ConfigError(
            f"Model {source.name!r}: its configuration is not valid for model_type {model_type!r} "
            f"({type(error).__name__}: {str(error)[:300]}).",
            parameter="model",
        ) from error
    _check_counts(source, config)
    if source.kind == "folder" and config.tie_word_embeddings and {EMBEDDING, LM_HEAD} <= tensors.keys():
        config.tie_word_embeddings = _are_equal(tensors[EMBEDDING], tensors[LM_HEAD])
    if not config.architectures and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    if source.kind == "folder" and EMBEDDING.removeprefix("model.") in tensors:
        config.architectures = [name.replace("ForCausalLM", "Model") for name in config.architectures or []]
    return config


def load_generation_config(source: ModelSource) -> dict[str, Any]:
    """generation_config.json as a dict (eos_token_id, temperature, ...), {} when there is none.

    A GGUF has no such file, but may name more than one token that ends a turn: then {"eos_token_id": [...]}.
    Raises ConfigError when an eos id is not an integer.
    """
    if source.kind == "gguf":
        metadata = read_gguf(source.path, with_vocabulary=False).metadata
        ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        known = list(dict.fromkeys(token_id for token_id in ids if isinstance(token_id, int)))
        return {"eos_token_id": known} if len(known) > 1 else {}
    content = read_json(source.path, "generation_config.json") or {}
    eos = content.get("eos_token_id")
    if eos is not None and not all(type(token_id) is int for token_id in (eos if isinstance(eos, list) else [eos])):
        raise refuse(source.path, f"generation_config.json: eos_token_id must be token ids, got {str(eos)[:80]!r}")
    return content


def resolve_dtype(
    dtype: str | torch.dtype, hf_config: PretrainedConfig, source: ModelSource, *, on_gpu: bool = False
) -> torch.dtype:
    """The dtype to compute in. "auto": what the checkpoint was trained in, as far as this device is good at it.

    float16 and bfloat16 checkpoints, and quantised ones, become bfloat16 on a GPU and where the CPU has instructions
    for it, else float32. Raises ConfigError for anything but "auto", "float32", "bfloat16".
    """
    name = str(dtype).removeprefix("torch.")
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ConfigError(f"dtype must be auto, {' or '.join(DTYPES)}, got {str(dtype)[:80]!r}.", parameter="dtype")
    if _stored_dtype(hf_config, source) == torch.float32 or not (on_gpu or has_bfloat16_instructions()):
        return torch.float32
    return torch.bfloat16


def has_bfloat16_instructions() -> bool:
    """True where bfloat16 matrix products are faster than float32 ones (AVX-512, AMX)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def weight_shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every stored tensor, from the headers alone. ConfigError for a hostile source."""
    if source.kind == "folder":
        return {name: tensor.shape for name, tensor in list_tensors(source.path).items()}
    file = read_gguf(source.path, with_vocabulary=False)
    return {hf_name: file.tensors[name].shape for name, hf_name in hf_names(file).items()}


def stored_bits(source: ModelSource) -> dict[str, int]:
    """Hugging Face name -> 4 or 8, for the tensors that quantization="gguf" multiplies as they are stored."""
    if source.kind == "folder":
        return {}
    file = read_gguf(source.path, with_vocabulary=False)
    bits = {hf_name: grouped_bits(file.tensors[name]) for name, hf_name in hf_names(file).items()}
    return {name: number for name, number in bits.items() if number is not None}


def iterate_weights(
    source: ModelSource,
    hf_config: PretrainedConfig,
    dtype: torch.dtype = torch.float32,
    *,
    own_bits: bool = False,
    parallel: TensorParallel | None = None,
    show_progress: bool = False,
) -> Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
    """Every tensor under its Hugging Face name, floating-point ones in `dtype`; one is held at a time.

    own_bits: those of `stored_bits` as they are. parallel: only this rank's part of each; no more than that is read
    of a safetensors file, while a GGUF's tensor is decoded as a whole.
    A yielded tensor may be a view of the file: copy it, do not change it. Raises ConfigError for a hostile source.
    """
    pairs: Iterator[tuple[str, torch.Tensor | GroupedWeight]]
    if source.kind == "gguf":
        file = read_gguf(source.path, with_vocabulary=False)
        total = len(hf_names(file))
        pairs = iterate_hf_weights(file, hf_config.get_text_config(), dtype, own_bits=own_bits)
        if parallel is not None:
            pairs = _cut(pairs, parallel)
    else:
        tensors = list_tensors(source.path)
        if hf_config.tie_word_embeddings and EMBEDDING in tensors:
            tensors.pop(LM_HEAD, None)  # a second copy of the embedding
        total = len(tensors)
        pairs = _iterate_safetensors(tensors, dtype, parallel)
    yield from tqdm(pairs, "Loading weights", total, unit="tensor", leave=False, disable=not show_progress)


def load_model(
    source: ModelSource, hf_config: PretrainedConfig, options: ModelOptions, *, show_progress: bool = False
) -> torch.nn.Module:
    """Build the model class of `hf_config` and fill it from the source. Returns it in eval mode, on options.device.

    Raises ConfigError when weights and configuration do not belong together (before memory is taken for them), or
    when the model class cannot be built.
    """
    check_shapes(source, hf_config, weight_shapes(source))
    from minivllm.models import registry  # here, so that reading a configuration does not import every model

    model_class: Any = registry.model_class(hf_config)
    parallel = options.parallel
    try:
        model = model_class(hf_config if parallel is None else parallel.narrow(hf_config), options)
    except MiniVLLMError:
        raise
    except Exception as error:  # transformers' and torch's own complaints about odd numbers, no memory, ...
        raise ConfigError(
            f"Model {source.name!r}: {model_class.__name__} cannot be built from its configuration "
            f"({type(error).__name__}: {str(error)[:300]}).",
            parameter="model",
        ) from error
    with torch.no_grad():
        own_bits = (options.quantization or "").startswith("gguf")
        weights = iterate_weights(
            source, hf_config, options.dtype, own_bits=own_bits, parallel=parallel, show_progress=show_progress
        )
        model.load_weights(weights)
    # What no tensor of the checkpoint was copied into (rotary frequencies) follows the weights.
    loaded: torch.nn.Module = model.requires_grad_(False).eval().to(options.device)
    _log_unquantised(loaded)
    return loaded


def _log_unquantised(model: torch.nn.Module) -> None:
    """One line for every reason why weights were not quantised."""
    modules = {path: str(getattr(module, "stays_plain", "")) for path, module in model.named_modules()}
    for reason in sorted(set(modules.values()) - {""}):
        paths = [path for path, why in modules.items() if why == reason]
        message = "not quantised: %s (%d weights like it): %s"
        logging.getLogger(__name__).warning(message, paths[0], len(paths), reason)


def check_shapes(source: ModelSource, hf_config: PretrainedConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the widths of the configuration with the stored tensors, before a model of that width is allocated.

    Raises ConfigError naming the number, or the tensor with expected and actual shape.
    """
    config = hf_config.get_text_config()
    sizes = {size for shape in shapes.values() for size in shape}
    for name in ("vocab_size", "hidden_size"):
        if getattr(config, name, None) is not None and getattr(config, name) not in sizes:
            raise _bad_model(source, f"{name} is {getattr(config, name)}, but no stored tensor has such a dimension")
    if (getattr(config, "num_hidden_layers", None) or 0) > len(shapes):
        raise _bad_model(source, f"num_hidden_layers is {config.num_hidden_layers}, stored are {len(shapes)} tensors")
    for name, shape in shapes.items():
        expected = _expected_shape(config, name)
        if expected is not None and shape != expected:
            raise _bad_model(source, f"tensor {name[:200]!r} must have shape {list(expected)}, got {list(shape)}")


def _bad_model(source: ModelSource, what: str) -> ConfigError:
    return ConfigError(
        f"Model {source.name!r}: configuration and weights do not belong together: {what}. Fetch both from one place.",
        parameter="model",
    )


def _read_config_json(source: ModelSource) -> dict[str, Any]:
    content = read_json(source.path, "config.json")
    if content is None:
        raise refuse(source.path, "it has no config.json", "Give the folder that holds config.json.")
    if "quantization_config" in content:
        raise refuse(
            source.path,
            "config.json has a quantization_config, and packed safetensors are not supported",
            "Use the unquantised model, or a GGUF file of it.",
        )
    names = content.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise refuse(source.path, f"config.json: architectures must be a list of names, got {str(names)[:80]!r}")
    return _without_dropped_keys(content)


def _without_dropped_keys(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_dropped_keys(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if not _DROPPED_KEY.fullmatch(key)
    }


def _check_layers(source: ModelSource, content: dict[str, Any]) -> None:
    """Before the configuration class makes its lists. num_hidden_layers, n_layer, encoder_layers, ..."""
    for key, value in content.items():
        if isinstance(value, dict):
            _check_layers(source, value)
        elif "layer" in key and isinstance(value, int) and value > MAX_LAYERS:
            raise ConfigError(
                f"Model {source.name!r}: {key[:80]} must be at most {MAX_LAYERS}, got {str(value)[:40]}.",
                parameter="model",
            )


def _check_counts(source: ModelSource, config: PretrainedConfig) -> None:
    for name in _COUNTS:
        value = getattr(config.get_text_config(), name, None)
        if value is not None and (type(value) is not int or not 1 <= value < 2**31):
            raise ConfigError(
                f"Model {source.name!r}: {name} must be an integer in [1, {2**31 - 1}], got {str(value)[:40]}.",
                parameter="model",
            )


def _expected_shape(config: PretrainedConfig, name: str) -> tuple[int, ...] | None:
    """Shapes that all the native decoders share; None where the name says nothing certain."""
    if config.model_type not in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text"):
        return None
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query_size, kv_size = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    return {
        "embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "lm_head.weight": (config.vocab_size, config.hidden_size),
        "q_proj.weight": (query_size, config.hidden_size),
        "k_proj.weight": (kv_size, config.hidden_size),
        "v_proj.weight": (kv_size, config.hidden_size),
        "o_proj.weight": (config.hidden_size, query_size),
        "gate_proj.weight": (config.intermediate_size, config.hidden_size),
        "up_proj.weight": (config.intermediate_size, config.hidden_size),
        "down_proj.weight": (config.hidden_size, config.intermediate_size),
    }.get(".".join(name.split(".")[-2:]))


def _stored_dtype(hf_config: PretrainedConfig, source: ModelSource) -> torch.dtype:
    """What the checkpoint holds: the file's own word, else the dtype most of its values have."""
    if source.kind == "gguf":
        file: GGUFFile = read_gguf(source.path, with_vocabulary=False)
        plain = all(tensor.type.name == "F32" for tensor in file.tensors.values())
        return torch.float32 if plain else torch.bfloat16  # a few bits per weight were never float32 truth
    declared = getattr(torch, str(getattr(hf_config, "dtype", None)).removeprefix("torch."), None)
    if isinstance(declared, torch.dtype):
        return declared
    stored = [tensor.dtype for tensor in list_tensors(source.path).values() if tensor.dtype in _STORED_DTYPES]
    return _STORED_DTYPES[max(set(stored), key=stored.count)] if stored else torch.float32


def _cut(
    pairs: Iterator[tuple[str, torch.Tensor | GroupedWeight]], parallel: TensorParallel
) -> Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
    for name, tensor in pairs:
        part = parallel.part_of(name)
        yield name, tensor[part] if part is not None and isinstance(tensor, torch.Tensor) else tensor


def _iterate_safetensors(
    tensors: dict[str, FolderTensor], dtype: torch.dtype, parallel: TensorParallel | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    shards = dict.fromkeys(tensor.shard for tensor in tensors.values())
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for name in (tensor.name for tensor in tensors.values() if tensor.shard == shard):
                    part = None if parallel is None else parallel.part_of(name)
                    weight = file.get_tensor(name) if part is None else file.get_slice(name)[part]
                    yield name, weight.to(dtype) if weight.is_floating_point() else weight
        except (SafetensorError, OSError) as error:
            raise refuse(shard.parent, f"{shard.name} cannot be read ({str(error)[:200]})") from error


def _are_equal(first: FolderTensor, second: FolderTensor) -> bool:
    (_, left), (_, right) = _iterate_safetensors({first.name: first, second.name: second}, torch.float32)
    return torch.equal(left, right)
