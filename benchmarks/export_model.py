"""Write a GGUF file out as a Hugging Face folder (float32 safetensors), so that every engine can load the same weights.

Run by a peer's python (it needs transformers, accelerate and gguf): export_model.py FILE.gguf FOLDER
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def export(gguf_file: Path, folder: Path) -> None:
    """Dequantise `gguf_file` once and save model, tokenizer and generation config under `folder`."""
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    # transformers remembers that the weights came from a GGUF and then refuses to save them, though they are plain now.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf_file", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    export(arguments.gguf_file.resolve(), arguments.folder)
    print(f"wrote {arguments.folder}")
