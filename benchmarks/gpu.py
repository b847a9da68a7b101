"""What kernels and engine reach on a GPU: python benchmarks/gpu.py [--model MODEL] [--json FILE]

Two tables, all of bfloat16 with the heads of Llama-3-8B (32 query heads, 8 KV heads of 128) and blocks of 16:

    decode attention         microseconds, GB/s of keys and values, their fraction of what a copy reaches on this GPU
    attention of one layer   tokens per second, by our kernel, by torch's SDPA and by eager torch

and with --model a third one, of the whole engine: output tokens per second with CUDA graphs, with enforce_eager and by
transformers' generate in turns, their ratios, and the fraction of the rate at which the weights alone could be read.
Without a checkpoint, random_model.py makes one of a real size.

Torch's two get keys and values that lie together already; ours reads them through a block table. Times are the median
of many replays of a CUDA graph by the GPU's own clock, each with a cold cache. `--rehearse` runs it small on a CPU in
Triton's interpreter (TRITON_INTERPRET=1): that shows that the script works, its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minivllm.kernels.paged_attention import AttentionMetadata, paged_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_SIZE**-0.5
DECODES = [(1, 1024), (1, 8192), (1, 32768), (8, 8192), (64, 1024), (64, 8192)]  # requests, context in tokens
PREFILLS = [(1, 512), (1, 2048), (1, 8192)]  # requests, prompt in tokens
NUM_RUNS, NUM_WARM_UPS = 50, 5
ENGINE_REQUESTS, ENGINE_TOKENS, ENGINE_ROUNDS = (1, 8, 32), 256, 3  # greedy, prompts of 64 tokens
CACHE_BYTES = 256 * 2**20  # more than the cache of any GPU


class Timer:
    """Times calls on one device."""

    def __init__(self, device: str, num_runs: int):
        self.device, self.num_runs = device, num_runs
        self.flush = torch.empty(CACHE_BYTES if device == "cuda" else 1, dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """The median of one call, with a cold cache. On a GPU the call is captured and replayed, as a decode step is:
        what the host needs to launch it is not in the time."""
        for _ in range(NUM_WARM_UPS if self.device == "cuda" else 1):
            call()
        if self.device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            call = graph.replay
        return statistics.median(self._once(call) for _ in range(self.num_runs))

    def _once(self, call: Callable[[], Any]) -> float:
        self.flush.zero_()  # takes longer than the host needs to launch what follows
        if self.device != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def copy_bytes_per_second(self) -> float:
        """Read and written bytes of a large copy: what memory gives here."""
        source = torch.ones(4 * self.flush.numel(), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))


class Step:
    """Attention of `num_reqs` equal requests, `num_rows` query rows each, over contexts of `seq_len` tokens."""

    def __init__(self, num_reqs: int, num_rows: int, seq_len: int, device: str):
        blocks_each = -(-seq_len // BLOCK_SIZE)
        ids = 1 + torch.randperm(num_reqs * blocks_each, generator=torch.Generator().manual_seed(0))
        cache_shape = (NUM_KV_HEADS, len(ids) + 1, BLOCK_SIZE, HEAD_SIZE)
        torch.manual_seed(0)
        # query [num_tokens, num_heads, head_size], caches [num_kv_heads, num_blocks, block_size, head_size]
        self.query = torch.randn(num_reqs * num_rows, NUM_HEADS, HEAD_SIZE, device=device, dtype=torch.bfloat16)
        self.k_cache, self.v_cache = (torch.randn(cache_shape, device=device, dtype=torch.bfloat16) for _ in "kv")
        self.metadata = AttentionMetadata(
            query_start_loc=[r * num_rows for r in range(num_reqs + 1)],
            seq_lens=[seq_len] * num_reqs,
            block_table=ids.view(num_reqs, blocks_each).int(),
            slot_mapping=torch.zeros(num_reqs * num_rows, dtype=torch.int64),
            block_size=BLOCK_SIZE,
        )
        self.num_reqs, self.num_rows, self.seq_len = num_reqs, num_rows, seq_len

    @property
    def key_value_bytes(self) -> int:
        """Read at least once, by any implementation."""
        return 2 * 2 * self.num_reqs * self.seq_len * NUM_KV_HEADS * HEAD_SIZE

    def ours(self) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
        return paged_attention(self.query, self.k_cache, self.v_cache, self.metadata, scale=SCALE, impl="triton")

    def torch_inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [num_reqs, num_heads, num_rows, head_size], and contiguous keys and values of all query heads' groups,
        [num_reqs, num_kv_heads, seq_len, head_size] each."""
        table = self.metadata.block_table.long().to(self.query.device)
        keys, values = (
            cache[:, table].flatten(2, 3)[:, :, : self.seq_len].transpose(0, 1).contiguous()
            for cache in (self.k_cache, self.v_cache)
        )
        query = self.query.view(self.num_reqs, self.num_rows, NUM_HEADS, HEAD_SIZE).transpose(1, 2).contiguous()
        return query, keys, values

    def rows_of(self, out: torch.Tensor) -> torch.Tensor:  # [num_reqs, num_heads, num_rows, head_size] -> as ours()
        return out.transpose(1, 2).reshape(self.query.shape)


def sdpa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """torch's fused attention. All [num_reqs, heads, rows, head_size]; a decode's one row sees every key."""
    is_causal = query.shape[2] > 1
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=is_causal, enable_gqa=True)


