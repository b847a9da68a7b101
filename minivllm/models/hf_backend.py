"""Any other Hugging Face decoder, on our paged cache: transformers' network, our attention, our matrix products.

transformers lets one name an attention function (AttentionInterface). Ours writes keys and values into the paged
cache and calls `paged_attention`; caches and metadata travel as one keyword argument through the network's forward.
Linear layers are exchanged for models/linear.py's.

What the function cannot see would be served wrongly in silence, so a network is refused, with the reason, unless
    - a dry run without weights calls our attention once per layer, with nothing that we do not understand, and
    - after loading, two requests computed in two chunks give what the network gives with its own attention.
That sorts out encoders, encoder-decoders, state-space and hybrid networks, chunked attention, sinks, ALiBi.

Knows no scheduler and no sampling. Called by: worker/model_runner.py, through models/registry.py. Twin in vLLM:
vllm/model_executor/models/transformers/ (the "Transformers modeling backend").
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from minivllm.errors import ConfigError
from minivllm.kernels.paged_attention import AttentionMetadata, paged_attention
from minivllm.kernels.reshape_and_cache import reshape_and_cache
from minivllm.models.layers import KVCache, KVCacheSpec, Linear, ModelOptions, soft_cap

ATTENTION = "minivllm_paged"
# Arguments of transformers' attention functions that change nothing for us.
WITHOUT_EFFECT = {"dropout", "use_cache", "position_ids", "cache_position", "output_attentions", "is_causal"}


# ------------------------------------------------------------------ the attention function
class PagedStep:
    """One forward step's caches and metadata. The layers call in order: the n-th call is the n-th layer."""

    def __init__(self, kv_caches: list[KVCache], metadata: AttentionMetadata, impl: str):
        self.kv_caches = iter(kv_caches)
        self.metadata = metadata
        self.impl = impl

    def attend(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        unknown: set[str],
    ) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
        kv_cache = next(self.kv_caches)
        reshape_and_cache(key, value, *kv_cache, self.metadata.slot_mapping, impl=self.impl)
        return paged_attention(
            query,
            *kv_cache,
            self.metadata,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            impl=self.impl,
        )


class DryRun:
    """Takes the place of PagedStep on the meta device: notes what each layer needs, refuses what we do not know."""

    def __init__(self) -> None:
        self.kv_cache_specs: list[KVCacheSpec] = []

    def attend(
        self,
        query: torch.Tensor,  # as in PagedStep
        key: torch.Tensor,  # as in PagedStep
        value: torch.Tensor,  # as in PagedStep
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        unknown: set[str],
    ) -> torch.Tensor:
        if unknown:
            raise ValueError(f"its attention uses {', '.join(sorted(unknown))}")
        if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
            raise ValueError("its keys, values and queries have different head sizes")
        self.kv_cache_specs.append(KVCacheSpec(key.shape[1], key.shape[2], sliding_window))
        return torch.empty_like(query)


def _attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_size]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_size]
    value: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_size]
    attention_mask: torch.Tensor | None,  # any shape: refused where there is one
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged_step: PagedStep | DryRun | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature around `PagedStep.attend`. Returns [1, num_tokens, num_heads, head_size]."""
    if paged_step is None:
        raise ValueError("it does not hand the step's arguments on to its attention")
    unknown = {name for name, given in others.items() if given is not None and name not in WITHOUT_EFFECT}
    if attention_mask is not None:
        unknown.add("attention_mask")
    if not (getattr(module, "is_causal", True) and others.get("is_causal") in (None, True)):
        unknown.add("is_causal=False")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # each [num_tokens, heads, head_size]
    return paged_step.attend(rows[0], rows[1], rows[2], scale, sliding_window, softcap, unknown)[None], None


AttentionInterface.register(ATTENTION, _attention)


# ------------------------------------------------------------------ the model
class TransformersForCausalLM(nn.Module):
    """The public face of models/llama.py around transformers' network. Raises ConfigError for networks it cannot
    serve, from the constructor (by configuration and dry run) or from `load_weights` (by comparison)."""

    can_be_captured = False  # in a CUDA graph: experts, for one, are routed by what the host reads

    def __init__(self, hf_config: Any, options: ModelOptions):
        super().__init__()
        _refuse_by_config(hf_config, options)
        self.options = options
        self.config = copy.deepcopy(hf_config)
        self.config.get_text_config().pad_token_id = None  # else some networks search the input for padding
        self.network: Any = None  # transformers' PreTrainedModel, built by load_weights
        self.network_class: Any  # a PreTrainedModel's
        self.network_class, self.kv_cache_specs, self.hidden_size = _dry_run(self.config)
        self.vocab_size: int = hf_config.get_text_config().vocab_size

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens] int64
        positions: torch.Tensor,  # [num_tokens] int64
        kv_caches: list[KVCache],  # one per layer
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """One step. Returns the hidden states [num_tokens, hidden_size] and writes keys and values."""
        step = PagedStep(kv_caches, metadata, self.options.impl)
        return _run(self.network, input_ids, positions, step)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [num_rows, hidden_size] -> [num_rows, vocab_size] fp32"""
        config = self.config.get_text_config()
        logits = self.network.get_output_embeddings()(hidden_states).float()
        logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
        return soft_cap(logits, getattr(config, "final_logit_softcapping", None))  # Gemma-2

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """weights: (Hugging Face name, tensor). Raises ConfigError naming a missing, unexpected or misshapen one."""
        state = {name: tensor.clone() for name, tensor in weights}  # a tensor may be a view of a file
        with _quiet():
            self.network, report = self.network_class.from_pretrained(
                None,
                config=self.config,
                state_dict=state,
                dtype=self.options.dtype,
                attn_implementation=ATTENTION,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
            )
        state.clear()
        _refuse_by_report(report)
        self.network.requires_grad_(False).eval().to(self.options.device)
        _exchange_linears(self.network, self.options)
        _compare_with_own_attention(self)


