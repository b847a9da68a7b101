"""From a model on disk to a module in memory: what is taken as it is, what is completed, what is refused and how."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from golden.tiny import write_tiny_model
from minivllm import LLM, SamplingParams
from minivllm.errors import ConfigError
from minivllm.hub import ModelSource
from minivllm.models import loader
from minivllm.models.linear import ModelOptions, weight_bytes
from tests.models.checkpoints import (
    HEADS,
    HIDDEN,
    VOCAB,
    gguf_name,
    hf_weights,
    metadata,
    to_llama_cpp,
    write_folder,
    write_gguf,
    write_gguf_model,
)
from tests.tolerances import HF_LOGPROB_ATOL

GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=0, ignore_eos=True)
FP32 = ModelOptions(dtype=torch.float32)


def source_of(path: Path) -> ModelSource:
    return ModelSource("gguf" if path.suffix == ".gguf" else "folder", path, path.stem)


def load(folder: Path) -> torch.nn.Module:
    source = source_of(folder)
    return loader.load_model(source, loader.load_hf_config(source), FP32)


def refused(message: str, call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ConfigError, match=message) as caught:
        call(*arguments)
    assert caught.value.parameter == "model" and len(str(caught.value)) < 800
    return str(caught.value)


def answer(folder: Path, **settings: Any) -> tuple[list[int], list[float]]:
    """Greedy token ids and their logprobs."""
    llm = LLM(folder, num_gpu_blocks_override=8, **({"dtype": "float32"} | settings))
    output = llm.generate({"prompt_token_ids": [5, 6, 7, 8, 9]}, GREEDY, use_tqdm=False)[0].outputs[0]
    return output.token_ids, [
        entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)
    ]


# ------------------------------------------------------------------ the configuration
def test_a_configuration_is_transformers_own_with_the_values_of_the_file(tmp_path: Path):
    config = loader.load_hf_config(source_of(write_folder(tmp_path / "m")))
    assert type(config).__name__ == "LlamaConfig"
    assert (config.hidden_size, config.vocab_size, config.num_attention_heads) == (HIDDEN, VOCAB, HEADS)
    assert config.rope_parameters["rope_theta"] == 50000.0


@pytest.mark.parametrize("architectures", [None, []])
def test_a_missing_architecture_is_completed_from_the_model_type(tmp_path: Path, architectures: Any):
    folder = write_folder(tmp_path / "m", architectures=architectures, model_type="mistral")
    assert loader.load_hf_config(source_of(folder)).architectures == ["MistralForCausalLM"]


@pytest.mark.parametrize(
    ("model_type", "shown"),
    [
        (None, "'None'"),
        ("llama9", "'llama9'"),
        ("../llama", r"'\.\./llama'"),
        (5, "'5'"),
        (["llama"], "llama"),
        ({}, "'{}'"),
        ("x" * 999, "'x{80}'"),
    ],
    ids=lambda value: str(value)[:9],
)
def test_an_unknown_model_type_is_named(tmp_path: Path, model_type: Any, shown: Any):
    folder = write_folder(tmp_path / "m", model_type=model_type)
    message = f"model_type must be one that transformers knows, got .*{shown}.*A newer transformers may know it"
    refused(message, loader.load_hf_config, source_of(folder))


@pytest.mark.parametrize("junk", ["LlamaForCausalLM", 5, [5], [None], [["LlamaForCausalLM"]], {"a": 1}, True], ids=repr)
def test_architectures_that_are_no_list_of_names_are_refused(tmp_path: Path, junk: Any):
    """A number or a list of lists was a TypeError, a string was taken for a list of letters."""
    folder = write_folder(tmp_path / "m", architectures=junk)
    refused("architectures must be a list of names, got", loader.load_hf_config, source_of(folder))


def test_a_folder_without_a_config_is_named(tmp_path: Path):
    (tmp_path / "m").mkdir()
    refused("'m' cannot be used: it has no config.json", loader.load_hf_config, source_of(tmp_path / "m"))


def test_a_folder_without_weights_is_refused_before_anything_is_built(tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    refused(r"it has no \*.safetensors file", loader.load_hf_config, source_of(folder))


COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip


@pytest.mark.parametrize("junk", [-1, 0, 2**31, 2**40, 10**30, "64", 64.0, math.nan, math.inf, True, [64], {}], ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_that_is_none_is_refused(tmp_path: Path, name: str, junk: Any):
    folder = write_folder(tmp_path / "m", weights={}, **{name: junk})
    refused("'m'", loader.load_hf_config, source_of(folder))


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_key_value_heads", "max_position_embeddings"])
def test_a_count_out_of_range_is_named_with_the_range(tmp_path: Path, name: str):
    folder = write_folder(tmp_path / "m", weights={}, **{name: 2**40})
    refused(
        rf"{name} must be an integer in \[1, 2147483647\], got 1099511627776", loader.load_hf_config, source_of(folder)
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("place", ["top", "nested"])
def test_an_absurd_number_of_layers_is_refused_before_lists_of_that_length_are_made(
    tmp_path: Path, model_type: str, place: str
):
    """Qwen's configuration class makes a list with an entry per layer: 2**31 of them filled the memory.

    Here it is one too many only: a test that fails must not do the same.
    """
    inside = {"num_hidden_layers": loader.MAX_LAYERS + 1}
    changes = inside if place == "top" else {"text_config": inside}
    folder = write_folder(tmp_path / "m", model_type=model_type, **changes)
    refused("num_hidden_layers must be at most 10000, got 10001", loader.load_hf_config, source_of(folder))


@pytest.mark.parametrize("key", ["n_layer", "num_layers", "encoder_layers", "max_window_layers"])
def test_the_number_of_layers_has_many_names(tmp_path: Path, key: str):
    folder = write_folder(tmp_path / "m", **{key: 2**31})
    refused(f"{key} must be at most 10000, got 2147483648", loader.load_hf_config, source_of(folder))


def test_the_number_of_a_classifiers_labels_is_not_looked_at(tmp_path: Path):
    """transformers makes a table with an entry per label: 2**31 of them, in a config.json of 400 bytes, filled the
    memory and took an hour."""
    config = loader.load_hf_config(source_of(write_folder(tmp_path / "m", num_labels=50_000)))
    assert config.num_labels < 10


@pytest.mark.parametrize("junk", [5, "text", {"hidden_size": 8}, [1]], ids=repr)
def test_a_text_config_that_the_model_type_does_not_know_is_refused(tmp_path: Path, junk: Any):
    """It was an AttributeError."""
    folder = write_folder(tmp_path / "m", text_config=junk)
    refused("its configuration is not valid for model_type 'llama'", loader.load_hf_config, source_of(folder))


@pytest.mark.parametrize(
    "changes",
    [{"rope_scaling": "linear"}, {"rope_scaling": {"rope_type": "llama3"}}, {"rms_norm_eps": "x"},
     {"tie_word_embeddings": "yes"}, {"hidden_act": 5}, {"to_dict": 5}, {"__class__": 5}, {"get_text_config": 5},
     {"torch_dtype": "os"}, {"num_attention_heads": 5}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_whatever_a_configuration_class_refuses_is_a_config_error(tmp_path: Path, changes: dict[str, Any]):
    folder = write_folder(tmp_path / "m", **changes)
    refused("'m': its configuration is not valid for model_type 'llama'", loader.load_hf_config, source_of(folder))


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"]
)
def test_the_folder_does_not_choose_which_code_computes_attention(tmp_path: Path, key: str):
    """transformers would fetch and run a kernel that is named there."""
    folder = write_folder(tmp_path / "m", **{key: "evil/kernel"})
    config = loader.load_hf_config(source_of(folder))
    assert "evil" not in json.dumps(config.to_dict()) and config._attn_implementation != "evil/kernel"


def test_nor_does_a_configuration_inside_the_configuration(tmp_path: Path):
    inside = {"model_type": "gemma3_text", "_attn_implementation": "evil/kernel", "num_labels": 50_000}
    folder = write_folder(tmp_path / "m", model_type="gemma3", architectures=["Gemma3ForCausalLM"], text_config=inside)
    text_config = loader.load_hf_config(source_of(folder)).get_text_config()
    assert text_config._attn_implementation != "evil/kernel" and text_config.num_labels < 10


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq", "bits": 4}, {}, None], ids=repr)
def test_packed_safetensors_are_refused_with_the_way_out(tmp_path: Path, quantization: Any):
    folder = write_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    refused("quantization_config.*Use the unquantised model, or a GGUF file", loader.load_hf_config, source_of(folder))


# ------------------------------------------------------------------ tied and untied heads
def test_one_matrix_for_both_ends_is_kept_once(tmp_path: Path):
    tied = load(write_folder(tmp_path / "tied", tie_word_embeddings=True))
    head = {"lm_head.weight": hf_weights("llama")["model.embed_tokens.weight"]}
    untied = load(write_folder(tmp_path / "untied", weights=hf_weights("llama") | head, tie_word_embeddings=False))
    table = tied.model.embed_tokens  # packed, its tiles are filled up
    assert weight_bytes(untied) - weight_bytes(tied) == 2 * VOCAB * HIDDEN * 4 - weight_bytes(table)


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_stored_head_unties_a_tied_configuration_only_if_it_differs(tmp_path: Path, is_equal: bool):
    weights = hf_weights("llama")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + (0 if is_equal else 1)
    folder = write_folder(tmp_path / "m", weights=weights, tie_word_embeddings=True)
    assert loader.load_hf_config(source_of(folder)).tie_word_embeddings is is_equal
    names = [name for name, _ in loader.iterate_weights(source_of(folder), loader.load_hf_config(source_of(folder)))]
    assert ("lm_head.weight" in names) is not is_equal  # a second copy is not even read
    reference = write_folder(tmp_path / "r", weights=weights, tie_word_embeddings=False)
    assert answer(folder)[0] == answer(reference)[0]


def test_an_untied_model_needs_its_head(tmp_path: Path):
    folder = write_folder(tmp_path / "m", tie_word_embeddings=False)
    refused(r"missing tensor 'lm_head\.weight' of shape \[80, 64\]", load, folder)


# ------------------------------------------------------------------ generation_config.json
@pytest.mark.parametrize("eos", [2, 0, [2, 7], [], None])
def test_eos_may_be_one_or_several_or_none(tmp_path: Path, eos: Any):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "temperature": 0.6}))
    assert loader.load_generation_config(source_of(tmp_path)) == {"eos_token_id": eos, "temperature": 0.6}


@pytest.mark.parametrize("eos", ["2", 2.0, True, [2, "7"], [[2]], [None], {"id": 2}], ids=repr)
def test_an_eos_that_is_no_token_id_is_refused(tmp_path: Path, eos: Any):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    refused(
        "generation_config.json: eos_token_id must be token ids, got",
        loader.load_generation_config,
        source_of(tmp_path),
    )


def test_without_a_file_there_are_no_defaults(tmp_path: Path):
    assert loader.load_generation_config(source_of(tmp_path)) == {}


@pytest.mark.parametrize("content", ["[]", "{", '{"auto_map": {"a": "evil.E"}}', " " * (1 << 20) + "{}"], ids=len)
def test_a_hostile_generation_config_is_refused(tmp_path: Path, content: Any):
    (tmp_path / "generation_config.json").write_text(content)
    refused("generation_config.json", loader.load_generation_config, source_of(tmp_path))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"eos": 2}, {}),  # the tokenizer knows that one
        ({"eos": 2, "eot": 7}, {"eos_token_id": [2, 7]}),
        ({"eos": 2, "eot": 2}, {}),
        ({"eos": 2, "eot": 7, "eom": 8}, {"eos_token_id": [2, 7, 8]}),
        ({}, {}),
        ({"eos": 2, "eot": "x"}, {}),
    ],
)
def test_a_gguf_may_name_several_ends_of_a_turn(tmp_path: Path, ids: Any, expected: Any):
    values = metadata("llama") | {f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items()}
    path = write_gguf_model(tmp_path / "m.gguf", "llama", hf_weights("llama"), values)
    assert loader.load_generation_config(source_of(path)) == expected


# ------------------------------------------------------------------ dtype
AUTO = [
    # what config.json says, what is stored, with bfloat16 instructions, without
    ("float32", torch.float32, torch.float32, torch.float32),
    ("bfloat16", torch.bfloat16, torch.bfloat16, torch.float32),
    ("float16", torch.float16, torch.bfloat16, torch.float32),
    (None, torch.float32, torch.float32, torch.float32),
    (None, torch.float16, torch.bfloat16, torch.float32),
    (None, torch.bfloat16, torch.bfloat16, torch.float32),
    ("float32", torch.bfloat16, torch.float32, torch.float32),  # the file's own word counts
]


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize(("declared", "stored", "fast", "slow"), AUTO)
def test_auto_is_what_the_checkpoint_was_trained_in_where_the_cpu_is_good_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, declared: str | None, stored: Any, fast: Any, slow: Any
):
    weights = {name: torch.from_numpy(weight).to(stored) for name, weight in hf_weights("llama").items()}
    source = source_of(write_folder(tmp_path / "m", weights=weights, **{key: declared}))
    config = loader.load_hf_config(source)
    for has_instructions, expected in ((True, fast), (False, slow)):
        monkeypatch.setattr(loader, "has_bfloat16_instructions", lambda has=has_instructions: has)
        assert loader.resolve_dtype("auto", config, source) is expected
        assert loader.resolve_dtype("auto", config, source, on_gpu=True) is fast


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_auto_of_a_gguf_is_float32_only_if_everything_in_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    tensors = {gguf_name("llama", n): to_llama_cpp("llama", n, w) for n, w in hf_weights("llama").items()}
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors, kind=GGMLQuantizationType[kind])
    monkeypatch.setattr(loader, "has_bfloat16_instructions", lambda: True)
    config = loader.load_hf_config(source_of(path))
    expected = torch.float32 if kind == "F32" else torch.bfloat16
    assert loader.resolve_dtype("auto", config, source_of(path)) is expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_dtype_that_is_asked_for_is_taken(tmp_path: Path, asked: Any, expected: Any):
    source = source_of(write_folder(tmp_path / "m"))
    assert loader.resolve_dtype(asked, loader.load_hf_config(source), source) is expected


@pytest.mark.parametrize(
    "junk", ["float16", torch.float16, "int8", "", None, 32, "x" * 999, []], ids=lambda junk: str(junk)[:9]
)
def test_another_dtype_is_refused_with_the_choices(tmp_path: Path, junk: Any):
    source = source_of(write_folder(tmp_path / "m"))
    with pytest.raises(ConfigError, match="dtype must be auto, float32 or bfloat16, got") as caught:
        loader.resolve_dtype(junk, loader.load_hf_config(source), source)
    assert caught.value.parameter == "dtype" and len(str(caught.value)) < 200


# ------------------------------------------------------------------ weights
def weights_in(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = source_of(folder)
    return {
        name: tensor.clone() for name, tensor in loader.iterate_weights(source, loader.load_hf_config(source), dtype)
    }


@pytest.mark.parametrize("num_shards", [2, 5])
def test_shards_hold_what_one_file_holds(tmp_path: Path, num_shards: int):
    single = weights_in(write_folder(tmp_path / "one"))
    sharded = weights_in(write_folder(tmp_path / "many", num_shards=num_shards))
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_a_sharded_model_answers_as_the_same_model_in_one_file(tmp_path: Path):
    one, many = write_folder(tmp_path / "one"), write_folder(tmp_path / "many", num_shards=3)
    assert answer(one) == answer(many)


def test_shapes_come_from_the_headers_alone(tmp_path: Path):
    folder = write_folder(tmp_path / "m", num_shards=2)
    expected = {name: weight.shape for name, weight in hf_weights("llama").items()}
    assert loader.weight_shapes(source_of(folder)) == expected
    path = write_gguf_model(tmp_path / "m.gguf", "llama", hf_weights("llama"))
    assert loader.weight_shapes(source_of(path)) == expected


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_become_the_wanted_dtype_and_integers_stay(tmp_path: Path, stored: Any):
    weights = {name: torch.from_numpy(weight).to(stored) for name, weight in hf_weights("llama").items()}
    weights["extra.ids"] = torch.arange(5)
    found = weights_in(write_folder(tmp_path / "m", weights=weights))
    assert found.pop("extra.ids").dtype == torch.int64
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(found[name], weights[name].float()) for name in found)  # widening loses nothing


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_computes_in_float32_with_its_own_values(tmp_path: Path, stored: Any):
    half = {name: torch.from_numpy(weight).to(stored) for name, weight in hf_weights("llama").items()}
    ids, logprobs = answer(write_folder(tmp_path / "half", weights=half))
    wide = {name: weight.float() for name, weight in half.items()}
    assert (ids, logprobs) == answer(write_folder(tmp_path / "wide", weights=wide))


def test_a_gguf_and_a_folder_of_the_same_weights_give_the_same_answer(tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    path = write_gguf_model(tmp_path / "m.gguf", "llama", hf_weights("llama"))
    (ids, logprobs), (gguf_ids, gguf_logprobs) = answer(folder), answer(path)
    assert ids == gguf_ids and logprobs == pytest.approx(gguf_logprobs, abs=HF_LOGPROB_ATOL)


def test_reading_weights_is_shown_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = source_of(write_folder(tmp_path / "m"))
    config = loader.load_hf_config(source)
    list(loader.iterate_weights(source, config))
    assert capsys.readouterr().err == ""
    list(loader.iterate_weights(source, config, show_progress=True))
    assert "Loading weights" in capsys.readouterr().err


# ------------------------------------------------------------------ weights that do not belong to the configuration
def test_a_missing_tensor_is_named(tmp_path: Path):
    weights = hf_weights("llama")
    del weights["model.layers.1.mlp.up_proj.weight"]
    refused(r"missing tensor 'model\.layers\.1\.mlp\.up_proj\.weight' of shape \[96, 64\]",
            load, write_folder(tmp_path / "m", weights=weights))  # fmt: skip


def test_an_unexpected_tensor_is_named(tmp_path: Path):
    weights = hf_weights("llama") | {"model.layers.2.input_layernorm.weight": torch.ones(HIDDEN)}
    refused(
        "unexpected tensor 'model.layers.2.input_layernorm.weight'", load, write_folder(tmp_path / "m", weights=weights)
    )


def test_weights_that_are_no_numbers_with_a_fraction_are_refused(tmp_path: Path):
    weights = hf_weights("llama")
    weights["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.int8)
    refused(
        "'model.norm.weight' must be floating-point, got torch.int8",
        load,
        write_folder(tmp_path / "m", weights=weights),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 2**31 - 1}, "vocab_size is 2147483647, but no stored tensor has such a dimension"),
        ({"hidden_size": 2**30}, "hidden_size is 1073741824, but no stored tensor has such a dimension"),
        ({"vocab_size": 96}, r"'model.embed_tokens.weight' must have shape \[96, 64\], got \[80, 64\]"),
        ({"hidden_size": 96}, r"'model.embed_tokens.weight' must have shape \[80, 96\], got \[80, 64\]"),
        ({"intermediate_size": 2**30}, r"down_proj.weight' must have shape \[64, 1073741824\], got \[64, 96\]"),
        ({"num_hidden_layers": 9999}, "num_hidden_layers is 9999, stored are 20 tensors"),
        ({"num_key_value_heads": 2**20}, r"k_proj.weight' must have shape \[16777216, 64\], got \[32, 64\]"),
        ({"num_key_value_heads": 1}, r"k_proj.weight' must have shape \[16, 64\], got \[32, 64\]"),
        ({"num_key_value_heads": 3}, r"k_proj.weight' must have shape \[48, 64\], got \[32, 64\]"),
        ({"head_dim": 32}, r"_proj.weight' must have shape .*, got"),
        ({"head_dim": 2**30}, r"_proj.weight' must have shape .*, got"),
    ],
    ids=lambda value: "=".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_widths_are_compared_before_memory_is_taken_for_them(tmp_path: Path, changes: dict[str, Any], message: str):
    """The model class must not be reached: at these widths it would take gigabytes, or all there is."""
    folder = write_folder(tmp_path / "m", **changes)
    config = loader.load_hf_config(source_of(folder))
    text = refused(message, loader.check_shapes, source_of(folder), config, loader.weight_shapes(source_of(folder)))
    assert "configuration and weights do not belong together" in text and "Fetch both from one place" in text
    refused(message, load, folder)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.weight", "model.norm.weight"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path, name: str):
    weights = hf_weights("llama")
    weights[name] = weights[name][:-1]
    refused(
        rf"'{name}' must have shape .*\[.*{weights[name].shape[0] + 1}.*\], got",
        load,
        write_folder(tmp_path / "m", weights=weights),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "relu"},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"architectures": ["os.system"]},
        {"architectures": ["Qwen3ForCausalLM"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_model_that_cannot_be_built_or_filled_is_a_config_error(tmp_path: Path, changes: dict[str, Any]):
    folder = write_folder(tmp_path / "m", **changes)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("name", ["rope_theta", "factor"])
@pytest.mark.parametrize("junk", [-1, 0, math.nan, math.inf, "10000"], ids=str)
def test_a_rope_without_a_positive_number_is_refused(tmp_path: Path, name: str, junk: Any):
    """NaN frequencies did not show: attention returned zeros, and the model answered with nonsense."""
    changes = (
        {"rope_theta": junk} if name == "rope_theta" else {"rope_scaling": {"rope_type": "linear", "factor": junk}}
    )
    with pytest.raises(ConfigError, match=f"{name} of the rotary embedding must be a positive number, got {junk!r}"):
        load(write_folder(tmp_path / "m", **changes))


def test_a_file_that_shrinks_after_its_header_was_read_is_a_config_error(tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    source = source_of(folder)
    weights = loader.iterate_weights(source, loader.load_hf_config(source))
    tensors = loader.list_tensors(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("model.safetensors cannot be read", lambda: list(loader._iterate_safetensors(tensors, torch.float32)))
    refused("model.safetensors", lambda: list(weights))


def test_what_only_the_safetensors_library_checks_is_a_config_error_too(tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "12345"})
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw.replace(b'"12345"', b"[12345]"))  # metadata must be text
    refused("model.safetensors cannot be read", load, folder)


# ------------------------------------------------------------------ code in a model folder
@pytest.fixture
def marked(tmp_path: Path) -> tuple[Path, str]:
    """A file that exists once anybody runs the code, and the code."""
    marker = tmp_path / "marker"
    return marker, f"open({str(marker)!r}, 'w').close()\n"


EVIL = ("evil.py", "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "setup.py",
        "custom_generate/generate.py", "sitecustomize.py", "torch.py", "transformers.py")  # fmt: skip


def with_code(folder: Path, code: str) -> Path:
    for name in EVIL:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code + "class Evil: pass\n")
    return folder


def change_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
)
def test_auto_map_is_refused_and_its_code_does_not_run(
    tmp_path: Path, marked: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, file: str
):
    """CVE-2025-66448, CVE-2026-22807."""
    marker, code = marked
    folder = with_code(write_tiny_model("llama", tmp_path / "m"), code)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    change_json(folder / file, auto_map=dict.fromkeys(names, "evil.Evil"))
    monkeypatch.chdir(folder)
    text = refused(f"{file} has an auto_map entry", LLM, folder)
    assert "minivllm never runs it" in text and not marker.exists()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_type": "evil"}),
        ("config.json", {"architectures": ["EvilForCausalLM"]}),
        ("config.json", {"architectures": ["evil.Evil"]}),
        ("config.json", {"custom_pipelines": {"p": {"impl": "evil.Evil"}}, "trust_remote_code": True}),
        ("config.json", {"attn_implementation": "evil/kernel", "_attn_implementation_internal": "evil/kernel"}),
        ("tokenizer_config.json", {"tokenizer_class": "Evil", "trust_remote_code": True}),
        ("tokenizer_config.json", {"processor_class": "evil.Evil"}),
        ("generation_config.json", {"custom_generate": "evil", "trust_remote_code": True}),
    ],
)
def test_no_other_word_of_a_folder_runs_its_code(
    tmp_path: Path, marked: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, file: str, changes: dict[str, Any]
):
    marker, code = marked
    folder = with_code(write_tiny_model("llama", tmp_path / "m"), code)
    change_json(folder / file, **changes)
    monkeypatch.chdir(folder)
    try:
        llm = LLM(folder, num_gpu_blocks_override=8)
    except ConfigError as error:
        assert len(str(error)) < 800
    else:
        assert len(llm.generate("the", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 6
    assert not marker.exists()


class Payload:
    """A pickle that runs code when it is opened."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def test_the_payload_of_these_tests_would_run(tmp_path: Path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker"))).close()
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_a_pickle_beside_the_weights_is_never_opened(tmp_path: Path, has_safetensors: bool):
    """CVE-2025-24357."""
    marker = tmp_path / "marker"
    folder = write_tiny_model("llama", tmp_path / "m")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pth", "consolidated.00.pth"):
        (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    if has_safetensors:
        assert len(answer(folder)[0]) == 6
    else:
        (folder / "model.safetensors").unlink()
        refused("which can run code when opened.*minivllm never opens them", LLM, folder)
    assert not marker.exists()


def test_a_pickle_under_a_name_of_safetensors_is_refused_unopened(tmp_path: Path):
    marker = tmp_path / "marker"
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(marker)))
    refused("model.safetensors", loader.load_hf_config, source_of(folder))
    shutil.rmtree(folder)
    assert not marker.exists()
