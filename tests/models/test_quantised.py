"""Weights in 8 and 4 bits: products against float64, guards, memory, and a GGUF model at its own bits."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from minivllm import LLM, SamplingParams
from minivllm.engine.planning import plan_engine
from minivllm.errors import ConfigError
from minivllm.hub import resolve_model
from minivllm.kernels.amx import HAS_AMX
from minivllm.models import loader, onednn, quantised
from minivllm.models.grouped import GROUP_SIZE, GroupedWeight, from_gguf_blocks, round_to_int4
from minivllm.models.linear import FORMATS, Linear, ModelOptions, TiedEmbedding, weight_bytes
from minivllm.models.quantised import (
    FEW_ROWS,
    IN_STRIPS,
    WIDE_ROWS,
    Int4Strips,
    Int4Weight,
    Int8Weight,
    choose_kind,
    planned_bytes,
)
from tests.models.paged import PagedRun
from tests.models.test_linear import loaded, random
from tests.tolerances import BF16_STEP, INT4_LEVEL, INT8_ROW_STEP, KERNEL_ERROR_FACTOR, OUTLIER_RMS, SAME_NETWORK_RMS

from .checkpoints import (
    LAYERS,
    VOCAB,
    gguf_name,
    hf_weights,
    metadata,
    random_blocks,
    to_llama_cpp,
    write_folder,
    write_gguf,
)

ODD_SHAPES = [(960, 576), (99, 48), (33, 40), (257, 31), (1000, 30), (8, 8), (1, 7), (16, 1)]  # out x in
INT4_SHAPES = [(960, 576), (576, 1536), (16, 32), (48, 96), (80, 64), (1040, 128)]
ROW_COUNTS = [0, 1, 2, FEW_ROWS, FEW_ROWS + 1, 7, 33, WIDE_ROWS - 1, WIDE_ROWS, WIDE_ROWS + 9]
BF16 = torch.bfloat16


def int8_values(weight: Int8Weight) -> torch.Tensor:
    """What the codes stand for: [out_features, in_features] float64."""
    tiles = onednn.read_rows(weight.tiles, torch.arange(weight.shape[0]))[:, : weight.shape[1]]
    return tiles.double() * weight.scales.double()[:, None]


def int4_values(weight: Int4Weight, codes: torch.Tensor) -> torch.Tensor:
    """The same, from levels as they are stored; codes: [out_features, in_features] -> float64."""
    scales, middles = weight.levels.double().unbind(-1)  # [num_groups, out_features]
    groups = (codes.double() - 8).unflatten(1, (-1, GROUP_SIZE))
    return (groups * scales.t()[..., None] + middles.t()[..., None]).flatten(1)


def assert_product(out: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, row_step: float = 0.0) -> None:
    """The house's rule against float64, and what rounding the rows to steps of their largest value may add."""
    assert out.dtype == rows.dtype and out.shape == (rows.shape[0], values.shape[0])
    if not len(rows):
        return
    exact = rows.double() @ values.t()
    own = (rows @ values.to(rows.dtype).t()).double()
    limit = KERNEL_ERROR_FACTOR * ((own - exact).abs().max() + torch.finfo(rows.dtype).eps * exact.abs().max())
    largest = rows.double().abs().amax(1, keepdim=True)
    steps = row_step * largest * values.abs().sum(1)  # [num_rows, out_features]
    assert torch.all((out.double() - exact).abs() <= limit + steps)


# ------------------------------------------------------------------ products
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_int8_multiplies_its_codes_with_rows_of_sixteen_bits(shape: tuple[int, int], dtype: torch.dtype):
    plain = random(*shape)
    weight = Int8Weight(plain)
    values = int8_values(weight)
    step = plain.abs().amax(1) / 127
    assert torch.all((values - plain).abs().amax(1) <= 0.75 * step)  # half a step, and the largest may be cut
    for num_rows in ROW_COUNTS:
        rows = random(num_rows, shape[1], seed=num_rows).to(dtype)
        assert_product(weight.product(rows, None), rows, values, INT8_ROW_STEP)


