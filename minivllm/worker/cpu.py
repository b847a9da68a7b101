"""CPUPath: how a step is computed where the tensors already are. The other path is gpu.py: the same three methods.

    prepare(batch)   the batch where the model reads it          here: as it is
    forward(batch)   hidden states of every scheduled token      here: a call of the model
    sample(logits)   one token per row of logits                 here: minivllm/sample, in numpy

Knows no scheduler. Called by model_runner.py. Twin in vLLM: vllm/v1/worker/cpu_model_runner.py.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm

from minivllm.kernels.paged_attention import KEYS_PER_ITEM, AttentionMetadata
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
            self.model(torch.tensor([0]), torch.tensor([0]), self.kv_caches, metadata)

    def prepare(self, batch: InputBatch) -> InputBatch:
        """The batch with its tensors on the device. Valid until the next call."""
        return batch

    def forward(self, batch: InputBatch) -> torch.Tensor:  # [num_tokens, hidden_size]
        """Hidden states of a prepared batch; writes its keys and values."""
        hidden_states: torch.Tensor = self.model(batch.input_ids, batch.positions, self.kv_caches, batch.attention)
        return hidden_states

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """minivllm.sample.sample. logits: [num_logits, vocab_size] fp32, spent afterwards"""
        return sample(logits, metadata)
