"""CPUPath: how a step is computed where the tensors already are. The other path is gpu.py: the same three methods.

    prepare(batch)   the batch where the model reads it          here: as it is
    forward(batch)   hidden states of every scheduled token      here: a call of the model, or of its whole step
    sample(logits)   one token per row of logits                 here: minivllm/sample, in numpy

Knows no scheduler. Called by model_runner.py. Twin in vLLM: vllm/v1/worker/cpu_model_runner.py.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm

from minivllm.kernels.decoder_step import decoder_step
from minivllm.kernels.paged_attention import KEYS_PER_ITEM, AttentionMetadata
from minivllm.models.whole_step import decoder_weights
from minivllm.sample.metadata import SamplingMetadata
from minivllm.sample.sampler import SamplerOutput, sample
from minivllm.worker.input_batch import InputBatch
from minivllm.worker.kv_cache import KVCache


class CPUPath:
    """Args:
    model: a class of models/registry.py.
    """

    def __init__(self, model: torch.nn.Module, kv_caches: KVCache):
        self.model: Any = model
        self.kv_caches = kv_caches
        self.decoder_weights = decoder_weights(model, kv_caches)  # None: steps are computed by the modules only

    def compile_kernels(self, block_size: int, *, show_progress: bool = False) -> None:
        """Compute one row behind a context that meets every kernel of a decode.

        The first time ever they are compiled, some seconds; later they are read from disk. Better here than in front of
        the first client. Reads the null block, writes no slot.
        """
        seq_len = KEYS_PER_ITEM + 1  # two items, to be merged
        metadata = AttentionMetadata(
            query_start_loc=[0, 1],
            seq_lens=[seq_len],
            block_table=torch.zeros(1, -(-seq_len // block_size), dtype=torch.int32),
            slot_mapping=torch.tensor([-1]),
            block_size=block_size,
        )
        with torch.inference_mode(), tqdm(total=1, desc="Preparing kernels", leave=False, disable=not show_progress):
            token = torch.tensor([0])  # [1]
            self.model(token, token, self.kv_caches, metadata)
            if self.decoder_weights is not None:
                decoder_step(
                    self.model.embed(token), *self.model.ropes["default"](token), self.decoder_weights, metadata
                )

    def prepare(self, batch: InputBatch) -> InputBatch:
        """The batch with its tensors on the device. Valid until the next call."""
        return batch

    def forward(self, batch: InputBatch) -> torch.Tensor:  # [num_tokens, hidden_size]
        """Hidden states of a prepared batch; writes its keys and values."""
        if self.decoder_weights is None:
            return self.call_modules(batch)
        rope = self.model.ropes["default"](batch.positions)
        return decoder_step(self.model.embed(batch.input_ids), *rope, self.decoder_weights, batch.attention)

    def call_modules(self, batch: InputBatch) -> torch.Tensor:  # [num_tokens, hidden_size]
        """The same by the modules one after the other: for other models, and where hooks look into them."""
        hidden_states: torch.Tensor = self.model(batch.input_ids, batch.positions, self.kv_caches, batch.attention)
        return hidden_states

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """minivllm.sample.sample. logits: [num_logits, vocab_size] fp32, spent afterwards"""
        return sample(logits, metadata)
