"""Who has seen the beginning of a prompt, and one page of everybody's metrics; no Ray runs here."""

from __future__ import annotations

import json
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from ray_ingress import CHUNK_CHARS, MAX_CHUNKS, Labelled, prefixes_of
from ray_serve import PrefixTable


def keys(**body: Any) -> list[str]:
    return prefixes_of(json.dumps(body).encode())


def test_equal_beginnings_have_equal_keys_as_far_as_they_go():
    first, second = keys(prompt="a" * 200 + "x"), keys(prompt="a" * 200 + "y" * 200)
    assert len(first) == (200 + 2) // CHUNK_CHARS == 3 and len(second) == 6
    assert first == second[:3] and len({*first, *second}) == 6
    assert keys(prompt="b" + "a" * 199)[2] not in first  # chained: the same later text is another prefix


def test_a_conversation_begins_like_its_continuation():
    one = [{"role": "system", "content": "s" * 300}, {"role": "user", "content": "hello"}]
    more = [*one, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and now?" * 20}]
    assert keys(messages=one) == keys(messages=more, temperature=1, model="m")[: len(keys(messages=one))] != []
    assert keys(prompt=[5] * 100)[:2] == keys(prompt=[5] * 60)[:2]


def test_what_has_no_prompt_has_no_keys_and_a_long_one_not_more_than_are_worth_it():
    for body in (b"", b"{", b"\xff", b"[1]", b"null", b"{}", b'{"messages": null}', b'{"prompt": "short"}'):
        assert prefixes_of(body) == []
    assert len(keys(input="z" * 10**6)) == MAX_CHUNKS


def test_the_longest_known_beginning_counts_and_only_of_a_replica_that_is_there():
    table = PrefixTable(max_prefixes=5)
    table.remember(["a", "ab"], "one")
    table.remember(["a", "ac"], "two")
    assert table.find(["a", "ab", "abc"], ["one", "two"]) == "one"
    assert table.find(["a", "ax"], ["one", "two"]) == "two"  # the last to have seen it
    assert table.find(["a", "ab"], ["two"]) == "two"
    assert table.find(["x"], ["one", "two"]) is None and table.find([], ["one"]) is None
    table.remember(["p", "q", "r"], "three")
    assert table.find(["a", "ab"], ["one"]) is None  # the oldest was forgotten
    assert table.find(["a"], ["two"]) == "two"


def test_metrics_of_several_are_one_page_with_each_family_once():
    counter = '# HELP vllm:n_total Tokens.\n# TYPE vllm:n_total counter\nvllm:n_total{{model_name="m"}} {}\n'
    page = f"{counter}# TYPE up gauge\nup 1.0\n"
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Labelled({"b": page.format("2.0"), "a": page.format("1.0")}))  # type: ignore[arg-type]
    lines = generate_latest(registry).decode().splitlines()
    assert [line for line in lines if "n_total{" in line] == [
        'vllm:n_total{model_name="m",replica="a"} 1.0',
        'vllm:n_total{model_name="m",replica="b"} 2.0',
    ]
    assert sum(line.startswith("# TYPE") for line in lines) == 2
    assert {'up{replica="a"} 1.0', 'up{replica="b"} 1.0'} < set(lines)
