"""Weights in 8 and 4 bits on a CPU. A token of a single stream reads every weight once; fewer bytes are less time.

    int8         a code per weight, one scale per output channel: oneDNN's 8-bit product         1   byte per weight
    int4         a code, and scale and middle per group of 32: torch's int4pack; int8 beside it  1.6
    int4+bf16    the same, with the bfloat16 weight beside it                                    2.6
    with AMX     both of int4 in strips, and nothing beside them: our own product                0.63

Microseconds on one thread of an Intel Xeon with AMX (CPU time, best of 5 rounds, `python
benchmarks/weight_formats.py`). A layer of SmolLM2-135M and its head:

    rows                  1      2      4      8     16     32     64    256
    layer  bfloat16     922    881    860    900    928   1027   1236   1944
           int8        1062   1051   1085   1186   1382   1748   2305   4764
           strips       511    498    501    576    680    918   1130   2722
    head   bfloat16    4836   4734   4749   4759   4950   5681   7250  17791
           int8        3016   2900   3113   3445   4697   6277  12342  48203
           strips      2187   2247   2363   2560   3370   4967   7255  24648

So with AMX int8 is a format for memory, and for the head of a few rows; int4 is the one for speed.

**int4 is for few rows without AMX.** torch's product spends per row what it spends once per weight, so from FEW_ROWS
on another form of the same weight is faster. In bfloat16 that is never slower than an unquantised model, and gives its
numbers; in 8 bits both forms together are smaller than an unquantised model.

**int8 takes rows in two digits.** oneDNN multiplies 8-bit rows with 8-bit weights. Rows rounded to 8 bits cost the
default model 4.3 % of perplexity, nearly all the loss there is: a few of its activations are large, and a row has one
scale. So a row becomes two rows of codes, 256 * high + low, and the two products are added: 16 bits of rows, 0.1 % of
perplexity. Up to some ten rows that is free, because the weights are read once either way. Sums are exact integers.

**Many rows leave int8.** From WIDE_ROWS on, rounding the rows (elementwise, in torch) costs more than the product.
Codes are exact in bfloat16, so they are widened into a temporary and multiplied as such, the scales follow.

Guards (`why_not`): torch's operations crash or are wrong outside their shapes and CPUs. Without VNNI, 8-bit products go
through 16-bit sums that overflow.

Knows no layer and no file. Called by: models/linear.py, engine/planning.py. Twin in vLLM:
model_executor/layers/quantization (compressed_tensors' W8A8, gguf.py) and its CPU kernels.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import nn

from minivllm.kernels.amx import HAS_AMX
from minivllm.kernels.packed_matmul import pack_codes, packed_matmul
from minivllm.models import onednn
from minivllm.models.grouped import GROUP_SIZE, GroupedWeight, round_to_int4

FEW_ROWS = 4  # int4 up to here, its other form above
WIDE_ROWS = 192  # int8 below, its codes in bfloat16 (or float32) from here on
IN_STRIPS = "int4 in strips"
STRIP = 32  # rows of the weight
KEEP_BFLOAT16 = "+bf16"  # the ending of a quantization whose int4 weights have a bfloat16 form beside them
LARGEST_CODE = 127
DIGIT = 256  # a row's value is scale * (DIGIT * high + low), both digits in -128 .. 127


def choose_kind(
    quantization: str,
    bits: Set[int | None],
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    batch_invariant: bool = False,
) -> tuple[str | None, str]:
    """("int8", "int4", "int4+bf16" or IN_STRIPS, "") for a weight of this shape, or (None, why it stays in the model's
    dtype).

    bits: in which the parts of a fused weight are stored, None where that is no group of 4 or 8 bits.
    batch_invariant: one product must serve every number of rows, and that is int8's.
    """
    name, ending, _ = quantization.partition(KEEP_BFLOAT16)
    if name == "gguf":
        if len(bits) > 1:
            return None, "its parts are stored in different formats"
        stored = next(iter(bits))
        if stored is None:
            return None, "torch has no product for the format it is stored in"
        name = f"int{stored}"
    if name == "int8" and ending:
        return None, ""  # beside bfloat16, which is faster for many rows, 8 bits gain little
    kind = "int8" if batch_invariant else name + ending
    if name == "int4" and not batch_invariant and has_strips(shape, dtype):
        return IN_STRIPS, ""
    reason = why_not(kind, shape, dtype)
    return (None, reason) if reason else (kind, "")


def why_not(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> str:
    """Why torch cannot multiply a weight of this shape in this kind; "" if it can. dtype: of the rows."""
    if kind.endswith(KEEP_BFLOAT16) and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 products"
    if not kind.endswith(KEEP_BFLOAT16) and not torch.cpu._is_vnni_supported():
        return "this CPU has no 8-bit products (VNNI)"
    if kind == "int8":
        return ""
    if dtype != torch.bfloat16:
        return f"4-bit products are fast in bfloat16 only, and the dtype is {str(dtype).removeprefix('torch.')}"
    if shape[0] % 16 or shape[1] % GROUP_SIZE:
        return f"4 bits need a multiple of 16 rows and of {GROUP_SIZE} columns, it has {shape[0]} x {shape[1]}"
    return ""


def has_strips(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether packed_matmul multiplies 4 bits of this shape here. dtype: of the rows."""
    return HAS_AMX and dtype == torch.bfloat16 and shape[0] % STRIP == 0 and shape[1] % GROUP_SIZE == 0


