"""What must not change an answer: neighbours, chunks, block size, prefix cache, preemption, kernels.

Each row of the table runs the same prompts on another engine and compares with all prompts at once on a plain one:
equal tokens, or a tie at the first difference, and log-probabilities within the tolerance before that. Other
arithmetics (bfloat16, int8, int4) cannot give the same numbers; they are held against transformers layer by layer.

Triton's interpreter must be chosen before triton is imported, so it gets a process of its own:
    TRITON_INTERPRET=1 python -m minivllm.verify.interpreter MODEL
Called by verify.py. Twin in vLLM: tests/v1/determinism.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from minivllm.errors import MiniVLLMError
from minivllm.models.quantised import Int4Strips, Int4Weight, Int8Weight
from minivllm.outputs import RequestOutput
from minivllm.verify.behaviour import LOGPROB_TOLERANCE, TIE_GAP, verdict
from minivllm.verify.engines import Engines, generate
from minivllm.verify.localise import check_layers
from minivllm.verify.records import FAIL, NOT_RUN, OK, TIE, Check, Finding
from minivllm.verify.reference import Reference

SECTION = "invariance"
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("batch: one at a time", {"max_num_seqs": 1}),
    ("chunks of 7 tokens", {"max_num_batched_tokens": 7}),
    ("blocks of 1 token", {"block_size": 1}),
    ("blocks of 32 tokens", {"block_size": 32}),
    ("no prefix cache", {"enable_prefix_caching": False}),
    ("kernels: reference", {"impl": "reference"}),
    ("kernels: cpu", {"impl": "cpu"}),
    ("batch_invariant", {"batch_invariant": True}),
)
ARITHMETICS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("dtype: bfloat16", "bfloat16", {"dtype": "bfloat16"}),
    ("quantisation: int8", "int8", {"quantization": "int8"}),
    ("quantisation: int4", "int4", {"quantization": "int4", "dtype": "bfloat16"}),
    ("quantisation: gguf", "int4", {"quantization": "gguf", "dtype": "bfloat16"}),
)
INTERPRETER_TOKENS, INTERPRETER_SECONDS = 3, 300
Answer = tuple[list[int], list[float], list[float]]  # token ids, their log-probabilities, the gaps of the two best


def answers_of(outputs: list[RequestOutput]) -> list[Answer]:
    """Of outputs with logprobs=2."""
    answers = []
    for output in outputs:
        one = output.outputs[0]
        ids = list(one.token_ids)
        logprobs: list[Any] = list(one.logprobs or [])
        ranked = [sorted((entry.logprob for entry in step.values()), reverse=True) for step in logprobs]
        own = [step[token_id].logprob for step, token_id in zip(logprobs, ids, strict=True)]
        answers.append((ids, own, [step[0] - step[1] for step in ranked]))
    return answers


def compare_answers(name: str, found: list[Answer], expected: list[Answer], detail: str = "") -> Check:
    """Token by token up to the first difference of each prompt."""
    status, delta = OK, 0.0
    for number, ((ids, logprobs, _), (right_ids, right_logprobs, gaps)) in enumerate(zip(found, expected, strict=True)):
        for index, right in enumerate(right_ids):
            if ids[index] != right:
                is_tie = gaps[index] <= TIE_GAP
                status = TIE if is_tie and status != FAIL else FAIL
                what = "tie" if is_tie else "DIFFERENT"
                detail += (
                    f" prompt {number}, token {index}: {ids[index]} instead of {right} ({what}, gap {gaps[index]:.1e})"
                )
                break
            delta = max(delta, abs(logprobs[index] - right_logprobs[index]))
    if not delta <= LOGPROB_TOLERANCE:
        status = FAIL
    return Check(SECTION, name, status, f"logprobs {delta:.1e}", f"{LOGPROB_TOLERANCE:.0e}", detail.strip())


def check_invariance(engines: Engines, prompts: list[list[int]], max_tokens: int) -> list[Check]:
    """The table, without other arithmetics."""
    wanted = {"max_tokens": max_tokens, "logprobs": 2, "detokenize": False}
    plain = engines.start()
    expected = answers_of(generate(plain, prompts, **wanted))
    checks = []
    for name, options in VARIANTS:
        try:
            engine = engines.start(**options)
            checks.append(compare_answers(name, answers_of(generate(engine, prompts, **wanted)), expected))
        except MiniVLLMError as error:
            checks.append(Check(SECTION, name, NOT_RUN, detail=str(error)))
        except RuntimeError as error:
            checks.append(Check(SECTION, name, FAIL, detail=str(error)))
    warm = generate(plain, prompts, **wanted)
    hits = sum(output.num_cached_tokens for output in warm)
    checks.append(compare_answers("warm prefix cache", answers_of(warm), expected, f"{hits} tokens from the cache."))
    checks.append(_preempted(engines, prompts, wanted, expected))
    checks.append(_interpreted(engines, prompts, expected))
    return checks


def _preempted(engines: Engines, prompts: list[list[int]], wanted: dict[str, Any], expected: list[Answer]) -> Check:
    """A pool that holds little more than one request."""
    longest = max(map(len, prompts)) + wanted["max_tokens"]
    block_size = 4
    engine = engines.start(block_size=block_size, num_gpu_blocks_override=longest // block_size + 3)
    answers = answers_of(generate(engine, prompts, **wanted))
    number = engine.scheduler.num_preemptions
    if number == 0:
        return Check(SECTION, "preemption", NOT_RUN, detail="nothing had to be preempted")
    return compare_answers("preemption", answers, expected, f"{number} preemptions.")


def _interpreted(engines: Engines, prompts: list[list[int]], expected: list[Answer]) -> Check:
    """Triton's kernels in Triton's interpreter: slow, so the shortest prompts and few tokens."""
    name = "kernels: triton, interpreted"
    if importlib.util.find_spec("triton") is None:
        return Check(SECTION, name, NOT_RUN, detail="triton is not installed")
    chosen = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))[:2]
    request = {
        "model": None if engines.model is None else str(engines.model),
        "max_model_len": engines.max_model_len,
        "max_tokens": INTERPRETER_TOKENS,
        "prompts": [prompts[index] for index in chosen],
    }
    command = [sys.executable, "-m", "minivllm.verify.interpreter"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=INTERPRETER_SECONDS,
            env={**os.environ, "TRITON_INTERPRET": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Check(SECTION, name, NOT_RUN, detail=f"more than {INTERPRETER_SECONDS} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check(SECTION, name, FAIL, detail=f"the process ended with {done.returncode}: {last[:300]}")
    found = json.loads(done.stdout.splitlines()[-1])
    short = [tuple(part[:INTERPRETER_TOKENS] for part in expected[index]) for index in chosen]
    return compare_answers(name, found, short, f"{len(chosen)} prompts, {INTERPRETER_TOKENS} tokens.")  # type: ignore[arg-type]


def check_arithmetics(engines: Engines, reference: Reference, vocab_size: int) -> tuple[list[Check], list[Finding]]:
    """bfloat16 and the quantisations, each layer against transformers in float32."""
    checks, findings = [], []
    for name, arithmetic, options in ARITHMETICS:
        try:
            if "quantization" in options and not _is_quantised(engines.start(**options)):
                raise MiniVLLMError("no weight of this model can be quantised on this CPU")
            [layers], _, found = check_layers(engines.start, reference, vocab_size, arithmetic, **options)
        except MiniVLLMError as error:
            checks.append(Check(SECTION, name, NOT_RUN, detail=str(error)))
            continue
        checks.append(Check(SECTION, name, verdict(not found), layers.value, layers.limit, layers.detail))
        findings += found
    return checks, findings


def _is_quantised(engine: Any) -> bool:
    return any(isinstance(module, Int8Weight | Int4Weight | Int4Strips) for module in engine._executor.model.modules())
