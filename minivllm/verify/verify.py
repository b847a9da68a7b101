"""The whole comparison of one model with transformers, part after part, into one Report.

Called by cli/verifying.py, tests and notebooks. Twin in vLLM: none; its tests compare outputs, and say not where.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from minivllm.engine.llm_engine import read_model_facts
from minivllm.errors import ConfigError
from minivllm.verify.behaviour import check_answers, check_sampler, check_tokenizer, prompts_of
from minivllm.verify.engines import Engines
from minivllm.verify.invariance import check_arithmetics, check_invariance
from minivllm.verify.localise import check_layers
from minivllm.verify.records import FAIL, Check, Report
from minivllm.verify.reference import Reference
from minivllm.version import __version__

MAX_MODEL_LEN = 256  # enough for every prompt here
MAX_TOKENS = 24
Say = Callable[[str], None]


def verify_model(
    model: str | Path | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    invariance: bool = True,
    say: Say = lambda text: None,
) -> Report:
    """Compare the engine with transformers on one model, both in float32 on the CPU.

    model: as LLM's. max_tokens: of a greedy run. invariance: also the table of what must not change an answer.
    say: told what is being done, part by part.
    Raises ModelNotFoundError, and ConfigError for a model that gives vectors instead of text.
    """
    facts = read_model_facts(model)
    if facts.model_config.is_pooling:
        raise ConfigError(f"{facts.model_config.name} is an embedding model: verify compares text.", parameter="model")
    say("loading the model into transformers")
    reference = Reference.load(facts.source, facts.hf_config)
    say("loading the model into the engine")
    engines = Engines(facts.source.path, min(MAX_MODEL_LEN, facts.model_config.max_model_len))
    vocab_size = facts.model_config.vocab_size
    report = Report(f"{facts.model_config.name} against transformers", environment(reference.weights_by))
    engine = engines.start()

    say("layers")
    checks, report.points, report.findings = check_layers(engines.start, reference, vocab_size)
    report.checks += checks
    say("tokenizer")
    report.checks += check_tokenizer(engine, facts.source)
    say("next tokens, greedy runs, prompt logprobs")
    prompts = prompts_of(engine.tokenizer, vocab_size, facts.model_config.max_model_len // 2)
    report.checks += _guarded("answers", lambda: _answers(report, engines, reference, prompts, max_tokens))
    say("sampler")
    report.checks += check_sampler(reference, prompts[-1])
    if invariance:
        say("invariances")
        report.checks += _guarded("invariance", lambda: check_invariance(engines, prompts, max_tokens))
        say("other arithmetics")
        arithmetics, findings = check_arithmetics(engines, reference, vocab_size)
        report.checks += arithmetics
        known = {(finding.kind, finding.component) for finding in report.findings}
        report.findings += [finding for finding in findings if (finding.kind, finding.component) not in known]
    return report


def _answers(report: Report, engines: Engines, reference: Reference, prompts: Any, max_tokens: int) -> list[Check]:
    checks, report.logprobs = check_answers(engines.start(), reference, prompts, max_tokens)
    return checks


def _guarded(section: str, run: Callable[[], list[Check]]) -> list[Check]:
    """An engine that fails a request (NaN) is a failed check; the layers say why."""
    try:
        return run()
    except RuntimeError as error:
        return [Check(section, "requests", FAIL, detail=str(error))]


def environment(weights_by: str = "") -> dict[str, str]:
    """What decides the numbers."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    facts = {"minivllm": __version__, **versions, "python": platform.python_version(), "cpu": _cpu()}
    facts |= {"threads": str(torch.get_num_threads()), "arithmetic": "float32, eager attention"}
    return facts | ({"weights read by": weights_by} if weights_by else {})


def _cpu() -> str:
    """Instructions that change the order of sums."""
    return str(torch.backends.cpu.get_cpu_capability())
