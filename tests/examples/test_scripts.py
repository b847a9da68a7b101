"""Every script of examples/ai-sdk/sdk4 and sdk7 ends well, prints what its first lines promise and asked the server.

What the SDK and the server owe each other in every case is in tests/sdk; here are the programs that a reader runs. They
ask for long answers: the servers' own limits cut them. Needs node and npm's registry: `tox -e examples`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.examples.running import EXAMPLES, Ran, install_examples, run
from tests.sdk.test_sdk import server

KEY = "examples-key"
EMBEDDER = "tiny-embedder"
SCRIPTS_AT_ONCE = 4
# These need room: a schema or tools in the prompt, an object in the answer, or a conversation.
LONG = {
    "json-generation",
    "streaming-objects",
    "json-schema-constraints",
    "basic-tool-usage",
    "streaming-tool-calls",
    "use-chat",
}
USAGE = r"(prompt|input)Tokens: [1-9]"
# What a script prints, beside its exit code 0. (?s) matches over lines.
PRINTS = {
    "basic-text-generation": [r"Generated text: \S", USAGE, r"Finish reason: (stop|length)"],
    "basic-tool-usage": [r"Response: ", r"Tool calls: \[", r"Tool results: \["],
    "batch-processing": [r"1: ", r"2: ", r"3: ", r"4: "],
    "caching-responses": [r"(?s)(.+)\nCache hit\n\1"],
    "chat-conversation": [r"Response: \S"],
    "choice-constraints": [r"Sentiment: (positive|negative|neutral)\n"],
    "compatibility-mode": [r"Usage stats: \{", USAGE],
    "configuration": [r"Chat: ", r"Completion: "],
    "connection-refused": [r"vLLM server is healthy"],
    "custom-headers": [r"API Request: http", r"API Response: 200\n.+"],
    "custom-retry-logic": [r"(?s)Meta-Llama-3-8B-Instruct failed.*Mistral-7B-Instruct-v0.2 failed.*Text: "],
    "environment-configuration": [r"Settings: \{", r"maxRetries: 3", r"Text: "],
    "error-handling": [r"Text: \S"],
    "json-generation": [r'(?s)"name": .*"ingredients": \[.*"difficulty": "(easy|medium|hard)"\n\}'],
    "json-schema-constraints": [r"(?s)Generated user: \{.*name: .*age: \d+.*email: '[^']+@"],
    "load-balancing": [r'"number":6,"url":"http[^"]*","text":'],
    "metrics-collection": [r"latency: [1-9]", r"tokensPerSecond: [\d.]*[1-9]", r"Text: "],
    "model-not-found": [r"SmolLM2-135M-Instruct"],
    "multiple-models": [r"(?s).+\nEmbedding: 64"],
    "optimized-client": [r"Text: \S"],
    "out-of-memory": [r"1: ", r"7: "],
    "provider-options": [r"Text: \S", r"Logprobs: [\[{]", r"logprob: -?\d"],
    "rate-limiting": [r"(\d+\.\d s: .*(\n|$)){3}"],
    "regex-patterns": [r"Phone number: \d{3}-\d{3}-\d{4}\n"],
    "request-logging": [r"(?s)vLLM Request: \{.*vLLM Response: \{.*status: 200"],
    "server-component": [r"<div>No prompt provided</div>\n", r'<p class="whitespace-pre-wrap">[^<]'],
    "streaming-objects": [r'(?s)Story outline: \{.*Story outline: \{.*"twist": "'],
    "streaming-server-component": [r"First: \S", r"Whole: \S"],
    "streaming-text-generation": [r"(?s)\S.*Token usage: \{", USAGE],
    "streaming-tool-calls": [r"\S"],
    "use-chat": [r"(?s)user: What is .*\nassistant: \S.*user: And of Italy\?\nassistant: \S"],
    "use-completion": [r"Stopped: \S", r"Whole: \S"],
}
# Where a script asks something else than its generation's first endpoint.
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
OVER_CHAT = {  # in generation 7: openai-compatible, or what the Responses API does not have
    "choice-constraints",
    "configuration",
    "json-generation",
    "json-schema-constraints",
    "provider-options",
    "regex-patterns",
    "streaming-objects",
}
PATHS = {
    "configuration": {CHAT, "/v1/completions"},
    "connection-refused": {"/v1/health"},
    "model-not-found": {"/v1/v1/models"},
    "multiple-models": {RESPONSES, "/v1/embeddings"},
}
# vLLM's own parameters in the body.
FIELDS = {
    "provider-options": "use_beam_search",
    "json-schema-constraints": "guided_json",
    "regex-patterns": "guided_regex",
    "choice-constraints": "guided_choice",
}
SCRIPTS = [f"{folder}/{path.name}" for folder in ("sdk4", "sdk7") for path in sorted((EXAMPLES / folder).glob("*.mjs"))]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Ran]]]:
    """All scripts that are asked for, some at a time, in the order of the tests."""
    install_examples()
    logs = tmp_path_factory.mktemp("scripts")
    embedder = ("--embedding-model", str(tiny_model("bert-cls")), "--served-embedding-model-name", EMBEDDER)
    cache = ("--api-key", KEY, "--kv-cache-memory-bytes", "200000000")
    with (
        server(logs / "short.log", "--max-model-len", "112", *cache, *embedder) as short,
        server(logs / "long.log", "--max-model-len", "832", *cache) as long,
        ThreadPoolExecutor(SCRIPTS_AT_ONCE) as pool,
    ):

        def started(script: str) -> Future[Ran]:
            url = long.url if Path(script).stem in LONG else short.url
            settings = {"VLLM_BASE_URL": url, "VLLM_API_KEY": KEY, "VLLM_EMBEDDING_MODEL": EMBEDDER}
            return pool.submit(run, script, **settings)

        wanted = [item.callspec.params.get("script") for item in request.session.items if hasattr(item, "callspec")]
        yield {script: started(script) for script in SCRIPTS if script in wanted}


def asked(script: str) -> set[str]:
    """The paths that a script asks."""
    name = Path(script).stem
    first = CHAT if script.startswith("sdk4") or name in OVER_CHAT else RESPONSES
    return {first if path == RESPONSES else path for path in PATHS.get(name, {first})}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script: str, runs: dict[str, Future[Ran]]):
    ran = runs[script].result()
    assert ran.code == 0, ran.out + ran.err
    for pattern in PRINTS[Path(script).stem]:
        assert re.search(pattern, ran.out), f"no {pattern} in:\n{ran.out}{ran.err}"
    refused = [call for call in ran.calls if call.get("status") != 200]
    if not script.endswith("custom-retry-logic.mjs"):
        assert refused == []
    else:
        assert [call["status"] for call in ran.calls] == [404, 404, 200]
    paths = {call["path"] for call in ran.calls if not call["path"].startswith("/api/")}  # /api/: its own route
    assert paths - ({"/v1/health"} if "load-balancing" in script else set()) == asked(script)


@pytest.mark.parametrize(
    ("script", "field"),
    [(f"{folder}/{name}.mjs", field) for folder in ("sdk4", "sdk7") for name, field in FIELDS.items()],
)
def test_vllms_own_options_reach_the_server(script: str, field: str, runs: dict[str, Future[Ran]]):
    """The SDK drops what it does not know; these scripts bring it there all the same."""
    first, *_ = runs[script].result().calls
    assert f'"{field}":' in first["body"]


def test_every_expectation_is_of_a_script():
    names = {Path(script).stem for script in SCRIPTS}
    assert set(PRINTS) == names
    assert names >= LONG | OVER_CHAT | set(PATHS)
