"""Bodies of requests and errors, and the one policy for fields.

    JSON bytes ──parse_json──▶ dict ──parse──▶ a Body, and the names of fields that nobody knows

A field is implemented (a member of its Body), without effect (NO_OP_FIELDS), refused while it is set (REFUSED_FIELDS),
or unknown: then it is named in the header X-Minivllm-Ignored. Nothing is ignored silently. Pydantic checks the types;
ranges are SamplingParams' own. `field_states` is the same table for /v1/engine/capabilities.

Knows no engine and no flask. Called by every endpoint. Twin in vLLM:
vllm/entrypoints/openai/chat_completion/protocol.py, .../completion/protocol.py and .../engine/protocol.py.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from minivllm.errors import ClientError, InvalidRequestError, OverloadedError, show
from minivllm.sampling_params import SamplingParams

MAX_JSON_DEPTH = 128
MAX_PROMPTS = 256  # in one call
MAX_EMBEDDING_INPUTS = 2048  # as many as OpenAI takes and its clients send

# Accepted because clients send them; they change nothing in an answer.
NO_OP_FIELDS = frozenset(
    {"user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
    | {"safety_identifier", "prediction", "verbosity", "reasoning_effort", "request_id"}
    | {"guided_decoding_backend"}  # which library reads a grammar is no part of what it means
)
# Not built: 400 naming the field, unless it is off (null, false, or one of these values).
REFUSED_FIELDS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "functions": (),
        "function_call": ("none",),
        "guided_whitespace_pattern": (),
        "chat_template": (),
        "prompt_embeds": (),
        "suffix": ("",),
        "echo": (),
        "audio": (),
        "modalities": (["text"],),
        "web_search_options": (),
        "logprob_token_ids": (),
        "return_tokens_as_token_ids": (),
        "stream_interval": (1,),
        "thinking_token_budget": (),
        "repetition_detection": (),
        "dimensions": (),
    }
)

# Go into SamplingParams under their own name. Whether there is text is not the client's to say.
SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams)) - {
    "detokenize",
    *REFUSED_FIELDS,
}


class StreamOptions(BaseModel):
    """continuous_usage_stats: usage in every chunk, not only behind the last."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Body(BaseModel):
    """What every request may hold.

    refused: fields that other endpoints have and this one has not, as in REFUSED_FIELDS.
    instead: what such a field is called here.
    echoed: fields that come back in the answer and change nothing else.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})
    instead: ClassVar[Mapping[str, str]] = MappingProxyType({})
    echoed: ClassVar[frozenset[str]] = frozenset()
    model: str | None = None


class SamplingBody(Body):
    """How one answer is drawn, whichever endpoint is asked for it; null means the default."""

    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stream: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    # The form of the answer; output_format.py knows what is in these.
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class GenerationBody(SamplingBody):
    """What chat and completions share."""

    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None  # -1: as many as fit
    truncation_side: Literal["left", "right"] | None = None
    response_format: dict[str, Any] | None = None


class FunctionDefinition(BaseModel):
    """parameters: a JSON schema of an object; none: the function takes no argument. strict: always so, here."""

    model_config = ConfigDict(strict=True, extra="allow")
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """What a model may call. Further keys are the chat template's."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: Literal["function"]
    function: FunctionDefinition


class ChatRequest(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Any]
    max_completion_tokens: int | None = None  # the newer name; wins
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None


