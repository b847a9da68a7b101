"""OpenAI batch files: one JSON request per line in, one JSON answer per line out, in the same order.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}

All good lines run together on the engine; a bad line is answered with an error in its place. A field that is not
understood is an error too, unless it is off (null, false): nothing is ignored silently. Nobody compares custom_ids:
two lines with the same one get an answer each.

Knows no HTTP and no file. Called by cli/batch.py. Twin in vLLM: vllm/entrypoints/openai/run_batch.py.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

from minivllm.engine.llm_engine import LLMEngine
from minivllm.entrypoints import logprobs
from minivllm.errors import InvalidRequestError, MiniVLLMError, ServerError
from minivllm.outputs import EmbeddingRequestOutput, RequestOutput
from minivllm.sampling_params import SamplingParams

Answer = dict[str, Any]

# Fields of the body that go into SamplingParams under the same name.
SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
# Fields with no effect on the answer, accepted because clients send them.
NO_OP_FIELDS = frozenset({"model", "user", "metadata", "store", "service_tier"})


@dataclasses.dataclass(slots=True)
class BatchRequest:
    """One understood line. `build` turns the finished output into the response body."""

    prompt: Any
    sampling_params: SamplingParams | None  # None: an embedding
    build: Callable[[Any], dict[str, Any]]


def run_batch_lines(
    engine: LLMEngine,
    lines: list[str],
    on_progress: Callable[[int, int], None],
    on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
) -> list[Answer]:
    """Answer every non-empty line; returns the answers in their order. Never raises for a bad line.

    on_progress: called with (answers, lines). on_answer: with each answer as soon as it is there, and its line's place.
    """
    answers: list[Answer] = []
    running: dict[str, tuple[int, BatchRequest]] = {}
    try:
        for line in (line for line in lines if line.strip()):
            answer: Answer = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": None, "response": None, "error": None}
            answers.append(answer)
            try:
                request_id, request = _queue(engine, line, answer)
                running[request_id] = (len(answers) - 1, request)
            except MiniVLLMError as error:
                _fail(answer, error)
                on_answer(len(answers) - 1, answer)
        on_progress(len(answers) - len(running), len(answers))
        while running:
            for output in engine.step():
                if output.finished and output.request_id in running:
                    index, request = running.pop(output.request_id)
                    _succeed(answers[index], request, output)
                    on_answer(index, answers[index])
                    on_progress(len(answers) - len(running), len(answers))
    finally:  # an interrupt must not leave requests behind
        for request_id in running:
            engine.abort_request(request_id)
    return answers


def _queue(engine: LLMEngine, line: str, answer: Answer) -> tuple[str, BatchRequest]:
    """Raises MiniVLLMError."""
    request = parse_line(engine, line, answer)
    options = {"embed": True} if request.sampling_params is None else {}
    return engine.add_request(request.prompt, request.sampling_params, **options), request


def parse_line(engine: LLMEngine, line: str, answer: Answer) -> BatchRequest:
    """Understand one line, noting its custom_id in the answer. Raises InvalidRequestError."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the line is not JSON: {error}") from None
    if not isinstance(item, dict):
        raise InvalidRequestError(f"the line must be a JSON object, got {type(item).__name__}.")
    custom_id = item.get("custom_id")
    answer["custom_id"] = custom_id if isinstance(custom_id, str) else None
    if not isinstance(custom_id, str) or not custom_id:
        raise InvalidRequestError(f"custom_id must be a non-empty string, got {custom_id!r}.", parameter="custom_id")
    if item.get("method", "POST") != "POST":
        raise InvalidRequestError(f"method must be POST, got {item['method']!r}.", parameter="method")
    body = item.get("body")
    if not isinstance(body, dict):
        raise InvalidRequestError("body must be a JSON object.", parameter="body")
    url = item.get("url")
    if not isinstance(url, str) or url not in ENDPOINTS:
        raise InvalidRequestError(f"url must be one of {', '.join(ENDPOINTS)}, got {url!r}.", parameter="url")
    return ENDPOINTS[url](engine, body)


def _chat(engine: LLMEngine, body: dict[str, Any]) -> BatchRequest:
    messages = _take(body, "messages", list)
    fields = {name: value for name, value in body.items() if name != "messages"}
    max_tokens = fields.pop("max_completion_tokens", None)  # the newer name wins
    fields["max_tokens"] = fields.get("max_tokens") if max_tokens is None else max_tokens
    fields["logprobs"] = _num_chat_logprobs(fields.pop("logprobs", None), fields.pop("top_logprobs", None))
    params = _sampling_params(engine, fields)
    prompt = engine.render_chat(messages)
    return BatchRequest(prompt, params, lambda output: _chat_body(engine, output, params.logprobs or 0))


def _num_chat_logprobs(wanted: Any, top_logprobs: Any) -> int | None:
    """Chat says in two fields what SamplingParams says in one."""
    if wanted is not None and not isinstance(wanted, bool):
        raise InvalidRequestError(f"logprobs must be true or false, got {wanted!r}.", parameter="logprobs")
    if wanted:
        return 0 if top_logprobs is None else top_logprobs
    if top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true.", parameter="top_logprobs")
    return None


