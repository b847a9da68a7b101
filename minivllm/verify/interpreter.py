"""Some prompts on Triton's kernels, in a process where TRITON_INTERPRET=1 was set before Python started.

Reads {"model", "max_model_len", "max_tokens", "prompts"} from standard input, prints the answers as one line of JSON.
Called by invariance.py. Twin in vLLM: none.
"""

from __future__ import annotations

import json
import sys

from minivllm.verify.engines import Engines, generate
from minivllm.verify.invariance import answers_of


def main() -> None:
    """One request of invariance.py."""
    request = json.load(sys.stdin)
    engine = Engines(request["model"], request["max_model_len"]).start(impl="triton")
    outputs = generate(engine, request["prompts"], max_tokens=request["max_tokens"], logprobs=2, detokenize=False)
    print(json.dumps(answers_of(outputs)))


if __name__ == "__main__":
    main()
