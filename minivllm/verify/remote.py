"""Any OpenAI server against transformers, or against another server: through echo, logprobs and greedy runs.

    verify_server(url, model)       the server against the checkpoint as transformers computes it
    diff_servers(url_a, url_b)      two servers; the first one stands for the truth

What can be asked of a server: the log-probabilities of a given prompt (echo), a greedy continuation, and the ids that a
text or a conversation becomes. A server that answers echo without the prompt's log-probabilities is said to, instead
of being compared by what it sent. Layers cannot be seen from outside; the first wrong position can.

Called by cli/verifying.py. Twin in vLLM: RemoteOpenAIServer of tests/utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch

from minivllm.engine.llm_engine import read_model_facts
from minivllm.engine.tokenizer import Tokenizer, load_tokenizer
from minivllm.openai_client import OpenAIClient, RemoteError
from minivllm.verify.behaviour import CHAT, TEXTS, chat_ids, prompts_of, verdict
from minivllm.verify.records import FAIL, NOT_RUN, OK, TIE, Check, Finding, Report
from minivllm.verify.reference import Reference
from minivllm.verify.verify import MAX_MODEL_LEN, MAX_TOKENS, Say, environment

Prompt = list[int] | str


class Limits(NamedTuple):
    """worst, mean: of |difference| of log-probabilities; gap: of the two best where a greedy choice is a tie."""

    worst: float
    mean: float
    gap: float


# By what the server computes in. The mean tells a rounded network from a wrong one; single tokens may be far off.
LIMITS: Mapping[str, Limits] = MappingProxyType(
    {
        "float32": Limits(1e-3, 1e-4, 1e-4),
        "bfloat16": Limits(math.inf, 0.1, 0.3),
        "int8": Limits(math.inf, 0.2, 0.5),
        "int4": Limits(math.inf, 0.6, 1.0),
    }
)


@dataclass(frozen=True)
class Score:
    """logprobs: of each prompt token, None for the first. None altogether: the server does not tell."""

    logprobs: list[float | None] | None
    tokens: list[str]


@dataclass(frozen=True)
class Run:
    """A greedy continuation. ids: None where the server does not tell them. gaps: of the two best at each position."""

    ids: list[int] | None
    tokens: list[str]
    gaps: list[float]


class Side(Protocol):
    """What is compared with a server."""

    name: str

    def score(self, prompt: Prompt) -> Score: ...

    def run(self, prompt: Prompt, max_tokens: int, guess: Run | None = None) -> Run: ...


# ------------------------------------------------------------------ the two kinds of sides
class Server:
    """A model on a server. Raises RemoteError from every method."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None):
        self.client = OpenAIClient(url, api_key)
        models = self.client.models()
        if not models:
            raise RemoteError(f"{self.client.url} serves no model.")
        self.model = model or models[0]
        self.name = f"{self.model} at {self.client.url}"

    def _complete(self, prompt: Prompt, **fields: Any) -> dict[str, Any]:
        """The first choice. Fields that are not OpenAI's are left out where the server refuses them."""
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "seed": 0, **fields}
        try:
            answer = self.client.ask("/completions", body)
        except RemoteError as error:
            further = {"ignore_eos", "return_token_ids"} & body.keys()
            if error.status not in (400, 422) or not further:
                raise
            answer = self.client.ask("/completions", {key: value for key, value in body.items() if key not in further})
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def score(self, prompt: Prompt) -> Score:
        choice = self._complete(prompt, max_tokens=1, echo=True, logprobs=1)
        found = choice.get("logprobs") or {}
        values, tokens = found.get("token_logprobs") or [], found.get("tokens") or []
        expected = len(prompt) + 1 if isinstance(prompt, list) else None
        if len(values) < 2 or (expected is not None and len(values) != expected) or values[0] is not None:
            return Score(None, tokens)
        return Score(values[:-1], tokens[:-1])

    def run(self, prompt: Prompt, max_tokens: int, guess: Run | None = None) -> Run:
        fields = {"ignore_eos": True, "return_token_ids": True}
        choice = self._complete(prompt, max_tokens=max_tokens, logprobs=2, **fields)
        found = choice.get("logprobs") or {}
        best = [sorted((step or {}).values(), reverse=True) for step in found.get("top_logprobs") or []]
        gaps = [step[0] - step[1] if len(step) > 1 else math.nan for step in best]
        return Run(choice.get("token_ids"), found.get("tokens") or [choice["text"]], gaps)

    def prompt_ids(self, text: str) -> tuple[list[int] | None, int | None]:
        """(ids that a text becomes, their number), as far as the server tells."""
        body = {"model": self.model, "prompt": text, "max_tokens": 1, "return_token_ids": True}
        return self._ids("/completions", body)

    def chat_ids(self, chat: Sequence[dict[str, str]]) -> tuple[list[int] | None, int | None]:
        """The same of a conversation."""
        body = {"model": self.model, "messages": list(chat), "max_tokens": 1, "return_token_ids": True}
        return self._ids("/chat/completions", body)

    def _ids(self, path: str, body: dict[str, Any]) -> tuple[list[int] | None, int | None]:
        try:
            answer = self.client.ask(path, body)
        except RemoteError as error:
            if error.status not in (400, 422):
                raise
            answer = self.client.ask(path, {key: value for key, value in body.items() if key != "return_token_ids"})
        ids = answer["choices"][0].get("prompt_token_ids") or answer.get("prompt_token_ids")
        return ids, (answer.get("usage") or {}).get("prompt_tokens")


