"""Pooling: one vector per request out of its hidden states.

    CLS    the first token's row          BERT-type models such as bge
    MEAN   the average of all rows        MiniLM
    LAST   the last token's row           decoders turned into embedding models

Sees a request's rows of one step at a time, because a prompt may be computed in chunks.
Knows no request. Called by model_runner.py. Twin in vLLM: vllm/model_executor/layers/pooler/.
"""

from __future__ import annotations

import torch

POOLING_TYPES = ("CLS", "MEAN", "LAST")


def accumulate(pooling_type: str, pooled: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """Take one chunk of a request into account.

    Args:
        pooled: what the chunks before gave, None for the first. # [hidden_size] fp32
        rows: the chunk's hidden states. # [num_rows, hidden_size]
    """
    if pooling_type == "CLS":
        return rows[0].float() if pooled is None else pooled
    if pooling_type == "LAST":
        return rows[-1].float()
    total = rows.float().sum(dim=0)
    return total if pooled is None else pooled + total


def finish(pooling_type: str, pooled: torch.Tensor, num_tokens: int) -> list[float]:
    """The L2-normalised embedding. `pooled` is [hidden_size] fp32; returns [hidden_size] floats."""
    if pooling_type == "MEAN":
        pooled = pooled / num_tokens
    return torch.nn.functional.normalize(pooled, dim=0).tolist()