class TextConfig(BaseModel):
    """`text` of the Responses API. format: output_format.py knows what is in it. verbosity has no effect."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesStreamOptions(BaseModel):
    """Nothing is padded here. Usage is always in the last event."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(SamplingBody):
    """POST /v1/responses."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        dict.fromkeys(("background", "background_options", "conversation", "prompt", "context_management"), ())
        | dict.fromkeys(("moderation", "image", "access_programs", "messages", "max_tokens"), ())
        | dict.fromkeys(("max_completion_tokens", "response_format", "logprobs", "prompt_logprobs"), ())
        | dict.fromkeys(("return_token_ids", "continue_final_message", "use_beam_search", "documents"), ())
        | dict.fromkeys(("truncate_prompt_tokens", "truncation_side", "add_special_tokens", "echo"), ())
        | {"n": (1,), "best_of": (1,), "length_penalty": (1.0,), "add_generation_prompt": (True,)}
    )
    instead: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "messages": "input",
            "conversation": "previous_response_id",
            "max_tokens": "max_output_tokens",
            "max_completion_tokens": "max_output_tokens",
            "response_format": "text.format",
            "truncate_prompt_tokens": "truncation",
            "logprobs": 'include: ["message.output_text.logprobs"] and top_logprobs',
        }
    )
    echoed: ClassVar[frozenset[str]] = frozenset(
        {"metadata", "user", "service_tier", "reasoning", "max_tool_calls", "safety_identifier", "prompt_cache_key"}
    )

    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    service_tier: str | None = None
    reasoning: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def as_generation(self) -> GenerationBody:
        """How the answer is drawn, as the other endpoints have it."""
        shared = {name: getattr(self, name) for name in SamplingBody.model_fields}
        return GenerationBody(**shared, max_tokens=self.max_output_tokens)


class VectorBody(Body):
    """What embeddings and scores share. Vectors always have length 1; nobody else's are made."""

    priority: int | None = None
    cache_salt: str | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_activation: Literal[True] | None = None
    normalize: Literal[True] | None = None  # its older name


class EmbeddingRequest(VectorBody):
    """POST /v1/embeddings."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {"messages": (), "embed_dtype": ("float32",), "endianness": ("little",), "padding": ()}
    )
    instead: ClassVar[Mapping[str, str]] = MappingProxyType({"messages": "input"})

    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None  # base64: of little-endian float32
    dimensions: int | None = None


class ScoreRequest(VectorBody):
    """POST /v1/score: one pair of these, text_1 with text_2 and so on."""

    text_1: str | list[Any] | None = None
    text_2: str | list[Any] | None = None
    queries: str | list[Any] | None = None
    documents: str | list[Any] | None = None
    items: str | list[Any] | None = None
    data_1: str | list[Any] | None = None
    data_2: str | list[Any] | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages."""

    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: list[Any]


BODIES: Mapping[str, type[Body]] = MappingProxyType(
    {
        "/v1/chat/completions": ChatRequest,
        "/v1/completions": CompletionRequest,
        "/v1/responses": ResponsesRequest,
        "/v1/embeddings": EmbeddingRequest,
        "/v1/score": ScoreRequest,
        "/tokenize": TokenizeRequest,
        "/detokenize": DetokenizeRequest,
    }
)
AnyBody = TypeVar("AnyBody", bound=Body)


def field_states(kind: type[Body]) -> dict[str, str]:
    """Field -> implemented, no-op or refused. Every other field is ignored, and named in the answer's headers."""
    states = dict.fromkeys(sorted({*REFUSED_FIELDS, *kind.refused}), "refused")
    states |= dict.fromkeys(sorted(NO_OP_FIELDS), "no-op")
    return states | {name: "no-op" if name in kind.echoed else "implemented" for name in kind.model_fields}


# ------------------------------------------------------------------ requests
def parse(kind: type[AnyBody], fields: dict[str, Any]) -> tuple[AnyBody, list[str]]:
    """The body, and the names of the fields in it that nobody knows. Raises InvalidRequestError naming the field."""
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error) from None
    unknown = []
    refused = {**REFUSED_FIELDS, **kind.refused}
    for name, value in (body.model_extra or {}).items():
        if name in NO_OP_FIELDS or value is None:
            continue
        if name not in refused:
            unknown.append(name)
        elif value is not False and value not in refused[name]:
            advice = f"use {kind.instead[name]}" if name in kind.instead else "leave it out"
            raise InvalidRequestError(f"{name} is not supported here: {advice}.", parameter=name)
    return body, unknown


