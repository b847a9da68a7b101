"""A model of a real size with random weights, where no checkpoint can be had: speed depends on shapes alone.

    python benchmarks/random_model.py llama-1b FOLDER     the shape of Llama-3.2-1B, 2.5 GB in bfloat16
    python benchmarks/random_model.py llama-8b FOLDER     the shape of Llama-3-8B, 16 GB

The folder has config.json, model.safetensors and the small tokenizer of golden/tiny.py (speed is measured with token
ids; texts mean nothing). Called by hand and by gpu.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from golden.tiny import write_tiny_model

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def write_random_model(shape: str, folder: Path, seed: int = 0) -> int:
    """Writes the folder and gives the bytes of its weights. shape: one of SHAPES."""
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tiny_model("llama", folder)  # for its tokenizer; config and weights are replaced
    config = LlamaConfig(
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=shape != "llama-8b",
        bos_token_id=1,
        eos_token_id=0,
        dtype="bfloat16",
        **SHAPES[shape],
    )
    torch.manual_seed(seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    model.save_pretrained(folder, max_shard_size="64GB")
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(f"{write_random_model(arguments.shape, arguments.folder) / 1e9:.2f} GB of weights in {arguments.folder}")


if __name__ == "__main__":
    main()
