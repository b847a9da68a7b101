"""Where the networks part: every point of every layer, ours against transformers', the layer's own fault kept apart.

    whole prompt    one chunk and some decode steps
    cut prompt      small blocks, small chunks, a prefix out of the cache, blocks that had another owner

Each layer of the reference is given our layer's input (reference.py), so an error does not travel, and a tolerance
holds for layer 30 as for layer 0. The first point over it, in the order of computation, is where the layer's fault is;
diagnose.py guesses its kind. Cache slots that nobody wrote are NaN here.

Knows no client and no sampler. Called by verify.py. Twin in vLLM: none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from minivllm.engine.llm_engine import LLMEngine
from minivllm.verify.diagnose import Place, diagnose
from minivllm.verify.observe import Observer, Trace
from minivllm.verify.records import FAIL, OK, Check, Finding, PointError
from minivllm.verify.reference import Reference, ReferenceTrace

# RMS(difference) / RMS(value), of one layer alone. float32: of the worst position; every tiny architecture and the
# default model stay below 6e-6 everywhere, below 3e-7 behind the first norm, which is one operation. From the scores
# on a layer may amplify rounding (scores of some hundred), so 1e-4 is allowed there. The others: of the median
# position, because a rounded network may choose another expert, or lose a value to cancellation, at single positions;
# two to three times what is measured.
TOLERANCES: Mapping[str, float] = MappingProxyType({"float32": 1e-4, "bfloat16": 0.04, "int8": 0.12, "int4": 0.5})
NORM_TOLERANCE, BEFORE_SCORES_TOLERANCE = 2e-6, 2e-5  # in float32
BEFORE_SCORES = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "key", "value")
CACHED_FACTOR = 10.0  # what another request left in the cache has the errors of all layers below it
BLOCK, CHUNK, SCENARIO_TOKENS, DECODE_TOKENS = 4, 13, 40, 5

Start = Callable[..., LLMEngine]  # options -> a new engine on the model


def compare(
    scenario: str, ours: Trace, free: ReferenceTrace, forced: ReferenceTrace, arithmetic: str, trust_cached: bool = True
) -> list[PointError]:
    """All points that both sides have, in the order of computation.

    trust_cached: keys and values out of the prefix cache are compared, too. They have gone through all layers below, so
    a fault that is known would show in them again.
    """
    errors = []
    for point, expected in forced.values.items():
        found = ours.get(point)
        if found is None or found.shape[1] != expected.shape[1]:
            continue
        start = len(expected) - len(found)
        if start == 0 and ours.first_row > 0 and not trust_cached:
            start = ours.first_row
            found = found[start:]
        tolerance = _tolerance(point, arithmetic) * (CACHED_FACTOR if start < ours.first_row else 1)
        own = _row_errors(found, expected[start:])
        wrong = (~(own <= tolerance)).nonzero().flatten()
        summary = _largest if arithmetic == "float32" else _median
        difference = (found - expected[start:]).abs()
        worst = int(own.nan_to_num(torch.inf).argmax())
        errors.append(
            PointError(
                scenario=scenario,
                point=point,
                layer=layer_of(point, ours.layers_path),
                own=summary(own),
                total=summary(_row_errors(found, free.values[point][start:])),
                max_abs=_largest(difference),
                mean_abs=float(difference.mean()),
                cosine=float(torch.cosine_similarity(found[worst], expected[start + worst], dim=0)),
                tolerance=tolerance,
                position=start + int(wrong[0]) if summary(own) > tolerance else None,
            )
        )
    return errors


def _tolerance(point: str, arithmetic: str) -> float:
    if arithmetic == "float32" and point.endswith("input_layernorm"):
        return NORM_TOLERANCE
    if arithmetic == "float32" and point.endswith(BEFORE_SCORES):
        return BEFORE_SCORES_TOLERANCE
    return TOLERANCES[arithmetic]


def _row_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """found, expected: [rows, width] -> [rows]"""
    return (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-20)


def _largest(values: torch.Tensor) -> float:
    """values: any shape. NaN counts as infinite."""
    return float(values.nan_to_num(torch.inf).max())


def _median(values: torch.Tensor) -> float:
    """values: any shape. NaN counts as infinite."""
    return float(values.nan_to_num(torch.inf).median())


def layer_of(point: str, layers_path: str) -> int | None:
    """The number behind the path of the layers; None for what is in no layer."""
    rest = point.removeprefix(f"{layers_path}.")
    return int(rest.split(".")[0]) if rest != point else None


def find(
    scenario: str,
    observer: Observer,
    ours: Trace,
    reference: Reference,
    arithmetic: str,
    token: Callable[[int], str],
    trust_cached: bool = True,
) -> tuple[list[PointError], list[Finding]]:
    """Compare one request of ours with transformers; one finding for every kind of fault."""
    free = reference.trace(ours.token_ids)
    inputs = {i: ours.values[f"{ours.layers_path}.{i}.input"] for i in range(len(reference.layers))}
    forced = reference.trace(ours.token_ids, inputs)
    errors = compare(scenario, ours, free, forced, arithmetic, trust_cached)
    firsts: dict[int | None, PointError] = {}
    for error in errors:
        is_layer_before = error.point.endswith(".input") and error.layer != 0
        is_spoiled = error.layer is not None and not torch.isfinite(inputs[error.layer]).all()  # NaN came in
        if error.is_wrong and not is_layer_before and not is_spoiled:
            firsts.setdefault(error.layer, error)
    if len(firsts) > 1:
        firsts.pop(None, None)  # the head reads what the layers spoiled
    findings: dict[tuple[str, str], Finding] = {}
    for layer, error in firsts.items():
        kind, evidence = diagnose(Place(error.point, layer, observer, ours, forced, reference))
        component = error.point.removeprefix(f"{ours.layers_path}.{layer}.")
        component = "output (residual sum)" if component == error.point and layer is not None else component
        component = "embedding" if component == "input" else component
        known = findings.setdefault(
            (kind, component),
            Finding(
                scenario=scenario,
                kind=kind,
                component=component,
                layers=[],
                position=error.position or 0,
                token_id=ours.token_ids[error.position or 0],
                token=token(ours.token_ids[error.position or 0]),
                evidence=evidence,
            ),
        )
        if layer is not None:
            known.layers.append(layer)
    return errors, list(findings.values())


# ------------------------------------------------------------------ scenarios
def check_layers(
    start: Start, reference: Reference, vocab_size: int, arithmetic: str = "float32", **options: Any
) -> tuple[list[Check], list[PointError], list[Finding]]:
    """Both scenarios; the whole prompt only in other arithmetics than float32, whose errors add up in the cache.

    A fault that the whole prompt shows is not told again for the cut one.
    options: of the engines. Raises ConfigError for what the model refuses.
    """
    checks: list[Check] = []
    points: list[PointError] = []
    findings: list[Finding] = []
    scenarios = (("whole prompt", _whole_prompt), ("cut prompt", _cut_prompt))
    for name, run in scenarios if arithmetic == "float32" else scenarios[:1]:
        engine, traces = run(start, vocab_size, options)
        with Observer(engine) as observer:
            for ours in traces(observer):
                token = _token_text(engine)
                errors, found = find(name, observer, ours, reference, arithmetic, token, trust_cached=not findings)
                checks.append(_as_check(name, errors, len(ours.token_ids), ours.first_row))
                known = {finding.component for finding in findings}
                findings += [finding for finding in found if finding.component not in known]
                points += errors if not points or any(error.is_wrong for error in errors) else []
    return checks, points, findings


def _as_check(name: str, errors: list[PointError], num_tokens: int, num_cached: int) -> Check:
    wrong = [error for error in errors if error.is_wrong]
    worst = max(errors, key=lambda error: error.own / error.tolerance)
    detail = f"{len(errors)} points, {num_tokens} tokens, {num_cached} from the prefix cache; worst: {worst.point}"
    return Check("layers", name, FAIL if wrong else OK, f"own error {worst.own:.1e}", f"{worst.tolerance:.0e}", detail)


def _token_text(engine: LLMEngine) -> Callable[[int], str]:
    return lambda token_id: engine.decode([token_id], skip_special_tokens=False)


def _random_ids(vocab_size: int, *seeds: int) -> list[list[int]]:
    """SCENARIO_TOKENS ids for each seed, the same everywhere."""
    return [random.Random(seed).choices(range(4, vocab_size), k=SCENARIO_TOKENS) for seed in seeds]


def _whole_prompt(start: Start, vocab_size: int, options: dict[str, Any]) -> Any:
    engine = start(poison=True, **options)
    [prompt] = _random_ids(vocab_size, 1)
    return engine, lambda observer: [observer.run(prompt, DECODE_TOKENS)]


def _cut_prompt(start: Start, vocab_size: int, options: dict[str, Any]) -> Any:
    """A prompt whose first blocks are in the cache; the next ones are there, too, but behind another prefix. Then the
    pool is filled by others, and a prompt comes back whose blocks were given away."""
    settings = {
        "block_size": BLOCK,
        "max_num_batched_tokens": CHUNK,
        "num_gpu_blocks_override": 3 * SCENARIO_TOKENS // BLOCK,
    }
    engine = start(poison=True, **settings, **options)
    first, second, third, fourth = _random_ids(vocab_size, 1, 2, 3, 4)
    half = SCENARIO_TOKENS // 2

    def traces(observer: Observer) -> list[Trace]:
        observer.run(first)
        observer.run([*third[:half], *second[half:]])
        mixed = observer.run([*first[:half], *second[half:]], DECODE_TOKENS)
        for prompt in (third, fourth, second):
            observer.run(prompt)
        return [mixed, observer.run(first, DECODE_TOKENS)]

    return engine, traces