def _completions(engine: LLMEngine, body: dict[str, Any]) -> BatchRequest:
    if "prompt" not in body:
        raise InvalidRequestError("prompt is missing.", parameter="prompt")
    fields = {name: value for name, value in body.items() if name != "prompt"}
    params = _sampling_params(engine, fields)
    prompt = body["prompt"] if isinstance(body["prompt"], str) else {"prompt_token_ids": body["prompt"]}
    return BatchRequest(prompt, params, lambda output: _completions_body(engine, output))


def _embeddings(engine: LLMEngine, body: dict[str, Any]) -> BatchRequest:
    _refuse_unknown(body, NO_OP_FIELDS | {"input", "encoding_format"})
    if body.get("encoding_format") not in (None, "float"):
        raise InvalidRequestError(
            f"encoding_format must be float, got {body['encoding_format']!r}.", parameter="encoding_format"
        )
    text = body.get("input")
    if not isinstance(text, str):
        raise InvalidRequestError("input must be one string per line in a batch file.", parameter="input")
    return BatchRequest(text, None, lambda output: _embeddings_body(engine, output))


ENDPOINTS: dict[str, Callable[[LLMEngine, dict[str, Any]], BatchRequest]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completions,
    "/v1/embeddings": _embeddings,
}


def _take(body: dict[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if not isinstance(value, kind) or not value:
        raise InvalidRequestError(f"{name} must be a non-empty {kind.__name__}, got {value!r}.", parameter=name)
    return value


def _refuse_unknown(fields: dict[str, Any], known: frozenset[str]) -> None:
    """Fields that are not understood; null and false have no effect in any of them."""
    names = sorted(name for name in fields.keys() - known if fields[name] is not None and fields[name] is not False)
    if names:
        raise InvalidRequestError(f"{', '.join(names)}: not supported in a batch file.", parameter=names[0])


def _sampling_params(engine: LLMEngine, fields: dict[str, Any]) -> SamplingParams:
    """The model's defaults with the body's fields on top; null means the default."""
    _refuse_unknown(fields, SAMPLING_FIELDS | NO_OP_FIELDS)
    given = {name: value for name, value in fields.items() if name in SAMPLING_FIELDS}
    if isinstance(given.get("logit_bias"), dict):
        try:
            given["logit_bias"] = {int(token_id): bias for token_id, bias in given["logit_bias"].items()}
        except ValueError:
            raise InvalidRequestError("logit_bias must be keyed by token ids.", parameter="logit_bias") from None
    explicit = {name: value for name, value in given.items() if value is not None or name == "max_tokens"}
    return dataclasses.replace(engine.default_sampling_params(), **explicit)


# ------------------------------------------------------------------ response bodies
def _usage(output: RequestOutput) -> dict[str, int]:
    num_completion_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    num_prompt_tokens = len(output.prompt_token_ids)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def _envelope(
    engine: LLMEngine, kind: str, prefix: str, choices: list[dict[str, Any]], output: RequestOutput
) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{output.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": engine.config.model.name,
        "choices": choices,
        "usage": _usage(output),
    }


def _chat_body(engine: LLMEngine, output: RequestOutput, num_top_logprobs: int) -> dict[str, Any]:
    choices = [
        {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": logprobs.chat_logprobs(
                engine.tokenizer, completion.token_ids, completion.logprobs, num_top_logprobs
            ),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        for completion in output.outputs
    ]
    return _envelope(engine, "chat.completion", "chatcmpl", choices, output)


def _completions_body(engine: LLMEngine, output: RequestOutput) -> dict[str, Any]:
    choices = [
        {
            "index": completion.index,
            "text": completion.text,
            "logprobs": logprobs.completion_logprobs(
                engine.tokenizer,
                completion.token_ids,
                None if completion.logprobs is None else list[logprobs.Position | None](completion.logprobs),
            ),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        for completion in output.outputs
    ]
    return _envelope(engine, "text_completion", "cmpl", choices, output)


def _embeddings_body(engine: LLMEngine, output: EmbeddingRequestOutput) -> dict[str, Any]:
    num_tokens = len(output.prompt_token_ids)
    return {
        "object": "list",
        "model": engine.config.model.name,
        "data": [{"object": "embedding", "index": 0, "embedding": output.outputs.embedding}],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _succeed(answer: Answer, request: BatchRequest, output: Any) -> None:
    if output.error is not None:
        _fail(answer, ServerError(output.error))
        return
    answer["response"] = {"status_code": 200, "request_id": output.request_id, "body": request.build(output)}


def _fail(answer: Answer, error: MiniVLLMError) -> None:
    """An error in the line's place, in the wire's form."""
    details = {
        "message": str(error),
        "type": type(error).__name__,
        "param": getattr(error, "parameter", None),
        "code": getattr(error, "code", None),
    }
    status = getattr(error, "status", 500)
    answer["response"] = {"status_code": status, "request_id": answer["id"], "body": {"error": details}}
    answer["error"] = details
