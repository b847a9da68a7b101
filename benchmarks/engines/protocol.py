"""How compare.py talks to one engine in its own process: one JSON object per line, in and out.

Standard library only, since it runs in every peer's python. It does not know any engine; each adapter beside it calls
`serve`. First line in: the fields of Setup; answer: what the engine says about itself. Every further line in:
{"requests": [[prompt_token_ids, num_output_tokens], ...], "json_schema": null or a schema}; answer: {"seconds",
"num_output_tokens"}, or {"unsupported": why}.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

Request = tuple[list[int], int]  # (prompt_token_ids, number of output tokens)


@dataclass(frozen=True)
class Setup:
    """What an engine is started with. An adapter that cannot do what is asked raises here: it would not be the same."""

    model: str  # Hugging Face folder
    gguf: str | None  # the file that the folder was written from, where there is one
    dtype: str
    threads: int
    options: dict[str, Any]  # of vLLM's names, as {"quantization": "int4"}


class Engine(Protocol):
    """What an adapter provides: its constructor takes a Setup and returns when it can answer."""

    # "version" and "dtype" (of the weights in memory); "weight_bytes" where they are not parameters x dtype;
    # "prepare_seconds" of work that only the first start has (writing the model out in the engine's own format)
    info: dict[str, Any]

    def generate(self, requests: list[Request], json_schema: dict[str, Any] | None) -> list[list[int]]:
        """Output token ids of each request: greedy, exactly as many as asked, end tokens ignored.

        json_schema: every output is the beginning of a document that it accepts. Raises NotImplementedError.
        """


def serve(make_engine: Callable[[Setup], Engine]) -> None:
    """Load the engine, then answer one job a line until the input ends."""
    # Libraries print to standard output; keep a private copy for the answers and send everything else to the log.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers)

    engine = make_engine(Setup(**json.loads(sys.stdin.readline())))
    answer(engine.info)
    for line in sys.stdin:
        job = json.loads(line)
        requests = [(ids, num_tokens) for ids, num_tokens in job["requests"]]
        start = time.perf_counter()
        try:
            outputs = engine.generate(requests, job["json_schema"])
        except NotImplementedError as error:
            answer({"unsupported": str(error)})
            continue
        seconds = time.perf_counter() - start
        answer({"seconds": seconds, "num_output_tokens": [len(ids) for ids in outputs]})


def refuse_options(options: dict[str, Any], supported: tuple[str, ...] = ()) -> None:
    """Raise unless all options are `supported`."""
    if unknown := set(options) - set(supported):
        raise ValueError(f"this engine has no {', '.join(sorted(unknown))}")
