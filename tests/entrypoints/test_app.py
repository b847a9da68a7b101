"""Keys, routes, origins, limits, health: what holds for every endpoint."""

from __future__ import annotations

from typing import Any

import pytest

from minivllm import AsyncEngine, ConfigError
from minivllm.entrypoints.app import OPEN
from minivllm.entrypoints.protocol import BODIES, field_states
from minivllm.entrypoints.service import STUCK_SECONDS, ServerConfig
from tests.engine.test_async_engine import Gate, settle
from tests.entrypoints.helpers import CHAT, COMPLETIONS, HELLO, Web

KEYS = ("first-key", "schlüssel")
OPEN_PATHS = ("/health", "/v1/health", "/ready", "/live", "/ping", "/version")
TINY = {"prompt": "the", "max_tokens": 1, "temperature": 0}


def routes(web: Web) -> list[tuple[str, str, str]]:
    """(endpoint, method, path) of everything there is."""
    return [
        (rule.endpoint, method, rule.rule.replace("<path:name>", "tiny"))
        for rule in web.app.url_map.iter_rules()
        for method in sorted(rule.methods or ())
    ]


# ------------------------------------------------------------------ keys
@pytest.fixture
def locked(engine: AsyncEngine) -> Web:
    return Web(engine, ServerConfig(served_model_names=("tiny",), api_keys=KEYS))


WRONG = [
    {},
    {"Authorization": ""},
    {"Authorization": "first-key"},
    {"Authorization": "Basic first-key"},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer first-ke"},
    {"Authorization": "Bearer first-key-and-more"},
    {"Authorization": "Bearer First-Key"},
    {"Authorization": "Bearer first-key, schl\u00fcssel"},
    {"Authorization": "Bearer " + "x" * 100_000},
    {"Authorization": "Bearer \u00ff\u00fe"},  # not ASCII: compare_digest raises on such a str
    {"X-Api-Key": "first-key"},
]


@pytest.mark.parametrize("headers", WRONG, ids=lambda headers: repr(headers)[:40])
def test_without_a_key_only_the_open_endpoints_answer(locked: Web, headers: dict[str, str]):
    """Default deny: /tokenize is behind the key too, and so is what does not exist."""
    for endpoint, method, path in routes(locked):
        reply = locked.call(method, path, headers=headers)
        if endpoint in OPEN:
            assert reply.status == 200
        else:
            assert reply.status == 401 and reply.headers["WWW-Authenticate"] == "Bearer"
            assert method == "HEAD" or reply.error["code"] == "invalid_api_key"
    for path in ("/nothing", "/v1", "/health/x", "/static/x", "/v1/../health/y"):
        assert locked.get(path, headers=headers).status == 401


def test_the_open_endpoints_are_these(locked: Web):
    assert {path for endpoint, _, path in routes(locked) if endpoint in OPEN} == {*OPEN_PATHS, "/metrics", "/"}


def test_any_of_the_keys_opens_whatever_the_case_of_the_scheme(locked: Web):
    for scheme in ("Bearer", "bearer", "BEARER"):
        for key in KEYS:
            sent = key.encode("utf-8").decode("latin-1")  # as a header arrives
            assert locked.get("/v1/models", headers={"Authorization": f"{scheme} {sent}"}).status == 200
            assert locked.get("/nothing", headers={"Authorization": f"{scheme}  {sent} "}).status == 404


def test_slashes_do_not_lead_around_the_key(locked: Web):
    for path in ("//v1/models", "/v1//models/", "/v1/models//", "/health/../v1/models", "/v1/v1/models"):
        assert locked.get(path).status == 401


def test_without_keys_any_key_is_fine(web: Web):
    """Clients send an empty or an invented key when none is needed."""
    for value in ("Bearer", "Bearer ", "Bearer x", "nonsense"):
        assert web.get("/v1/models", headers={"Authorization": value}).status == 200


@pytest.mark.parametrize(
    "settings",
    [{"port": -1}, {"port": 65536}, {"max_body_bytes": 0}, {"shutdown_timeout_seconds": -1.0}, {"api_keys": ("",)}],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any]):
    """An empty key would have let an empty header in."""
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**settings)
    assert caught.value.parameter and caught.value.parameter in next(iter(settings)).replace("api_keys", "api_key")


# ------------------------------------------------------------------ routes
def test_every_path_answers_with_any_number_of_slashes(web: Web):
    for path in (*OPEN_PATHS, "/v1/models", "/v1/v1/models", "/v1/models/tiny", "/v1/engine/capabilities"):
        expected = web.get(path)
        assert expected.status == 200
        for other in (path + "/", "/" + path, path.replace("/", "//"), path + "///"):
            assert web.get(other).text == expected.text
    assert web.call("POST", "//v1/chat/completions/", {"messages": HELLO, "max_tokens": 1}).status == 200
    assert web.call("POST", "/ping").status == 200


