"""The two waiting lines: in order of arrival, and by priority."""

from __future__ import annotations

import random

import pytest

from minivllm.core.request import Request
from minivllm.core.request_queue import (
    FCFSRequestQueue,
    PriorityRequestQueue,
    RequestQueue,
    make_request_queue,
)
from tests.core.helpers import lines_executed, make_request


def fill(queue: RequestQueue, *names: str) -> dict[str, Request]:
    """Add requests in order. A name like "b1" is request b with priority 1."""
    requests = {}
    for arrival, name in enumerate(names):
        priority = int(name[1:] or 0)
        requests[name] = make_request(name, [1], priority=priority, arrival=arrival)
        queue.add(requests[name])
    return requests


def names(queue: RequestQueue) -> list[str]:
    return [request.request_id for request in queue]


def popped(queue: RequestQueue) -> list[str]:
    """Everything, in the order in which it comes out."""
    return [queue.pop().request_id for _ in range(len(queue))]


def test_the_policy_chooses_the_line():
    assert isinstance(make_request_queue("fcfs"), FCFSRequestQueue)
    assert isinstance(make_request_queue("priority"), PriorityRequestQueue)


# ------------------------------------------------------------------ both
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_looking_takes_nothing_away(policy: str):
    queue = make_request_queue(policy)
    requests = fill(queue, "a", "b")
    assert queue.peek() is queue.peek() is requests["a"]
    assert names(queue) == names(queue) == ["a", "b"] and len(queue) == 2
    assert queue.pop() is requests["a"]
    assert names(queue) == ["b"] and len(queue) == 1 and bool(queue)
    queue.pop()
    assert len(queue) == 0 and not queue


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize(("leaves", "stay"), [("a", ["b", "c"]), ("b", ["a", "c"]), ("c", ["a", "b"])])
def test_anybody_may_leave_the_line(policy: str, leaves: str, stay: list[str]):
    queue = make_request_queue(policy)
    requests = fill(queue, "a", "b", "c")
    queue.remove(requests[leaves])
    assert names(queue) == stay and len(queue) == 2
    assert queue.peek().request_id == stay[0]
    assert popped(queue) == stay


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_leaving_and_entering_cost_the_same_in_a_long_line(policy: str):
    """Counted in lines of Python: an abort in a line of 4,000 searches nothing."""
    costs = set()
    for length in (16, 4_000):
        queue = make_request_queue(policy)
        requests = fill(queue, *(f"r{number % 7}_{number}".replace("_", "0") for number in range(length)))
        assert len(queue) == length
        some = list(requests.values())[length // 2]
        new = make_request("new", [1], arrival=length)
        costs.add(
            lines_executed(lambda queue=queue, new=new, some=some: (queue.remove(some), queue.add(new), queue.peek()))
        )
    assert len(costs) == 1


# ------------------------------------------------------------------ first come, first served
def test_first_come_first_served_does_not_look_at_priorities():
    queue = FCFSRequestQueue()
    fill(queue, "a9", "b0", "c5")
    assert popped(queue) == ["a9", "b0", "c5"]


def test_who_is_put_back_is_first_again():
    queue = FCFSRequestQueue()
    requests = fill(queue, "a", "b", "c", "d")
    a, b = queue.pop(), queue.pop()
    assert (a, b) == (requests["a"], requests["b"])
    queue.put_back(b)  # victims come youngest first
    queue.put_back(a)
    assert popped(queue) == ["a", "b", "c", "d"]  # so the old order is back


# ------------------------------------------------------------------ priority
def test_the_lower_number_runs_first_and_equals_in_order_of_arrival():
    queue = PriorityRequestQueue()
    fill(queue, "a2", "b0", "c-1", "d0", "e2")
    assert names(queue) == ["c-1", "b0", "d0", "a2", "e2"]
    assert popped(queue) == ["c-1", "b0", "d0", "a2", "e2"]


def test_who_is_put_back_goes_before_later_ones_of_his_priority_only():
    queue = PriorityRequestQueue()
    fill(queue, "a1", "b1", "c1")
    a = queue.pop()
    urgent = make_request("z0", [1], priority=0, arrival=9)
    queue.add(urgent)
    queue.put_back(a)
    assert popped(queue) == ["z0", "a1", "b1", "c1"]


def test_a_removed_request_does_not_come_up_again():
    queue = PriorityRequestQueue()
    requests = fill(queue, "a0", "b1", "c2")
    queue.remove(requests["a0"])
    assert queue.peek() is requests["b1"]
    queue.remove(requests["b1"])
    assert queue.pop() is requests["c2"]
    assert not queue


def test_an_id_that_comes_back_stands_at_its_new_place():
    """The heap still holds the entry of the first "a0": it must not lift the second one, which came last."""
    queue = PriorityRequestQueue()
    requests = fill(queue, "a0", "b0", "c0")
    queue.remove(requests["a0"])
    again = make_request("a0", [1], priority=0, arrival=3)
    queue.add(again)
    assert queue.peek() is requests["b0"]
    assert popped(queue) == ["b0", "c0", "a0"]


def test_leftovers_of_removed_requests_do_not_pile_up():
    queue = PriorityRequestQueue()
    requests = fill(queue, *(f"r{number}" for number in range(100)))
    for request in list(requests.values())[10:]:
        queue.remove(request)
        assert len(queue._heap) <= 2 * len(queue)
    for arrival in range(100, 1_000):  # ten stay, 900 come and go
        request = make_request(f"n{arrival}", [1], arrival=arrival)
        queue.add(request)
        queue.remove(request)
        assert len(queue._heap) <= 2 * (len(queue) + 1)
    assert popped(queue) == [f"r{number}" for number in range(10)]


def test_any_sequence_of_operations_comes_out_sorted():
    rng, queue, inside = random.Random(0), PriorityRequestQueue(), {}
    for arrival in range(2_000):
        action = rng.choice(["add", "add", "pop", "remove", "put back"])
        if action == "add" or not inside:
            name = f"r{rng.randrange(50)}x{arrival}" if rng.random() < 0.9 else f"again{rng.randrange(3)}"
            if name not in inside:
                inside[name] = make_request(name, [1], priority=rng.randrange(3), arrival=arrival)
                queue.add(inside[name])
        elif action == "remove":
            queue.remove(inside.pop(rng.choice(sorted(inside))))
        else:
            first = min(inside.values(), key=lambda request: (request.priority, request.arrival))
            assert queue.peek() is first and queue.pop() is first
            if action == "pop":
                del inside[first.request_id]
            else:
                queue.put_back(first)
        assert len(queue) == len(inside)
    expected = sorted(inside.values(), key=lambda request: (request.priority, request.arrival))
    assert list(queue) == expected
