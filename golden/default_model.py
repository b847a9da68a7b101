"""The default model, SmolLM2-135M-Instruct, as transformers reads its GGUF file.

The weights go through transformers' own dequantiser. The tokenizer does not: transformers does not know the
pre-tokenizer "smollm" and takes GPT-2's, so that digits after two blanks or newlines become other ids than the
model was trained with. Here it is built from the file's vocabulary, as the model's authors publish it.

Called by make.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CONTROL_TOKEN = 3  # tokenizer.ggml.token_type


def find() -> Path:
    """The file's place, downloaded if need be."""
    from minivllm.hub import resolve_model

    return resolve_model(None).path


def load_model(gguf: Path) -> Any:
    """The dequantised model in float32, eager attention."""
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    )


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, every digit on its own."""
    fields = GGUFReader(gguf).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"].contents()],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"].contents()],
        chat_template=fields["tokenizer.chat_template"].contents(),
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, content: str | list[dict[str, str]]) -> list[int]:
    """Text as it is; messages through the chat template, ready for the answer."""
    if isinstance(content, str):
        return list(tokenizer.encode(content, add_special_tokens=True))
    ids: Any = tokenizer.apply_chat_template(content, add_generation_prompt=True, return_dict=False)
    return list(ids)
