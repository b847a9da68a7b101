"""SamplingParams: what a caller may ask of the sampler, validated once, here.

Every bound of `design` is in LIMITS; an error names the parameter, what was expected and what came.
This module knows no tokenizer and no model: token ids are checked against the vocabulary by
engine/input_processor.py. Called by llm.py, cli/ and the HTTP layer.
Twin in vLLM: vllm/sampling_params.py (same fields, same defaults; best_of is kept here).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
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
MAX_GRAMMAR_BYTES = 64 * 1024  # of a JSON schema, a grammar, or all choices together
MAX_SCHEMA_DEPTH = 64
MAX_ENUM_VALUES = 1000  # also of choices
MAX_REGEX_BYTES = 2048
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


def _text_bytes(name: str, value: Any, max_bytes: int) -> str:
    """A non-empty string of at most max_bytes in UTF-8."""
    expected = f"a non-empty string of at most {max_bytes} bytes"
    if not isinstance(value, str) or not value or len(value) > max_bytes:
        raise _refuse_grammar(name, expected, value)
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise _refuse_grammar(name, "valid Unicode (it holds half a surrogate pair)", value) from None
    if num_bytes > max_bytes:
        raise _refuse_grammar(name, expected, value)
    return value


def _refuse_grammar(name: str, expected: str, got: Any) -> InvalidRequestError:
    message = f"structured_outputs.{name} must be {expected}, got {show(got)}."
    return InvalidRequestError(message, parameter="structured_outputs")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


@dataclass(slots=True)
class StructuredOutputsParams:
    """What the output must look like: exactly one of the fields. Raises InvalidRequestError naming the field.

    json           a JSON schema, as text, dict or bool; the output is a JSON document that it accepts
    regex          the whole output matches it (anchors are tolerated; \\d and \\w are ASCII)
    choice         the output is one of these strings
    grammar        a context-free grammar: Lark, or GBNF/EBNF with a rule `root`
    json_object    True: any JSON object

    Limits are checked here; whether a schema, regex or grammar can be used at all is found by
    structured_output/, before the request is queued.
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        names = ("json", "regex", "choice", "grammar", "json_object")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                f"structured_outputs must have exactly one of {', '.join(names)}, got {', '.join(given) or 'none'}.",
                parameter="structured_outputs",
            )
        if self.json is not None:
            _check_schema(self.schema())
        elif self.regex is not None:
            _text_bytes("regex", self.regex, MAX_REGEX_BYTES)
            if "\0" in self.regex:
                raise _refuse_grammar("regex", "without NUL characters", self.regex)
        elif self.choice is not None:
            self._check_choice()
        elif self.grammar is not None:
            _text_bytes("grammar", self.grammar, MAX_GRAMMAR_BYTES)
        elif self.json_object is not True:
            raise _refuse_grammar("json_object", "True or absent", self.json_object)

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return next(name for name in self.__slots__ if getattr(self, name) is not None)

    def schema(self) -> dict[str, Any] | bool:
        """The JSON schema as an object, whatever form it was given in."""
        text = self.json
        if not isinstance(text, str):
            try:
                text = json.dumps(text, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise _refuse_grammar("json", f"made of JSON values ({error})", self.json) from None
        _text_bytes("json", text, MAX_GRAMMAR_BYTES)
        try:
            schema = json.loads(text, parse_constant=_no_constant)
        except RecursionError:
            raise _refuse_grammar("json", f"nested at most {MAX_SCHEMA_DEPTH} deep", text) from None
        except ValueError as error:
            raise _refuse_grammar("json", f"a JSON schema ({error})", text) from None
        if not isinstance(schema, dict | bool):
            raise _refuse_grammar("json", "a JSON schema: an object or a boolean", schema)
        return schema

    def _check_choice(self) -> None:
        choice = self.choice
        if not isinstance(choice, list | tuple) or not 1 <= len(choice) <= MAX_ENUM_VALUES:
            raise _refuse_grammar("choice", f"a list of 1 to {MAX_ENUM_VALUES} strings", choice)
        for item in choice:
            if not isinstance(item, str):
                raise _refuse_grammar("choice", "made of strings", item)
        _text_bytes("choice", "\n".join(["", *choice]), MAX_GRAMMAR_BYTES)
        self.choice = list(choice)


def _check_schema(schema: dict[str, Any] | bool) -> None:
    """Depth, length of enums, local references."""
    for value, depth in _containers(schema):
        if depth > MAX_SCHEMA_DEPTH:
            raise _refuse_grammar("json", f"nested at most {MAX_SCHEMA_DEPTH} deep", schema)
        if not isinstance(value, dict):
            continue
        enum, reference = value.get("enum"), value.get("$ref")
        if isinstance(enum, list) and len(enum) > MAX_ENUM_VALUES:
            raise _refuse_grammar("json", f"without enums of more than {MAX_ENUM_VALUES} values", enum)
        if isinstance(reference, str) and not reference.startswith("#"):
            raise _refuse_grammar("json", "without references to other documents ($ref must start with #)", reference)


def _containers(schema: Any) -> Iterator[tuple[Any, int]]:
    """Every object and array with its depth; 1 is the whole."""
    waiting = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        if children is not None:
            yield value, depth
            waiting.extend((child, depth + 1) for child in children)


@dataclass(frozen=True, slots=True)
class CallForm:
    """How one tool is called in an answer: `begin`, arguments that `schema` accepts, `end`.

    label: what an error calls the schema.
    """

    begin: str
    schema: dict[str, Any] | bool
    end: str = ""
    label: str = "tools"


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The form of a whole answer: [thinking] then text, or [text] opening call {separator call} closing.

    Made by the HTTP layer for tools and for models that think; no caller sends one. Marks may be special tokens.

    thinking       "none"; "begun": the prompt has opened it; "may": the answer may open it
    text           the form of an answer without a call; None: free text, which may also stand before calls
    allows_text    False: the answer must be a call
    trigger        the beginning of `opening` and `begin` that text cannot hold: from there on a call must follow
    only_at_start  calls begin the answer; text may hold the trigger later on
    keywords       arguments are written name=value, value in JSON, not as one JSON object
    """

    thinking: str = "none"
    think_marks: tuple[str, str] = ("<think>", "</think>")
    text: StructuredOutputsParams | None = None
    allows_text: bool = True
    calls: tuple[CallForm, ...] = ()
    opening: str = ""
    separator: str = ""
    closing: str = ""
    trigger: str = ""
    only_at_start: bool = False
    keywords: bool = False
    max_calls: int = 1

    @property
    def kind(self) -> str:
        return "answer"


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
    structured_outputs    what the output must look like; None = free text. It ends with eos also with ignore_eos,
                       and before min_tokens when nothing else may follow
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
    structured_outputs: StructuredOutputsParams | AnswerForm | None = None

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_distribution()
        self._check_stops()
        self._check_token_fields()
        _flags(self, "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | AnswerForm | None):
            raise _refuse("structured_outputs", "StructuredOutputsParams", self.structured_outputs)

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
