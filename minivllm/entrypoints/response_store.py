"""What the Responses API remembers: answers by their id, and the items in them by theirs.

    put ──▶ [oldest ... newest] ──▶ the least recently used leave when there are too many, or too many bytes
             └── the items of an answer come and go with it

An answer is kept with the whole conversation that led to it, so that it can be continued when earlier ones are gone.
All methods may be called from any thread. Nothing is written to disk: a restart forgets everything.

Knows no HTTP and no engine. Made by service.py, called by responses.py and response_input.py. Twin in vLLM: the
response_store of vllm/entrypoints/openai/responses/serving.py, which has no limit.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from minivllm.entrypoints.protocol import to_json
from minivllm.errors import ClientError

Item = dict[str, Any]


class NotStoredError(ClientError):
    """No such answer or item: never stored, deleted, or dropped for newer ones."""

    status = 404


@dataclasses.dataclass(eq=False, slots=True)
class StoredResponse:
    """One answer.

    Args:
        history: the items that the model was shown, those of earlier turns included; without instructions.
        read: the answer as it is now; while it runs, it grows.
        cancel: end it, if it still runs.
    """

    id: str
    history: tuple[Item, ...]
    read: Callable[[], dict[str, Any]]
    cancel: Callable[[], None]
    item_ids: tuple[str, ...] = ()
    history_bytes: int = 0
    num_bytes: int = 0

    def settled(self) -> StoredResponse:
        """The same, when it has ended: it lets go of everything that was needed to run it."""
        response = self.read()
        self.read, self.cancel = lambda: response, lambda: None
        return self


class ResponseStore:
    """The most recently used answers, at most max_responses of them and at most max_bytes. 0 of either: none."""

    def __init__(self, max_responses: int, max_bytes: int):
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._owners: dict[str, StoredResponse] = {}  # item id -> the answer that it is in
        self._num_bytes = 0

    @property
    def keeps_any(self) -> bool:
        return self._max_responses > 0 and self._max_bytes > 0

    @property
    def num_responses(self) -> int:
        return len(self._responses)

    @property
    def num_items(self) -> int:
        return len(self._owners)

    @property
    def num_bytes(self) -> int:
        """Of all that is kept, as JSON. What two answers share is counted twice."""
        return self._num_bytes

    def put(self, stored: StoredResponse) -> None:
        """Remember an answer; `refresh` whenever it has got an item, and at its end."""
        stored.history_bytes = sum(len(to_json(item)) for item in stored.history)
        response = stored.read()
        with self._lock:
            self._responses[stored.id] = stored
            self._account(stored, response)

    def refresh(self, stored: StoredResponse) -> None:
        """Count an answer anew. Does nothing when it was deleted or dropped meanwhile."""
        response = stored.read()  # outside the lock: it has one of its own
        with self._lock:
            if self._responses.get(stored.id) is stored:
                self._account(stored, response)

    def get(self, response_id: str, parameter: str) -> StoredResponse:
        """Raises NotStoredError naming the parameter."""
        with self._lock:
            stored = self._responses.get(response_id)
            if stored is None:
                raise _not_stored("response", response_id, parameter)
            self._responses.move_to_end(response_id)
            return stored

    def item(self, item_id: str, parameter: str) -> Item:
        """An item of an answer's output. Raises NotStoredError naming the parameter."""
        with self._lock:
            stored = self._owners.get(item_id)
            if stored is None:
                raise _not_stored("item", item_id, parameter)
            self._responses.move_to_end(stored.id)
        return next(item for item in stored.read()["output"] if item["id"] == item_id)

    def delete(self, response_id: str, parameter: str) -> None:
        """Forget an answer and its items. Raises NotStoredError naming the parameter."""
        with self._lock:
            if response_id not in self._responses:
                raise _not_stored("response", response_id, parameter)
            self._drop(response_id)

    def _account(self, stored: StoredResponse, response: dict[str, Any]) -> None:
        """Its items and its size; then drop what is too much, which may be this very answer."""
        self._num_bytes -= stored.num_bytes
        stored.num_bytes = stored.history_bytes + len(to_json(response))
        self._num_bytes += stored.num_bytes
        stored.item_ids = tuple(item["id"] for item in response["output"])
        self._owners.update(dict.fromkeys(stored.item_ids, stored))
        while self._responses and (len(self._responses) > self._max_responses or self._num_bytes > self._max_bytes):
            self._drop(next(iter(self._responses)))

    def _drop(self, response_id: str) -> None:
        stored = self._responses.pop(response_id)
        self._num_bytes -= stored.num_bytes
        for item_id in stored.item_ids:
            self._owners.pop(item_id, None)


def _not_stored(what: str, name: str, parameter: str) -> NotStoredError:
    return NotStoredError(
        f"There is no {what} {name[:80]!r} here: it was not stored (store: false), was deleted, or was dropped for "
        "newer ones. Send the items of the conversation instead.",
        parameter=parameter,
        code=f"{what}_not_found",
    )
