"""The work that every engine is given, as token ids, so that all of them compute the same thing.

Standard library only, so that it can be read and run anywhere. Called by compare.py and http_path.py.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VOCAB_SIZE = 49_000  # a little below SmolLM2's 49,152
FIRST_TOKEN_ID = 20  # below it lie the special tokens

Request = tuple[list[int], int]  # (prompt_token_ids, number of output tokens)


def random_requests(
    num_requests: int = 32,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    prompt: tuple[int, int] = (16, 256),
    output: tuple[int, int] = (32, 128),
) -> list[Request]:
    """Requests of random token ids; prompt and output lengths in tokens are uniform in the closed ranges."""
    rng = random.Random(seed)

    def request() -> Request:
        # The order of the draws is part of the published workload: prompt length, ids, output length.
        num_prompt_tokens = rng.randint(*prompt)
        prompt_token_ids = [rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(num_prompt_tokens)]
        return prompt_token_ids, rng.randint(*output)

    return [request() for _ in range(num_requests)]


@dataclass(frozen=True)
class Batch:
    """Requests that are handed over together, and timed together."""

    requests: list[Request]
    json_schema: dict[str, Any] | None = None  # every output is the beginning of a document that it accepts


# More elements than any output here has room for, so that no document ends early.
RECORDS_SCHEMA = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "price": {"type": "integer"}, "sold": {"type": "boolean"}},
        "required": ["name", "price", "sold"],
        "additionalProperties": False,
    },
}


def shared_prefix() -> list[Batch]:
    """Two prompts of 1,088 tokens that share the first 1,024; one token each, so that the time is that to the first."""
    (prefix, _), (first, _), (second, _) = random_requests(3, seed=3, prompt=(1024, 1024), output=(1, 1))
    return [Batch([(prefix + first[:64], 1)]), Batch([(prefix + second[:64], 1)])]


def copied_records(encode: Callable[[str], list[int]], round_index: int) -> list[Batch]:
    """A list of records that the prompt has four times already: the model goes on with it.

    The one workload that is text: a model copies what it can read, and random token ids it does not.
    """
    rng = random.Random(round_index)
    words = ["river", "stone", "garden", "window", "market", "letter", "engine", "doctor", "silver", "village"]
    lines = [
        f'{{"name": "{rng.choice(words)} {rng.choice(words)}", "price": {rng.randint(100, 999)}}}\n' for _ in range(8)
    ]
    return [Batch([(encode("".join(lines) * 4), 128)])]


# The last batch is what is measured; where there are two, also how long it takes relative to the first.
WORKLOADS: dict[str, Callable[[], list[Batch]]] = {
    "w32": lambda: [Batch(random_requests(32))],
    "single": lambda: [Batch(random_requests(1, prompt=(64, 64), output=(128, 128)))],
    "prompt1024": lambda: [Batch(random_requests(1, prompt=(1024, 1024), output=(1, 1)))],
    "shared_prefix": shared_prefix,
    "json": lambda: [
        Batch(random_requests(8, seed=5, prompt=(64, 64), output=(64, 64)), schema) for schema in (None, RECORDS_SCHEMA)
    ],
}
COPY = "copy"
NAMES = (*WORKLOADS, COPY)


def batches_of_round(name: str, round_index: int, encode: Callable[[str], list[int]] | None = None) -> list[Batch]:
    """The batches of workload `name`, other token ids in each round and, but for a prefix shared on purpose, batch.

    The lengths stay; ids are shifted, so that no engine's prefix cache can answer from an earlier round. Round 0 is the
    published list. encode: text -> token ids, for "copy", whose length may differ by a token or two between rounds.
    """
    if name == COPY:
        if encode is None:
            raise ValueError("the workload 'copy' is text: it needs a tokenizer")
        return copied_records(encode, round_index)
    span = VOCAB_SIZE - FIRST_TOKEN_ID

    def shift(token_id: int, by: int) -> int:
        return (token_id - FIRST_TOKEN_ID + by) % span + FIRST_TOKEN_ID

    def shifted(batch: Batch, by: int) -> Batch:
        requests = [([shift(token_id, by) for token_id in ids], num_tokens) for ids, num_tokens in batch.requests]
        return Batch(requests, batch.json_schema)

    # A schema changes nothing about a prompt's blocks: its batch needs ids of its own.
    return [shifted(batch, round_index + (1000 if batch.json_schema else 0)) for batch in WORKLOADS[name]()]
