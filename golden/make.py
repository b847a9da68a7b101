"""Make or check the golden cases with transformers.

    python -m golden.make                      everything: about ten minutes on one core, most for the default model
    python -m golden.make --only llama         one model; "default" is SmolLM2-135M-Instruct
    python -m golden.make --check              recompute, compare with the committed files, write nothing; exit code 1
                                               and a list of differences when they do not agree

The default model's file comes from minivllm.hub (downloaded once); --default-model names another place.
Knows the engine's parameter names, not the engine. Called by people, and by CI with --check.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import tokenizers
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from golden import cases as files
from golden import default_model, prompts
from golden.cases import Case
from golden.reference import Reference, embedding, final_distribution, logits_changes
from golden.tiny import DECODERS, EMBEDDERS, TINY, config_hash, weights_hash, write_tiny_model

CHECK_TOLERANCE = 2e-5  # between two machines' float32 runs of the same transformers model; a fifth of the truth's 1e-4
MIN_MARGIN = 2e-6  # a distribution case must not hang on rounding: ten roundings of a float32
TINY_TOKENS = 24
DEFAULT_TOKENS = 64
DISTRIBUTION_LENGTHS = (20, 41)  # teacher-forced positions in the longest prompt

# What is left to draw from: every field alone, in pairs, all together.
DISTRIBUTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 40, "min_p": 0.03},
    {"temperature": 1.6, "top_p": 0.85, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.5, "top_k": 30, "repetition_penalty": 1.3},
)


def versions() -> dict[str, str]:
    """The libraries that decide the numbers."""
    modules = (transformers, torch, tokenizers, numpy)
    return {module.__name__: str(module.__version__) for module in modules}


def provenance(name: str, hashes: dict[str, str], seed: int | None) -> dict[str, Any]:
    return {
        "model": name,
        "hashes": hashes,
        "seed": seed,
        "versions": versions(),
        "command": f"python -m golden.make --only {name}",
        "computed": "transformers, float32, CPU, eager attention, batch of one",
    }


# ------------------------------------------------------------------ tiny decoders
class TinyDecoderCases:
    """All cases of one tiny decoder."""

    def __init__(self, name: str, folder: Path):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.reference = Reference(model)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.eos_token_ids = frozenset(TINY[name].eos_token_ids)
        self.prompts = prompts.tiny_prompts(name)

    def make(self) -> Iterator[Case]:
        for length, prompt in self.prompts.items():
            yield self._greedy(f"greedy-{length}", prompt, {}, with_prompt=True)
        yield from self._penalties()
        yield from self._stops()
        yield from self._masks()
        yield from self._texts()
        for length in DISTRIBUTION_LENGTHS:
            yield self._distributions(self.prompts[63][:length])

    def _greedy(
        self,
        case_id: str,
        prompt: list[int],
        changed: dict[str, Any],
        *,
        with_prompt: bool = False,
        bad_words: list[list[int]] | None = None,
    ) -> Case:
        """One continuation. `changed` are the fields of SamplingParams beside the usual ones."""
        params = {"temperature": 0.0, "max_tokens": TINY_TOKENS, "ignore_eos": True} | changed
        eos = frozenset() if params["ignore_eos"] else self.eos_token_ids
        stops = eos | frozenset(params.get("stop_token_ids", []))
        changes = logits_changes(params, len(prompt), stops, bad_words or [])
        prompt_steps, steps = self.reference.greedy(
            prompt, params["max_tokens"], changes, stops, params.get("min_tokens", 0)
        )
        stopped = steps.token_ids[-1] in stops and len(steps.token_ids) >= params.get("min_tokens", 0)
        own_stop = stopped and steps.token_ids[-1] not in eos
        return {
            "id": case_id,
            "kind": "greedy",
            "prompt": prompt,
            "params": params,
            "steps": steps.as_dict(with_top=with_prompt),
            "prompt_steps": prompt_steps.as_dict(with_top=True) if with_prompt else None,
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": steps.token_ids[-1] if own_stop else None,
        }

    def _penalties(self) -> Iterator[Case]:
        settings: dict[str, dict[str, Any]] = {
            "repetition-1.3": {"repetition_penalty": 1.3},
            "repetition-0.8": {"repetition_penalty": 0.8},
            "frequency-0.7": {"frequency_penalty": 0.7},
            "frequency-minus-0.5": {"frequency_penalty": -0.5},
            "presence-1.2": {"presence_penalty": 1.2},
            "all-penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.6},
        }
        for case_id, changed in settings.items():
            yield self._greedy(case_id, self.prompts[17], changed)
        yield self._greedy("repetition-1.3-long", self.prompts[63], {"repetition_penalty": 1.3})

    def _plain_output(self, length: int) -> list[int]:
        _, steps = self.reference.greedy(self.prompts[length], TINY_TOKENS)
        return steps.token_ids

    def _stops(self) -> Iterator[Case]:
        prompt, plain = self.prompts[33], self._plain_output(33)
        eos = {"ignore_eos": False}
        yield self._greedy("eos", prompt, eos)
        yield self._greedy("stop-token", prompt, {"stop_token_ids": [plain[7], 3]})
        yield self._greedy("stop-token-before-eos", prompt, eos | {"stop_token_ids": [plain[4]]})
        yield self._greedy("min-tokens", prompt, eos | {"stop_token_ids": plain[2:5], "min_tokens": 11})
        yield self._greedy(
            "min-tokens-exact", prompt, {"stop_token_ids": [plain[5]], "min_tokens": plain.index(plain[5])}
        )

    def _masks(self) -> Iterator[Case]:
        prompt, plain = self.prompts[16], self._plain_output(16)
        for size in (1, 2):
            yield self._bad_word_case(size)
        allowed = sorted({3, 5, *plain[::2], *range(40, 120, 7)})
        yield self._greedy("allowed-token-ids", prompt, {"allowed_token_ids": allowed})
        mild = {50: 3.0, 60: 2.5, plain[0]: -1.5, plain[3]: -100.0}
        extreme = {plain[0]: -100.0, plain[1]: -3.5, plain[2]: 2.25, 50: 4.0, 60: 100.0}
        yield self._greedy("logit-bias", prompt, {"logit_bias": mild})
        yield self._greedy("logit-bias-extreme", prompt, {"logit_bias": extreme, "max_tokens": 6})
        word, sequences = self._bad_word(plain, 1)
        everything = {
            "allowed_token_ids": sorted({*allowed, *range(120, 260, 3)}),
            "bad_words": [word],
            "stop_token_ids": [allowed[4], allowed[5]],
            "min_tokens": 8,
            "logit_bias": {allowed[2]: 3.0, allowed[6]: -2.0, 50: 1.5},
            "repetition_penalty": 1.15,
            "frequency_penalty": 0.3,
            "presence_penalty": 0.2,
        }
        yield self._greedy("everything", prompt, everything, bad_words=sequences)

    def _bad_word_case(self, size: int) -> Case:
        """Ban a word of `size` tokens that the model would say; of the prompts, the first where it says one."""
        for length in self.prompts:
            prompt, plain = self.prompts[length], self._plain_output(length)
            try:
                word, sequences = self._bad_word(plain, size)
            except ValueError:
                continue
            case = self._greedy(f"bad-word-{size}", prompt, {"bad_words": [word]}, bad_words=sequences)
            return case | {"bad_words_ids": sequences}
        raise ValueError(f"no prompt makes the model say a word of {size} tokens")

    def _bad_word(self, plain: list[int], size: int) -> tuple[str, list[list[int]]]:
        """A piece of the output that, as text, encodes to exactly its tokens. (text, token ids to ban)

        A word is banned with and without a space before it (vLLM's rule: the second form counts only when it has as
        many tokens and begins with another one). It does not start the output: transformers would look for its first
        tokens in the prompt, too. ValueError when there is none.
        """
        for start in range(1, len(plain) - size):
            ids = plain[start : start + size]
            text = str(self.tokenizer.decode(ids))
            if not text or text != text.strip() or self.tokenizer.encode(text, add_special_tokens=False) != ids:
                continue
            spaced = self.tokenizer.encode(" " + text, add_special_tokens=False)
            return text, [ids, spaced] if len(spaced) == size and spaced[0] != ids[0] else [ids]
        raise ValueError("the output holds no such word")

    def _texts(self) -> Iterator[Case]:
        for index, text in enumerate(prompts.TINY_TEXTS):
            ids = default_model.encode(self.tokenizer, text)
            yield self._text_case(f"text-{index}", ids) | {"prompt_text": text}
        ids = default_model.encode(self.tokenizer, prompts.TINY_MESSAGES)
        yield self._text_case("chat", ids) | {"messages": prompts.TINY_MESSAGES}

    def _text_case(self, case_id: str, prompt: list[int]) -> Case:
        case = self._greedy(case_id, prompt, {})
        text = self.tokenizer.decode(case["steps"]["token_ids"], skip_special_tokens=True)
        return case | {"kind": "text", "text": text}

    def _distributions(self, prompt: list[int]) -> Case:
        # The logits as they are written, digits cut: a reader must get these probabilities from what he reads.
        raw = torch.tensor(files.rounded(self.reference.logits(prompt)[-1].tolist()))  # [vocab_size]
        combinations = []
        for params in DISTRIBUTIONS:
            scores = raw
            for change in logits_changes(params, len(prompt), frozenset(), []):
                scores = change(torch.tensor([prompt]), scores[None].clone())[0]
            kept, margin = final_distribution(scores, params)
            if margin < MIN_MARGIN:
                raise ValueError(
                    f"rounding decides {params} after {len(prompt)} tokens: choose DISTRIBUTION_LENGTHS anew"
                )
            combinations.append({"params": params, "ids": list(kept), "probabilities": list(kept.values())})
        return {
            "id": f"distribution-{len(prompt)}",
            "kind": "distribution",
            "prompt": prompt,
            "logits": raw.tolist(),
            "combinations": combinations,
        }


def tiny_decoder_cases(name: str, folder: Path) -> list[Case]:
    return list(TinyDecoderCases(name, folder).make())


def tiny_embedding_cases(name: str, folder: Path) -> list[Case]:
    """Vectors of the usual prompts, and of texts (with the tokenizer's own special tokens)."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pooling = str(TINY[name].pooling)
    inputs: list[tuple[str, list[int], Case]] = []
    for length, prompt in prompts.tiny_prompts(name).items():
        inputs.append((f"embedding-{length}", prompt, {}))
    for index, text in enumerate(prompts.TINY_EMBEDDING_TEXTS):
        inputs.append((f"text-{index}", list(tokenizer.encode(text)), {"prompt_text": text}))
    return [
        {"id": case_id, "kind": "embedding", "prompt": ids, "embedding": embedding(model, ids, pooling)} | more
        for case_id, ids, more in inputs
    ]


# ------------------------------------------------------------------ the default model
def default_model_cases(gguf: Path) -> list[Case]:
    """64 greedy tokens for each of 32 prompts; prompt logprobs for some."""
    tokenizer = default_model.load_tokenizer(gguf)
    reference = Reference(default_model.load_model(gguf), use_cache=True)
    cases = []
    for prompt in tqdm(prompts.DEFAULT_PROMPTS, "default model", unit="prompt"):
        ids = default_model.encode(tokenizer, prompt.content)
        prompt_steps, steps = reference.greedy(ids, DEFAULT_TOKENS)
        cases.append(
            {
                "id": prompt.name,
                "kind": "text",
                "prompt": ids,
                "params": {"temperature": 0.0, "max_tokens": DEFAULT_TOKENS, "ignore_eos": True},
                "steps": steps.as_dict(with_top=True),
                "prompt_steps": prompt_steps.as_dict(with_top=True) if prompt.prompt_logprobs else None,
                "finish_reason": "length",
                "stop_reason": None,
                "text": tokenizer.decode(steps.token_ids, skip_special_tokens=True),
            }
            | prompt.fields
        )
    return cases


# ------------------------------------------------------------------ all models
def compute(name: str, gguf: Path | None) -> tuple[dict[str, Any], list[Case]]:
    """(provenance, cases) of one model."""
    if name == "default":
        path = gguf or default_model.find()
        return provenance(name, {"gguf": files.file_hash(path)}, None), default_model_cases(path)
    make: Callable[[str, Path], list[Case]] = tiny_embedding_cases if name in EMBEDDERS else tiny_decoder_cases
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tiny_model(name, scratch)
        hashes = {"config": config_hash(folder), "weights": weights_hash(folder)}
        return provenance(name, hashes, TINY[name].seed), make(name, folder)


def differences(expected: Any, actual: Any, place: str = "") -> Iterator[str]:
    """Where two structures differ by more than CHECK_TOLERANCE, as readable lines.

    top_ids and ranks may differ where the logprobs beside them agree: two candidates have then changed places.
    """
    if isinstance(expected, dict) and isinstance(actual, dict) and expected.keys() == actual.keys():
        for key in expected:
            if key not in ("ranks", "top_ids"):
                yield from differences(expected[key], actual[key], f"{place}.{key}")
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        for index, (left, right) in enumerate(zip(expected, actual, strict=True)):
            label = left["id"] if isinstance(left, dict) and "id" in left else index
            yield from differences(left, right, f"{place}[{label}]")
    elif isinstance(expected, float) and isinstance(actual, float):
        if abs(expected - actual) > CHECK_TOLERANCE * max(1.0, abs(expected)):
            yield f"{place}: committed {expected}, now {actual}"
    elif expected != actual:
        yield f"{place}: committed {str(expected)[:80]}, now {str(actual)[:80]}"


def check(name: str, found: dict[str, Any], cases: list[Case]) -> list[str]:
    """Compare fresh cases with the committed ones."""
    try:
        committed = files.read_file(name)
    except FileNotFoundError:
        return [f"{files.case_path(name).name} was never made"]
    scratch = files.rounded(cases)
    lines = list(differences(committed["cases"], scratch))
    if committed["provenance"]["hashes"] != found["hashes"]:
        lines.insert(0, f"another model: committed {committed['provenance']['hashes']}, now {found['hashes']}")
    return lines


def summary_row(name: str, cases: list[Case]) -> tuple[str, ...]:
    gaps = [gap for case in cases if "steps" in case for gap in case["steps"]["gaps"]]
    close = [sum(gap < limit for gap in gaps) for limit in (1e-4, 1e-2)]
    smallest = f"{min(gaps):.2g}" if gaps else ""
    return name, str(len(cases)), str(len(gaps)), str(close[0]), str(close[1]), smallest


def run(names: list[str], *, only_check: bool, gguf: Path | None) -> int:
    """Make or check `names`. Returns the exit code."""
    console = Console(width=150)
    table = Table("model", "cases", "tokens", "gap < 1e-4", "gap < 1e-2", "smallest", title="golden cases")
    problems: dict[str, list[str]] = {}
    for name in tqdm(names, "models", unit="model"):
        found, cases = compute(name, gguf)
        table.add_row(*summary_row(name, cases))
        if only_check:
            problems[name] = check(name, found, cases)
        else:
            files.write_cases(files.case_path(name), found, cases)
    if not only_check:
        files.write_manifest(versions(), all_hashes())
    console.print(table)
    for name, lines in problems.items():
        console.print(f"{name}: {'agrees' if not lines else f'{len(lines)} differences'}", highlight=False)
        for line in lines[:10]:
            console.print(f"    {line}", highlight=False, markup=False)
    return 1 if any(problems.values()) else 0


def all_hashes() -> dict[str, dict[str, str]]:
    """What every committed case file says it was computed from."""
    names = [name for name in ("default", *TINY) if files.case_path(name).exists()]
    return {name: files.read_file(name)["provenance"]["hashes"] for name in names}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m golden.make", description="Make or check the golden cases.")
    choices = [*DECODERS, *EMBEDDERS, "default"]
    parser.add_argument("--only", action="append", choices=choices, metavar="NAME", help=f"one of {', '.join(choices)}")
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    parser.add_argument("--default-model", type=Path, metavar="FILE", help="the default model's .gguf file")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1: sums in one order)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return run(options.only or choices, only_check=options.check, gguf=options.default_model)


if __name__ == "__main__":
    sys.exit(main())
