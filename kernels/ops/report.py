"""What the compilers make of every kernel, without a GPU: python -m minivllm.kernels.report --help

    Build ──triton.compile──▶ code for four GPUs ──▶ registers, spills, shared memory, loads, tensor instructions
    Workload ──arithmetic──▶ roofline: a MODEL of the time, no measurement

One row per kernel x configuration x target. A row that breaks the budget is marked, and the exit code is then 1.

The model: a multiprocessor holds as many programs as its registers and shared memory allow; memory delivers what the
running programs have in flight per LATENCY, at most its bandwidth; no wave is shorter than one LATENCY. Launch cost,
caches and clock changes are left out.

Knows the formats of cubins and of AMD's assembly. Twin in vLLM: none.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minivllm.kernels.build import Build, Workload

LATENCY_SECONDS = 0.7e-6  # of device memory, roughly, on all of these


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU: what it is called, what is compiled for it, and its data sheet (bfloat16, dense)."""

    arch: str
    name: str
    gpu: GPUTarget
    multiprocessors: int
    bytes_per_second: float
    flops_per_second: float
    shared_bytes: int  # per program
    shared_bytes_per_multiprocessor: int
    registers: int  # of 32 bits, per multiprocessor
    threads: int  # per multiprocessor
    fp8: str = "fp8e4nv"  # how Triton reads e4m3 there


TARGETS = (
    Target(
        "sm_80", "A100", GPUTarget("cuda", 80, 32), 108, 2.0e12, 312e12, 163 << 10, 164 << 10, 65536, 2048, "fp8e4b15"
    ),
    Target("sm_90", "H100", GPUTarget("cuda", 90, 32), 132, 3.35e12, 989e12, 227 << 10, 228 << 10, 65536, 2048),
    Target("sm_100", "B200", GPUTarget("cuda", 100, 32), 148, 8.0e12, 2250e12, 227 << 10, 228 << 10, 65536, 2048),
    Target("gfx942", "MI300X", GPUTarget("hip", "gfx942", 64), 304, 5.3e12, 1307e12, 64 << 10, 64 << 10, 131072, 2048),
)
SMALLEST_SHARED_BYTES = 99 << 10  # sm_86 and sm_89 run the code of sm_80


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel in one configuration on one target."""

    operation: str
    build: str
    target: str
    registers: int  # per thread
    spills: int  # bytes per thread
    shared_bytes: int  # per program
    wide_loads: int  # instructions that load 128 bits
    other_loads: int
    tensor_instructions: int
    programs_per_multiprocessor: int
    workload: str
    bytes: int
    flops: int
    model_microseconds: float
    bound_microseconds: float  # bytes over bandwidth or operations over their peak, whichever is longer
    broken: tuple[str, ...]  # budgets


# ------------------------------------------------------------------ compiling
def all_builds() -> list[Build]:
    """Every configuration of every kernel."""
    from minivllm.kernels.logprobs import kernel as logprobs
    from minivllm.kernels.paged_attention import builds as paged_attention
    from minivllm.kernels.penalties import kernel as penalties
    from minivllm.kernels.quant_matmul import builds as quant_matmul
    from minivllm.kernels.reshape_and_cache import kernel as reshape_and_cache
    from minivllm.kernels.rms_norm import kernel as rms_norm
    from minivllm.kernels.rotary_embedding import kernel as rotary_embedding
    from minivllm.kernels.silu_and_mul import kernel as silu_and_mul
    from minivllm.kernels.token_bitmask import kernel as token_bitmask
    from minivllm.kernels.top_k_top_p import kernel as top_k_top_p

    attention = (paged_attention, reshape_and_cache, rotary_embedding)
    rows = (rms_norm, silu_and_mul, quant_matmul)
    sampling = (token_bitmask, penalties, logprobs, top_k_top_p)
    return [build for operation in (*attention, *rows, *sampling) for build in operation.builds()]


def compile_build(build: Build, target: Target) -> Any:
    """Triton's CompiledKernel."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(build.kernel.params):
        if parameter.name in build.constants:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = build.constants[parameter.name]
            continue
        type_name = build.types[parameter.name]
        signature[parameter.name] = f"*{target.fp8}" if type_name == "*fp8" else type_name
        if parameter.name in build.divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps(build, target), "num_stages": build.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target.gpu, options=options)


def num_warps(build: Build, target: Target) -> int:
    """Attention's tiles are laid out by warps, so that AMD's get twice the threads; the others count threads."""
    return build.num_threads // (32 if build.has_dot else target.gpu.warp_size)


# ------------------------------------------------------------------ reading machine code
def resources(compiled: Any, target: Target) -> dict[str, int]:
    """registers, spills, shared_bytes, wide_loads, other_loads, tensor_instructions."""
    read = _amd_resources if target.gpu.backend == "hip" else _nvidia_resources
    return {"shared_bytes": int(compiled.metadata.shared), **read(compiled)}


