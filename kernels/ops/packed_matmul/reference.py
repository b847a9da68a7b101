"""What packed_matmul means, in plain torch. Called through `impl="reference"` and by tests; the packing also by
models/quantised.py. Twin in vLLM: none."""

import torch


def pack(weight: torch.Tensor) -> torch.Tensor:  # [out_features, in_features] -> [.., in_features / 2, 32, 2]
    """The strips of a weight, zeros where its last strip is not full."""
    out_features, in_features = weight.shape
    padded = weight.new_zeros(-(-out_features // 32) * 32, in_features)  # [whole strips, in_features]
    padded[:out_features] = weight
    return padded.view(-1, 32, in_features // 2, 2).transpose(1, 2).contiguous()


def unpack(strips: torch.Tensor, out_features: int) -> torch.Tensor:  # [out_features, in_features]
    """The reverse of pack. strips: [.., in_features / 2, 32, 2]"""
    return strips.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features]


def pack_codes(
    codes: torch.Tensor,  # [out_features, in_features] uint8 in 0 .. 15
    scales: torch.Tensor,  # [out_features, in_features / 32]
    minimums: torch.Tensor,  # [out_features, in_features / 32]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [.., in_features / 2, 32] uint8 and levels [.., in_features / 32, 2, 32] fp16 of the strips, zeros where
    the last one is not full."""
    halves = pack(codes)  # [.., in_features / 2, 32, 2]

    def in_strips(values: torch.Tensor) -> torch.Tensor:  # [out_features, groups] -> [.., groups, 32]
        padded = values.new_zeros(len(halves) * 32, values.shape[1])  # [whole strips, groups]
        padded[: len(values)] = values
        return padded.view(-1, 32, values.shape[1]).transpose(1, 2)

    levels = torch.stack([in_strips(scales), in_strips(minimums)], 2).to(torch.float16)
    return halves[..., 0] | halves[..., 1] << 4, levels.contiguous()


def widen(
    codes: torch.Tensor,  # [.., in_features / 2, 32] uint8, as pack_codes gives them
    levels: torch.Tensor,  # [.., in_features / 32, 2, 32] fp16
    dtype: torch.dtype,
) -> torch.Tensor:  # [.., in_features / 2, 32, 2]
    """The strips that codes stand for."""
    halves = torch.stack([codes & 15, codes >> 4], -1).to(torch.promote_types(dtype, torch.float32))
    scales, minimums = levels.to(halves.dtype).repeat_interleave(16, 1)[..., None].unbind(2)
    return (halves * scales + minimums).to(dtype)


def packed_matmul(
    rows: torch.Tensor,  # [num_rows, in_features]
    strips: torch.Tensor,  # [ceil(out_features / 32), in_features / 2, 32, 2], or codes: [.., in_features / 2, 32]
    bias: torch.Tensor | None,  # [out_features]
    out_features: int,
    levels: torch.Tensor | None = None,  # [ceil(out_features / 32), in_features / 32, 2, 32], of codes
) -> torch.Tensor:  # [num_rows, out_features]
    """See the package's docstring. Any dtype up to float64; narrower ones are computed in float32."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if levels is not None:  # rounded as the kernel does for many rows
        strips = widen(strips, levels, rows.dtype)
    out = rows.to(dtype) @ unpack(strips, out_features).to(dtype).t()
    return (out if bias is None else out + bias.to(dtype)).to(rows.dtype)
