"""The name of a full block: a chained SHA-256.

    hash(block i) = SHA-256( hash(block i-1) | extra keys | token ids of block i )

The parent's hash makes it stand for the whole prefix: equal hashes mean equal tokens at equal positions.
SHA-256 and not Python's hash(), because prompts of different users meet in one cache and a collision
would show one user's text to another. The salt goes into the first block only; the chain spreads it.

Knows no block and no request queue. Called by kv_cache_manager.py.
Twin in vLLM: hash_block_tokens in vllm/v1/core/kv_cache_utils.py.
"""

from __future__ import annotations

import hashlib
from array import array

from minivllm.core.request import Request

ROOT_HASH = hashlib.sha256(b"minivllm kv-cache root").digest()


def hash_block(parent_hash: bytes, token_ids: list[int], extra_key: str | None = None) -> bytes:
    """Hash of one full block. The extra key is length-prefixed, so that it cannot run into the token ids."""
    extra = b"" if extra_key is None else extra_key.encode("utf-8", "surrogatepass")
    prefix = b"-" if extra_key is None else b"+%d:" % len(extra)
    return hashlib.sha256(parent_hash + prefix + extra + array("q", token_ids).tobytes()).digest()


def extend_block_hashes(request: Request, block_size: int) -> None:
    """Hash the blocks that the request's tokens have filled since the last call. Amortised O(1) per token."""
    hashes = request.block_hashes
    num_full_blocks = len(request.all_token_ids) // block_size
    while len(hashes) < num_full_blocks:
        start = len(hashes) * block_size
        parent = hashes[-1] if hashes else ROOT_HASH
        extra_key = request.cache_salt if start == 0 else None
        hashes.append(hash_block(parent, request.all_token_ids[start : start + block_size], extra_key))