class Local:
    """The checkpoint in transformers, with the same two questions. Prompts are token ids."""

    name = "transformers"

    def __init__(self, reference: Reference, tokenizer: Tokenizer | None):
        self.reference, self.tokenizer = reference, tokenizer

    def _text(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id) if self.tokenizer is not None else ""

    def score(self, prompt: Prompt) -> Score:
        ids = _ids_of(prompt)
        rows = torch.log_softmax(self.reference.logits(ids).double(), dim=-1)
        logprobs = [float(rows[position - 1, ids[position]]) for position in range(1, len(ids))]
        return Score([None, *logprobs], [self._text(token_id) for token_id in ids])

    def run(self, prompt: Prompt, max_tokens: int, guess: Run | None = None) -> Run:
        """Greedy. Where the other side's ids are known they are checked in one forward, up to the first wrong one."""
        ids, gaps = list(_ids_of(prompt)), list[float]()
        start = len(ids)
        guessed = list((guess.ids if guess is not None else None) or [])[:max_tokens]
        rows = self.reference.logits([*ids, *guessed])[start - 1 :]
        for index in range(max_tokens if not guessed else len(guessed)):
            row = rows[index] if guessed else self.reference.logits(ids)[-1]
            best = torch.log_softmax(row.double(), dim=-1).topk(2)
            gaps.append(float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
            if guessed and ids[-1] != guessed[index]:
                break
        return Run(ids[start:], [self._text(token_id) for token_id in ids[start:]], gaps)


def _ids_of(prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        raise TypeError("transformers' side takes token ids")
    return prompt


# ------------------------------------------------------------------ comparing
def compare_sides(
    truth: Side, server: Side, prompts: Sequence[Prompt], max_tokens: int, limits: Limits, report: Report
) -> None:
    """Log-probabilities of every prompt, then greedy runs. Adds to the report."""
    _compare_scores(truth, server, prompts, limits, report)
    for index, prompt in enumerate(prompts):
        found = server.run(prompt, max_tokens)
        status, words = _compare_runs(truth.run(prompt, max_tokens, found), found, limits)
        value, _, detail = words.partition(", then ")
        report.checks.append(Check("greedy", f"prompt {index}", status, value, f"{max_tokens} equal tokens", detail))


def _compare_scores(truth: Side, server: Side, prompts: Sequence[Prompt], limits: Limits, report: Report) -> None:
    differences: list[float] = []
    for index, prompt in enumerate(prompts):
        expected, found = truth.score(prompt), server.score(prompt)
        for side, score in ((truth, expected), (server, found)):
            if score.logprobs is None:
                detail = f"{side.name} answers echo with logprobs, but not with one for each prompt token"
                report.checks.append(Check("prompt logprobs", f"prompt {index}", NOT_RUN, detail=detail))
        if expected.logprobs is None or found.logprobs is None:
            continue
        if len(expected.logprobs) != len(found.logprobs):
            value = f"{len(found.logprobs)} tokens, not {len(expected.logprobs)}"
            report.checks.append(Check("tokenizer", f"tokens of prompt {index}", FAIL, value))
            continue
        pairs = [(a, b) for a, b in zip(expected.logprobs, found.logprobs, strict=True) if a is not None]
        if not pairs:  # a single token has no log-probability
            continue
        deltas = [abs(a - b) if b is not None and math.isfinite(b) else math.inf for a, b in pairs]
        report.logprobs += [(a, math.nan if b is None else b) for a, b in pairs]
        differences += deltas
        worst, mean = max(deltas), sum(deltas) / len(deltas)
        passed = worst <= limits.worst and mean <= limits.mean
        value, limit = f"worst {worst:.1e}, mean {mean:.1e}", f"{limits.worst:.0e}, {limits.mean:.0e}"
        report.checks.append(Check("prompt logprobs", f"prompt {index}", verdict(passed), value, limit))
        if not passed and not report.findings:
            report.findings.append(_first_difference(index, prompt, expected, deltas, limits))


def _first_difference(index: int, prompt: Prompt, expected: Score, deltas: list[float], limits: Limits) -> Finding:
    """Where a prompt's log-probabilities part, and what that pattern is usually due to."""
    bound = max(limits.mean, 1e-12) * (1 if math.isfinite(limits.worst) else 3)
    wrong = [position for position, delta in enumerate(deltas, start=1) if not delta <= bound]
    first = wrong[0] if wrong else 1
    if first <= 2:
        kind = "different from the start"
        evidence = "Already the first tokens differ: weights, embedding, norms, or another model or tokenizer."
    else:
        kind = "different from some position on"
        evidence = f"The first {first} tokens agree: rotary positions, window, block or chunk borders."
    evidence += f" {len(wrong)} of {len(deltas)} log-probabilities are off."
    token_id = prompt[first] if isinstance(prompt, list) else -1
    return Finding(f"prompt {index}", kind, "log-probabilities", [], first, token_id, expected.tokens[first], evidence)


def _compare_runs(expected: Run, found: Run, limits: Limits) -> tuple[str, str]:
    """(status, words), by ids where both sides tell them, else by the tokens' texts."""
    by_ids = expected.ids is not None and found.ids is not None
    right: Sequence[Any] = (expected.ids if by_ids else expected.tokens) or []
    ours: Sequence[Any] = (found.ids if by_ids else found.tokens) or []
    for index, (a, b) in enumerate(zip(right, ours, strict=False)):
        if a != b:
            gap = expected.gaps[index] if index < len(expected.gaps) else math.nan
            words = f"{index} equal tokens, then {b!r} instead of {a!r} (gap of the two best {gap:.1e})"
            return (TIE if gap <= limits.gap else FAIL), words
    return (OK if ours else FAIL), f"{min(len(right), len(ours))} equal tokens"


# ------------------------------------------------------------------ the two commands
def verify_server(
    url: str, model: str | Path | None = None, *, api_key: str | None = None, server_dtype: str = "float32",
    max_tokens: int = MAX_TOKENS, say: Say = lambda text: None,
) -> Report:  # fmt: skip
    """Compare a server with a checkpoint. model: as LLM's; the server is asked for the first model that it lists.

    server_dtype: what the server computes in, a name of LIMITS.
    Raises RemoteError, ModelNotFoundError, ConfigError.
    """
    server = Server(url, api_key)
    facts = read_model_facts(model)
    say("loading the model into transformers")
    reference = Reference.load(facts.source, facts.hf_config)
    tokenizer = load_tokenizer(facts.source)
    report = Report(f"{server.name} against transformers", environment(reference.weights_by))
    say("tokenizer")
    if tokenizer is not None:
        report.checks += _check_ids(server, tokenizer)
    say("log-probabilities and greedy runs")
    room = min(MAX_MODEL_LEN, facts.model_config.max_model_len) // 2
    prompts = prompts_of(tokenizer, facts.model_config.vocab_size, room)
    compare_sides(Local(reference, tokenizer), server, prompts, max_tokens, LIMITS[server_dtype], report)
    return report


def _check_ids(server: Server, tokenizer: Tokenizer) -> list[Check]:
    """Ids of texts and of a conversation; where the server tells no ids, how many there are."""
    asked = [(f"text {text!r}", tokenizer.encode(text), server.prompt_ids(text)) for text in TEXTS]
    if tokenizer.chat_template:
        asked.append(("chat template", chat_ids(tokenizer, CHAT[0]), server.chat_ids(CHAT[0])))
    checks = []
    for name, expected, (ids, count) in asked:
        if ids is not None:
            checks.append(Check("tokenizer", name, verdict(ids == expected), f"{len(ids)} ids", f"{len(expected)} ids"))
        elif count is not None:
            value = f"{count} tokens by usage"
            checks.append(Check("tokenizer", name, verdict(count == len(expected)), value, f"{len(expected)}"))
        else:
            checks.append(Check("tokenizer", name, NOT_RUN, detail="the server tells neither ids nor usage"))
    return checks


def diff_servers(
    url_a: str, url_b: str, *, api_key: str | None = None, server_dtype: str = "float32",
    max_tokens: int = MAX_TOKENS, say: Say = lambda text: None,
) -> Report:  # fmt: skip
    """Compare two servers on the same texts; the first one's answers count as right. Raises RemoteError."""
    first, second = Server(url_a, api_key), Server(url_b, api_key)
    report = Report(f"{second.name} against {first.name}", environment())
    say("log-probabilities and greedy runs")
    compare_sides(first, second, TEXTS, max_tokens, LIMITS[server_dtype], report)
    return report
