"""The waiting line: first come first served, or by priority.

Both answer the same five calls, so that the scheduler does not know which one it has.
Twin in vLLM: vllm/v1/core/sched/request_queue.py.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from minivllm.core.request import Request


class FCFSRequestQueue:
    """In order of arrival. A preempted request goes back to the head: it was there first."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request

    def put_back(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._requests.move_to_end(request.request_id, last=False)

    def peek(self) -> Request:
        return next(iter(self._requests.values()))

    def pop(self) -> Request:
        return self._requests.popitem(last=False)[1]

    def remove(self, request: Request) -> None:
        del self._requests[request.request_id]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())


class PriorityRequestQueue:
    """Lower priority number first, then order of arrival. A removed request is skipped when it comes up."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str]] = []  # with leftovers of removed requests, at most as many as live ones
        self._requests: dict[str, Request] = {}

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        heapq.heappush(self._heap, self._entry(request))

    put_back = add

    def peek(self) -> Request:
        while True:
            request = self._requests.get(self._heap[0][2])
            if request is not None and self._entry(request) == self._heap[0]:  # an id may have come back
                return request
            heapq.heappop(self._heap)

    def pop(self) -> Request:
        request = self.peek()
        heapq.heappop(self._heap)
        del self._requests[request.request_id]
        return request

    def remove(self, request: Request) -> None:
        del self._requests[request.request_id]
        if len(self._heap) > 2 * len(self._requests):
            self._heap = [self._entry(other) for other in self._requests.values()]
            heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._requests.values(), key=self._entry))

    @staticmethod
    def _entry(request: Request) -> tuple[int, int, str]:
        return request.priority, request.arrival, request.request_id


RequestQueue = FCFSRequestQueue | PriorityRequestQueue


def make_request_queue(policy: str) -> RequestQueue:
    return PriorityRequestQueue() if policy == "priority" else FCFSRequestQueue()
