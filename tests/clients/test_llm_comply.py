"""llm-comply's suites for chat and for Open Responses: what becomes of every case.

Its requests have no limit of tokens, so this server has a short context: an answer ends there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.sdk.test_sdk import Server, server

CONTEXT_TOKENS = 256
TIMEOUT_SECONDS = 900
# Fields that are null here, as with vLLM, where the suite's schema wants a value or no field at all.
NULLS = "annotations,function_call,service_tier,system_fingerprint"
CUT = "got 'incomplete',got 'length'"  # an answer that the short context ended
PASSED = {
    "openai-chat": [
        "chat-basic-response",
        "chat-system-prompt",
        "chat-multi-turn",
        "chat-tool-calling",
        "chat-streaming-response",
        "chat-streaming-usage",
    ],
    "open-responses": [
        "basic-response",
        "system-prompt",
        "multi-turn",
        "tool-calling",
        "streaming-response",
        "streaming-usage",
    ],
}
# Not asked: images, summaries of reasoning and compaction, which this server does not have; and error-handling, where a
# request without a model must fail: here it is for the model that is served.


@pytest.fixture(scope="module")
def short_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("llm-comply") / "server.log"
    with server(log, "--max-model-len", str(CONTEXT_TOKENS)) as started:
        yield started


@pytest.mark.parametrize("suite", PASSED)
def test_suite(suite: str, short_server: Server):
    command = [sys.executable, "-m", "llm_comply.cli", "--json", "--format", suite, "--filter", ",".join(PASSED[suite])]
    where = ["--base-url", short_server.url, "--api-key", "none", "--model", short_server.model]
    options = ["--ignore", f"{NULLS},{CUT}", "--timeout", "300"]
    done = subprocess.run([*command, *where, *options], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    results = json.loads(done.stdout)["results"]
    assert {result["id"]: result["status"] for result in results} == dict.fromkeys(PASSED[suite], "passed"), results
