"""Adapter: minivllm, offline. Runs in the python that runs compare.py."""

from typing import Any

import torch
from protocol import Request, Setup, serve

import minivllm
from minivllm import LLM, SamplingParams
from minivllm.sampling_params import StructuredOutputsParams


class Ours:
    """minivllm.LLM with its own settings, only the dtype given; options are its keyword arguments."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        # "gguf" keeps the weights as that file has them: the same model in the file's own format.
        model = setup.gguf if setup.options.get("quantization", "").startswith("gguf") else setup.model
        self.llm = LLM(model=model, dtype=setup.dtype, **setup.options)
        self.info = {
            "version": minivllm.__version__,
            "torch": torch.__version__,
            "dtype": setup.dtype,
            "weight_bytes": self.llm.llm_engine.plan.weight_bytes,
        }

    def generate(self, requests: list[Request], json_schema: dict[str, Any] | None) -> list[list[int]]:
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        form = None if json_schema is None else StructuredOutputsParams(json=json_schema)
        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, structured_outputs=form) for _, n in requests
        ]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(Ours)
