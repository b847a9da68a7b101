"""Logprobs in the two shapes of the wire, and prompt_logprobs.

In completions' top_logprobs the keys are texts, and two tokens may have one text (halves of characters): such a token
is named by its bytes or, at last, by its id, so that no entry hides another. Evaluation harnesses compare the token's
own logprob with the largest of them for equality, so both are the same number.

Knows no HTTP. Called by chat.py, completions.py and run_batch.py. Twin in vLLM:
vllm/entrypoints/openai/engine/serving.py.
"""

from __future__ import annotations

import itertools
from typing import Any

from minivllm.engine.tokenizer import Tokenizer
from minivllm.outputs import Logprob

Position = dict[int, Logprob]  # the token itself first, then the likeliest
MIN_LOGPROB = -9999.0  # JSON has no infinity


def finite(logprob: Logprob) -> float:
    return max(logprob.logprob, MIN_LOGPROB)


def chat_logprobs(
    tokenizer: Tokenizer | None, token_ids: list[int], positions: list[Position] | None, num_top: int
) -> dict[str, Any] | None:
    """As vLLM: the sampled token first among the top ones, and never more of them than were asked for."""
    if positions is None:
        return None

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        text = logprob.decoded_token or ""
        return {"token": text, "logprob": finite(logprob), "bytes": list(_bytes_of(tokenizer, token_id, text))}

    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        top = [entry(other, logprob) for other, logprob in itertools.islice(position.items(), num_top)]
        content.append({**entry(token_id, position[token_id]), "top_logprobs": top})
    return {"content": content}


def completion_logprobs(
    tokenizer: Tokenizer | None, token_ids: list[int], positions: list[Position | None] | None, offset: int = 0
) -> dict[str, Any] | None:
    """Four lists, one entry per token; null for the first token of a prompt, which nothing predicts.

    offset: characters of this choice before these tokens.
    """
    if positions is None:
        return None
    texts = [_text_of(tokenizer, token_id, position) for token_id, position in zip(token_ids, positions, strict=True)]
    return {
        "text_offset": list(itertools.accumulate(map(len, texts), initial=offset))[:-1],
        "token_logprobs": [
            None if position is None else finite(position[token_id])
            for token_id, position in zip(token_ids, positions, strict=True)
        ],
        "tokens": texts,
        "top_logprobs": [None if position is None else _by_name(tokenizer, position) for position in positions],
    }


def prompt_logprobs(positions: list[Position | None] | None) -> list[dict[str, Any] | None] | None:
    """By token id: [null, {"5": {logprob, rank, decoded_token}}, ...]."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": finite(logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token_id, logprob in position.items()
        }
        for position in positions
    ]


def _text_of(tokenizer: Tokenizer | None, token_id: int, position: Position | None) -> str:
    if position is not None:
        return position[token_id].decoded_token or ""
    return tokenizer.token_text(token_id) if tokenizer is not None else ""


def _bytes_of(tokenizer: Tokenizer | None, token_id: int, text: str) -> bytes:
    if tokenizer is not None and "\ufffd" in text:
        byte = tokenizer.token_byte(token_id)
        return bytes([byte]) if byte is not None else tokenizer.token_bytes(token_id)
    return text.encode("utf-8", "replace")


def _by_name(tokenizer: Tokenizer | None, position: Position) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in position.items():
        name = logprob.decoded_token or ""
        if "\ufffd" in name:
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in _bytes_of(tokenizer, token_id, name))
        if name in found:
            name = f"token_id:{token_id}"
        found[name] = finite(logprob)
    return found
