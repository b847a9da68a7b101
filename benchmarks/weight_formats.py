"""What a product costs in each weight format, by the number of rows: the tables of models/linear.py and quantised.py.

    python benchmarks/weight_formats.py                      the products alone, shapes of SmolLM2-135M
    python benchmarks/weight_formats.py --dtype float32      plain and packed
    python benchmarks/weight_formats.py --engine             the default model: one stream, and 32 requests

Every format has the layers' weights of its own, so that none is left in the cache from the call
before; the formats take turns, and the fastest round counts. One thread's CPU time: other processes then matter little.
Compare figures of one run only.
"""

import itertools
import json
import statistics
import time
from typing import Annotated

import torch
import typer
from machine import describe
from workload import random_requests

from minivllm import LLM, SamplingParams
from minivllm.kernels.amx import HAS_AMX
from minivllm.models.linear import FORMATS, IN_STRIPS
from minivllm.worker.executor import keep_freed_memory

LAYER = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}  # out x in
HEAD = {"head": (49_152, 576)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
NAMES = {
    torch.float32: ("plain", "packed"),
    torch.bfloat16: ("plain", "packed", "int8", *((IN_STRIPS,) if HAS_AMX else ("int4", "int4+bf16"))),
}


def seconds_of(
    shapes: dict[str, tuple[int, int]], dtype: torch.dtype, num_layers: int, rounds: int
) -> dict[tuple[int, str], float]:
    """(rows, format) -> seconds of one layer's products, the best of all rounds."""
    plain = [[torch.randn(shape).to(dtype) * 0.05 for shape in shapes.values()] for _ in range(num_layers)]
    stored = {name: [[FORMATS[name].store(weight) for weight in layer] for layer in plain] for name in NAMES[dtype]}
    best: dict[tuple[int, str], float] = {}
    for _, num_rows in itertools.product(range(rounds), ROWS):
        inputs = [torch.randn(num_rows, shape[1]).to(dtype) for shape in shapes.values()]
        for name in NAMES[dtype]:
            start = time.thread_time()
            for layer in stored[name]:
                for rows, weight in zip(inputs, layer, strict=True):
                    FORMATS[name].product(rows, weight, None)
            seconds = (time.thread_time() - start) / num_layers
            best[num_rows, name] = min(seconds, best.get((num_rows, name), seconds))
    return best


def compare_engines(names: tuple[str, ...], rounds: int) -> None:
    """The default model in every format, in turns: CPU seconds and how many times faster than without."""
    sizes = {"max_model_len": 1024, "kv_cache_memory_bytes": 128 << 20, "enable_prefix_caching": False}
    engines = {name: LLM(dtype="bfloat16", quantization=name, **sizes) for name in names}
    torch.set_num_threads(1)
    works = {"1 x (64 + 128)": (1, 64, 128), "32 x (32 + 32)": (32, 32, 32), "1 x (900 + 1)": (1, 900, 1)}
    for title, (count, num_prompt, num_output) in works.items():
        requests = random_requests(count, prompt=(num_prompt, num_prompt), output=(num_output, num_output))
        params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _, name in itertools.product(range(rounds), names):
            start = time.thread_time()
            engines[name].generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)
            seconds[name].append(time.thread_time() - start)
        for name in names:
            ratios = sorted(plain / own for plain, own in zip(seconds[names[0]], seconds[name], strict=True))
            print(f"{title:16}{name:12}{min(seconds[name]):8.2f} s   {statistics.median(ratios):.2f} x", end="")
            print(f"  ({ratios[0]:.2f} - {ratios[-1]:.2f})", flush=True)


def main(
    engine: Annotated[bool, typer.Option("--engine", help="Measure the default model.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the rows: bfloat16 or float32.")] = "bfloat16",
    layers: Annotated[int, typer.Option(help="Weights of so many layers take turns.")] = 30,
    rounds: Annotated[int, typer.Option()] = 5,
) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    keep_freed_memory()
    print(json.dumps(describe()))
    if engine:
        compare_engines(("none", "int8", "gguf", "gguf+bf16"), rounds)
        return
    names = NAMES[getattr(torch, dtype)]
    for title, shapes, count in (("a layer", LAYER, layers), ("the head", HEAD, 2)):
        print(f"microseconds, {title}\n      rows" + "".join(f"{name:>16}" for name in names))
        best = seconds_of(shapes, getattr(torch, dtype), count, rounds)
        for num_rows in ROWS:
            print(f"{num_rows:10d}" + "".join(f"{best[num_rows, name] * 1e6:16.0f}" for name in names))


if __name__ == "__main__":
    typer.run(main)
