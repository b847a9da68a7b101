"""A model server whose answers a test writes down, word by word, and hands out when it likes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from tests.scripted_server import Asked, ScriptedServer, chat_event

PATIENCE_SECONDS = 180.0
METRICS = b'vllm:generation_tokens_total{model_name="scripted"} 7\nvllm:num_requests_running{model_name="scripted"} 2\n'


def event(body: Any) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


def ending(finish_reason: str = "stop") -> list[bytes]:
    """The last events of an answer, with its token counts."""
    last = chat_event()
    last["choices"][0]["finish_reason"] = finish_reason
    usage = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    return [event(last), event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


def says(*words: str, finish_reason: str = "stop") -> list[bytes]:
    return [*(event(chat_event(content=word)) for word in words), *ending(finish_reason)]


def calls(tool: str, *fragments: str) -> list[bytes]:
    """A tool call whose input comes in fragments."""
    first = {"index": 0, "id": "call-1", "type": "function", "function": {"name": tool, "arguments": ""}}
    deltas = [first, *({"index": 0, "function": {"arguments": fragment}} for fragment in fragments)]
    return [*(event(chat_event(tool_calls=[delta])) for delta in deltas), *ending("tool_calls")]


def continues(*words: str) -> list[bytes]:
    """An answer of /v1/completions."""
    texts = [{"choices": [{"index": 0, "text": word, "finish_reason": None}]} for word in words]
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    last = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": usage}
    return [event(body) for body in [*texts, last]] + [b"data: [DONE]\n\n"]


class Model(ScriptedServer):
    """Answers a GET with figures, and each POST with the next of the answers that were put in.

    A paced answer comes piece by piece, one for each `give()`.
    """

    def __init__(self) -> None:
        super().__init__(content=self._content)
        self._answers: list[tuple[Iterable[bytes], bool]] = []
        self._given = threading.Semaphore(0)

    def will(self, answer: Iterable[bytes], *, is_paced: bool = False) -> None:
        self._answers.append((answer, is_paced))

    def will_refuse(self, status: int, message: str) -> None:
        """The next answers, until a status of 200."""
        self.status = status
        self.will([json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}}).encode()])

    def give(self, count: int = 1) -> None:
        self._given.release(count)

    def reset(self) -> None:
        """For the next test."""
        self.status = 200
        self._answers.clear()
        self.asked.clear()
        self.hold.set()
        self.gone.clear()
        self._given = threading.Semaphore(0)

    @property
    def bodies(self) -> list[Any]:
        """What was asked, without the calls for figures."""
        return [asked.body for asked in list(self.asked) if asked.method == "POST"]

    def _content(self, asked: Asked) -> Iterable[bytes]:
        if asked.method == "GET":
            return [METRICS]
        if not self._answers:
            raise RuntimeError("the test has no answer to this")
        answer, is_paced = self._answers.pop(0)
        return self._paced(answer) if is_paced else answer

    def _paced(self, answer: Iterable[bytes]) -> Iterator[bytes]:
        given = self._given
        for piece in answer:
            if not given.acquire(timeout=PATIENCE_SECONDS):
                return
            yield piece
