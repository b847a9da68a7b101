"""The tests of this folder are tested: each kernel with one planted bug must fail them.

A row of MUTATIONS is one text of a kernel.py, which must occur there exactly once, and what takes its place. The
changed source is loaded as a module of its own and stands in for the operation's kernel while the ordinary tests in
CASES run. One of them must fail, by its comparison or at the fence (tests/interpreter/helpers.py); with the source as
it is all of them pass. Nothing is written into the package.

To add a kernel: a few calls of its ordinary tests in CASES, small and fast ones first, which together see all that can
go wrong; and at least three rows. Take texts that say one thing and are unlikely to be written in another way tomorrow.
A mutant that survives is a hole in the ordinary tests: close it there, and add that test to CASES.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import pytest
import torch
from triton.runtime.errors import InterpreterError

from minivllm.kernels import (
    logprobs,
    paged_attention,
    penalties,
    quant_matmul,
    reshape_and_cache,
    rms_norm,
    rotary_embedding,
    silu_and_mul,
    token_bitmask,
    top_k_top_p,
)
from tests.interpreter import test_logprobs as likelihood
from tests.interpreter import test_paged_attention as attention
from tests.interpreter import test_penalties as penalty
from tests.interpreter import test_quant_matmul as products
from tests.interpreter import test_quantised_cache as codes
from tests.interpreter import test_reshape_and_cache as cache
from tests.interpreter import test_row_kernels as rows
from tests.interpreter import test_token_bitmask as bitmask
from tests.interpreter import test_top_k_top_p as draw
from tests.interpreter.helpers import OUTSIDE, TWICE

OPERATIONS = MappingProxyType(
    {
        package.__name__.rsplit(".", 1)[1]: package
        for package in (
            *(paged_attention, reshape_and_cache, rms_norm, rotary_embedding, silu_and_mul),
            *(token_bitmask, penalties, logprobs, top_k_top_p, quant_matmul),
        )
    }
)
FP32, INT8 = torch.float32, torch.int8

CASES: MappingProxyType[str, tuple[Callable[[], object], ...]] = MappingProxyType(
    {
        "rms_norm": (
            partial(rows.test_rms_norm, FP32, 65, add_one=True, has_residual=True),
            partial(rows.test_rms_norm, torch.float16, 576, add_one=False, has_residual=True),
            rows.test_heads_of_a_strided_query_are_normed_one_by_one,
            rows.test_small_rows_are_held_by_eps,
            rows.test_rms_norm_of_rows_that_lie_far_apart,
        ),
        "rotary_embedding": (
            partial(rows.test_rotary_embedding, FP32, 9, 3, 80),
            rows.test_every_stride_of_the_heads_is_taken_as_it_is,
            rows.test_rotary_embedding_of_tokens_that_lie_far_apart,
        ),
        "silu_and_mul": (
            partial(rows.test_silu_and_mul, FP32, "silu", 1025),
            partial(rows.test_silu_and_mul, FP32, "gelu_tanh", 7),
            rows.test_silu_of_large_gates_does_not_overflow,
            rows.test_gates_in_a_wider_row_are_found,
            rows.test_silu_and_mul_of_rows_that_lie_far_apart,
        ),
        "reshape_and_cache": (
            partial(cache.test_rows_land_in_their_slots_and_nothing_else_changes, FP32, 3, 16, 80),
            cache.test_every_stride_of_keys_and_values_is_taken_as_it_is,
            cache.test_keys_and_values_of_tokens_that_lie_far_apart,
            partial(codes.test_codes_and_scales_are_the_references_and_nothing_else_changes, INT8, FP32, 3, 16, 80),
            codes.test_int8_middles_go_to_the_even_code,
            partial(codes.test_every_middle_between_two_codes_goes_to_the_even_one, "triton"),
        ),
        "paged_attention": (
            partial(attention.test_every_group_and_head_size, group=3, head_size=80),
            partial(attention.test_every_option, {"sliding_window": 7}),
            partial(attention.test_every_option, {"alibi": True, "soft_cap": 2.0, "sliding_window": 20}),
            attention.test_a_windows_edge_in_a_tile_that_ends_before_every_row,
            partial(attention.test_splits_of_any_length_merge_into_the_whole, 64, {}),
            partial(attention.test_a_cache_beyond_two_to_the_31_values_is_read_at_the_right_place, 1, 31),
            partial(attention.test_a_cache_beyond_two_to_the_31_values_is_read_at_the_right_place, 3, 30),
            partial(codes.test_every_dtype, INT8, FP32, codes.DECODES),
            partial(codes.test_small_and_large_values_survive_in_float16, 1e-6),
        ),
        "token_bitmask": (
            partial(bitmask.test_the_reference_gives_the_same_bits, 33),
            partial(bitmask.test_the_reference_gives_the_same_bits, 8193),
            bitmask.test_offsets_beyond_two_to_the_31_are_right,
        ),
        "penalties": (
            partial(penalty.test_the_reference_gives_the_same_bits, 10000, 3000),
            partial(penalty.test_the_bias_is_the_references, 8193),
            penalty.test_a_finite_logit_stays_finite,
            penalty.test_offsets_beyond_two_to_the_31_are_right,
        ),
        "logprobs": (
            partial(likelihood.test_every_vocabulary, 33),
            partial(likelihood.test_masks_ties_and_broken_rows, 1),
            likelihood.test_offsets_beyond_two_to_the_31_are_right,
        ),
        "quant_matmul": (
            partial(products.test_every_number_of_columns, "int8", 1, 129),
            partial(products.test_every_dtype, "int4 in 32", FP32),
            products.test_rows_that_lie_far_apart,
        ),
        "top_k_top_p": (
            draw.test_an_edge_that_is_met_exactly_belongs_to_one_side,
            draw.test_offsets_beyond_two_to_the_31_are_right,
            draw.test_top_k_counts_tokens_that_a_coarse_bound_cannot_tell_apart,
            partial(draw.test_every_vocabulary_and_restriction, 33, "all"),
            partial(draw.test_masked_and_broken_rows, "top_k"),
            partial(draw.test_every_vocabulary_and_restriction, 10000, "top_p"),
            partial(draw.test_every_vocabulary_and_restriction, 8193, "none"),
            draw.test_a_flat_row_needs_every_token_as_a_candidate,
            draw.test_ties_at_the_edge,
        ),
    }
)


class Mutation(NamedTuple):
    """One planted bug."""

    operation: str
    text: str  # occurs exactly once in the operation's kernel.py
    instead: str
    why: str  # what the bug is


MUTATIONS = (
    Mutation("rms_norm", "mask = columns < size", "mask = columns <= size", "mask off by one"),
    Mutation("rms_norm", "axis=0) / size", "axis=0) / BLOCK", "mean over the padded row"),
    Mutation("rms_norm", "row * x_stride", "row * size", "stride of x ignored"),
    Mutation("rms_norm", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", "int32 offset"),
    Mutation("rms_norm", "mean_square + eps", "mean_square", "eps forgotten"),
    Mutation("rms_norm", "total = rounded.to(tl.float32)", "pass", "norm of the sum before it is rounded"),
    Mutation("rms_norm", "weight += 1.0", "weight += 0.0", "Gemma's weight taken for Llama's"),
    Mutation("rms_norm", "weight_ptr + columns, mask=mask, other=0.0", "weight_ptr + columns", "unmasked weight"),
    Mutation("rotary_embedding", "a * cos - b * sin", "a * cos + b * sin", "turned the wrong way"),
    Mutation("rotary_embedding", "heads * x_head_stride", "heads * 2 * half", "stride of the heads ignored"),
    Mutation("rotary_embedding", "token * x_token_stride", "token * num_heads * 2 * half", "stride of tokens ignored"),
    Mutation("rotary_embedding", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)", "int32 offset"),
    Mutation("rotary_embedding", "(heads < num_heads) &", "(heads <= num_heads) &", "mask of heads off by one"),
    Mutation("rotary_embedding", "& (pairs < half)", "& (pairs <= half)", "mask of pairs off by one"),
    Mutation("rotary_embedding", "in_row = pairs < half", "in_row = pairs <= half", "mask of the angles off by one"),
    Mutation("rotary_embedding", "sin_ptr + token * 2 * half + half", "sin_ptr + token * 2 * half", "sign of sin"),
    Mutation("rotary_embedding", "token * num_heads + heads", "token * HEADS + heads", "padded heads in the output"),
    Mutation("silu_and_mul", "mask = columns < size", "mask = columns <= size", "mask off by one"),
    Mutation("silu_and_mul", "row * x_stride + columns", "row * 2 * size + columns", "stride of the gate ignored"),
    Mutation("silu_and_mul", "row * x_stride + size", "row * 2 * size + size", "stride of up ignored"),
    Mutation("silu_and_mul", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", "int32 offset"),
    Mutation("silu_and_mul", "tl.program_id(1) * BLOCK", "tl.program_id(1)", "every stretch starts in the first"),
    Mutation("silu_and_mul", "tl.where(slope >= 0, 1.0, small)", "1.0", "sigmoid of the absolute value"),
    Mutation("silu_and_mul", "tl.exp(-tl.abs(slope))", "tl.exp(-slope)", "exp overflows"),
    Mutation("silu_and_mul", "0.044715", "0.044175", "a constant mistyped"),
    Mutation("reshape_and_cache", "(slot < 0) |", "(slot < -1) |", "slot -1 written"),
    Mutation("reshape_and_cache", "(slot >= num_slots)", "(slot > num_slots)", "the slot behind the last written"),
    Mutation("reshape_and_cache", "(heads < num_heads) &", "(heads <= num_heads) &", "mask of heads off by one"),
    Mutation("reshape_and_cache", "& (columns < head_size)", "& (columns <= head_size)", "mask of columns off by one"),
    Mutation("reshape_and_cache", "heads * key_head_stride", "heads * head_size", "stride of the heads ignored"),
    Mutation("reshape_and_cache", "token * value_token_stride", "token * key_token_stride", "the keys' stride"),
    Mutation("reshape_and_cache", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)", "int32 offset"),
    Mutation("reshape_and_cache", "tl.load(slot_mapping_ptr + token)", "tl.load(slot_mapping_ptr)", "one slot for all"),
    Mutation(
        "reshape_and_cache",
        "target = (heads * num_slots + slot) * head_size",
        "target = (slot * num_heads + heads) * head_size",
        "heads side by side in a slot",
    ),
    Mutation("paged_attention", "is_key = key < seq_len", "is_key = key <= seq_len", "mask of keys off by one"),
    Mutation("paged_attention", "distance >= 0", "distance > 0", "a token does not see itself"),
    Mutation("paged_attention", "distance >= 0", "distance >= -1", "a token sees the next one"),
    Mutation("paged_attention", "distance < sliding_window", "distance <= sliding_window", "window off by one"),
    Mutation("paged_attention", "acc = acc * rescale[:, None]", "acc = acc", "rescale of the products forgotten"),
    Mutation("paged_attention", "running_sum * rescale", "running_sum", "rescale of the sum forgotten"),
    Mutation("paged_attention", "running_max = new_max", "pass", "running maximum not kept"),
    Mutation("paged_attention", "else scale * LOG2_E", "else scale", "base of the softmax"),
    Mutation("paged_attention", "scores *= LOG2_E", "scores *= 1.0", "base of the softmax behind a cap"),
    Mutation("paged_attention", "(first_key + TILE > ", "(first_key + 1 > ", "a tile at the end taken for a whole one"),
    Mutation(
        "paged_attention", "(first_key < window_edge)", "(first_key < 0)", "a tile at a window's edge taken for whole"
    ),
    Mutation("paged_attention", 'tl.full([BLOCK_M], float("-inf")', "tl.full([BLOCK_M], 1e4", "start of the maximum"),
    Mutation("paged_attention", "lanes % group  #", "lanes % group * 0  #", "one query head for the group"),
    Mutation("paged_attention", "kv_head * group + lanes", "kv_head + lanes", "grouping of the query heads"),
    Mutation("paged_attention", "(lanes // group < BLOCK_Q) & ", "", "lanes left over compute the next tile's row"),
    Mutation("paged_attention", "& (row < num_rows)", "& (row <= num_rows)", "the next request's first row"),
    Mutation("paged_attention", "+ key % block_size", "+ key % TILE", "offset in the block"),
    Mutation("paged_attention", "+ key // block_size", "+ key // TILE", "number of the block"),
    Mutation("paged_attention", "context + last_row + 1", "context + last_row", "the last key left out"),
    Mutation("paged_attention", "- sliding_window + 1, 0)", "- sliding_window + 1 + TILE, 0)", "window starts late"),
    Mutation("paged_attention", "cache_head = kv_head.to(tl.int64)", "cache_head = kv_head", "int32 offset of a head"),
    Mutation(
        "paged_attention",
        "offset = cache_head + slot * head_size",
        "offset = (cache_head + slot * head_size).to(tl.int32)",
        "int32 offset of a slot",
    ),
    Mutation("paged_attention", "tl.exp(-2 * tl.abs", "tl.exp(-1 * tl.abs", "soft cap"),
    Mutation("paged_attention", "scores -= slopes", "scores += slopes", "sign of ALiBi"),
    Mutation("paged_attention", "if first_tile <= tile", "if first_tile < tile", "search of the request"),
    Mutation("paged_attention", "(split + 1) * split_len", "(split + 1) * split_len + 1", "a tile in two splits"),
    Mutation("paged_attention", "running_max + tl.log2(running_sum)", "running_max", "log-sum-exp without the sum"),
    Mutation("paged_attention", 'tl.log2(running_sum), float("-inf")', "tl.log2(running_sum), 0.0", "an empty split"),
    Mutation(
        "paged_attention",
        "target += split.to(tl.int64) * num_tokens",
        "target += split.to(tl.int64)",
        "stride of splits",
    ),
    Mutation("paged_attention", 'num_splits, other=float("-inf")', "num_splits, other=0.0", "neutral element of merge"),
    Mutation("paged_attention", "tl.exp2(lse - tl.where(largest", "tl.exp(lse - tl.where(largest", "merge in base e"),
    Mutation("paged_attention", "weights = weights / tl.where(total > 0.0, total, 1.0)", "pass", "merge undivided"),
    Mutation("token_bitmask", "words < num_words", "words <= num_words", "mask of the words off by one"),
    Mutation("token_bitmask", "is_token = tokens < vocab_size", "is_token = tokens <= vocab_size", "mask off by one"),
    Mutation("token_bitmask", "row * logits_stride", "row * vocab_size", "stride of the logits ignored"),
    Mutation("token_bitmask", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", "int32 offset"),
    Mutation("token_bitmask", ">> shifts[None, :]", ">> (31 - shifts[None, :])", "bits from the other end"),
    Mutation("token_bitmask", "tl.cdiv(vocab_size, 32)", "vocab_size // 32", "the last word left out"),
    Mutation("token_bitmask", "(bits != -1)", "(bits == -1)", "a mixed stretch left alone"),
    Mutation("penalties", "(entries < num_seen) &", "(entries <= num_seen) &", "mask of the list off by one"),
    Mutation(
        "penalties",
        "(entries < num_ids) & (ids >= 0) & (ids < vocab_size)",
        "(entries < num_ids) & (ids >= 0) & (ids <= vocab_size)",
        "the id behind the vocabulary",
    ),
    Mutation(
        "penalties", "before / repetition, before * repetition", "before * repetition, before / repetition", "sign"
    ),
    Mutation("penalties", "frequency * counts.to(tl.float64)", "frequency", "count forgotten"),
    Mutation("penalties", "tl.where(counts > 0, presence, 0.0)", "presence", "presence of what was not produced"),
    Mutation("penalties", "num_seen, tl.num_programs(1) * BLOCK", "num_seen, BLOCK", "parts of a list overlap"),
    Mutation("penalties", "tl.abs(before) <= FLOAT32_MAX", "before == before", "an infinite logit made finite"),
    Mutation(
        "penalties", "seen_token_ids_ptr + row * max_seen", "seen_token_ids_ptr + row * BLOCK", "stride of the lists"
    ),
    Mutation(
        "penalties",
        "row = tl.program_id(0).to(tl.int64)\n    num_seen",
        "row = tl.program_id(0)\n    num_seen",
        "int32 offset",
    ),
    Mutation("logprobs", "is_token = tokens < vocab_size", "is_token = tokens <= vocab_size", "mask off by one"),
    Mutation("logprobs", "sums * tl.exp(maxima - safe)", "sums", "rescale of the pieces forgotten"),
    Mutation("logprobs", "tl.sum(counts, axis=0))", "tl.max(counts, axis=0))", "ranks not added up"),
    Mutation("logprobs", "(logits >= own)", "(logits > own)", "a token does not count itself"),
    Mutation("logprobs", "piece = row * tl.num_programs(1)", "piece = row", "stride of the pieces"),
    Mutation("logprobs", "(tokens ^ LOW_BITS).to", "tokens.to", "the higher id of two equals"),
    Mutation("logprobs", "tl.where(logits == 0.0, 0.0, logits)", "logits", "-0.0 below 0.0"),
    Mutation(
        "logprobs",
        'tl.where(tl.max(is_broken.to(tl.int32), axis=0) > 0, float("nan"), total)',
        "total",
        "NaN forgotten",
    ),
    Mutation("logprobs", "& (token < vocab_size)", "& (token <= vocab_size)", "the id behind the vocabulary"),
    Mutation(
        "logprobs",
        "row = tl.program_id(0).to(tl.int64)\n    piece =",
        "row = tl.program_id(0)\n    piece =",
        "int32 offset",
    ),
    Mutation("top_k_top_p", "sums = sums * tl.exp2((maxima - safe) * scale) +", "sums = sums +", "rescale forgotten"),
    Mutation("top_k_top_p", "tl.cumsum(kept, axis=0) - 1", "tl.cumsum(kept, axis=0)", "keys one place too far"),
    Mutation(
        "top_k_top_p", "num_keys += tl.sum(kept, axis=0)", "num_keys = tl.sum(kept, axis=0)", "keys of one tile only"
    ),
    Mutation(
        "top_k_top_p",
        "keys_ptr + row * max_keys + num_keys",
        "keys_ptr + row * vocab_size + num_keys",
        "stride of the keys",
    ),
    Mutation(
        "top_k_top_p", "(places < num_keys) & (keys", "(places <= num_keys) & (keys", "mask of the keys off by one"
    ),
    Mutation("top_k_top_p", "low = (low >> ID_BITS) << ID_BITS", "pass", "equals of the k-th left out"),
    Mutation(
        "top_k_top_p",
        "weight > need if STRICT else weight >= need",
        "weight >= need",
        "an edge given to the wrong side",
    ),
    Mutation("top_k_top_p", "weight > need if STRICT else weight >= need", "weight > need", "top_k keeps one more"),
    Mutation("top_k_top_p", "0.999 * (1.0 - top_p)", "0.999 * top_p", "the bound of a flat row"),
    Mutation("top_k_top_p", '& (logits > float("-inf"))', "", "masked tokens kept"),
    Mutation(
        "top_k_top_p", "start + tl.minimum(lane, last)", "tl.minimum(lane, last)", "every token in the first tile"
    ),
    Mutation(
        "top_k_top_p",
        "low, high, top_p * mass",
        "low, high, top_p * tl.load(total_ptr + row)",
        "top_p of what top_k left out",
    ),
    Mutation(
        "top_k_top_p",
        "row = tl.program_id(0).to(tl.int64)\n    temperature",
        "row = tl.program_id(0)\n    temperature",
        "int32 offset",
    ),
    Mutation(
        "quant_matmul",
        "is_column = column < in_features",
        "is_column = column <= in_features",
        "mask of columns off by one",
    ),
    Mutation(
        "quant_matmul",
        "codes_ptr + output[None, :] * in_features",
        "codes_ptr + output[None, :] * BLOCK_K",
        "stride of the codes",
    ),
    Mutation(
        "quant_matmul", "tl.load(scales_ptr + output,", "tl.load(scales_ptr + output * 0,", "one scale for all outputs"
    ),
    Mutation(
        "quant_matmul",
        "codes.to(rows.dtype), acc,",
        "codes.to(rows.dtype), acc * 0.0,",
        "sum of the earlier tiles forgotten",
    ),
    Mutation(
        "quant_matmul",
        "token[:, None] * rows_stride + column[None, :],",
        "(token[:, None] * rows_stride).to(tl.int32) + column[None, :],",
        "int32 offset",
    ),
    Mutation("quant_matmul", "byte // HALF * (2 * HALF) + byte % HALF", "byte", "halves of a group side by side"),
    Mutation("quant_matmul", "_values(codes >> 4", "_values(codes & 15", "the low half twice"),
    Mutation("quant_matmul", "group = first + tl.arange", "group = tl.arange", "scales of the first tile for all"),
    Mutation("quant_matmul", "* scales + minimums)", "* scales)", "minimum forgotten"),
    Mutation("reshape_and_cache", "tl.float32)), FLOOR)", "tl.float32)), 1.0)", "no scale below one"),
    Mutation("reshape_and_cache", "tl.div_rn(rows, tl.broadcast_to(scale, rows.shape))", "rows", "codes not scaled"),
    Mutation(
        "reshape_and_cache",
        "scale_target = heads * num_slots + slot",
        "scale_target = heads + slot",
        "stride of the scales",
    ),
    Mutation(
        "paged_attention",
        "scale_offset = kv_head.to(tl.int64) * num_slots + slot",
        "scale_offset = kv_head.to(tl.int64) + slot",
        "stride of the scales",
    ),
    Mutation("paged_attention", "scores *= key_scales[None, :]", "pass", "scale of the keys forgotten"),
    Mutation("paged_attention", "weights *= value_scales[None, :]", "pass", "scale of the values forgotten"),
    Mutation(
        "paged_attention",
        "(_widened(values, tl.float32) * value_scales[:, None])",
        "_widened(values, tl.float32)",
        "scale of values in float16 forgotten",
    ),
    Mutation(
        "paged_attention",
        "tl.load(k_scales_ptr + scale_offset",
        "tl.load(v_scales_ptr + scale_offset",
        "the scale of values for the keys",
    ),
)


def source_of(operation: str) -> str:
    """The operation's kernel.py."""
    return Path(str(OPERATIONS[operation].__file__)).with_name("kernel.py").read_text()


