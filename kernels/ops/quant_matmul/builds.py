"""The configurations that quant_matmul's kernels are compiled in ahead of time; what a product moves and multiplies.

Knows no compiler. Called by report.py. Twin in vLLM: none.
"""

from minivllm.kernels.build import Build, Workload
from minivllm.kernels.quant_matmul.packing import GROUP_SIZES
from minivllm.kernels.quant_matmul.tiles import choose_tile

ROW_BYTES = 2  # of one bfloat16
IN_FEATURES, OUT_FEATURES = 4096, 14336  # up_proj of Llama-3-8B


def builds() -> list[Build]:
    """A decode of one request, of 64, and a prefill, in 8 bits and in 4 bits with every group size; scales of 4 bits as
    GGUF has them, in fp16."""
    return [
        _build(f"{name}, {num_tokens} rows", num_tokens, group_size)
        for name, group_size in (("int8", 0), *((f"int4, groups of {size}", size) for size in GROUP_SIZES))
        for num_tokens in (1, 64, 1024)
    ]


def _build(name: str, num_tokens: int, group_size: int) -> Build:
    """group_size 0: 8 bits."""
    from minivllm.kernels.quant_matmul import kernel

    tile = choose_tile(num_tokens, is_int4=group_size > 0)
    pointers = ("rows_ptr", "codes_ptr", "scales_ptr", "out_ptr", *(("minimums_ptr",) if group_size else ()))
    sizes = ("in_features", "out_features", "rows_stride")
    constants = {"UPCAST": False, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    if group_size:
        constants |= {"HALF": group_size // 2, "GROUPS": tile.block_k // group_size}
    else:
        constants["BLOCK_K"] = tile.block_k
    return Build(
        operation="quant_matmul",
        name=name,
        kernel=kernel.int4_matmul_kernel if group_size else kernel.int8_matmul_kernel,
        types={
            **dict.fromkeys(("rows_ptr", "out_ptr"), "*bf16"),
            "codes_ptr": "*u8" if group_size else "*i8",
            **dict.fromkeys(("scales_ptr", "minimums_ptr"), "*fp16" if group_size else "*fp32"),
            **dict.fromkeys(("num_tokens", *sizes), "i32"),
        },
        constants=constants,
        divisible=frozenset({*pointers, *sizes}),
        num_threads=32 * tile.num_warps,
        num_stages=tile.num_stages,
        workload=_workload(num_tokens, group_size),
        has_dot=True,
    )


def _workload(num_tokens: int, group_size: int) -> Workload:
    """Every weight, row and output once."""
    tile = choose_tile(num_tokens, is_int4=group_size > 0)
    bytes_per_weight = 0.5 + 4 / group_size if group_size else 1.0
    num_bytes = int(bytes_per_weight * IN_FEATURES * OUT_FEATURES) + (0 if group_size else 4 * OUT_FEATURES)
    num_bytes += num_tokens * (IN_FEATURES + OUT_FEATURES) * ROW_BYTES
    return Workload(
        name=f"{num_tokens} rows, {IN_FEATURES} to {OUT_FEATURES}",
        bytes=num_bytes,
        flops=2 * num_tokens * IN_FEATURES * OUT_FEATURES,
        programs=-(-num_tokens // tile.block_m) * -(-OUT_FEATURES // tile.block_n),
        bytes_in_flight=int((tile.num_stages - 1) * tile.block_k * tile.block_n * bytes_per_weight),
    )