def _invalid(error: ValidationError) -> InvalidRequestError:
    """All complaints about the first bad field: one for each type that it might have had."""
    details = error.errors(include_url=False, include_context=False)
    name = str(details[0]["loc"][0])
    complaints = dict.fromkeys(detail["msg"] for detail in details if str(detail["loc"][0]) == name)
    if details[0]["type"] == "missing" and len(details[0]["loc"]) == 1:
        return InvalidRequestError(f"{name} is missing.", parameter=name)
    got = show(details[0]["input"], 100)
    return InvalidRequestError(f"{name}: {'; or: '.join(complaints)}. Got {got}.", parameter=name)


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object of finite numbers and real characters, nested at most MAX_JSON_DEPTH deep.

    Python's reader takes NaN, Infinity, 1e400, repeated keys and halves of surrogate pairs; none of them is meant.
    Raises InvalidRequestError.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_no_twins
        )
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body must be JSON in UTF-8: byte {error.start} is not.") from None
    except RecursionError:
        raise _too_deep() from None
    except ClientError:
        raise
    except ValueError as error:
        raise InvalidRequestError(f"The body must be JSON: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"The body must be a JSON object, got {type(value).__name__}.")
    for name, member in value.items():
        _check_tree(name, member)
    return value


def _no_constant(name: str) -> None:
    raise InvalidRequestError(f"The body must hold finite numbers, got {name}.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise InvalidRequestError(f"The body must hold finite numbers, got {text[:40]}.")
    return number


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twins = sorted(name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1)
        raise InvalidRequestError(f"The body holds {show(twins[0], 60)} twice: which one is meant?")
    return found


def _check_tree(parameter: str, value: Any) -> None:
    """Depth and characters of everything below one field, without recursion."""
    waiting = [(parameter, 1), (value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if depth >= MAX_JSON_DEPTH:
            raise _too_deep()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                name = parameter.encode("utf-8", "replace").decode("utf-8")
                raise InvalidRequestError(f"{name} holds half of a surrogate pair.", parameter=name) from None
        elif isinstance(item, dict):
            waiting += [(member, depth + 1) for pair in item.items() for member in pair]
        elif isinstance(item, list):
            waiting += [(member, depth + 1) for member in item if isinstance(member, str | list | dict)]


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"The body must be nested at most {MAX_JSON_DEPTH} deep.")


def prompts_of(value: str | list[Any], parameter: str, max_prompts: int = MAX_PROMPTS) -> list[Any]:
    """str, [str], [int] or [[int]] as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidRequestError(f"{parameter} must not be empty.", parameter=parameter)
    if all(type(item) is int for item in value):
        return [value]
    if len(value) > max_prompts:
        raise InvalidRequestError(
            f"{parameter} must hold at most {max_prompts} prompts, got {len(value)}.", parameter=parameter
        )
    if not all(isinstance(item, str | list) for item in value):
        raise InvalidRequestError(
            f"{parameter} must be text, token ids, or a list of either, got {show(value, 100)}.", parameter=parameter
        )
    return value


# ------------------------------------------------------------------ answers
def to_json(value: Any) -> bytes:
    """UTF-8, no NaN; half a character (bytes that are none) is escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


ERROR_TYPES: Mapping[int, str] = MappingProxyType(
    {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable"}
)


def error_type(status: int) -> str:
    return ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "internal_error")


def error_body(message: str, status: int, parameter: str | None = None, code: Any = None) -> dict[str, Any]:
    """The one error body. A server error's code is its status: clients read it in a stream, which began with 200."""
    code = status if code is None and status >= 500 else code
    return {"error": {"message": message, "type": error_type(status), "param": parameter, "code": code}}


def describe_error(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(status, body, headers) of an exception. What is not deliberate shows nothing of itself."""
    status = int(getattr(error, "status", 500))
    headers: dict[str, str] = {}
    if isinstance(error, OverloadedError):
        headers = {"Retry-After": f"{error.retry_after_seconds}", "Retry-After-Ms": f"{error.retry_after_seconds}000"}
    elif status == 503:
        headers = {"Retry-After": "5"}
    elif status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    if isinstance(error, ClientError):
        return status, error_body(error.message, status, error.parameter, error.code), headers
    message = str(error) if status == 503 else "The server failed to answer this request."
    return status, error_body(message, status), headers
