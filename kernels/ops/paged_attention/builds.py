"""The configurations that paged_attention's kernels are compiled in ahead of time; what a step moves and multiplies.

Knows no compiler. Called by report.py. Twin in vLLM: none.
"""

import dataclasses
from types import MappingProxyType

from minivllm.kernels.build import Build, Workload
from minivllm.kernels.paged_attention.split import Launch, choose_launch, next_power_of_2

KV_BYTES = 2  # of one bfloat16
SCALE_BYTES = 4  # beside head_size codes of one byte
CACHE_TYPES = MappingProxyType({"bf16": "*bf16", "int8": "*i8", "fp8": "*fp8"})  # "fp8": as report.Target.fp8 reads it
BLOCK_SIZE = 16
MULTIPROCESSORS = 132  # of an H100, for the named workloads


@dataclasses.dataclass(frozen=True)
class Heads:
    """One attention layer. Llama-3-8B: Heads(32, 8, 128)."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


def step_launch(
    heads: Heads,
    rows_per_request: int,
    batch: int,
    context: int,
    multiprocessors: int,
    *,
    has_slopes: bool = False,
    is_quantised: bool = False,
) -> Launch:
    """The launch of a step of equal requests."""
    return choose_launch(
        batch * rows_per_request,
        batch,
        context,
        heads.num_kv_heads,
        heads.group,
        heads.head_size,
        multiprocessors=multiprocessors,
        has_slopes=has_slopes,
        is_quantised=is_quantised,
    )


def step_workload(
    heads: Heads, rows_per_request: int, batch: int, context: int, launch: Launch, *, is_quantised: bool = False
) -> Workload:
    """A step of `batch` requests, each with `context` keys of which the last `rows_per_request` are its own."""
    key_bytes = heads.head_size + SCALE_BYTES if is_quantised else heads.head_size * KV_BYTES
    tokens = batch * rows_per_request
    tiles_per_request = -(-rows_per_request // launch.block_q)
    key_reads = batch * context * heads.num_kv_heads * 2 * key_bytes
    rows = tokens * heads.num_heads * heads.head_size
    num_bytes = key_reads + 2 * rows * KV_BYTES + batch * context // BLOCK_SIZE * 4
    if launch.num_splits > 1:
        num_bytes += 2 * launch.num_splits * (rows + tokens * heads.num_heads) * 4
    visible = context - (rows_per_request - 1) / 2  # keys per row, on average
    return Workload(
        name=f"batch {batch}, {rows_per_request} rows, context {context}",
        bytes=num_bytes,
        flops=int(4 * rows * visible),
        programs=batch * tiles_per_request * heads.num_kv_heads * launch.num_splits,
        bytes_in_flight=2 * 2 * launch.tile * key_bytes,
    )


def builds() -> list[Build]:
    """Decodes with splits, and prefills, of a small model and of Llama-3-8B; the options; the merge; the same over
    quantised caches, and once in float16, which multiplies values by their scales elsewhere."""
    small, large = Heads(9, 3, 64), Heads(32, 8, 128)
    quantised = {
        "decode 64": (small, 1, 1, 4096),
        "decode 128": (large, 1, 1, 8192),
        "decode 256": (Heads(8, 4, 256), 1, 64, 4096),
        "prefill 64": (small, 1024, 1, 1024),
        "prefill 128": (large, 1024, 1, 1024),
        "prefill 256": (Heads(8, 4, 256), 512, 1, 4096),
    }
    return [
        _build("decode 64", small, 1, 1, 4096),
        _build("decode 128", large, 1, 1, 8192),
        _build("decode 256, window, cap", Heads(8, 4, 256), 1, 64, 4096, sliding_window=1024, HAS_CAP=True),
        _build("prefill 64", small, 1024, 1, 1024),
        _build("prefill 128", large, 1024, 1, 1024),
        _build("prefill 128, window, slopes", large, 1024, 1, 4096, sliding_window=1024, HAS_SLOPES=True),
        _build("prefill 256, cap", Heads(8, 4, 256), 512, 1, 4096, HAS_CAP=True),
        _merge("merge 128", large, 32),
        _build("decode 128, int8, float16", large, 1, 1, 8192, cache="int8", query="*fp16"),
        *(
            _build(f"{name}, {codes}", *step, cache=codes)
            for codes in ("int8", "fp8")
            for name, step in quantised.items()
        ),
    ]


def _build(
    name: str,
    heads: Heads,
    rows_per_request: int,
    batch: int,
    context: int,
    *,
    sliding_window: int = 0,
    cache: str = "bf16",
    query: str = "*bf16",
    **flags: bool,
) -> Build:
    from minivllm.kernels.paged_attention import kernel

    is_quantised = cache != "bf16"
    launch = step_launch(
        heads,
        rows_per_request,
        batch,
        context,
        MULTIPROCESSORS,
        has_slopes=flags.get("HAS_SLOPES", False),
        is_quantised=is_quantised,
    )
    has_splits = launch.num_splits > 1
    strides = ("query_token_stride", "query_head_stride")
    return Build(
        operation="paged_attention",
        name=name,
        kernel=kernel.paged_attention_kernel,
        types={
            "query_ptr": query,
            **dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), CACHE_TYPES[cache]),
            **dict.fromkeys(("block_table_ptr", "query_start_loc_ptr", "seq_lens_ptr"), "*i32"),
            **dict.fromkeys(("k_scales_ptr", "v_scales_ptr", "alibi_slopes_ptr", "lse_ptr"), "*fp32"),
            "out_ptr": "*fp32" if has_splits else query,
            **dict.fromkeys(("scale", "soft_cap"), "fp32"),
            **dict.fromkeys(("num_reqs", "num_tokens", "num_slots", *strides), "i32"),
            **dict.fromkeys(("block_table_stride", "split_len"), "i32"),
        },
        constants={
            "block_size": BLOCK_SIZE,
            "head_size": heads.head_size,
            "num_heads": heads.num_heads,
            "group": heads.group,
            "sliding_window": sliding_window,
            **{flag: flags.get(flag, False) for flag in ("HAS_CAP", "HAS_SLOPES")},
            "HAS_SPLITS": has_splits,
            "IS_QUANTISED": is_quantised,
            "UPCAST": False,
            "BLOCK_M": launch.block_m,
            "BLOCK_Q": launch.block_q,
            "BLOCK_D": next_power_of_2(heads.head_size),
            "TILE": launch.tile,
        },
        divisible=frozenset({"query_ptr", "k_cache_ptr", "v_cache_ptr", "out_ptr", "num_slots", "split_len", *strides}),
        num_threads=32 * launch.num_warps,
        num_stages=launch.num_stages,
        workload=step_workload(heads, rows_per_request, batch, context, launch, is_quantised=is_quantised),
        has_dot=True,
    )


def _merge(name: str, heads: Heads, num_splits: int) -> Build:
    from minivllm.kernels.paged_attention import kernel

    rows = heads.num_heads * heads.head_size
    num_bytes = num_splits * (rows + heads.num_heads) * 4 + rows * KV_BYTES
    return Build(
        operation="paged_attention",
        name=name,
        kernel=kernel.merge_kernel,
        types={
            **dict.fromkeys(("parts_ptr", "lse_ptr"), "*fp32"),
            "out_ptr": "*bf16",
            **dict.fromkeys(("num_splits", "num_pairs", "head_size"), "i32"),
        },
        constants={"SPLITS": num_splits, "BLOCK_D": heads.head_size},
        divisible=frozenset({"parts_ptr", "lse_ptr", "out_ptr", "head_size"}),
        num_threads=128,
        workload=Workload(
            f"{num_splits} splits, 1 token",
            num_bytes,
            3 * num_splits * rows,
            heads.num_heads,
            num_bytes // heads.num_heads,
        ),
    )
