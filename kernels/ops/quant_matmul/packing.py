"""How weights become codes of 8 and 4 bits, and codes of 4 bits bytes.

One group of 4-bit codes, group_size of them in group_size // 2 bytes:

    byte j:  low half  = code of column j                      columns j and j + group_size // 2 of the group,
             high half = code of column j + group_size // 2    so each half of a byte is a plain slice of columns

That is GGUF's own order for its groups of 32: Q4_0 and Q4_1 are taken byte for byte. A kernel never has to interleave
the halves: it multiplies the low ones with one slice of the rows and the high ones with the other.

Knows no kernel. Called by reference.py, by loaders and tests. Formats: ggml's block_q4_0 (value = d * (code - 8)) and
block_q4_1 (value = d * code + m). Twin in vLLM: model_executor/layers/quantization/utils/quant_utils.py.
"""

import torch

GROUP_SIZES = (32, 64, 128)
GGUF_GROUP_SIZE = 32


def pack_int4(
    codes: torch.Tensor,  # [out_features, in_features], 0 .. 15
    group_size: int,
) -> torch.Tensor:  # [out_features, in_features // 2] uint8
    """Two codes to a byte. in_features is a multiple of group_size."""
    low, high = codes.to(torch.uint8).unflatten(1, (-1, 2, group_size // 2)).unbind(2)  # [out, num_groups, half]
    return (low | (high << 4)).flatten(1)


def unpack_int4(
    codes: torch.Tensor,  # [out_features, in_features // 2] uint8
    group_size: int,
) -> torch.Tensor:  # [out_features, in_features] uint8, 0 .. 15
    """The reverse of pack_int4."""
    pairs = codes.unflatten(1, (-1, 1, group_size // 2))  # [out_features, num_groups, 1, half]
    return torch.cat([pairs & 15, pairs >> 4], dim=2).flatten(1)


def quantise_int8(
    weight: torch.Tensor,  # [out_features, in_features]
) -> tuple[torch.Tensor, torch.Tensor]:
    """codes [out_features, in_features] int8 and scales [out_features] fp32: each row's largest value is code 127."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    codes = wide / torch.where(scales > 0, scales, 1.0)[:, None]
    return codes.round().to(torch.int8), scales


def quantise_int4(
    weight: torch.Tensor,  # [out_features, in_features]
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [out_features, in_features // 2] uint8, scales and minimums [out_features, num_groups] fp32.

    A group's least value is code 0, its greatest code 15. Rounding to the nearest: a checkpoint made with its
    activations in view (GPTQ, AWQ) is better. Raises ValueError unless in_features is a multiple of group_size.
    """
    if group_size not in GROUP_SIZES or weight.shape[1] % group_size:
        raise ValueError(
            f"group_size: expected one of {', '.join(map(str, GROUP_SIZES))} that divides in_features "
            f"{weight.shape[1]}, got {group_size}"
        )
    groups = weight.float().unflatten(1, (-1, group_size))  # [out_features, num_groups, group_size]
    minimums, maximums = groups.aminmax(dim=2)
    scales = (maximums - minimums) / 15
    codes = (groups - minimums[..., None]) / torch.where(scales > 0, scales, 1.0)[..., None]
    return pack_int4(codes.round().clamp(0, 15).flatten(1), group_size), scales, minimums


def from_q4_0(
    blocks: torch.Tensor,  # [out_features, in_features // 32 * 18] uint8, as a GGUF file has them
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [out_features, in_features // 2], scales and minimums [out_features, in_features // 32] fp16.

    A block is an fp16 d and 16 bytes of codes; minimum = -8 d is exact in fp16.
    """
    scales, codes = _split(blocks, num_header_values=1)
    return codes, scales[..., 0].contiguous(), -8 * scales[..., 0]


def from_q4_1(
    blocks: torch.Tensor,  # [out_features, in_features // 32 * 20] uint8, as a GGUF file has them
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [out_features, in_features // 2], scales and minimums [out_features, in_features // 32] fp16.

    A block is an fp16 d, an fp16 m and 16 bytes of codes.
    """
    header, codes = _split(blocks, num_header_values=2)
    return codes, header[..., 0].contiguous(), header[..., 1].contiguous()


def _split(
    blocks: torch.Tensor,  # [out_features, num_groups * (2 * num_header_values + 16)] uint8
    num_header_values: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp16 values [out_features, num_groups, num_header_values] and the codes [out_features, num_groups * 16]."""
    code_bytes = GGUF_GROUP_SIZE // 2
    parts = blocks.unflatten(1, (-1, 2 * num_header_values + code_bytes))
    header = parts[..., : 2 * num_header_values].contiguous().view(torch.float16)
    return header, parts[..., 2 * num_header_values :].flatten(1).contiguous()