def planned_bytes(kind: str, shape: tuple[int, int]) -> int:
    """What a weight takes: codes, and per output channel an fp32 scale and oneDNN's sum of the row."""
    num_weights = shape[0] * shape[1]
    if kind == IN_STRIPS:
        return num_weights // 2 + 4 * num_weights // GROUP_SIZE
    int8_bytes = num_weights + 8 * shape[0]
    if kind == "int8":
        return int8_bytes
    return num_weights // 2 + 4 * num_weights // GROUP_SIZE + (2 * num_weights if "+" in kind else int8_bytes)


class Int8Weight(nn.Module):
    """weight[o, i] = scales[o] * code[o, i], code in -127 .. 127."""

    packed: torch.Tensor  # [out_features, in_features] int8 opaque
    scales: torch.Tensor  # [out_features] fp32

    def __init__(self, weight: torch.Tensor | GroupedWeight):  # [out_features, in_features]
        super().__init__()
        plain = weight.dequantise() if isinstance(weight, GroupedWeight) else weight.float()
        # Exact in bfloat16, so that both products below use the same scale.
        scales = (plain.abs().amax(1) / LARGEST_CODE).bfloat16().float()
        codes = plain / torch.where(scales > 0, scales, 1.0)[:, None]
        codes = codes.round_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
        self.shape = (codes.shape[0], codes.shape[1])
        self.register_buffer("packed", onednn.pack_int8(codes))
        self.register_buffer("scales", scales)
        # a view of packed's memory, as find_tiles describes it; None where the layout is unknown
        self.tiles = onednn.find_tiles(self.packed, codes)

    def product(
        self,
        rows: torch.Tensor,  # [num_rows, in_features] bfloat16 or float32
        bias: torch.Tensor | None,  # [out_features]
    ) -> torch.Tensor:  # [num_rows, out_features]
        if rows.shape[0] >= WIDE_ROWS and self._can_widen:
            out = self._wide_product(rows)
        else:
            out = self._product(rows)
        return out if bias is None else out.add_(bias)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the weight by number: ids [num_rows] int64 -> [num_rows, in_features]. Only where tiles are known."""
        if self.tiles is None:
            raise RuntimeError("the layout of this packed weight is not known")
        codes = onednn.read_rows(self.tiles, ids)[:, : self.shape[1]]
        return (codes * self.scales[ids, None]).to(dtype)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:  # [num_rows, in_features] -> [num_rows, out_features]
        num_rows = rows.shape[0]
        digits, row_scales = two_digits(rows)
        sums = onednn.int8_product(digits, self.packed, self.scales)
        return torch.add(sums[num_rows:], sums[:num_rows], alpha=DIGIT).mul_(row_scales).to(rows.dtype)

    @property
    def _can_widen(self) -> bool:
        return self.tiles is not None and self.tiles.shape[-1] == 4

    def _wide_product(self, rows: torch.Tensor) -> torch.Tensor:  # [num_rows, in_features] -> [num_rows, out_features]
        assert self.tiles is not None
        quads = self.tiles.view(torch.int32).squeeze(-1).permute(0, 3, 1, 2)  # four columns in one value: a fast copy
        codes = quads.flatten(2).flatten(0, 1).contiguous().view(torch.int8)[: self.shape[0], : self.shape[1]]
        return onednn.linear(rows, codes.to(rows.dtype)).mul_(self.scales.to(rows.dtype))


def two_digits(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """row = scale * (DIGIT * high + low).

    rows: [num_rows, in_features] -> digits + 128 [2 * num_rows, in_features] uint8, the high ones of all rows before
    the low ones, and scales [num_rows, 1] fp32.
    """
    num_rows = rows.shape[0]
    wide = rows.float()
    scales = wide.abs().amax(-1, keepdim=True).mul_(1 / (LARGEST_CODE * DIGIT))
    # A row of zeros is 0 / 0: its digits are anything, and are multiplied by its scale of zero.
    both = torch.div(wide, scales).add_(128 * DIGIT + 128.5).to(torch.int32)  # 256 * (high + 128) + low + 128
    digits = torch.empty(2 * num_rows, rows.shape[1], dtype=torch.uint8)
    digits[num_rows:].copy_(both)  # the lower byte
    digits[:num_rows].copy_(both.bitwise_right_shift_(8))
    return digits, scales


class Int4Weight(nn.Module):
    """weight[o, i] = (code[o, i] - 8) * scale[o, g] + middle[o, g], g = i // GROUP_SIZE; and a form for more rows.

    Scales and middles are bfloat16, as the weights of an unquantised model are: a weight moves by at most 3 % of the
    step between two codes, and by 1 / 256 of its group's middle.
    A plain weight is rounded: every value to the nearest of its group's 16 levels. keep_bfloat16: the other form is
    the packed weight that an unquantised model has, else it is an Int8Weight.
    """

    packed: torch.Tensor  # [out_features, in_features // 2] uint8, in int4pack's order
    levels: torch.Tensor  # [num_groups, out_features, 2] bfloat16: scale and middle
    bfloat16_form: torch.Tensor  # [out_features, in_features] opaque, where there is no int8 form

    def __init__(
        self,
        weight: torch.Tensor | GroupedWeight,  # [out_features, in_features]
        *,
        keep_bfloat16: bool = False,
    ):
        super().__init__()
        grouped = weight if isinstance(weight, GroupedWeight) else round_to_int4(weight)
        if grouped.minimums is None:
            raise ValueError("weight: expected codes of 4 bits, got 8")
        codes = grouped.integers().to(torch.int32)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        scales = grouped.scales.float()
        middles = grouped.minimums.float() + 8 * scales
        self.register_buffer("levels", torch.stack([scales.t(), middles.t()], -1).bfloat16().contiguous())
        self.int8 = None if keep_bfloat16 else Int8Weight(grouped)
        bfloat16 = onednn.pack(grouped.dequantise(torch.bfloat16)) if keep_bfloat16 else None
        self.register_buffer("bfloat16_form", bfloat16)  # [out_features, in_features] opaque

    def product(
        self,
        rows: torch.Tensor,  # [num_rows, in_features] bfloat16
        bias: torch.Tensor | None,  # [out_features]
    ) -> torch.Tensor:  # [num_rows, out_features]
        if rows.shape[0] > FEW_ROWS:
            if self.int8 is not None:
                return self.int8.product(rows, bias)
            return onednn.product(rows, self.bfloat16_form, bias)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), self.packed, GROUP_SIZE, self.levels)
        return out if bias is None else out.add_(bias)


class Int4Strips(nn.Module):
    """weight[o, i] = code[o, i] * scale[o, g] + minimum[o, g], g = i // GROUP_SIZE, in the order of packed_matmul.

    Scales and minimums are fp16, as GGUF has them: a weight from a file is what the file says, rounded once to bfloat16
    for many rows and not at all for few. A plain weight is rounded to its group's 16 levels.
    """

    codes: torch.Tensor  # [out_features / 32, in_features / 2, 32] uint8
    levels: torch.Tensor  # [out_features / 32, in_features / 32, 2, 32] fp16

    def __init__(self, weight: torch.Tensor | GroupedWeight):  # [out_features, in_features]
        super().__init__()
        grouped = weight if isinstance(weight, GroupedWeight) else round_to_int4(weight)
        if grouped.minimums is None:
            raise ValueError("weight: expected codes of 4 bits, got 8")
        codes, levels = pack_codes(grouped.integers().to(torch.uint8), grouped.scales.float(), grouped.minimums.float())
        self.register_buffer("codes", codes)
        self.register_buffer("levels", levels)

    def product(
        self,
        rows: torch.Tensor,  # [num_rows, in_features] bfloat16
        bias: torch.Tensor | None,  # [out_features]
    ) -> torch.Tensor:  # [num_rows, out_features]
        return packed_matmul(rows, self.codes, len(self.codes) * STRIP, levels=self.levels, bias=bias)
