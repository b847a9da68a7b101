"""golden/tiny.py: the same bytes every time, and checkpoints as transformers expects them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from golden.tiny import DECODERS, EMBEDDERS, TINY, draw_weights, tensor_shapes, train_tokenizer, write_tiny_model


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mean"])
def test_writing_a_model_twice_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    assert all_bytes(write_tiny_model(name, tmp_path / "a")) == all_bytes(write_tiny_model(name, tmp_path / "b"))


@pytest.mark.parametrize("name", TINY)
def test_transformers_finds_every_tensor_and_no_other(name: str, tmp_path: Path) -> None:
    folder = write_tiny_model(name, tmp_path / name)
    auto = AutoModel if name in EMBEDDERS else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__.startswith(TINY[name].config["architectures"][0].removesuffix("ForCausalLM"))
    assert not {key: value for key, value in info.items() if value}
    assert (folder / "model.safetensors").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", TINY)
def test_the_tokenizer_fills_the_vocabulary_and_gives_text_back(name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(name, tmp_path / name))
    assert len(tokenizer) == TINY[name].config["vocab_size"]
    text = "The fox über die Brücke: 1024!\n\tdef add(first) 🍕"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_a_weight_depends_on_its_name_and_the_seed_only() -> None:
    weights = draw_weights("llama")
    assert list(weights) == sorted(tensor_shapes("llama"))
    left, right = (weights[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert not np.array_equal(left, right)
    assert not np.array_equal(weights["model.norm.weight"], draw_weights("mixtral")["model.norm.weight"])


def test_generation_config_names_two_ends_and_the_file_holds_what_was_drawn(tmp_path: Path) -> None:
    folder = write_tiny_model("llama", tmp_path)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 118]
    stored = load_file(folder / "model.safetensors")
    drawn = draw_weights("llama")
    assert stored.keys() == drawn.keys()
    assert all(np.array_equal(stored[key], drawn[key]) for key in drawn)


def test_the_tokenizer_does_not_depend_on_chance() -> None:
    texts = {train_tokenizer(320, ("<a>", "<b>", "<c>")).to_str() for _ in range(5)}
    assert len(texts) == 1


def test_every_decoder_has_a_second_end_that_its_output_reaches() -> None:
    assert all(len(TINY[name].eos_token_ids) == 2 for name in DECODERS)