def _run(network: Any, input_ids: torch.Tensor, positions: torch.Tensor, step: PagedStep | DryRun) -> torch.Tensor:
    """input_ids, positions: [num_tokens] -> hidden states [num_tokens, hidden_size]"""
    output = network.base_model(
        input_ids=input_ids[None], position_ids=positions[None], use_cache=False, paged_step=step
    )
    return output.last_hidden_state[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bars and reports, which are in the exceptions."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _exchange_linears(network: nn.Module, options: ModelOptions) -> None:
    """Put our Linear in place of transformers' linear layers. A head tied to the embedding keeps sharing its table."""
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    for path, module in list(network.named_modules()):
        if type(module) is nn.Linear:
            weight = module.weight
        elif type(module) is Conv1D:  # GPT-2: stored [in_features, out_features]
            weight = module.weight.t().contiguous()
        else:
            continue
        ours = Linear.from_plain(weight, module.bias, options, keep_plain=id(module.weight) in tables)
        network.set_submodule(path, ours)


# ------------------------------------------------------------------ refusals
def _refuse(hf_config: Any, why: str) -> ConfigError:
    name = (hf_config.architectures or [type(hf_config).__name__])[0]
    return ConfigError(f"{name} cannot be served: {why}.", parameter="model")


def _refuse_by_config(hf_config: Any, options: ModelOptions) -> None:
    config = hf_config.get_text_config()
    names = hf_config.architectures or []
    ropes = getattr(config, "rope_parameters", None) or {}
    rope_types = {part.get("rope_type") for part in (ropes, *ropes.values()) if isinstance(part, dict)}
    layer_types = set(getattr(config, "layer_types", None) or [])
    if hf_config.is_encoder_decoder:
        raise _refuse(hf_config, "it is an encoder-decoder, and only decoders have a paged cache here")
    if any(name.endswith("ForSequenceClassification") for name in names):
        reason = "it is a classifier or a cross-encoder; score compares vectors: use an embedding model"
        raise _refuse(hf_config, reason)
    if names and not set(names) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise _refuse(hf_config, "it is neither known to models/registry.py nor a causal language model")
    if rope_types & {"dynamic", "longrope"}:
        raise _refuse(hf_config, "its rotary frequencies depend on the longest request in a step")
    if layer_types - {"full_attention", "sliding_attention"}:
        raise _refuse(hf_config, f"it has layers of type {', '.join(sorted(layer_types))}")
    if options.quantization is not None:
        raise _refuse(hf_config, "quantization is only for networks that minivllm has itself (models/registry.py)")
    if options.batch_invariant and any("expert" in name for name in config.to_dict()):
        raise _refuse(hf_config, "batch_invariant is not possible with experts, which see varying numbers of rows")


def _dry_run(config: Any) -> tuple[type[PreTrainedModel], list[KVCacheSpec], int]:
    """The network's class, what each of its layers caches, and its hidden size; two tokens, no memory, no weights."""
    step = DryRun()
    ids = torch.zeros(2, dtype=torch.int64, device="meta")
    try:
        with _quiet(), torch.device("meta"), torch.no_grad():
            # bfloat16: on the meta device experts refuse anything else
            network = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=ATTENTION, dtype=torch.bfloat16
            )
            hidden_states = _run(network.eval(), ids, ids, step)
    except Exception as error:  # foreign code: whatever it raises means that it cannot be driven like this
        raise _refuse(config, f"{error or type(error).__name__} ({type(error).__name__} in a dry run)") from error
    text_config = config.get_text_config()
    num_calls, num_layers = len(step.kv_cache_specs), text_config.num_hidden_layers
    if num_calls != num_layers:
        raise _refuse(config, f"{num_calls} of its {num_layers} layers attend through transformers' AttentionInterface")
    windows = ["sliding_attention" if spec.sliding_window else "full_attention" for spec in step.kv_cache_specs]
    if getattr(text_config, "layer_types", None) not in (None, windows):
        raise _refuse(config, f"it says layer_types {text_config.layer_types} but attends with {windows}")
    return type(network), step.kv_cache_specs, hidden_states.shape[-1]