def eager(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The formula in torch's own operations. All [num_reqs, heads, rows, head_size]."""
    keys, values = (x.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1) for x in (keys, values))
    scores = query @ keys.transpose(2, 3) * SCALE  # [num_reqs, num_heads, num_rows, seq_len]
    num_rows, seq_len = scores.shape[2:]
    hidden = torch.ones(num_rows, seq_len, dtype=torch.bool, device=query.device).triu(seq_len - num_rows + 1)
    return torch.softmax(scores.float().masked_fill(hidden, float("-inf")), dim=-1).to(query.dtype) @ values


def decode_row(timer: Timer, num_reqs: int, seq_len: int, copy_rate: float) -> dict[str, Any]:
    """One line of the first table."""
    step = Step(num_reqs, 1, seq_len, timer.device)
    seconds = timer.seconds(step.ours)
    rate = step.key_value_bytes / seconds
    return {
        "requests": num_reqs,
        "context": seq_len,
        "microseconds": 1e6 * seconds,
        "gb_per_s": rate / 1e9,
        "fraction_of_copy": rate / copy_rate,
    }


def comparison_row(timer: Timer, num_reqs: int, num_rows: int, seq_len: int) -> dict[str, Any]:
    """One line of the second table, after a check that all three mean the same."""
    step = Step(num_reqs, num_rows, seq_len, timer.device)
    inputs = step.torch_inputs()
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": step.ours,
        "sdpa": lambda: step.rows_of(sdpa(*inputs)),
        "eager": lambda: step.rows_of(eager(*inputs)),
    }
    outputs = {name: way().float() for name, way in ways.items()}
    largest = float(outputs["eager"].abs().max())
    off = max(float((outputs[name] - outputs["eager"]).abs().max()) for name in ("ours", "sdpa"))
    rates = {f"{name}_tokens_per_s": num_reqs * num_rows / timer.seconds(way) for name, way in ways.items()}
    return {"requests": num_reqs, "rows": num_rows, "context": seq_len, **rates, "largest_difference": off / largest}


def engine_rows(
    model: str, device: str, num_reqs: tuple[int, ...], num_tokens: int, copy_rate: float
) -> list[dict[str, Any]]:
    """The third table: medians of ENGINE_ROUNDS rounds, all ways on the GPU at once and in turns."""
    ways = {
        "graphs": our_engine(model, device, max(num_reqs), enforce_eager=False),
        "eager": our_engine(model, device, max(num_reqs), enforce_eager=True),
        "transformers": transformers_engine(model, device),
    }
    weight_bytes = sum(file.stat().st_size for file in Path(model).rglob("*.safetensors")) or Path(model).stat().st_size
    rows = []
    for count in num_reqs:
        prompts = [[(7 * r + i) % 100 for i in range(64)] for r in range(count)]
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _, (name, way) in itertools.product(range(1 + ENGINE_ROUNDS), ways.items()):
            start = time.perf_counter()
            way(prompts, num_tokens)
            rates[name].append(count * num_tokens / (time.perf_counter() - start))
        medians = {name: statistics.median(rates[name][1:]) for name in ways}  # the first round compiles
        rows.append(
            {
                "requests": count,
                **{f"{name}_tokens_per_s": rate for name, rate in medians.items()},
                "graphs_over_eager": medians["graphs"] / medians["eager"],
                "graphs_over_transformers": medians["graphs"] / medians["transformers"],
                "of_weight_reading": medians["graphs"] * weight_bytes / (count * copy_rate),
            }
        )
    return rows


Way = Callable[[list[list[int]], int], None]  # prompts and the number of tokens to add to each


def our_engine(model: str, device: str, max_num_seqs: int, *, enforce_eager: bool) -> Way:
    from minivllm import LLM, SamplingParams

    llm = LLM(
        model, device=device, enforce_eager=enforce_eager, max_num_seqs=max_num_seqs, num_gpu_blocks_override=4096
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    return generate


def transformers_engine(model: str, device: str) -> Way:
    """Its generate, one static batch; the prompts are equally long, so nothing is padded."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        ids = torch.tensor(prompts, device=device)  # [num_reqs, prompt length]
        network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
        )

    return generate


def table(rows: list[dict[str, Any]]) -> str:
    """Plain text, numbers to four digits."""
    cells = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main() -> None:
    """Runs and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or .gguf file, for the table of the engine")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--rehearse", action="store_true", help="small, on a CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit("there is no GPU: nothing was measured (--rehearse only tries the script)")
    timer = Timer("cpu", 1) if arguments.rehearse else Timer("cuda", NUM_RUNS)
    decodes, prefills = ([(2, 40)], [(1, 20)]) if arguments.rehearse else (DECODES, PREFILLS)
    copy_rate = timer.copy_bytes_per_second()
    result = {
        "device": "rehearsal" if arguments.rehearse else torch.cuda.get_device_name(),
        "copy_gb_per_s": copy_rate / 1e9,
        "decode": [decode_row(timer, *one, copy_rate) for one in decodes],
        "comparison": [
            *(comparison_row(timer, num_reqs, 1, seq_len) for num_reqs, seq_len in decodes),
            *(comparison_row(timer, num_reqs, seq_len, seq_len) for num_reqs, seq_len in prefills),
        ],
    }
    print(f"{result['device']}, a copy moves {result['copy_gb_per_s']:.0f} GB/s\n\ndecode attention")
    print(f"{table(result['decode'])}\n\nattention of one layer\n{table(result['comparison'])}")
    if arguments.model is not None:
        sizes = ((1, 2), 3) if arguments.rehearse else (ENGINE_REQUESTS, ENGINE_TOKENS)
        result["engine"] = engine_rows(arguments.model, timer.device, *sizes, copy_rate)
        print(f"\nthe engine, {arguments.model}\n{table(result['engine'])}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
