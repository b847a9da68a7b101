"""SamplingParams: what a caller may ask of the sampler, validated once, here.

Every bound of `design` is in LIMITS; an error names the parameter, what was expected and what came.
This module knows no tokenizer and no model: token ids are checked against the vocabulary by
engine/input_processor.py. Called by llm.py, cli.py and the HTTP layer.
Twin in vLLM: vllm/sampling_params.py (same fields, same defaults; best_of is kept here).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from minivllm.errors import InvalidRequestError, show

MAX_SEQUENCES = 64  # n, best_of and beam width
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 4
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORDS = 128
MAX_LOGIT_BIAS = 1024
LOGIT_BIAS_RANGE = 100.0
GREEDY_EPS = 1e-5  # a temperature below this is greedy
MIN_TEMPERATURE = 1e-2  # a sampling temperature below this is raised to it: logits/T must stay finite

_INT64 = 2**63


def _refuse(parameter: str, expected: str, got: Any) -> InvalidRequestError:
    return InvalidRequestError(f"{parameter} must be {expected}, got {show(got)}.", parameter=parameter)


def _number(parameter: str, value: Any, low: float, high: float, expected: str, *, low_open: bool = False) -> float:
    """A finite float in [low, high] (or (low, high] when low_open)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refuse(parameter, expected, value)
    try:
        number = float(value)
    except OverflowError:
        raise _refuse(parameter, expected, value) from None
    if not math.isfinite(number) or not low <= number <= high or (low_open and number == low):
        raise _refuse(parameter, expected, value)
    return number


def _integer(parameter: str, value: Any, low: int, high: int, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _refuse(parameter, expected, value)
    return value


def _flags(params: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(params, name), bool):
            raise _refuse(name, "True or False", getattr(params, name))


def _strings(parameter: str, value: Any, max_items: int, max_chars: int) -> list[str]:
    items = [value] if isinstance(value, str) else value
    if items is None:
        return []
    if not isinstance(items, list | tuple) or len(items) > max_items:
        raise _refuse(parameter, f"a string or a list of at most {max_items} strings", value)
    for item in items:
        if not isinstance(item, str) or not item or len(item) > max_chars:
            raise _refuse(parameter, f"made of non-empty strings of at most {max_chars} characters", item)
    return list(items)


def _token_ids(parameter: str, value: Any, max_items: int | None) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list | tuple | set | frozenset) or (max_items is not None and len(value) > max_items):
        limit = f" of at most {max_items}" if max_items is not None else ""
        raise _refuse(parameter, f"a list{limit} token ids", value)
    for item in value:
        _integer(parameter, item, 0, 2**31 - 1, "made of non-negative token ids")
    return list(value)


@dataclass(slots=True)
class SamplingParams:
    """How to turn logits into tokens and when to stop. Raises InvalidRequestError naming the bad field.

    n / best_of        return n of best_of candidates, the ones with the highest cumulative logprob
    temperature        [0, 2]; below 1e-5 is greedy, and then top_p, top_k and min_p have no effect
    top_p, top_k, min_p   (0, 1]; 0 or -1 = off, else >= 1; [0, 1]
    seed               int64; None or -1 draws one from the engine's own seed
    max_tokens         None = as many as fit the context
    logprobs           None, or the number of alternatives beside the sampled token (0..20)
    prompt_logprobs    None, or the same for each prompt token; the prefix cache is then not read
    logit_bias         {token id: added to its logit}, clamped to [-100, 100]
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] | str | None = field(default_factory=list)
    stop_token_ids: list[int] | None = field(default_factory=list)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = field(default_factory=list)

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_distribution()
        self._check_stops()
        self._check_token_fields()
        _flags(self, "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens")

    def _check_counts(self) -> None:
        _integer("n", self.n, 1, MAX_SEQUENCES, f"an integer in [1, {MAX_SEQUENCES}]")
        if self.best_of is not None:
            expected = f"an integer in [n, {MAX_SEQUENCES}]"
            _integer("best_of", self.best_of, self.n, MAX_SEQUENCES, expected)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1, "at least 1")
        limit = 2**31 - 1 if self.max_tokens is None else self.max_tokens
        _integer("min_tokens", self.min_tokens, 0, limit, "an integer in [0, max_tokens]")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, 0, MAX_LOGPROBS, f"an integer in [0, {MAX_LOGPROBS}]")
        if self.seed is not None:
            _integer("seed", self.seed, -_INT64, _INT64 - 1, "a 64-bit integer")
            self.seed = None if self.seed == -1 else self.seed

    def _check_distribution(self) -> None:
        self.temperature = _number("temperature", self.temperature, 0.0, 2.0, "a number in [0, 2]")
        if GREEDY_EPS <= self.temperature < MIN_TEMPERATURE:
            self.temperature = MIN_TEMPERATURE
        self.top_p = _number("top_p", self.top_p, 0.0, 1.0, "a number in (0, 1]", low_open=True)
        self.top_k = _integer("top_k", self.top_k, -1, 2**31 - 1, "0 or -1 (off), or at least 1")
        self.top_k = max(self.top_k, 0)
        self.min_p = _number("min_p", self.min_p, 0.0, 1.0, "a number in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            setattr(self, name, _number(name, getattr(self, name), -2.0, 2.0, "a number in [-2, 2]"))
        self.repetition_penalty = _number(
            "repetition_penalty", self.repetition_penalty, 0.0, 10.0, "a number in (0, 10]", low_open=True
        )
        if self.is_greedy:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
            if self.num_candidates > 1:
                name = "n" if self.n > 1 else "best_of"
                raise _refuse(name, "1 with temperature 0 (all candidates would be equal)", self.num_candidates)

    def _check_stops(self) -> None:
        self.stop = _strings("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS)
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        self.bad_words = _strings("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_STOP_STRING_CHARS)
        _flags(self, "detokenize")
        if self.stop and not self.detokenize:
            raise _refuse("stop", "empty when detokenize is False", self.stop)

    def _check_token_fields(self) -> None:
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids, None)
            if not self.allowed_token_ids:
                raise _refuse("allowed_token_ids", "a non-empty list of token ids", [])
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, dict) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise _refuse("logit_bias", f"a map of at most {MAX_LOGIT_BIAS} token ids to numbers", self.logit_bias)
        clamped: dict[int, float] = {}
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, 0, 2**31 - 1, "keyed by non-negative token ids")
            value = _number("logit_bias", bias, -math.inf, math.inf, "a map to finite numbers")
            clamped[token_id] = min(max(value, -LOGIT_BIAS_RANGE), LOGIT_BIAS_RANGE)
        self.logit_bias = clamped or None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPS

    @property
    def num_candidates(self) -> int:
        """How many sequences are generated for the prompt: best_of, or n."""
        return self.best_of or self.n

    @property
    def uses_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(slots=True)
class BeamSearchParams:
    """Beam search over the engine: `beam_width` beams of at most `max_tokens` tokens.

    A beam's score is cumulative_logprob / length ** length_penalty, where the length counts the prompt too
    (vLLM's rule; transformers counts generated tokens only).
    """

    beam_width: int
    max_tokens: int = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _integer("beam_width", self.beam_width, 1, MAX_SEQUENCES, f"an integer in [1, {MAX_SEQUENCES}]")
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1, "at least 1")
        self.length_penalty = _number("length_penalty", self.length_penalty, -10.0, 10.0, "a number in [-10, 10]")
        _flags(self, "ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
