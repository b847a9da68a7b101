"""What packed_matmul means, in plain torch. Called through `impl="reference"` and by tests."""

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


def packed_matmul(
    rows: torch.Tensor,  # [num_rows, in_features]
    strips: torch.Tensor,  # [ceil(out_features / 32), in_features / 2, 32, 2]
    bias: torch.Tensor | None,  # [out_features]
    out_features: int,
) -> torch.Tensor:  # [num_rows, out_features]
    """See the package's docstring. Any dtype up to float64; narrower ones are computed in float32."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = rows.to(wide) @ unpack(strips, out_features).to(wide).t()
    return (out if bias is None else out + bias.to(wide)).to(rows.dtype)
