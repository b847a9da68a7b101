"""Adapter: llama.cpp on the GGUF, one request after another. Runs in the peer "llama_cpp"."""

from pathlib import Path
from typing import Any

import llama_cpp
from protocol import Request, Setup, refuse_options, serve

CONTEXT_TOKENS = 2048


class LlamaCpp:
    """llama-cpp-python has one sequence: a batch of requests takes as long as all of them one by one."""

    def __init__(self, setup: Setup) -> None:
        refuse_options(setup.options)
        if setup.gguf is None:
            raise ValueError("llama.cpp reads a GGUF file, and this model has none")
        self.llm = llama_cpp.Llama(
            setup.gguf, n_ctx=CONTEXT_TOKENS, n_threads=setup.threads, n_threads_batch=setup.threads, verbose=False
        )
        self.info = {
            "version": llama_cpp.__version__,
            "dtype": "as in the GGUF",
            "weight_bytes": Path(setup.gguf).stat().st_size,
        }

    def generate(self, requests: list[Request], json_schema: dict[str, Any] | None) -> list[list[int]]:
        if json_schema is not None:
            # Its schemas become grammars that end where the document ends; lengths would not be those asked for.
            raise NotImplementedError("structured output is not measured here")
        return [self._generate_one(ids, num_tokens) for ids, num_tokens in requests]

    def _generate_one(self, ids: list[int], num_tokens: int) -> list[int]:
        # The low-level generator does not stop at end tokens. It keeps what a prompt shares with the one before.
        tokens = self.llm.generate(ids, temp=0.0, repeat_penalty=1.0)
        return [next(tokens) for _ in range(num_tokens)]


if __name__ == "__main__":
    serve(LlamaCpp)