def _nvidia_resources(compiled: Any) -> dict[str, int]:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = compiled.asm["ptx"]
    loads = re.findall(r"ld\.global\S*", text)
    copies = re.findall(r"cp\.async\.c\w\S* \[[^;]*?, (0x\w+|\d+)", text)
    wide = sum(_is_wide(load) for load in loads) + sum(int(size, 0) == 16 for size in copies)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        "spills": int(re.search(r"STACK:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        "wide_loads": wide,
        "other_loads": len(loads) + len(copies) - wide,
        "tensor_instructions": len(re.findall(r"mma\.sync|wgmma\.mma|tcgen05\.mma", text)),
    }


def _is_wide(load: str) -> bool:
    """ld.global.v4.b32 and ld.global.v2.b64 are 16 bytes."""
    count, bits = re.search(r"\.v(\d)", load), re.search(r"\.[bufs](\d+)", load)
    return bool(count and bits) and int(count.group(1)) * int(bits.group(1)) == 128  # type: ignore[union-attr]


def _amd_resources(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]

    loads = re.findall(r"(?:global|buffer)_load_\w+", text)
    wide = sum("dwordx4" in load or "b128" in load for load in loads)
    return {
        "registers": number("vgpr_count"),
        "spills": 4 * number("vgpr_spill_count"),
        "wide_loads": wide,
        "other_loads": len(loads) - wide,
        "tensor_instructions": len(re.findall(r"v_mfma", text)),
    }


# ------------------------------------------------------------------ the model
def programs_per_multiprocessor(target: Target, registers: int, num_warps: int, shared_bytes: int) -> int:
    """How many programs of one kernel run on one multiprocessor at a time."""
    threads = num_warps * target.gpu.warp_size
    by_registers = target.registers // (max(-(-registers // 8) * 8, 8) * threads)
    by_shared = target.shared_bytes_per_multiprocessor // (shared_bytes + 1024)
    return max(1, min(by_registers, by_shared, target.threads // threads, 32))


def bound_seconds(target: Target, workload: Workload) -> float:
    """No kernel can be faster: all bytes at full bandwidth, or all operations at full speed."""
    return max(workload.bytes / target.bytes_per_second, workload.flops / target.flops_per_second)


def model_seconds(target: Target, workload: Workload, per_multiprocessor: int) -> float:
    """Wave after wave: a full one, or a last one with fewer programs; the module's docstring says what is left out."""
    slots = target.multiprocessors * per_multiprocessor
    num_full, last = divmod(workload.programs, slots)
    return num_full * _wave_seconds(target, workload, slots) + (_wave_seconds(target, workload, last) if last else 0.0)


def _wave_seconds(target: Target, workload: Workload, running: int) -> float:
    """So many programs at a time. Memory gives what they have in flight per latency, at most its bandwidth."""
    share = running / workload.programs
    bytes_per_second = min(target.bytes_per_second, running * workload.bytes_in_flight / LATENCY_SECONDS)
    busy = min(1.0, running / target.multiprocessors)
    memory = share * workload.bytes / bytes_per_second
    return max(memory, share * workload.flops / (busy * target.flops_per_second), LATENCY_SECONDS)


@dataclasses.dataclass(frozen=True)
class DecodeModel:
    """Attention of one decode step.

    ratio: the model's time over that of the keys' and values' bytes alone, which is one LATENCY at least.
    """

    num_splits: int
    microseconds: float
    ratio: float


def decode_model(
    rows: list[Row],
    target: Target,
    batch: int,
    context: int,
    *,
    multiprocessors: int | None = None,
    cut_for: int | None = None,
) -> DecodeModel:
    """Llama-3-8B's layer, with the launch that split.py chooses for this GPU (or for so many multiprocessors).

    cut_for: a longer context that the launch is cut for, as a CUDA graph's is; splits behind `context` end at once.
    """
    from minivllm.kernels.paged_attention import builds

    heads = builds.Heads(32, 8, 128)
    launch = builds.step_launch(heads, 1, batch, cut_for or context, multiprocessors or target.multiprocessors)
    launch = dataclasses.replace(launch, num_splits=-(-context // launch.split_len))
    workload = builds.step_workload(heads, 1, batch, context, launch)
    row = next(row for row in rows if row.target == target.arch and row.build == "decode 128")
    seconds = model_seconds(target, workload, row.programs_per_multiprocessor)
    key_bytes = batch * context * heads.num_kv_heads * heads.head_size * 2 * builds.KV_BYTES
    bound = max(key_bytes / target.bytes_per_second, LATENCY_SECONDS)
    return DecodeModel(launch.num_splits, 1e6 * seconds, seconds / bound)


# ------------------------------------------------------------------ rows
def report(targets: Iterable[Target] = TARGETS, builds: Iterable[Build] | None = None) -> list[Row]:
    """Compile everything. One to three seconds per row with a cold cache."""
    builds = all_builds() if builds is None else list(builds)
    return [_row(build, target) for target in targets for build in builds]


def _row(build: Build, target: Target) -> Row:
    found = resources(compile_build(build, target), target)
    per_multiprocessor = programs_per_multiprocessor(
        target, found["registers"], num_warps(build, target), found["shared_bytes"]
    )
    return Row(
        operation=build.operation,
        build=build.name,
        target=target.arch,
        **found,
        programs_per_multiprocessor=per_multiprocessor,
        workload=build.workload.name,
        bytes=build.workload.bytes,
        flops=build.workload.flops,
        model_microseconds=round(1e6 * model_seconds(target, build.workload, per_multiprocessor), 2),
        bound_microseconds=round(1e6 * bound_seconds(target, build.workload), 2),
        broken=tuple(broken_budgets(build, target, found)),
    )


def broken_budgets(build: Build, target: Target, found: dict[str, int]) -> list[str]:
    """What kernels.md does not allow."""
    limit = min(target.shared_bytes, SMALLEST_SHARED_BYTES) if target.arch == "sm_80" else target.shared_bytes
    checks = {
        f"spills {found['spills']} bytes": found["spills"] > 0,
        f"shared memory above {limit >> 10} KB": found["shared_bytes"] > limit,
        "no 128-bit loads": build.has_wide_loads and not found["wide_loads"],
        "no tensor instructions": build.has_dot and not found["tensor_instructions"],
    }
    return [complaint for complaint, is_broken in checks.items() if is_broken]


def fingerprint() -> str:
    """Of every source that a row depends on."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        if file.name in (
            "kernel.py",
            "builds.py",
            "build.py",
            "split.py",
            "tiles.py",
            "report.py",
            "quantised_cache.py",
        ):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------ printing
PREFACE = """# What the compilers make of the kernels

Made by `python -m minivllm.kernels.report --write docs/kernel-report.md`; a test fails when it is older than
the sources.

Registers, spills, shared memory and instructions are read from the machine code that Triton compiles ahead of time.
**The times are a model, no measurement: nothing here was run on a GPU.** "bound" is the bytes over the GPU's bandwidth
or the operations over its peak, whichever is longer; "model" adds how many programs run at a time and the last wave.
No wave is shorter than one latency
of memory, taken as 0.7 us. Launch cost and caches are left out.

"""


def as_markdown(rows: list[Row]) -> str:
    """One table per target."""
    lines = [f"<!-- sources {fingerprint()} triton {triton.__version__} -->"]
    for target in TARGETS:
        own = [row for row in rows if row.target == target.arch]
        if not own:
            continue
        lines += [
            f"\n## {target.name} ({target.arch})\n",
            "| kernel | configuration | registers | spills | shared KB | 128-bit / other loads | tensor | programs / "
            "multiprocessor | workload | MB | GFLOP | model us | bound us |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in own:
            name = row.operation if not row.broken else f"**{row.operation}: {', '.join(row.broken)}**"
            lines.append(
                f"| {name} | {row.build} | {row.registers} | {row.spills} | {row.shared_bytes / 1024:.0f} | "
                f"{row.wide_loads} / {row.other_loads} | {row.tensor_instructions} | "
                f"{row.programs_per_multiprocessor} | {row.workload} | {row.bytes / 1e6:.2f} | {row.flops / 1e9:.2f} | "
                f"{row.model_microseconds:.2f} | {row.bound_microseconds:.2f} |"
            )
        lines += _decode_lines(rows, target)
    return "\n".join(lines) + "\n"


def _decode_lines(rows: list[Row], target: Target) -> list[str]:
    """The model of decode attention over batch and context."""
    lines = [
        "\nDecode attention of Llama-3-8B, one layer, by the model:\n",
        "| batch | context | splits | model us | of the time of its keys' and values' bytes |",
        "|---|---|---|---|---|",
    ]
    for batch, context in itertools.product((1, 64), (1 << 10, 8 << 10, 32 << 10, 128 << 10)):
        found = decode_model(rows, target, batch, context)
        lines.append(
            f"| {batch} | {context >> 10}k | {found.num_splits} | {found.microseconds:.1f} | {found.ratio:.2f} x |"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m minivllm.kernels.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--target", choices=[target.arch for target in TARGETS], help="one GPU only")
    parser.add_argument("--json", action="store_true", help="rows as JSON instead of tables")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put all tables into FILE, behind an explanation")
    options = parser.parse_args(arguments)
    rows = report([target for target in TARGETS if options.target in (None, target.arch)])
    if options.write:
        options.write.write_text(PREFACE + as_markdown(rows), encoding="utf-8")
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if options.json else as_markdown(rows))
    return 1 if any(row.broken for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
