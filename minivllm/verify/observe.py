"""Our side: what every module of the engine's network computed for one request, and what the cache holds of it.

    with Observer(engine) as observer:
        trace = observer.run(token_ids, max_tokens=4)

The request goes through the scheduler like any other, so chunks, prefix hits and decode steps are seen as they are.
Torch's forward hooks are the only way in; names of points are those of transformers' modules (reference.py).
Knows nothing of the other side. Called by localise.py, behaviour.py, invariance.py. Twin in vLLM: none.
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

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "decoder.final_layer_norm")


class Trace:
    """One request's values.

    token_ids: prompt and output, without the last token, which was drawn and never computed.
    first_row: positions before it came out of the prefix cache; points have rows from there on, `key` and `value` for
    every position.
    """

    def __init__(self, token_ids: list[int], first_row: int, values: Values, output_ids: list[int], layers_path: str):
        self.token_ids, self.first_row, self.values, self.output_ids = token_ids, first_row, values, output_ids
        self.layers_path = layers_path

    def get(self, point: str) -> torch.Tensor | None:  # [num_tokens - first_row, width]
        """By transformers' name. Keys and values are those of the cache; the last norm is fused with a sum."""
        if point.endswith((".key", ".value")):
            layer = point.removeprefix(f"{self.layers_path}.").partition(".")[0]
            point = f"{self.layers_path}.{layer}.cache.{point.rpartition('.')[2]}"
        elif point in FINAL_NORMS:
            point = "final"
        return self.values.get(point)


class Observer:
    """Hooks on an engine's network. Nothing else may run in the engine while `run` does.

    Hooks see modules, so meanwhile these compute every step: a step in one call (models/whole_step.py) would call none.
    """

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self.model: Any = engine._executor.model
        self._path: Any = engine._executor._runner.path  # type: ignore[union-attr]
        self._decoder_weights: Any = None  # what the path computes its steps with, while it must not
        self._rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._handles: list[Any] = []
        self.linears: dict[str, tuple[Linear, str]] = {}  # point -> the product and the shard that it comes from
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
        if hasattr(self._path, "decoder_weights"):
            self._decoder_weights, self._path.decoder_weights = self._path.decoder_weights, None
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if hasattr(self._path, "decoder_weights"):
            self._path.decoder_weights = self._decoder_weights

    # ------------------------------------------------------------------ hooks
    def _watch_ours(self, base: Any) -> None:
        """Fused products are taken apart; a norm that is fused with a sum is seen as the input of what follows."""
        for name, module in base.named_modules():
            if isinstance(module, Linear):
                self._handles.append(module.register_forward_hook(self._shards(module, name)))
                parent = name.rpartition(".")[0]
                self.linears |= {f"{parent}.{s}" if s else name: (module, s) for s in module.shards}
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
        names = [f"{name.rpartition('.')[0]}.{shard}" if shard else name for shard in module.shards]

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

    def weight(self, point: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(weight [out_features, in_features], bias [out_features]) as the product really uses them, whatever the
        format: it is multiplied with the unit vectors. None for what is no product of ours."""
        if point not in self.linears:
            return None
        module, shard = self.linears[point]
        with torch.inference_mode():
            zero = torch.zeros(1, module.in_features, dtype=self._dtype)
            units = torch.eye(module.in_features, dtype=self._dtype)
            bias = module(zero).float()
            columns = module(units).float() - bias
        index = list(module.shards).index(shard)
        widths = list(module.shards.values())
        return columns.split(widths, dim=1)[index].t(), bias[0].split(widths)[index]

    # ------------------------------------------------------------------ one request
    def run(self, token_ids: list[int], max_tokens: int = 1) -> Trace:
        """Compute a prompt and `max_tokens` greedy tokens. A request that the engine failed (NaN) is looked at, too.

        Raises RuntimeError where the engine broke off before the prompt was computed.
        """
        self._rows.clear()
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        request_id = self.engine.add_request({"prompt_token_ids": token_ids}, params)
        outputs: list[Any] = []
        while self.engine.has_unfinished_requests():
            outputs += self.engine.step()
        output = outputs[-1]
        state = self.engine._executor._runner.states.get(request_id)  # type: ignore[union-attr]
        if state is None or "final" not in self._rows:
            raise RuntimeError(f"the engine failed a request of {len(token_ids)} tokens: {output.error}")
        output_ids = list(output.outputs[0].token_ids)
        computed = [*token_ids, *output_ids][: state.num_tokens - (1 if output_ids else 0)]
        values = {point: torch.cat(parts) for point, parts in self._rows.items()}
        num_rows = len(values["final"])
        values = {point: rows for point, rows in values.items() if len(rows) == num_rows}  # not those of experts
        block_ids = torch.from_numpy(state.block_ids[: state.num_blocks].copy()).long()
        values |= self._cached(block_ids, len(computed))
        with torch.inference_mode():
            values["logits"] = self.model.compute_logits(values["final"].to(self._dtype)).float()
        return Trace(computed, len(computed) - num_rows, values, output_ids, self.layers_path)

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
