"""What the Responses API remembers: limits in count and bytes, what is dropped first, many threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from minivllm import ConfigError
from minivllm.entrypoints.response_store import NotStoredError, ResponseStore, StoredResponse
from minivllm.entrypoints.service import ServerConfig


def response(name: str, *items: str, text: str = "") -> dict[str, Any]:
    return {"id": name, "text": text, "output": [{"id": item} for item in items]}


def stored(name: str, *items: str, text: str = "", history: tuple[dict[str, Any], ...] = ()) -> StoredResponse:
    return StoredResponse(name, history, lambda: response(name, *items, text=text), lambda: None)


def knows(store: ResponseStore, name: str) -> bool:
    try:
        store.get(name, "x")
    except NotStoredError:
        return False
    return True


def test_an_answer_and_its_items_are_found_by_their_ids():
    store = ResponseStore(8, 10_000)
    store.put(stored("a", "m1", "f1"))
    store.put(stored("b", "m2"))
    assert store.get("a", "x").id == "a" and store.item("f1", "x") == {"id": "f1"} and store.item("m2", "x")
    assert (store.num_responses, store.num_items) == (2, 3)
    store.delete("a", "x")
    for call in (store.get, store.delete):
        with pytest.raises(NotStoredError, match="no response 'a'") as caught:
            call("a", "previous_response_id")
        assert (caught.value.status, caught.value.parameter) == (404, "previous_response_id")
    with pytest.raises(NotStoredError, match="no item 'm1'") as caught:
        store.item("m1", "input")
    assert (caught.value.parameter, caught.value.code) == ("input", "item_not_found")
    assert (store.num_responses, store.num_items) == (1, 1)


def test_the_least_recently_used_is_dropped_first_and_an_items_use_is_its_answers():
    store = ResponseStore(3, 10_000)
    for name in "abc":
        store.put(stored(name, f"m{name}"))
    store.get("a", "x")
    store.item("mb", "x")
    store.put(stored("d"))
    assert [knows(store, name) for name in "abcd"] == [True, True, False, True]
    with pytest.raises(NotStoredError):
        store.item("mc", "x")
    assert store.num_items == 2


def test_bytes_are_bounded_too_and_the_conversation_counts():
    store = ResponseStore(1000, 5000)
    for number in range(50):
        store.put(stored(f"r{number}", f"m{number}", text="x" * 300, history=({"role": "user", "content": "y" * 500},)))
        assert 0 < store.num_bytes <= 5000
    assert 2 <= store.num_responses <= 6 and knows(store, "r49") and not knows(store, "r0")
    store.put(stored("huge", text="x" * 6000))
    assert store.num_responses == store.num_items == store.num_bytes == 0  # it pushed out the others, then itself


@pytest.mark.parametrize("limits", [(0, 1000), (1000, 0)], ids=["count", "bytes"])
def test_a_limit_of_nothing_remembers_nothing(limits: tuple[int, int]):
    store = ResponseStore(*limits)
    store.put(stored("a", "m"))
    assert not store.keeps_any and store.num_responses == store.num_items == store.num_bytes == 0


def test_a_growing_answer_is_counted_anew_and_a_dropped_one_does_not_come_back():
    store = ResponseStore(2, 10_000)
    items: list[str] = []
    growing = StoredResponse("a", (), lambda: response("a", *items), lambda: None)
    store.put(growing)
    before = store.num_bytes
    items += ["m1", "f1"]
    store.refresh(growing)
    assert store.num_bytes > before and store.item("f1", "x")
    store.refresh(growing)
    assert store.num_items == 2
    store.delete("a", "x")
    store.refresh(growing)
    assert store.num_responses == store.num_items == store.num_bytes == 0


def test_what_has_settled_needs_nothing_that_made_it():
    made = []

    def read() -> dict[str, Any]:
        made.append(1)
        return response("a", "m")

    one = StoredResponse("a", (), read, lambda: made.append(2))
    one.settled()
    one.cancel()
    assert one.read() is one.read() and made == [1]


def test_many_threads_at_once():
    """Counts and indexes agree afterwards, and nobody saw a half of anything."""
    store = ResponseStore(20, 100_000)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in range(200):
                name = f"r{seed}-{number}"
                one = stored(name, f"m{name}", text="x" * (number % 50))
                store.put(one)
                store.refresh(one)
                if knows(store, name):
                    assert number % 3 or store.item(f"m{name}", "x")
                if number % 5 == 0:
                    store.delete(name, "x")
        except NotStoredError:
            pass  # dropped between two looks
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and store.num_responses == store.num_items <= 20
    for name in list(store._responses):
        store.delete(name, "x")
    assert store.num_items == store.num_bytes == 0


@pytest.mark.parametrize("name", ["max_stored_responses", "max_stored_bytes"])
def test_a_negative_limit_is_refused(name: str):
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**{name: -1})
    assert caught.value.parameter == name
