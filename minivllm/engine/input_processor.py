"""From what a caller sends to what the core runs: prompt or chat to token ids, and every check that needs the
tokenizer, the vocabulary or the context length.

    "text" | {"prompt": text} | {"prompt_token_ids": ids} | ids   + SamplingParams  ──▶  EngineCoreRequest
    messages ──▶ normalize_messages ──▶ chat template ──▶ {"prompt", "prompt_token_ids"}

Every refusal is a ClientError that names the parameter, and comes before the request exists anywhere. Token ids are
compared with the logits width, which may be more or less than the tokenizer's length: an id that no token has but
the model computes is allowed. Text is refused by its number of characters before it is tokenised.

Knows no HTTP and no scheduler; safe to use from several threads. Called by llm_engine.py in the caller's thread.
Twin in vLLM: vllm/v1/engine/input_processor.py and vllm/entrypoints/chat_utils.py.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minivllm.engine.tokenizer import TemplateTraits, Tokenizer
from minivllm.errors import ConfigError, ContextLengthError, InvalidRequestError
from minivllm.sampling_params import SamplingParams
from minivllm.structured_output.grammar import CompiledGrammar

MAX_BAD_WORDS_TOKENS = 1024  # all bad words together
MAX_CACHE_SALT_CHARS = 128
MAX_MESSAGES = 2048
MAX_TOOLS = 128
MAX_REQUEST_ID_CHARS = 256
MAX_TRUNCATED_CHARS = 2**20  # of a text that may be cut, which is tokenised whole: where to cut is not known before
_INT64 = 2**63

PromptType = str | list[int] | dict[str, Any]
Message = dict[str, Any]

# generation_config.json name -> SamplingParams field
GENERATION_CONFIG_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(slots=True)
class EngineCoreRequest:
    """A checked request. One object per caller's request; output_processor.py fans it out for n > 1.

    sampling_params is the engine's own copy with max_tokens resolved; None: a pooling request.
    """

    request_id: str
    prompt: str | None  # None: token ids were sent, or the text was cut
    prompt_token_ids: list[int]
    sampling_params: SamplingParams | None
    eos_token_ids: frozenset[int] = frozenset()  # end the output silently; empty with ignore_eos
    stop_token_ids: frozenset[int] = frozenset()  # eos_token_ids and the caller's own: masked below min_tokens
    bad_words_token_ids: list[list[int]] = field(default_factory=list)
    cache_salt: str | None = None
    priority: int = 0
    seed: int = 0
    arrival_time: float = 0.0  # seconds, of the engine's clock
    max_tokens: int = 0  # output limit: what was asked for, or the room that the prompt leaves
    max_tokens_clamped: bool = False  # more was asked for than there is room
    truncated_to: int | None = None  # tokens of a prompt that had more of them, and was to be cut
    prompt_index: int = 0  # which of the prompts that came in one call: hooks may be for some of them
    grammar: CompiledGrammar | None = None  # of sampling_params.structured_outputs; set by llm_engine.py


@dataclass(frozen=True, slots=True)
class Truncation:
    """Keep at most max_tokens of a prompt; `side` is what is cut off, left or right."""

    max_tokens: int
    side: str


class InputProcessor:
    """Checks and tokenises requests for one model.

    Args:
        tokenizer: None: only token ids are accepted.
        vocab_size: width of the logits; token ids are in [0, vocab_size).
        max_model_len: tokens of prompt and output together.
        eos_token_ids: the tokenizer's and generation_config's.
        generation_config: the model's generation_config.json, {} when it has none.
        num_blocks, block_size: of the pool; a request that could never fit is refused. None: not checked.
        seed: requests without a seed get one from a generator that starts here.
        clock: seconds, for arrival_time.

    Raises ConfigError: generation_config holds a value that SamplingParams refuses.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        generation_config: Mapping[str, Any] | None = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._clock = clock
        self._random = random.Random(seed)
        self._generation_defaults = _generation_defaults(generation_config or {})
        self.default_sampling_params()  # a bad generation_config must be found at start-up

    # ------------------------------------------------------------------ requests
    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """SamplingParams with the model's own defaults; `overrides` are the caller's values and win."""
        try:
            defaults = SamplingParams(**self._generation_defaults)
        except InvalidRequestError as error:
            raise ConfigError(f"generation_config.json: {error.message}", parameter="generation_config") from error
        return SamplingParams(**{**self._generation_defaults, **overrides}) if overrides else defaults

    def process(
        self,
        request_id: str,
        prompt: PromptType,
        sampling_params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        arrival_time: float | None = None,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
        truncation_side: str | None = None,
    ) -> EngineCoreRequest:
        """Check a request for generated text. sampling_params None: the model's defaults.

        A dict prompt may bring its own cache_salt. max_tokens None means the room left, and more than the room is
        lowered to it (max_tokens_clamped says so). A longer prompt than truncate_prompt_tokens keeps its end
        (truncation_side "right": its beginning); -1 is the longest one that leaves room for a token of output.
        Raises InvalidRequestError, ContextLengthError.
        """
        if sampling_params is not None and not isinstance(sampling_params, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params must be SamplingParams, got {type(sampling_params).__name__}.",
                parameter="sampling_params",
            )
        cut = self._truncation(truncate_prompt_tokens, truncation_side, self.max_model_len - 1, "left")
        text, prompt_token_ids, own_salt, was_cut = self._parse_prompt(prompt, add_special_tokens, cut)
        self._check_length(len(prompt_token_ids), self.max_model_len - 1)
        params = _own_copy(sampling_params) if sampling_params is not None else self.default_sampling_params()
        max_tokens, clamped = self._resolve_max_tokens(len(prompt_token_ids), params)
        params.max_tokens = max_tokens
        self._check_sampling_params(params)
        eos_token_ids = frozenset() if params.ignore_eos else self.eos_token_ids
        return EngineCoreRequest(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=prompt_token_ids,
            sampling_params=params,
            eos_token_ids=eos_token_ids,
            stop_token_ids=eos_token_ids | frozenset(params.stop_token_ids or ()),
            bad_words_token_ids=self._bad_words_token_ids(params.bad_words or ()),
            cache_salt=_check_cache_salt(cache_salt if cache_salt is not None else own_salt),
            priority=_check_priority(priority),
            seed=params.seed if params.seed is not None else self._random.getrandbits(63),
            arrival_time=self._clock() if arrival_time is None else arrival_time,
            max_tokens=max_tokens,
            max_tokens_clamped=clamped,
            truncated_to=len(prompt_token_ids) if was_cut else None,
        )

    def process_pooling(
        self,
        request_id: str,
        prompt: PromptType,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        arrival_time: float | None = None,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
        truncation_side: str | None = None,
    ) -> EngineCoreRequest:
        """Check a request for an embedding: the whole context is there for the prompt.

        A longer prompt than truncate_prompt_tokens keeps its beginning (truncation_side "left": its end).
        """
        cut = self._truncation(truncate_prompt_tokens, truncation_side, self.max_model_len, "right")
        text, prompt_token_ids, own_salt, was_cut = self._parse_prompt(prompt, add_special_tokens, cut)
        self._check_length(len(prompt_token_ids), self.max_model_len)
        if self.num_blocks is not None:
            check_fits_pool(len(prompt_token_ids), 0, self.num_blocks, self.block_size)
        return EngineCoreRequest(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=prompt_token_ids,
            sampling_params=None,
            cache_salt=_check_cache_salt(cache_salt if cache_salt is not None else own_salt),
            priority=_check_priority(priority),
            arrival_time=self._clock() if arrival_time is None else arrival_time,
            truncated_to=len(prompt_token_ids) if was_cut else None,
        )

    # ------------------------------------------------------------------ prompts
    def tokenize_prompt(self, prompt: PromptType, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt in any of its forms, checked against the vocabulary and max_model_len - 1."""
        _, prompt_token_ids, _, _ = self._parse_prompt(prompt, add_special_tokens)
        self._check_length(len(prompt_token_ids), self.max_model_len - 1)
        return prompt_token_ids

    def _parse_prompt(
        self, prompt: PromptType, add_special_tokens: bool, cut: Truncation | None = None
    ) -> tuple[str | None, list[int], str | None, bool]:
        """(text, token ids, cache_salt, whether it was cut) of one prompt; token ids win where both are given.

        A prompt that was cut has no text: the whole one is not what the model sees.
        """
        salt: str | None = None
        text: Any = None
        token_ids: Any = None
        if isinstance(prompt, str):
            text = prompt
        elif isinstance(prompt, dict):
            unknown = sorted(str(key) for key in prompt.keys() - {"prompt", "prompt_token_ids", "cache_salt"})
            if unknown:
                raise InvalidRequestError(
                    f"A prompt may have prompt, prompt_token_ids and cache_salt, got {', '.join(unknown)[:100]}.",
                    parameter="prompt",
                )
            text, token_ids, salt = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt")
        else:
            token_ids = prompt
        if not isinstance(text, str) and not (text is None and token_ids is not None):
            got = "neither" if text is None else type(text).__name__
            raise InvalidRequestError(f"A prompt must be text or token ids, got {got}.", parameter="prompt")
        if token_ids is not None:
            name = "prompt_token_ids" if isinstance(prompt, dict) else "prompt"
            token_ids = self.check_token_ids(token_ids, name)
            was_cut = cut is not None and len(token_ids) > cut.max_tokens
            if cut is not None and was_cut:
                token_ids = token_ids[: cut.max_tokens] if cut.side == "right" else token_ids[-cut.max_tokens :]
        elif cut is not None:
            token_ids, was_cut = self._encode_cut(text or "", add_special_tokens, cut)
        else:
            token_ids, was_cut = self.encode_text(text or "", add_special_tokens), False
        return None if was_cut else text, token_ids, salt, was_cut

    def encode_text(
        self, text: str, add_special_tokens: bool = True, parameter: str = "prompt", *, may_be_cut: bool = False
    ) -> list[int]:
        """Token ids of a text that may fit; refused by its length in characters before it is tokenised.

        may_be_cut: the caller will cut what is too much, so that the text may be longer than the context.
        Raises InvalidRequestError (no tokenizer, empty, not Unicode), ContextLengthError.
        """
        tokenizer = self._check_text(text, parameter, may_be_cut)
        return self._check_encoded(tokenizer.encode(text, add_special_tokens=add_special_tokens), parameter)

    def _encode_cut(self, text: str, add_special_tokens: bool, cut: Truncation) -> tuple[list[int], bool]:
        """As encode_text, cut to what is wanted; and whether there was more."""
        tokenizer = self._check_text(text, "prompt", may_be_cut=True)
        least = tokenizer.num_special_tokens + 1 if add_special_tokens else 1
        if cut.max_tokens < least:
            raise InvalidRequestError(
                f"truncate_prompt_tokens must be at least {least}: this model puts {least - 1} tokens around every "
                f"text, got {cut.max_tokens}.",
                parameter="truncate_prompt_tokens",
            )
        token_ids, was_cut = tokenizer.encode_cut(text, cut.max_tokens, cut.side, add_special_tokens)
        return self._check_encoded(token_ids, "prompt"), was_cut

    def _check_text(self, text: str, parameter: str, may_be_cut: bool) -> Tokenizer:
        """Everything that can be refused before a text is tokenised. Returns what can tokenise it."""
        if self.tokenizer is None:
            raise InvalidRequestError(
                "This model has no tokenizer: send prompt_token_ids instead of text.", parameter=parameter
            )
        if not text:
            raise InvalidRequestError("prompt must not be empty.", parameter=parameter)
        max_chars = self.tokenizer.max_chars_per_token * self.max_model_len
        if may_be_cut:
            max_chars = max(max_chars, MAX_TRUNCATED_CHARS)
        if len(text) > max_chars:
            raise ContextLengthError(
                f"The prompt has {len(text)} characters, which cannot fit this model's context of {self.max_model_len} "
                f"tokens of at most {self.tokenizer.max_chars_per_token} characters: send at most {max_chars}.",
                parameter=parameter,
            )
        _check_unicode(text, parameter)
        return self.tokenizer

    def _check_encoded(self, token_ids: list[int], parameter: str) -> list[int]:
        if not token_ids:  # characters that the vocabulary does not have may vanish
            raise InvalidRequestError("prompt has no token: the model cannot see any of it.", parameter=parameter)
        return self.check_token_ids(token_ids, parameter)

    def check_token_ids(self, token_ids: Any, parameter: str, *, allow_empty: bool = False) -> list[int]:
        """A list of ints in [0, vocab_size), as a new list."""
        if not isinstance(token_ids, list | tuple):
            expected = "text or a list of token ids" if parameter == "prompt" else "a list of token ids"
            raise InvalidRequestError(
                f"{parameter} must be {expected}, got {type(token_ids).__name__}.", parameter=parameter
            )
        if not token_ids and not allow_empty:
            raise InvalidRequestError(f"{parameter} must not be empty.", parameter=parameter)
        for token_id in token_ids:
            if type(token_id) is not int:  # bool is none either
                raise InvalidRequestError(
                    f"{parameter} must hold integers only, got {_show(token_id)}.", parameter=parameter
                )
        bad = [token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size]
        if bad:
            raise InvalidRequestError(
                f"{parameter} must hold token ids in [0, {self.vocab_size - 1}], got {_show_some(bad)}.",
                parameter=parameter,
            )
        return list(token_ids)

    def _truncation(self, max_tokens: Any, side: Any, longest: int, default_side: str) -> Truncation | None:
        """What is asked for. `longest`: the longest prompt that is taken, which -1 stands for."""
        if side not in (None, "left", "right"):
            raise InvalidRequestError(
                f"truncation_side must be left or right, got {_show(side)}.", parameter="truncation_side"
            )
        if max_tokens is None:
            if side is not None:
                raise InvalidRequestError(
                    "truncation_side has no effect without truncate_prompt_tokens.", parameter="truncation_side"
                )
            return None
        if type(max_tokens) is not int or not (max_tokens == -1 or 1 <= max_tokens <= self.max_model_len):
            raise InvalidRequestError(
                f"truncate_prompt_tokens must be -1 (as many as fit) or an integer in [1, {self.max_model_len}], got "
                f"{_show(max_tokens)}.",
                parameter="truncate_prompt_tokens",
            )
        return Truncation(longest if max_tokens == -1 else min(max_tokens, longest), side or default_side)

    def _check_length(self, num_tokens: int, limit: int) -> None:
        if num_tokens <= limit:
            return
        room = "" if limit == self.max_model_len else ", one of which must be left for the output"
        raise ContextLengthError(
            f"This model's maximum context length is {self.max_model_len} tokens{room}. However, your prompt has "
            f"{num_tokens} tokens: shorten it by {num_tokens - limit}."
        )

    # ------------------------------------------------------------------ sampling parameters
    def _resolve_max_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> tuple[int, bool]:
        """(output limit, whether more was asked for than the context has room for)."""
        room = self.max_model_len - num_prompt_tokens
        asked = params.max_tokens
        if asked is None:  # as many as fit, the pool too; at least one, which must fit
            pool_room = room if self.num_blocks is None else self.num_blocks * self.block_size - num_prompt_tokens
            max_tokens = max(min(room, pool_room), 1)
        else:
            max_tokens = min(asked, room)
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be at most {max_tokens}, the room that is left behind {num_prompt_tokens} prompt "
                f"tokens, got {params.min_tokens}.",
                parameter="min_tokens",
            )
        if self.num_blocks is not None:
            check_fits_pool(num_prompt_tokens, max_tokens, self.num_blocks, self.block_size)
        return max_tokens, asked is not None and asked > room

    def _check_sampling_params(self, params: SamplingParams) -> None:
        """What SamplingParams could not check itself: token ids, and fields that need a tokenizer."""
        for name in ("stop_token_ids", "allowed_token_ids"):
            self.check_token_ids(getattr(params, name) or [], name, allow_empty=True)
        self.check_token_ids(list(params.logit_bias or {}), "logit_bias", allow_empty=True)
        for name in ("stop", "bad_words"):
            words = getattr(params, name) or []
            if words and self.tokenizer is None:
                raise InvalidRequestError(f"{name} needs a tokenizer, and this model has none.", parameter=name)
            for word in words:
                _check_unicode(word, name)

    def _bad_words_token_ids(self, bad_words: Iterable[str]) -> list[list[int]]:
        """Each word as it is spelled at the start of a text and behind a blank; equal spellings once."""
        found: list[list[int]] = []
        if self.tokenizer is None:  # then there are no bad words
            return found
        for word in bad_words:
            bare = word.lstrip() or word
            for spelling in (bare, " " + bare):
                token_ids = self.tokenizer.encode(spelling, add_special_tokens=False)
                if token_ids and token_ids not in found:
                    found.append(self.check_token_ids(token_ids, "bad_words"))
            num_tokens = sum(map(len, found))
            if num_tokens > MAX_BAD_WORDS_TOKENS:
                raise InvalidRequestError(
                    f"bad_words must make at most {MAX_BAD_WORDS_TOKENS} tokens in all, got at least {num_tokens}.",
                    parameter="bad_words",
                )
        return found

    # ------------------------------------------------------------------ chat
    def render_chat(
        self,
        messages: Any,
        *,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        may_be_cut: bool = False,
    ) -> dict[str, Any]:
        """A conversation as a prompt: {"prompt": text, "prompt_token_ids": ids}.

        add_special_tokens: also those of a plain prompt; the template mostly writes bos itself.
        may_be_cut: the request will have truncate_prompt_tokens, so that the text may be longer than the context.
        Raises InvalidRequestError, ContextLengthError.
        """
        if self.tokenizer is None:
            raise InvalidRequestError("This model has no tokenizer: send prompt_token_ids.", parameter="messages")
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt=False: the last message is continued, or a new "
                "one is begun.",
                parameter="continue_final_message",
            )
        normalized = normalize_messages(messages, self.tokenizer.template_traits(with_tools=bool(tools)))
        _check_dicts("tools", tools, MAX_TOOLS)
        _check_dicts("documents", documents, MAX_MESSAGES)
        text = self.tokenizer.apply_chat_template(
            normalized,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=chat_template_kwargs,
        )
        token_ids = self.encode_text(text, add_special_tokens, "messages", may_be_cut=may_be_cut)
        return {"prompt": text, "prompt_token_ids": token_ids}


# ---------------------------------------------------------------------- checks
def check_request_id(request_id: Any) -> str:
    """A caller's own name for a request. Raises InvalidRequestError."""
    if not isinstance(request_id, str) or not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS:
        got = f"{len(request_id)} characters" if isinstance(request_id, str) else _show(request_id)
        raise InvalidRequestError(
            f"request_id must be a string of 1 to {MAX_REQUEST_ID_CHARS} characters, got {got}.",
            parameter="request_id",
        )
    _check_unicode(request_id, "request_id")
    return request_id


def check_fits_pool(num_prompt_tokens: int, max_tokens: int, num_blocks: int, block_size: int) -> None:
    """Raise ContextLengthError, with the arithmetic, when even an otherwise empty pool is too small.

    num_blocks: blocks that can hold tokens (without the null block).
    """
    num_tokens = num_prompt_tokens + max_tokens
    needed_blocks = -(-num_tokens // block_size)
    if needed_blocks <= num_blocks:
        return
    pool_tokens = num_blocks * block_size
    raise ContextLengthError(
        f"This request can never fit the KV cache: {num_prompt_tokens} prompt tokens + {max_tokens} max_tokens = "
        f"{num_tokens} tokens need {needed_blocks} blocks of {block_size}, and the pool has {num_blocks} "
        f"({pool_tokens} tokens). Ask for at most {max(pool_tokens - num_prompt_tokens, 0)} output tokens, shorten the "
        "prompt, or give the server more cache memory.",
        parameter="max_tokens" if num_prompt_tokens < pool_tokens else "prompt",
    )


def _own_copy(sampling_params: SamplingParams) -> SamplingParams:
    """A copy, checked again: the caller may have changed a field since. `logprobs` is not checked a second time,
    because beam search sets more of them than a caller may ask for."""
    params = copy.copy(sampling_params)
    params.logprobs = None
    params.__post_init__()
    params.logprobs = sampling_params.logprobs
    return params


def _check_unicode(text: str, parameter: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and has no bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{parameter} must be valid Unicode, got a lone surrogate at character {error.start}.", parameter=parameter
        ) from None


def _check_cache_salt(cache_salt: Any) -> str | None:
    if cache_salt is None:
        return None
    if not isinstance(cache_salt, str) or not 1 <= len(cache_salt) <= MAX_CACHE_SALT_CHARS:
        got = f"{len(cache_salt)} characters" if isinstance(cache_salt, str) else type(cache_salt).__name__
        raise InvalidRequestError(
            f"cache_salt must be a string of 1 to {MAX_CACHE_SALT_CHARS} characters, got {got}.", parameter="cache_salt"
        )
    _check_unicode(cache_salt, "cache_salt")
    return cache_salt


def _check_priority(priority: Any) -> int:
    if type(priority) is not int or not -_INT64 <= priority < _INT64:
        raise InvalidRequestError(
            f"priority must be a 64-bit integer (lower runs first), got {_show(priority)}.", parameter="priority"
        )
    return priority


def _check_dicts(parameter: str, value: Any, max_items: int) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple) or len(value) > max_items or not all(isinstance(v, dict) for v in value):
        raise InvalidRequestError(f"{parameter} must be a list of at most {max_items} objects.", parameter=parameter)


def _generation_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    found = {field: generation_config.get(name) for name, field in GENERATION_CONFIG_FIELDS.items()}
    return {name: value for name, value in found.items() if value is not None}


def _show(value: Any) -> str:
    """A value for a message: short, whatever it is (a very long integer cannot even be printed)."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, str | int | float):
        return repr(value[:50] if isinstance(value, str) else value)
    return type(value).__name__


def _show_some(values: Sequence[int]) -> str:
    shown = ", ".join(_show(value) for value in values[:5])
    return f"{shown} and {len(values) - 5} more" if len(values) > 5 else shown


# ---------------------------------------------------------------------- messages
def normalize_messages(messages: Any, traits: TemplateTraits) -> list[Message]:
    """Messages as the template wants them; the caller's are not changed.

    - content: a string, a list of {"type": "text", "text": ...}, or None beside tool_calls. Text parts are joined by
      newlines for a template that takes strings; a string becomes one part for a template that takes only lists.
      Other parts (images, audio, files) are refused.
    - developer becomes system where the template does not know it; then all system messages are joined, by a blank
      line, into one in front.
    - tool_calls[].function.arguments, a JSON string on the wire, becomes an object ({} when it is none).
    Raises InvalidRequestError (messages).
    """
    if not isinstance(messages, list | tuple) or not 1 <= len(messages) <= MAX_MESSAGES:
        got = f"{len(messages)} of them" if isinstance(messages, list | tuple) else type(messages).__name__
        raise _bad_message(f"must be a list of 1 to {MAX_MESSAGES} messages, got {got}")
    normalized = [_normalize_message(index, message, traits) for index, message in enumerate(messages)]
    if traits.knows_developer or all(message["role"] != "developer" for message in normalized):
        return normalized
    system = [message for message in normalized if message["role"] in ("developer", "system")]
    others = [message for message in normalized if message["role"] not in ("developer", "system")]
    text = "\n\n".join(_joined_text(message.get("content")) for message in system)
    return [{"role": "system", "content": _as_content(text, traits)}, *others]


def _normalize_message(index: int, message: Any, traits: TemplateTraits) -> Message:
    if not isinstance(message, dict):
        raise _bad_message(f"[{index}] must be an object, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _bad_message(f"[{index}].role must be a non-empty string, got {_show(role)}")
    result = {key: value for key, value in message.items() if key != "content" and value is not None}
    calls = result.pop("tool_calls", None)
    if calls:
        result["tool_calls"] = _normalize_tool_calls(index, calls)
    content = message.get("content")
    if content is None:
        if role == "assistant" and calls:
            return result
        raise _bad_message(f"[{index}].content must be text (only an assistant message with tool_calls may have none)")
    if not isinstance(content, str):
        parts = _check_parts(index, content)
        content = parts if traits.loops_over_content and role != "tool" else _joined_text(parts)
    result["content"] = content if role == "tool" else _as_content(content, traits)
    return result


def _as_content(content: str | list[dict[str, str]], traits: TemplateTraits) -> str | list[dict[str, str]]:
    """A text as a list of one part for a template that knows no other form."""
    if isinstance(content, str) and traits.loops_over_content and not traits.tests_for_string:
        return [{"type": "text", "text": content}]
    return content


def _check_parts(index: int, content: Any) -> list[dict[str, str]]:
    """The text parts of a content list, reduced to what a template reads."""
    if not isinstance(content, list | tuple):
        raise _bad_message(f"[{index}].content must be text or a list of text parts, got {type(content).__name__}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "input_text", "output_text"):
            raise _bad_message(f"[{index}].content may hold text parts only, got {_show(kind)}")
        if not isinstance(part.get("text"), str):
            raise _bad_message(f"[{index}].content: a text part must have a string text")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _joined_text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part["text"] for part in content)


def _normalize_tool_calls(index: int, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise _bad_message(f"[{index}].tool_calls must be a list, got {type(calls).__name__}")
    result = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise _bad_message(f"[{index}].tool_calls may hold function calls only")
        arguments = _parse_arguments(f"[{index}].tool_calls[{number}].function.arguments", function.get("arguments"))
        result.append({**call, "function": {**function, "arguments": arguments}})
    return result


def _parse_arguments(place: str, arguments: Any) -> dict[str, Any]:
    """Templates want an object. A call that was cut, or that the AI SDK could not read, comes back as something else:
    refusing it would end the conversation for good, so it counts as {} (as in vLLM), and the log says so."""
    if isinstance(arguments, str) and arguments:
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        if arguments:
            logging.getLogger(__name__).warning("messages%s is no JSON object: taken for {}", place)
        return {}
    return arguments


def _bad_message(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"messages{' ' if not what.startswith('[') else ''}{what}.", parameter="messages")