def _refuse_by_report(report: dict[str, Any]) -> None:
    mismatched = [f"{name} of shape {list(got)}, not {list(want)}" for name, got, want in report["mismatched_keys"]]
    for what, names in (
        ("missing", sorted(report["missing_keys"])),
        ("misshapen", sorted(mismatched)),
        ("unexpected", sorted(report["unexpected_keys"])),
        ("unreadable", list(report["error_msgs"])),
    ):
        if names:
            others = f" and {len(names) - 1} others" if len(names) > 1 else ""
            raise ConfigError(f"The weights do not fit the model: {what} {names[0]}{others}.", parameter="model")


def _compare_with_own_attention(model: TransformersForCausalLM) -> None:
    """Two requests in two chunks on our cache against the network's own attention, one whole request at a time.

    Compared are the rows of the second chunk, by the median: experts may pick another expert for a row in bfloat16.
    """
    network, lengths, chunk = model.network, (7, 5), 3
    generator = torch.Generator().manual_seed(0)
    requests = [
        torch.randint(model.vocab_size, (length,), generator=generator).to(model.options.device) for length in lengths
    ]
    with torch.no_grad():
        network.set_attn_implementation("eager")
        own = [network(request[None], use_cache=False).logits[0, chunk:].float() for request in requests]
        network.set_attn_implementation(ATTENTION)
        ours = _logits_of_second_chunk(model, requests, chunk)
    errors = [(F.log_softmax(a, -1) - F.log_softmax(b, -1)).norm(dim=-1) for a, b in zip(own, ours, strict=True)]
    sizes = [F.log_softmax(a, -1).std(dim=-1) * a.shape[-1] ** 0.5 for a in own]
    error = float((torch.cat(errors) / torch.cat(sizes)).median())
    if not error < (1e-3 if model.options.dtype == torch.float32 else 0.1):
        raise _refuse(
            model.config,
            f"chunks on the paged cache give other logits than its own attention (relative error {error:.2g}); "
            "it keeps a state or a mask that the cache does not hold",
        )


def _logits_of_second_chunk(
    model: TransformersForCausalLM, requests: list[torch.Tensor], chunk: int
) -> list[torch.Tensor]:
    """Logits after the first `chunk` tokens of each request, [length - chunk, vocab_size] each.

    requests: token ids, [length] each
    """
    block_size = 16
    like = torch.empty(0, dtype=model.options.dtype, device=model.options.device)
    caches: list[KVCache] = []
    for spec in model.kv_cache_specs:
        shape = (spec.num_kv_heads, len(requests) + 1, block_size, spec.head_size)
        caches.append((like.new_zeros(shape), like.new_zeros(shape)))
    logits: list[torch.Tensor] = []
    for start, stop in ((0, chunk), (chunk, max(map(len, requests)))):
        parts = [request[start:stop] for request in requests]
        positions = [torch.arange(start, start + len(part), device=part.device) for part in parts]
        slots = [rows + (block + 1) * block_size for block, rows in enumerate(positions)]
        starts = [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]
        metadata = AttentionMetadata(
            query_start_loc=starts,
            seq_lens=[start + len(part) for part in parts],
            block_table=torch.arange(1, len(requests) + 1, dtype=torch.int32)[:, None],
            slot_mapping=torch.cat(slots),
            block_size=block_size,
            batch_invariant=model.options.batch_invariant,
        )
        hidden_states = model(torch.cat(parts), torch.cat(positions), caches, metadata)
        logits = list(model.compute_logits(hidden_states).split([len(part) for part in parts]))
    return logits
