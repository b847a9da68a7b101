"""Logits to tokens: pure functions on [num_reqs, vocab_size]. The law of this folder is in README.md.

Called by worker/model_runner.py. Twin in vLLM: vllm/v1/sample/.
"""

from minivllm.sample.logprobs import prompt_logprobs
from minivllm.sample.metadata import SamplingMetadata, SamplingRow
from minivllm.sample.sampler import SamplerOutput, final_probabilities, sample

__all__ = [
    "SamplerOutput",
    "SamplingMetadata",
    "SamplingRow",
    "final_probabilities",
    "prompt_logprobs",
    "sample",
]
