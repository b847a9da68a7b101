"""How compare.py talks to one engine in its own process: one JSON object per line, in and out.

Standard library only, since it runs in every peer's python. It does not know any engine; each adapter beside it calls
`serve`. First line in: {"model": folder, "dtype": name, "threads": n}; answer: what the engine says about itself.
Every further line in: {"requests": [[prompt_token_ids, num_output_tokens], ...]}; answer: {"seconds",
"num_output_tokens"}.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

Request = tuple[list[int], int]  # (prompt_token_ids, number of output tokens)


class Engine(Protocol):
    """What an adapter provides: its constructor takes (model, dtype, threads), returns when it can answer."""

    info: dict[str, Any]  # "version" and "dtype" (of the weights in memory), and what else is worth a note

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """Output token ids of each request: greedy, exactly as many as asked, end tokens ignored."""


def serve(make_engine: Callable[[str, str, int], Engine]) -> None:
    """Load the engine, then answer one job a line until the input ends."""
    # Libraries print to standard output; keep a private copy for the answers and send everything else to the log.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers)

    job = json.loads(sys.stdin.readline())
    engine = make_engine(job["model"], job["dtype"], job["threads"])
    answer(engine.info)
    for line in sys.stdin:
        requests = [(ids, num_tokens) for ids, num_tokens in json.loads(line)["requests"]]
        start = time.perf_counter()
        outputs = engine.generate(requests)
        seconds = time.perf_counter() - start
        answer({"seconds": seconds, "num_output_tokens": [len(ids) for ids in outputs]})
