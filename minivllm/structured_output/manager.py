"""StructuredOutputManager: the grammars of all requests of one engine.

    compile(params)                 any thread, before the request is queued; errors are the caller's
    add_request / remove_request    one matcher per sequence, from queueing to its end, preemptions included
    bitmasks(drawn)                 rows for the sequences that draw a token in this step
    accept_tokens                   after the step

A matcher follows the output tokens only. A preempted request keeps it: what is computed again is never drawn again.

Knows no scheduler. Owned by engine/llm_engine.py. Twin in vLLM: vllm/v1/structured_output/__init__.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minivllm.errors import InvalidRequestError
from minivllm.sampling_params import AnswerForm, StructuredOutputsParams
from minivllm.structured_output.grammar import (
    CompiledGrammar,
    GrammarMatcher,
    GrammarTokenizer,
    answer_text,
    compile_grammar,
    grammar_text,
)

MAX_CACHE_BYTES = 64 << 20
MAX_CACHE_ENTRIES = 4096


class GrammarCache:
    """Grammar texts by what was asked for, the least recently used forgotten first.

    Only texts: their size is known exactly. Every operation is one step of a dict, so threads need no lock; at worst
    a text is made twice.
    """

    def __init__(self, max_bytes: int = MAX_CACHE_BYTES, max_entries: int = MAX_CACHE_ENTRIES):
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self._texts: OrderedDict[str, str] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Characters of keys and texts; they are ASCII nearly always, and else counted by their width."""
        return sum(_num_bytes(key) + _num_bytes(text) for key, text in list(self._texts.items()))

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, key: str) -> str | None:
        text = self._texts.pop(key, None)
        if text is not None:
            self._texts[key] = text  # the newest
        return text

    def put(self, key: str, text: str) -> None:
        self._texts[key] = text
        excess = self.num_bytes - self.max_bytes
        for old_key, old_text in list(self._texts.items()):
            if excess <= 0 and len(self._texts) <= self.max_entries:
                return
            self._texts.pop(old_key, None)
            excess -= _num_bytes(old_key) + _num_bytes(old_text)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)


class StructuredOutputManager:
    """Args:
    backend: the `tokenizers` object of the model; None: it has no tokenizer, and every grammar is refused.
    vocab_size: width of the logits.
    eos_token_ids: end an output.
    """

    def __init__(self, backend: Any, vocab_size: int, eos_token_ids: frozenset[int]):
        self.cache = GrammarCache()
        self._backend = backend
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer: GrammarTokenizer | None = None
        self._matchers: dict[str, GrammarMatcher] = {}

    # ------------------------------------------------------------------ before queueing
    def prepare(self) -> None:
        """Read the vocabulary now instead of at the first grammar. Raises InvalidRequestError: it cannot be used."""
        self._grammar_tokenizer()

    def _grammar_tokenizer(self) -> GrammarTokenizer:
        if self._tokenizer is None:
            if self._backend is None:
                raise InvalidRequestError(
                    "structured_outputs needs a tokenizer, and this model has none.", parameter="structured_outputs"
                )
            self._tokenizer = GrammarTokenizer(self._backend, self._vocab_size, self._eos_token_ids)
        return self._tokenizer

    def compile(self, params: StructuredOutputsParams | AnswerForm) -> CompiledGrammar:
        """The grammar of one request. Raises InvalidRequestError naming the reason."""
        if not isinstance(params, AnswerForm):
            return self._compile(params)
        try:
            return self._compile(params)
        except InvalidRequestError as error:
            if error.parameter == "tools":
                self._find_fault(params)
            raise

    def _compile(self, params: StructuredOutputsParams | AnswerForm) -> CompiledGrammar:
        tokenizer = self._grammar_tokenizer()
        if isinstance(params, AnswerForm):
            spec: Any = dataclasses.asdict(params)
        else:
            spec = params.schema() if params.kind == "json" else getattr(params, params.kind)
        key = f"{params.kind} {json.dumps(spec)}"
        text = self.cache.get(key)
        if text is None:
            text = answer_text(tokenizer, params) if isinstance(params, AnswerForm) else grammar_text(params)
            grammar = compile_grammar(tokenizer, params.kind, text)
            self.cache.put(key, text)
            return grammar
        return compile_grammar(tokenizer, params.kind, text)

    def _find_fault(self, form: AnswerForm) -> None:
        """Raise what the text's own form, or a tool's schema, is refused for when it stands alone."""
        if form.text is not None:
            self._compile(form.text)
        for call in form.calls:
            try:
                self._compile(StructuredOutputsParams(json=call.schema))
            except InvalidRequestError as error:
                fault = re.sub(r"^structured_outputs(\.json)?", "", error.message)
                raise InvalidRequestError(call.label + fault, parameter="tools") from None

    # ------------------------------------------------------------------ while it runs
    def add_request(self, request_id: str, grammar: CompiledGrammar) -> None:
        self._matchers[request_id] = grammar.new_matcher()

    def remove_request(self, request_id: str) -> None:
        """Forget a sequence; nothing happens when it has no grammar."""
        self._matchers.pop(request_id, None)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._matchers

    def __len__(self) -> int:
        return len(self._matchers)

    def bitmasks(self, drawn: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """{request id: [ceil(vocab_size / 32)] int32}; a row of a broken matcher allows nothing.

        drawn: what each of them has drawn in the running step and its grammar has not accepted yet: drafts that came
        true. Nothing may follow an eos among them, nor a token that is refused.
        """
        rows = {}
        for request_id, token_ids in drawn.items():
            rows[request_id] = row = np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
            matcher = self._matchers[request_id]
            num_accepted = matcher.accept_tokens(token_ids)
            if not token_ids or (num_accepted == len(token_ids) and not matcher.is_terminated()):
                matcher.fill_bitmask(row)
            matcher.rollback(num_accepted)
        return rows

    def validate_tokens(self, request_id: str, token_ids: Sequence[int]) -> int:
        """How many of these drafts its grammar would accept; nothing changes."""
        return self._matchers[request_id].validate_tokens(token_ids)

    def accept_tokens(self, request_id: str, token_ids: Sequence[int]) -> int:
        """Follow what was drawn; returns how many of the tokens the grammar accepts."""
        return self._matchers[request_id].accept_tokens(token_ids)

    def error(self, request_id: str) -> str | None:
        """Why this sequence's grammar cannot be followed any further, or None."""
        return self._matchers[request_id].error

    def is_terminated(self, request_id: str) -> bool:
        """It has drawn eos where its grammar may end."""
        return self._matchers[request_id].is_terminated()

    def is_complete(self, request_id: str) -> bool:
        """Nothing but eos may follow."""
        return self._matchers[request_id].is_complete()

    def forced_tokens(self, request_id: str) -> list[int]:
        """Tokens of the text that its grammar leaves no choice about: they need not be drawn."""
        return self._matchers[request_id].forced_tokens()
