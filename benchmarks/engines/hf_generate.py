"""Adapter: transformers' generate in static batches of 16, padded on the left. Runs in the peer "transformers"."""

from typing import Any

import torch
import transformers
from protocol import Request, Setup, refuse_options, serve
from transformers import AutoModelForCausalLM

BATCH_SIZE = 16


class HuggingFaceGenerate:
    """A static batch runs until its longest request is done; what others generate beyond their share is thrown away."""

    def __init__(self, setup: Setup) -> None:
        refuse_options(setup.options)
        torch.set_num_threads(setup.threads)
        self.model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=setup.dtype).eval()
        self.info = {"version": transformers.__version__, "torch": torch.__version__, "dtype": setup.dtype}

    def generate(self, requests: list[Request], json_schema: dict[str, Any] | None) -> list[list[int]]:
        if json_schema is not None:
            raise NotImplementedError("transformers has no structured output")
        outputs: list[list[int]] = []
        for first in range(0, len(requests), BATCH_SIZE):
            outputs += self._generate_batch(requests[first : first + BATCH_SIZE])
        return outputs

    @torch.inference_mode()
    def _generate_batch(self, batch: list[Request]) -> list[list[int]]:
        width = max(len(ids) for ids, _ in batch)
        num_steps = max(num_tokens for _, num_tokens in batch)
        padding = [width - len(ids) for ids, _ in batch]
        pad_token_id = self.model.config.pad_token_id
        tokens = torch.tensor([[pad_token_id] * pad + ids for pad, (ids, _) in zip(padding, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
        generated = self.model.generate(
            input_ids=tokens,  # [batch, width]
            attention_mask=mask,  # [batch, width]
            do_sample=False,
            min_new_tokens=num_steps,
            max_new_tokens=num_steps,
            pad_token_id=pad_token_id,
        )
        rows = generated[:, width:].tolist()
        return [row[:num_tokens] for row, (_, num_tokens) in zip(rows, batch, strict=True)]


if __name__ == "__main__":
    serve(HuggingFaceGenerate)
