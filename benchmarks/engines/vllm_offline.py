"""Adapter: vLLM's CPU build, offline. Runs in the peer "vllm"."""

import os
from typing import Any

from protocol import Request, Setup, serve

KV_CACHE_BYTES = 2**30  # 23 KB a token in 16 bit, 46 KB in 32 bit: far more than any workload here holds
MAX_MODEL_LEN = 2048


class VllmOffline:
    """vllm.LLM with its own settings, except what would not be fair on a small machine (see __init__).

    Options are its keyword arguments.
    """

    def __init__(self, setup: Setup) -> None:
        # By default vLLM keeps one core for its other processes, which is half of a two-core machine.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        import torch
        import vllm
        from vllm.sampling_params import StructuredOutputsParams

        self.sampling_params, self.structured_outputs = vllm.SamplingParams, StructuredOutputsParams
        self.llm = vllm.LLM(
            model=setup.model,
            dtype=setup.dtype,
            max_model_len=MAX_MODEL_LEN,
            # The warm-up computes this many tokens at once; the default of 8192 only makes the start slower.
            max_num_batched_tokens=MAX_MODEL_LEN,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            disable_log_stats=True,
            **setup.options,
        )
        self.info = {"version": vllm.__version__, "torch": torch.__version__, "dtype": setup.dtype}

    def generate(self, requests: list[Request], json_schema: dict[str, Any] | None) -> list[list[int]]:
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        form = None if json_schema is None else self.structured_outputs(json=json_schema)
        shared = {"temperature": 0, "ignore_eos": True, "detokenize": False, "structured_outputs": form}
        params = [self.sampling_params(max_tokens=n, **shared) for _, n in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(VllmOffline)
