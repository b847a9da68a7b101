"""The guide's balancer, in the client (balancer.mjs, with the real SDK), against three servers. Needs node and npm."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.instances import PATIENCE_SECONDS, Instance
from tests.sdk.test_sdk import install

SDK = Path(__file__).parents[1] / "sdk/sdk4"


class Balancer:
    """One process of node."""

    def __init__(self, urls: list[str]):
        command = ["node", str(Path(__file__).parent / "balancer.mjs"), *urls]
        environment = {**os.environ, "SDK_FOLDER": str(SDK), "VLLM_API_KEY": "none"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, line: str) -> Any:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("node has no pipes")
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE_SECONDS)


@pytest.fixture
def balancer(instances: list[Instance]) -> Iterator[Balancer]:
    install(SDK.name)
    found = Balancer([f"http://127.0.0.1:{one.port}/v1" for one in instances])
    yield found
    found.close()


def test_three_instances_share_and_a_killed_one_is_left_out(balancer: Balancer, instances: list[Instance]):
    before = [one.num_answered for one in instances]
    assert balancer("check") == [True, True, True]
    assert len(balancer("ask 6")) == 6
    assert [one.num_answered for one in instances] == [count + 2 for count in before]

    instances[1].kill()
    try:
        assert balancer("check") == [True, False, True]
        assert len(balancer("ask 6")) == 6
        assert [instances[0].num_answered, instances[2].num_answered] == [before[0] + 5, before[2] + 5]
    finally:
        instances[1].start()
    assert balancer("check") == [True, True, True]
    assert len(balancer("ask 3")) == 3
    assert instances[1].num_answered == 1


def test_between_two_checks_a_killed_instance_is_the_callers_to_retry(balancer: Balancer, instances: list[Instance]):
    assert balancer("check") == [True, True, True]
    instances[1].kill()
    try:
        assert "Cannot connect" in balancer("ask 1")  # the second is next
        assert len(balancer("ask 1")) == 1
    finally:
        instances[1].start()
