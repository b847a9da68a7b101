"""The work that every engine is given, as token ids, so that all of them compute the same thing.

Standard library only, so that it can be read and run anywhere. Called by compare.py.
"""

import random
from collections.abc import Callable

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


WORKLOADS: dict[str, Callable[[], list[Request]]] = {
    "w32": lambda: random_requests(32),
    "single": lambda: random_requests(1, prompt=(64, 64), output=(128, 128)),
    "prompt1024": lambda: random_requests(1, prompt=(1024, 1024), output=(1, 1)),
}


def requests_of_round(name: str, round_index: int) -> list[Request]:
    """The requests of workload `name`, other token ids in each round.

    The lengths stay; ids are shifted by the round, so that no engine's prefix cache can answer from an earlier round.
    Round 0 is the published list.
    """
    span = VOCAB_SIZE - FIRST_TOKEN_ID

    def shift(token_id: int) -> int:
        return (token_id - FIRST_TOKEN_ID + round_index) % span + FIRST_TOKEN_ID

    return [([shift(token_id) for token_id in ids], num_tokens) for ids, num_tokens in WORKLOADS[name]()]
