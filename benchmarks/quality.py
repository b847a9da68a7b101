"""What each weight format costs in quality: python benchmarks/quality.py

Every format, and float32 as the reference, reads the same tokens and says how likely it held each next one.

    text      the first pieces of Python's own manual (pydoc_data; its hash is printed): perplexity
    golden    the greedy answers of transformers in golden/cases/default.json: how often its token is the likeliest here
    few rows  the first piece again, four tokens in a step: the products of a single stream

Beside perplexity: on how many positions the likeliest token is float32's, and the Kullback-Leibler divergence from
float32's distribution, over its 20 likeliest tokens and the rest as one. Deterministic, so once is enough.
"""

import hashlib
import json
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from minivllm import LLM, SamplingParams

PIECE, NUM_PIECES, FEW_PIECE, TOP = 512, 8, 512, 20  # tokens, pieces, tokens, logprobs
FORMATS = ("none", "int8", "int4", "int4+bf16", "gguf", "gguf+bf16")
GOLDEN = Path(__file__).parents[1] / "golden" / "cases" / "default.json"
Position = tuple[float, dict[int, float]]  # logprob of the token that follows, and of the likeliest tokens


def read(llm: LLM, pieces: list[list[int]]) -> list[Position]:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP)
    outputs = llm.generate([{"prompt_token_ids": piece} for piece in pieces], params, use_tqdm=False)
    positions = []
    for output in outputs:
        for token, row in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            positions.append((row[token].logprob, {i: entry.logprob for i, entry in row.items()}))
    return positions


def perplexity(positions: list[Position]) -> float:
    return math.exp(-sum(logprob for logprob, _ in positions) / len(positions))


def compare(positions: list[Position], reference: list[Position]) -> tuple[float, float]:
    """(share of positions with the same likeliest token, mean divergence)."""
    same = divergence = 0.0
    for (_, found), (_, truth) in zip(positions, reference, strict=True):
        same += max(found, key=found.get) == max(truth, key=truth.get)
        known = found.keys() & truth.keys()
        rest = [max(1e-9, 1 - sum(math.exp(row[token]) for token in known)) for row in (truth, found)]
        divergence += rest[0] * math.log(rest[0] / rest[1])
        divergence += sum(math.exp(truth[token]) * (truth[token] - found[token]) for token in known)
    return same / len(positions), divergence / len(positions)


def golden_share(llm: LLM, cases: list[dict[str, Any]]) -> float:
    """How often the token that transformers chose is the likeliest, along its own answer."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    answers = [case["steps"]["token_ids"] for case in cases]
    prompts = [{"prompt_token_ids": case["prompt"] + answer} for case, answer in zip(cases, answers, strict=True)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ranks = []
    for output, answer in zip(outputs, answers, strict=True):
        rows = output.prompt_logprobs[-len(answer) :]
        ranks += [row[token].rank for row, token in zip(rows, answer, strict=True)]
    return sum(rank == 1 for rank in ranks) / len(ranks)


def measure(model: str | None, text: str, quantization: str, dtype: str) -> dict[str, Any]:
    def load(budget: int) -> LLM:
        sizes = {"max_model_len": 1024, "max_num_batched_tokens": budget, "kv_cache_memory_bytes": 256 << 20}
        return LLM(model, dtype=dtype, quantization=quantization, **sizes)

    llm = load(PIECE)
    ids = llm.get_tokenizer().encode(text)[: PIECE * NUM_PIECES]
    pieces = [ids[start : start + PIECE] for start in range(0, len(ids), PIECE)]
    result: dict[str, Any] = {"weight_bytes": llm.llm_engine.plan.weight_bytes, "text": read(llm, pieces)}
    result["golden"] = golden_share(llm, json.loads(GOLDEN.read_text())["cases"]) if model is None else None
    return result | {"few": read(load(4), [ids[:FEW_PIECE]])}


def main(
    model: Annotated[str | None, typer.Option(help="Folder or .gguf file; nothing = the default model.")] = None,
    formats: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(FORMATS),
) -> None:
    text = "\n".join(topics[name] for name in sorted(topics))[:24_000]
    print("text: sha256", hashlib.sha256(text.encode()).hexdigest())
    columns = ("weights", "MB", "perplexity", "same best", "divergence", "golden", "few rows: perpl.", "same", "div.")
    table = Table(*columns)
    reference = measure(model, text, "none", "float32")
    for name in ("float32", *formats.split(",")):
        found = reference if name == "float32" else measure(model, text, name, "bfloat16")
        row = [name.replace("none", "bfloat16"), f"{found['weight_bytes'] / 1e6:.0f}"]
        for part in ("text", "few"):
            same, divergence = compare(found[part], reference[part])
            row += [f"{perplexity(found[part]):.3f}", f"{100 * same:.1f} %", f"{divergence:.4f}"]
        golden = "-" if found["golden"] is None else f"{100 * found['golden']:.1f} %"
        table.add_row(*row[:5], golden, *row[5:])
        print(name, row, golden, flush=True)
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
