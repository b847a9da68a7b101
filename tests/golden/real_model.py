"""A real model against transformers on prompts that nobody has seen, by hand: python -m tests.golden.real_model --help

Prompts are random pieces of Python's own manual (pydoc_data), a new choice for every --seed, some through the chat
template. transformers recomputes nothing twice (its DynamicCache); both sides are float32. Exit code 1 and the first
difference when one is found that is no tie. For models too large to commit golden cases of.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from golden.reference import Reference
from minivllm import LLM, RequestOutput
from minivllm.hub import ModelSource, resolve_model
from tests.golden.compare import compare_case, compare_logprobs, find_tie, first_steps, sampling_params


def prompts_of_seed(llm: LLM, count: int, seed: int) -> list[list[int]]:
    """Token ids: pieces of 20 to 1,200 characters of the manual; every fourth is asked as a question."""
    chance = random.Random(seed)
    manual = "\n".join(topics[name] for name in sorted(topics))
    found = []
    for index in range(count):
        start = chance.randrange(len(manual) - 1200)
        piece = manual[start : start + chance.randint(20, 1200)]
        if index % 4 == 3 and llm.get_tokenizer().chat_template is not None:
            prompt: Any = llm.llm_engine.render_chat([{"role": "user", "content": f"Explain: {piece}"}])
        else:
            prompt = piece
        found.append(llm.llm_engine.tokenize_prompt(prompt)[0])
    return found


def load_transformers(source: ModelSource) -> Reference:
    """transformers' own network and dequantiser, eager attention."""
    place = {"gguf_file": source.path.name} if source.kind == "gguf" else {}
    folder = source.path.parent if source.kind == "gguf" else source.path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **place)
    return Reference(model, use_cache=True)


def case_of(reference: Reference, prompt: list[int], num_tokens: int, name: str) -> dict[str, Any]:
    """What transformers says of one prompt, as a golden case."""
    prompt_steps, steps = reference.greedy(prompt, num_tokens)
    return {
        "id": name,
        "params": {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True},
        "prompt": prompt,
        "prompt_steps": prompt_steps.as_dict(with_top=True),
        "steps": steps.as_dict(with_top=True),
        "finish_reason": "length",
        "stop_reason": None,
    }


def largest_difference(case: dict[str, Any], output: RequestOutput) -> float:
    """Over prompt and output, up to a tie."""
    ours = output.outputs[0]
    tie = find_tie(case["id"], case["steps"], ours.token_ids)
    count = len(case["steps"]["token_ids"]) if tie is None else tie.position
    return max(
        compare_logprobs(case["id"], case["prompt_steps"], output.prompt_logprobs[1:]),
        compare_logprobs(case["id"], first_steps(case["steps"], count), ours.logprobs[:count]),
    )


def main(
    model: Annotated[str | None, typer.Option(help="Folder or .gguf file; nothing = the default model.")] = None,
    prompts: Annotated[int, typer.Option(help="How many.")] = 16,
    tokens: Annotated[int, typer.Option(help="Greedy tokens of each.")] = 48,
    seed: Annotated[int, typer.Option(help="Another seed, other prompts.")] = 0,
) -> None:
    """Compare greedy ids and log-probabilities, prompt included."""
    source = resolve_model(None if model is None else Path(model))
    llm = LLM(source.path, dtype="float32", max_model_len=2048, kv_cache_memory_bytes=1 << 30)
    reference = load_transformers(source)
    token_ids = prompts_of_seed(llm, prompts, seed)
    cases = [case_of(reference, ids, tokens, f"seed {seed}, prompt {i}") for i, ids in enumerate(token_ids)]
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in token_ids], [sampling_params(case, detokenize=False) for case in cases]
    )
    table = Table("prompt", "tokens", "output", "max |dlogprob|", "verdict", title=f"{source.name}, float32")
    worst, ties = 0.0, []
    for case, output in zip(cases, outputs, strict=True):
        tie = compare_case(case, output)
        ties += [tie] if tie is not None else []
        difference = largest_difference(case, output)
        worst = max(worst, difference)
        verdict = "equal" if tie is None else str(tie)
        table.add_row(case["id"], str(len(case["prompt"])), str(tokens), f"{difference:.2g}", verdict)
    Console().print(table)
    print(f"{prompts} prompts x {tokens} tokens: no difference, {len(ties)} ties, max |dlogprob| {worst:.2g}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except AssertionError as error:
        sys.exit(f"DIFFERENT: {error}")
