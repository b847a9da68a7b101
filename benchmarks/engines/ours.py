"""Adapter: minivllm, offline. Runs in the python that runs compare.py."""

import torch
from protocol import Request, serve

import minivllm
from minivllm import LLM, SamplingParams


class Ours:
    """minivllm.LLM with its own settings, only the dtype given."""

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.llm = LLM(model=model, dtype=dtype)
        self.info = {"version": minivllm.__version__, "torch": torch.__version__, "dtype": dtype}

    def generate(self, requests: list[Request]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(Ours)