@pytest.mark.parametrize("form", [False, True], ids=["int8 beside it", "bfloat16 beside it"])
@pytest.mark.parametrize("shape", INT4_SHAPES, ids=str)
def test_int4_multiplies_its_codes_for_few_rows_and_its_other_form_for_more(shape: tuple[int, int], form: bool):
    grouped = round_to_int4(random(*shape))
    weight = Int4Weight(grouped, keep_bfloat16=form)
    values = int4_values(weight, grouped.integers())
    steps, minimums = (part.repeat_interleave(GROUP_SIZE, dim=1) for part in (grouped.scales, grouped.minimums))
    limit = INT4_LEVEL * steps + BF16_STEP * (minimums + 8 * steps).abs()
    assert torch.all((values - grouped.dequantise()).abs() <= limit)
    other = grouped.dequantise(BF16).double() if form else int8_values(weight.int8)
    for num_rows in ROW_COUNTS[1:]:
        rows = random(num_rows, shape[1], seed=num_rows).to(BF16)
        few = num_rows <= FEW_ROWS
        assert_product(
            weight.product(rows, None), rows, values if few else other, 0.0 if few or form else INT8_ROW_STEP
        )


@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (32, 32), (64, 96)], ids=str)
def test_int4_in_strips_multiplies_what_the_file_says(shape: tuple[int, int]):
    grouped = round_to_int4(random(*shape))
    grouped = GroupedWeight(grouped.codes, grouped.scales.half(), grouped.minimums.half())  # as a file has them
    weight, values = Int4Strips(grouped), grouped.dequantise(torch.float64)
    for num_rows in ROW_COUNTS[1:]:
        rows = random(num_rows, shape[1], seed=num_rows).to(BF16)
        assert_product(weight.product(rows, None), rows, values)


@pytest.mark.parametrize("name", ["int8", "int4", "int4+bf16", IN_STRIPS])
@pytest.mark.parametrize("num_rows", [1, 40, WIDE_ROWS])
def test_a_bias_is_added_and_rows_of_zeros_or_nan_stay_what_they_are(name: str, num_rows: int):
    stored, bias = FORMATS[name].store(random(64, 96)), random(64, seed=1).to(BF16)
    rows = random(num_rows, 96, seed=2).to(BF16)
    out = FORMATS[name].product(rows, stored, None)
    assert (FORMATS[name].product(rows, stored, bias) - (out + bias)).abs().max() <= 2 * BF16_STEP * out.abs().max()
    rows[0] = 0
    assert torch.equal(FORMATS[name].product(rows, stored, bias)[0], bias)
    rows[0, 3] = torch.nan
    out = FORMATS[name].product(rows, stored, bias)
    assert out[0].isnan().all() and not out[1:].isnan().any()


def test_rows_that_are_a_view_are_multiplied_as_their_copy():
    stored = Int4Weight(random(64, 96))
    wide = random(4, 192).to(BF16)
    assert torch.equal(stored.product(wide[:, ::2], None), stored.product(wide[:, ::2].contiguous(), None))


def test_a_row_with_one_large_value_keeps_its_small_ones():
    """Rounded to 8 bits, all but the large one would be zero."""
    weight = Int8Weight(random(64, 128))
    rows = random(3, 128, seed=1)
    rows[:, 5] = 300.0
    assert_product(weight.product(rows, None), rows, int8_values(weight), INT8_ROW_STEP)
    exact = rows.double() @ int8_values(weight).t()
    assert (weight.product(rows, None) - exact).norm() <= OUTLIER_RMS * (exact - 300 * int8_values(weight)[:, 5]).norm()