def test_models_are_listed_and_found(web: Web):
    cards = web.get("/v1/models").body
    assert cards["object"] == "list" and [card["id"] for card in cards["data"]] == ["tiny", "alias"]
    assert cards["data"][0]["max_model_len"] == 128
    assert web.get("/v1/models/alias").body == cards["data"][1]
    reply = web.get("/v1/models/other/name")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


def test_without_a_served_name_the_model_has_its_own(engine: AsyncEngine):
    web = Web(engine, ServerConfig())
    (card,) = web.get("/v1/models").body["data"]
    assert card["id"] == card["root"] == "llama"


def test_capabilities_are_the_table_that_requests_are_checked_against(web: Web):
    endpoints = web.get("/v1/engine/capabilities").body["endpoints"]
    assert endpoints == {path: field_states(kind) for path, kind in BODIES.items()}


# ------------------------------------------------------------------ errors
def test_every_error_has_the_one_shape(web: Web):
    """Flask's own are HTML."""
    json_type = {"content_type": "application/json"}
    for expected, reply in (
        (404, web.get("/nothing")),
        (404, web.get("/v1/responses/x")),
        (404, web.chat(model="other")),
        (405, web.get(COMPLETIONS)),
        (405, web.call("DELETE", "/v1/models")),
        (405, web.call("OPTIONS", CHAT)),
        (413, web.call("POST", CHAT, data=b"x" * (2**20 + 1), **json_type)),
        (415, web.call("POST", CHAT, data=b"{}")),
        (415, web.call("POST", CHAT, data=b"{}", content_type="text/plain")),
        (415, web.call("POST", CHAT, data={"messages": "x"})),
        (400, web.call("POST", CHAT, data=b"", **json_type)),
        (400, web.call("POST", CHAT, data=b"[" * 100_000, **json_type)),
        (400, web.call("POST", CHAT, data=b'{"messages": NaN}', **json_type)),
        (400, web.call("POST", CHAT, data=b'{"messages": "\\ud800"}', **json_type)),
        (400, web.call("POST", CHAT, data=b"\xff\xfe", **json_type)),
    ):
        assert (reply.status, bool(reply.error)) == (expected, True)
    assert web.get(COMPLETIONS).headers["Allow"] == "POST"


def test_an_accident_is_a_500_in_the_same_shape(web: Web, monkeypatch: pytest.MonkeyPatch):
    def accident(*_: Any, **__: Any) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(web.service.engine.engine, "render_chat", accident)
    reply = web.chat()
    assert (reply.status, reply.error["type"]) == (500, "internal_error") and "secret" not in reply.text


def test_a_body_of_exactly_the_limit_is_read(engine: AsyncEngine):
    web = Web(engine, ServerConfig(max_body_bytes=2000))
    start, end = b'{"prompt": "the", "max_tokens": 1, "user": "', b'"}'
    for size, status in ((2000, 200), (2001, 413)):
        body = start + b"x" * (size - len(start) - len(end)) + end
        assert web.call("POST", COMPLETIONS, data=body, content_type="application/json").status == status


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/vnd.api+json"])
def test_kinds_of_json_are_json(web: Web, content_type: str):
    assert web.call("POST", "/detokenize", data=b'{"tokens": []}', content_type=content_type).status == 200


# ------------------------------------------------------------------ fields
def test_ignored_fields_are_named_in_a_header_that_cannot_be_broken(web: Web):
    fields: dict[str, Any] = {"temprature": 1, "bad\r\nX-Evil: 1": 1, "ü" * 100: 1, "user": "me", "none": None}
    for extra in ({}, {"stream": True}):
        reply = web.complete(**TINY, **fields, **extra)
        assert reply.headers["X-Minivllm-Ignored"] == f"temprature, bad??X-Evil??1, {'?' * 64}"
        assert "X-Evil" not in reply.headers
    many = web.complete(**TINY, **{f"field{i:04}": 1 for i in range(1000)}).headers["X-Minivllm-Ignored"]
    assert many.endswith("field0015, and 984 more")
    assert "X-Minivllm-Ignored" not in web.complete(**TINY, user="me", store=True, tools=None).headers