def load(operation: str, source: str, folder: Path) -> ModuleType:
    """`source` as a module; the interpreter reads functions from files, so it is written into `folder`."""
    file = folder / f"mutant_of_{operation}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def failure_with(operation: str, source: str, folder: Path, patch: pytest.MonkeyPatch) -> str | None:
    """What the first failing case says when `source` is the operation's kernel; None: all pass."""
    mutant = load(operation, source, folder)
    patch.setattr(OPERATIONS[operation], "kernel", mutant, raising=False)
    if operation == "paged_attention":
        patch.setattr(attention, "kernel", mutant)
    for case in CASES[operation]:
        try:
            case()
        except AssertionError as error:
            return str(error) or "a comparison failed"
        except InterpreterError as error:
            said = str(error).replace("\\", "")  # from a function that a kernel calls it comes quoted twice
            if OUTSIDE not in said and TWICE not in said:
                raise
            return said
    return None


@pytest.mark.parametrize("operation", CASES)
def test_the_source_as_it_is_passes(operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert failure_with(operation, source_of(operation), tmp_path, monkeypatch) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.operation}: {mutation.why}")
def test_a_planted_bug_fails_an_ordinary_test(mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = source_of(mutation.operation)
    assert source.count(mutation.text) == 1, f"write {mutation.text!r} anew: it is no longer one place of the kernel"
    mutant = source.replace(mutation.text, mutation.instead)
    assert failure_with(mutation.operation, mutant, tmp_path, monkeypatch) is not None, "the mutant survived"


def test_every_kernel_has_three_mutants_that_differ():
    for operation in CASES:
        mutants = {(one.text, one.instead) for one in MUTATIONS if one.operation == operation}
        assert len(mutants) >= 3, operation
