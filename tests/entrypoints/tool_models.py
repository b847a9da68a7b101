"""Tiny random models whose chat templates know tools, or thinking, in the ways of real families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from golden.tiny import CHAT_TEMPLATE, write_tiny_model
from minivllm import LLM

MESSAGES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for call in m.tool_calls or [] %}CALL {{ call.function.name }} {{ call.function.arguments.items() | list }}"
    " {{ call.id }}{% endfor %}{{ m.tool_call_id }}<|endoftext|>\n{% endfor %}<|im_start|>assistant\n"
)
TOOLS = "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
HERMES = f"{TOOLS}{{# <tool_call> #}}{MESSAGES}"
MISTRAL = f"{TOOLS}{{# [TOOL_CALLS] #}}{MESSAGES}"
MISTRAL_ARGS = f"{TOOLS}{{# [TOOL_CALLS] [ARGS] #}}{MESSAGES}"
LLAMA = f'{TOOLS}{{# {{"name": function name, "parameters": dictionary}} #}}{MESSAGES}'
PYTHONIC = f"{TOOLS}{{# [func_name1(a=1)] #}}{MESSAGES}"
THINKS = f"{HERMES}{{% if enable_thinking is defined and not enable_thinking %}}<think>\n\n</think>\n\n{{% endif %}}"
BEGINS_THINKING = f"{THINKS}<think>\n"
FAMILIES = {
    "hermes": HERMES,
    "mistral": MISTRAL,
    "mistral_args": MISTRAL_ARGS,
    "llama3_json": LLAMA,
    "pythonic": PYTHONIC,
    "none": CHAT_TEMPLATE,
}


def tiny_llm(folder: Path, template: str, special: str | None = None) -> LLM:
    """The tiny llama with room for 2048 tokens. special: what its third special token, id 2, is called."""
    write_tiny_model("llama", folder)
    _change(folder / "config.json", max_position_embeddings=2048)
    _change(folder / "tokenizer_config.json", chat_template=template, model_max_length=2048)
    _change(folder / "generation_config.json", eos_token_id=0)  # not also a token with a text
    if special is not None:
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace("<|im_end|>", special))
    return LLM(folder, dtype="float32", num_gpu_blocks_override=600, max_num_seqs=8, batch_invariant=True, seed=7)


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def closing_bias(llm: LLM, **others: float) -> dict[str, float]:
    """A random model would write strings for ever: make it like what closes them."""
    tokenizer = llm.get_tokenizer()
    likes = {'"': 9.0, "}": 12.0, "]": 12.0, "n": 6.0, ".": -9.0, ")": 12.0} | others
    return {str(tokenizer.encode(text)[-1]): bias for text, bias in likes.items()}
