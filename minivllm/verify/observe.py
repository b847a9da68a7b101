"""Our side: what every module of the engine's network computed for one request, and what the cache holds of it.

    with Observer(engine) as observer:
        trace = observer.run(token_ids, max_tokens=4)

The request goes through the scheduler like any other, so chunks, prefix hits and decode steps are seen as they are.
Torch's forward hooks are the only way in; names of points are those of transformers' modules (reference.py).
Knows no transformers. Called by localise.py, behaviour.py, invariance.py. Twin in vLLM: none.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from minivllm.engine.llm_engine import LLMEngine
from minivllm.models.linear import Linear
from minivllm.sampling_params import SamplingParams
from minivllm.verify.reference import Values, find_layers


class Trace:
    """One request's values.

    token_ids: prompt and output, without the last token, which was drawn and never computed.
    first_row: positions before it came out of the prefix cache; points have rows from there on, `key` and `value` for
    every position.
    """

    def __init__(self, token_ids: list[int], first_row: int, values: Values, output_ids: list[int]):
        self.token_ids, self.first_row, self.values, self.output_ids = token_ids, first_row, values, output_ids


class Observer:
    """Hooks on an engine's network. Nothing else may run in the engine while `run` does."""

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self.model: Any = engine._executor.model
        self._rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._handles: list[Any] = []
        self._is_batched = hasattr(self.model, "network")  # transformers' own modules: hf_backend.py

    def __enter__(self) -> Observer:
        if self._is_batched:
            base = self.model.network.base_model
            path, layers = find_layers(base, self.model.config.get_text_config())
            names = [name for name, module in base.named_modules() if name and not isinstance(module, nn.ModuleList)]
            for name in names:
                self._on_output(base.get_submodule(name), name)
        else:
            base, path, layers = self.model.model, "layers", self.model.model.layers
            self._watch_ours(base)
        for index, layer in enumerate(layers):
            hook = layer.register_forward_pre_hook(self._layer_input(f"{path}.{index}.input"), with_kwargs=True)
            self._handles.append(hook)
        self._handles.append(self.model.register_forward_hook(lambda *call: self._add("final", call[2])))
        self.layers_path = path
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ------------------------------------------------------------------ hooks
    def _watch_ours(self, base: Any) -> None:
        """Fused products are taken apart; a norm that is fused with a sum is seen as the input of what follows."""
        for name, module in base.named_modules():
            if isinstance(module, Linear):
                self._handles.append(module.register_forward_hook(self._shards(module, name)))
            elif name.endswith(("q_norm", "k_norm", "post_feedforward_layernorm", "self_attn", "mlp")):
                self._on_output(module, name)
        for index, layer in enumerate(base.layers):
            path = f"layers.{index}"
            has_four_norms = hasattr(layer, "pre_feedforward_layernorm")
            if has_four_norms:
                self._on_output(layer.post_attention_layernorm, f"{path}.post_attention_layernorm")
            before_mlp = "pre_feedforward_layernorm" if has_four_norms else "post_attention_layernorm"
            self._on_input(layer.self_attn, f"{path}.input_layernorm")
            self._on_input(layer.self_attn.o_proj, f"{path}.self_attn.context")
            self._on_input(layer.mlp, f"{path}.{before_mlp}")
            self._on_input(layer.mlp.down_proj, f"{path}.mlp.activation")
            self._handles.append(layer.register_forward_hook(self._layer_output(path)))

    def _on_output(self, module: nn.Module, point: str) -> None:
        self._handles.append(module.register_forward_hook(lambda m, args, output: self._add(point, output)))

    def _on_input(self, module: nn.Module, point: str) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda m, args: self._add(point, args[0])))

    def _shards(self, module: Linear, name: str) -> Any:
        parent = name.rpartition(".")[0]
        names = [f"{parent}.{shard}" if shard else name for shard in module.shards]

        def hook(m: nn.Module, args: Any, output: torch.Tensor) -> None:  # output: [num_tokens, out_features]
            for point, part in zip(names, output.split(list(module.shards.values()), dim=-1), strict=True):
                self._add(point, part)

        return hook

    def _layer_input(self, point: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            residual = args[1] if len(args) > 1 and not self._is_batched else None
            self._add(point, hidden if residual is None else hidden.float() + residual.float())

        return hook

    def _layer_output(self, point: str) -> Any:
        """(hidden_states, residual): their sum is what transformers' layer returns."""
        return lambda module, args, output: self._add(point, output[0].float() + output[1].float())

    def _add(self, point: str, value: Any) -> None:
        """One step's rows; transformers' modules have a batch dimension of one in front."""
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, torch.Tensor):
            rows = value[0] if self._is_batched and value.dim() >= 3 else value
            self._rows[point].append(rows.detach().flatten(1).float().clone())

    # ------------------------------------------------------------------ one request
    def run(self, token_ids: list[int], max_tokens: int = 1) -> Trace:
        """Compute a prompt and `max_tokens` greedy tokens. Raises RuntimeError where the engine failed the request."""
        self._rows.clear()
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        request_id = self.engine.add_request({"prompt_token_ids": token_ids}, params)
        output: Any = None
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished and getattr(output, "error", None):
                    raise RuntimeError(f"the engine failed the request: {output.error}")
        state = self.engine._executor._runner.states[request_id]  # type: ignore[union-attr]
        output_ids = list(output.outputs[0].token_ids)
        computed = [*token_ids, *output_ids][:-1]
        values = {point: torch.cat(parts) for point, parts in self._rows.items()}
        num_rows = len(values["final"])
        values = {point: rows for point, rows in values.items() if len(rows) == num_rows}  # not those of experts
        block_ids = torch.from_numpy(state.block_ids[: state.num_blocks].copy()).long()
        values |= self._cached(block_ids, len(computed))
        with torch.inference_mode():
            values["logits"] = self.model.compute_logits(values["final"].to(self._dtype)).float()
        return Trace(computed, len(computed) - num_rows, values, output_ids)

    @property
    def _dtype(self) -> torch.dtype:
        return self.engine._executor.dtype

    def _cached(self, block_ids: torch.Tensor, num_tokens: int) -> Values:
        """Keys and values of every position out of the cache. block_ids: [num_blocks]"""
        found = {}
        for index, pair in enumerate(self.engine._executor._runner.kv_caches):  # type: ignore[union-attr]
            for name, cache in zip(("key", "value"), pair, strict=True):
                blocks = cache[:, block_ids].flatten(1, 2)[:, :num_tokens]  # [num_kv_heads, num_tokens, head_size]
                found[f"{self.layers_path}.{index}.cache.{name}"] = blocks.transpose(0, 1).flatten(1).float()
        return found