# ------------------------------------------------------------------ what is stored in what
def test_the_kind_follows_the_wish_and_what_the_file_has(monkeypatch: pytest.MonkeyPatch):
    def kind(quantization: str, bits: int | None = None, **options: Any) -> str | None:
        return choose_kind(quantization, {bits}, (64, 64), BF16, **options)[0]

    monkeypatch.setattr(quantised, "HAS_AMX", True)
    assert [kind("int8"), kind("int4"), kind("int4+bf16")] == ["int8", IN_STRIPS, IN_STRIPS]
    assert [kind("gguf", bits) for bits in (4, 8, None)] == [IN_STRIPS, "int8", None]
    assert kind("int4", batch_invariant=True) == "int8"
    monkeypatch.setattr(quantised, "HAS_AMX", False)
    assert [kind("int8"), kind("int4"), kind("int4+bf16")] == ["int8", "int4", "int4+bf16"]
    assert [kind("gguf", bits) for bits in (4, 8, None)] == ["int4", "int8", None]
    assert [kind("gguf+bf16", bits) for bits in (4, 8, None)] == ["int4+bf16", None, None]
    assert [kind(name, 4, batch_invariant=True) for name in ("int8", "int4", "gguf+bf16")] == ["int8"] * 3
    assert choose_kind("gguf", {4, 8}, (64, 64), BF16) == (None, "its parts are stored in different formats")


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((64, 48), BF16, "multiple of 16 rows and of 32 columns, it has 64 x 48"),
        ((40, 64), BF16, "multiple of 16 rows and of 32 columns, it has 40 x 64"),
        ((64, 64), torch.float32, "fast in bfloat16 only, and the dtype is float32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["int4", "int4+bf16"])
def test_what_4_bits_cannot_multiply_stays_as_it_was(name: str, shape: Any, dtype: torch.dtype, reason: str):
    weight = random(*shape).to(dtype)
    layer = loaded(Linear(shape[1], shape[0], ModelOptions(dtype, quantization=name)), weight)
    assert reason in layer.stays_plain
    plain = loaded(Linear(shape[1], shape[0], ModelOptions(dtype)), weight)
    rows = random(3, shape[1], seed=1).to(dtype)
    assert torch.equal(layer(rows), plain(rows))
    assert layer.planned_bytes({}, "layer.proj") == weight.nbytes


def test_without_8_bit_instructions_nothing_is_stored_in_8_bits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(quantised, "HAS_AMX", False)
    assert choose_kind("int8", {None}, (64, 64), BF16) == (None, "this CPU has no 8-bit products (VNNI)")
    assert choose_kind("int4", {None}, (64, 64), BF16)[0] is None
    assert choose_kind("int4+bf16", {None}, (64, 64), BF16)[0] == "int4+bf16"
    table = loaded(TiedEmbedding(64, 32, ModelOptions(BF16, quantization="int8")), random(64, 32))
    assert isinstance(table.weight, torch.Tensor)


def fused(bits: tuple[str, ...], quantization: str = "gguf") -> tuple[Linear, torch.Tensor]:
    """A layer of two shards in GGUF's formats, and the plain weight."""
    layer = Linear(256, {"q_proj": 32, "k_proj": 16}, ModelOptions(BF16, quantization=quantization))
    parts = []
    for (name, slot), kind_name in zip(layer.weight_slots("layer.qkv").items(), bits, strict=True):
        kind = GGMLQuantizationType[kind_name]
        blocks = random_blocks(kind, slot.shape[0] * 256 // gguf.GGML_QUANT_SIZES[kind][0], seed=len(parts))
        part = from_gguf_blocks(kind_name, torch.from_numpy(blocks.reshape(slot.shape[0], -1)))
        slot.put(part)
        parts.append(part.dequantise())
        assert name.endswith(".weight")
    return layer, torch.cat(parts)


@pytest.mark.parametrize("bits", [("Q4_0", "Q4_1"), ("Q4_K", "Q4_0")], ids=str)
def test_shards_of_4_bits_are_one_weight_of_4_bits(bits: tuple[str, ...]):
    layer, plain = fused(bits)
    assert isinstance(layer.weight, Int4Weight)
    whole = layer(torch.eye(256, dtype=BF16)[:FEW_ROWS]).t()  # a few columns of the weight
    assert (whole - plain[:, :FEW_ROWS]).abs().max() <= 4 * BF16_STEP * plain.abs().max()


def test_shards_of_different_bits_stay_whole():
    layer, plain = fused(("Q4_1", "Q8_0"))
    assert layer.stays_plain == "its parts are stored in different formats"
    rows = random(5, 256).to(BF16)
    assert torch.equal(layer(rows), Linear.from_plain(plain.to(BF16), None, ModelOptions(BF16))(rows))


# ------------------------------------------------------------------ memory
@pytest.mark.parametrize("name", ["int8", "int4", "int4+bf16"])
def test_only_the_stored_forms_are_in_memory(name: str):
    weight = random(640, 1024).to(BF16)
    layer = loaded(Linear(1024, 640, ModelOptions(BF16, quantization=name)), weight)
    assert isinstance(layer.weight, Int4Strips) == (HAS_AMX and name != "int8")
    assert weight_bytes(layer) == planned_bytes(choose_kind(name, {None}, (640, 1024), BF16)[0], (640, 1024))
    large = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.numel() >= weight.numel() // 2]
    allowed = {id(weight), *(id(buffer) for buffer in layer.buffers())}
    tiles = [module.tiles.data_ptr() for module in layer.modules() if isinstance(module, Int8Weight)]
    assert [t for t in large if id(t) not in allowed and t.shape[:1] in ((640,), (1024,))] == []
    assert tiles == [
        torch.ops.mkldnn.data_ptr(module.packed) for module in layer.modules() if isinstance(module, Int8Weight)
    ]


def test_a_quantised_table_is_in_memory_once_and_gives_rows_and_logits():
    plain = random(320, 96)
    table = loaded(TiedEmbedding(320, 96, ModelOptions(BF16, quantization="int4")), plain)
    assert isinstance(table.weight, Int8Weight)
    assert weight_bytes(table) <= planned_bytes("int8", (320, 128))  # columns in whole tiles of 64
    values = int8_values(table.weight)
    ids = torch.tensor([0, 319, 7, 7])
    assert torch.equal(table(ids), values[ids].to(BF16))
    rows = random(6, 96, seed=1).to(BF16)
    assert_product(table.logits(rows), rows, values, INT8_ROW_STEP)


def test_a_table_whose_rows_cannot_be_found_stays_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn, "find_tiles", lambda packed, plain: None)
    plain = random(320, 64).to(BF16)
    table = loaded(TiedEmbedding(320, 64, ModelOptions(BF16, quantization="int8")), plain)
    assert torch.equal(table(torch.tensor([5, 319])), plain[[5, 319]])


# ------------------------------------------------------------------ batch invariance
@pytest.mark.parametrize("name", ["int8", "int4", "int4+bf16"])
def test_an_invariant_layer_gives_the_same_bits_alone_and_in_company(name: str):
    options = ModelOptions(BF16, batch_invariant=True, quantization=name)
    layer = loaded(Linear(96, 64, options, bias=True), random(64, 96), random(64, seed=1))
    table = loaded(TiedEmbedding(257, 96, options), random(257, 96))
    rows = random(WIDE_ROWS + 5, 96, seed=2).to(BF16)
    for product in (layer, table.logits):
        together = product(rows)
        assert torch.equal(torch.cat([product(row[None]) for row in rows]), together)
        assert torch.equal(torch.cat([product(part) for part in rows.split([5, 30, WIDE_ROWS - 30])]), together)


# ------------------------------------------------------------------ a whole model
def write_model(path: Path, kinds: dict[str, str], default: str = "Q4_1") -> Path:
    """A tiny Llama whose matrices are quantised by the gguf package; kinds: the end of a GGUF name -> its format."""
    raw, plain = {}, {}
    for hf_name, weight in hf_weights("llama").items():
        name, data = gguf_name("llama", hf_name), to_llama_cpp("llama", hf_name, weight)
        kind = GGMLQuantizationType[next((kinds[end] for end in kinds if name.endswith(end)), default)]
        if weight.ndim == 1 or kind.name == "F32":
            plain[name] = data
        else:
            raw[name] = (gguf.quantize(np.ascontiguousarray(data), kind), kind)
    return write_gguf(path, "llama", plain, values=metadata("llama"), raw=raw)


def engine(path: Path, **settings: Any) -> LLM:
    return LLM(path, dtype="bfloat16", kv_cache_memory_bytes=1_000_000, **settings)


def logits(path: Path, options: ModelOptions, num_tokens: int) -> torch.Tensor:
    """Of one step with so many tokens: [num_tokens, vocab_size]."""
    source = resolve_model(path)
    model = loader.load_model(source, loader.load_hf_config(source), options)
    ids = [(7 * number + 3) % VOCAB for number in range(num_tokens)]
    return PagedRun(model).logits({"a": ids})["a"]


def assert_same_network(path: Path, quantization: str, num_tokens: int) -> None:
    exact = logits(path, ModelOptions(torch.float32), num_tokens)
    found = logits(path, ModelOptions(BF16, quantization=quantization), num_tokens)
    assert (found - exact).norm() <= SAME_NETWORK_RMS * exact.norm()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", ["gguf", "gguf+bf16"])
@pytest.mark.parametrize("num_tokens", [3, 30])
def test_a_model_at_its_own_bits_is_the_dequantised_model(kind: str, name: str, num_tokens: int, tmp_path: Path):
    path = write_model(tmp_path / "m.gguf", {"token_embd.weight": "Q8_0"}, kind)
    assert_same_network(path, name, num_tokens)


def test_tensors_in_other_formats_stay_whole_and_one_line_names_them(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write_model(tmp_path / "m.gguf", {"attn_v.weight": "Q8_0", "ffn_down.weight": "Q5_0"})
    with caplog.at_level(logging.WARNING):
        engine(path, quantization="gguf")
    lines = [record.getMessage() for record in caplog.records if "not quantised" in record.getMessage()]
    prefix = "not quantised: model.layers.0"
    assert lines == [
        f"{prefix}.self_attn.qkv_proj ({LAYERS} weights like it): its parts are stored in different formats",
        f"{prefix}.mlp.down_proj ({LAYERS} weights like it): torch has no product for the format it is stored in",
    ]
    assert_same_network(path, "gguf", 20)


@pytest.mark.parametrize("name", ["int8", "int4", "gguf", "int4+bf16", "gguf+bf16"])
def test_the_plan_is_what_a_loaded_engine_reserves(name: str, tmp_path: Path):
    path = write_model(tmp_path / "m.gguf", {"token_embd.weight": "Q8_0", "ffn_down.weight": "Q8_0"})
    planned = plan_engine(path, dtype="bfloat16", quantization=name).cache.weight_bytes
    loaded_bytes = engine(path, quantization=name).llm_engine.plan.weight_bytes
    assert planned <= loaded_bytes <= 1.5 * planned  # the tiny widths are padded to tiles of 64
    assert (planned < plan_engine(path, dtype="bfloat16").cache.weight_bytes) == (HAS_AMX or "+" not in name)


@pytest.mark.parametrize("name", ["int8", "int4", "int4+bf16"])
def test_a_batch_invariant_engine_gives_the_same_bits_whatever_runs_beside(name: str, tmp_path: Path):
    llm = engine(write_folder(tmp_path / "m"), quantization=name, batch_invariant=True, max_num_batched_tokens=8)
    prompts = [{"prompt_token_ids": [number, *range(3, 20)]} for number in range(5)]
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, ignore_eos=True)
    together = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, together, strict=True):
        llm.llm_engine.reset_prefix_cache()
        alone = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        assert (alone.token_ids, alone.logprobs) == (output.outputs[0].token_ids, output.outputs[0].logprobs)


def test_transformers_own_networks_are_not_quantised(tiny_model: Any):
    with pytest.raises(ConfigError, match="quantization is only for networks that minivllm has itself"):
        LLM(tiny_model("gpt2"), quantization="int8")


def test_8_bit_codes_have_no_4_bit_form():
    with pytest.raises(ValueError, match="expected codes of 4 bits, got 8"):
        Int4Weight(GroupedWeight(torch.zeros(16, 32, dtype=torch.int8), torch.ones(16, 1), None))


def test_the_rows_of_an_unknown_layout_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantised.onednn, "find_tiles", lambda packed, plain: None)
    with pytest.raises(RuntimeError, match="layout of this packed weight is not known"):
        Int8Weight(random(16, 16)).rows(torch.tensor([0]), BF16)