# ------------------------------------------------------------------ tokens
def test_tokens_and_back(web: Web, llm: Any):
    tokenizer = llm.get_tokenizer()
    body = web.post("/tokenize", prompt="the value", return_token_strs=True).body
    tokens = tokenizer.encode("the value")
    assert body == {
        "count": len(tokens),
        "max_model_len": 128,
        "tokens": tokens,
        "token_strs": tokenizer.convert_ids_to_tokens(tokens),
    }
    assert web.post("/detokenize", tokens=tokens).body == {"prompt": "the value"}
    expected = llm.llm_engine.render_chat(HELLO)["prompt_token_ids"]
    assert web.post("/tokenize", messages=HELLO).body["tokens"] == expected
    shorter = web.post("/tokenize", messages=HELLO, add_generation_prompt=False).body["tokens"]
    assert shorter == expected[: len(shorter)] and len(shorter) < len(expected)
    assert web.post("/tokenize", prompt="the", add_special_tokens=False).body["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": [5]}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
    ],
    ids=str,
)
def test_bad_tokens_are_refused_by_name(web: Web, path: str, fields: dict[str, Any], param: str):
    reply = web.post(path, **fields)
    assert (reply.status, reply.error["param"]) == (400, param)


# ------------------------------------------------------------------ full, draining, stuck
def test_a_full_queue_is_a_429_with_the_time_to_come_back(gate: Gate, engine: AsyncEngine):
    """Also for one prompt too many in a call: then none of them runs."""
    web = Web(engine)
    streams = [engine.submit("the") for _ in range(engine.max_requests)]
    for reply in (web.complete(**TINY), web.chat(stream=True), web.complete("", temperature="x"), web.get("/ready")):
        assert (reply.status, reply.error["code"], reply.error["type"]) == (429, "queue_full", "rate_limit_error")
        assert reply.headers["Retry-After"] == "1" and reply.headers["Retry-After-Ms"] == "1000"
    assert web.get("/health").status == web.post("/tokenize", prompt="a").status == 200
    for stream in streams:
        stream.close()
    gate.open()
    settle(engine)
    assert engine.num_unfinished_requests == 0
    assert web.complete(["a"] * engine.max_requests, max_tokens=1).status == 200
    assert web.complete(["a"] * (engine.max_requests + 1), max_tokens=100, ignore_eos=True).status == 429
    settle(engine)
    assert engine.num_unfinished_requests == 0


def test_a_draining_server_takes_no_work_and_is_not_ready_but_well(web: Web):
    web.service.draining.set()
    for reply in (web.complete(**TINY), web.chat(stream=True), web.get("/ready")):
        assert (reply.status, reply.error["type"]) == (503, "service_unavailable") and "Retry-After" in reply.headers
    assert web.get("/health").status == web.get("/live").status == web.get("/v1/models").status == 200


def test_work_without_a_step_for_too_long_is_bad_health(gate: Gate, engine: AsyncEngine, monkeypatch: Any):
    web = Web(engine)
    stream = engine.submit("the")
    gate.wait()
    assert web.get("/health").status == 200
    engine._progress_time -= STUCK_SECONDS
    for path in ("/health", "/ping", "/ready"):
        assert web.get(path).status == 503
    assert web.get("/live").status == 200
    gate.open()
    list(stream)
    assert web.get("/health").status == 200


def test_a_rest_is_no_hang(engine: AsyncEngine, gate: Gate):
    """The time of the last step is long ago when the first request after a rest comes in."""
    web = Web(engine)
    engine._progress_time -= 10 * STUCK_SECONDS
    assert web.get("/health").status == 200
    stream = engine.submit("the")
    assert web.get("/health").status == 200
    stream.close()


# ------------------------------------------------------------------ origins
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def test_other_origins_are_off(web: Web):
    headers = {"Origin": "http://a.test"}
    assert "Access-Control-Allow-Origin" not in web.get("/v1/models", headers=headers).headers
    assert web.call("OPTIONS", CHAT, headers={**headers, **PREFLIGHT}).status == 405


@pytest.mark.parametrize("allowed", ["http://a.test", "*"])
def test_an_allowed_origin_is_told_so_with_a_key_needed_or_not(engine: AsyncEngine, allowed: str):
    """A preflight carries no key; an answer without the header would be hidden from the page, errors too."""
    web = Web(engine, ServerConfig(allowed_origins=(allowed,), api_keys=("key",)))
    headers = {"Origin": "http://a.test"}
    reply = web.call("OPTIONS", CHAT, headers={**headers, **PREFLIGHT})
    assert reply.status == 204 and {"POST", "DELETE"} <= set(reply.headers["Access-Control-Allow-Methods"].split(", "))
    assert "Authorization" in reply.headers["Access-Control-Allow-Headers"]
    for found in (reply, web.get("/health", headers=headers), web.get("/v1/models", headers=headers)):
        assert found.headers["Access-Control-Allow-Origin"] == "http://a.test"
    assert web.get("/v1/models", headers=headers).status == 401
    other = web.call("OPTIONS", CHAT, headers={"Origin": "http://b.test", **PREFLIGHT})
    assert (other.status == 204) == (allowed == "*")
