"""OpenAI's client for Python against the server as a process; tests/entrypoints use it throughout."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.clients.forced import MAX_TOKENS, QUESTION, Temperature, check
from tests.clients.live import LiveServer
from tests.tolerances import UNIT_LENGTH_ATOL

MESSAGES = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url, api_key=live.key, max_retries=0) as client:
        yield client


def test_chat_whole_and_streamed(client: openai.OpenAI, live: LiveServer):
    """The client's own accumulator wants an answer that ends by itself: this one must, by its form."""
    request = {
        "model": live.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    whole = client.chat.completions.parse(**request, response_format=Temperature)
    with client.chat.completions.stream(**request, response_format=Temperature) as stream:
        kinds = {event.type for event in stream}
        gathered = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert gathered.choices[0].message.content == whole.choices[0].message.content
    assert gathered.choices[0].message.parsed == whole.choices[0].message.parsed


def test_a_parsed_call(client: openai.OpenAI, live: LiveServer):
    answer = client.chat.completions.parse(
        model=live.model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        tools=[openai.pydantic_function_tool(Temperature, name="temperature")],
        tool_choice={"type": "function", "function": {"name": "temperature"}},
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Temperature)


def test_responses_whole_streamed_and_parsed(client: openai.OpenAI, live: LiveServer):
    request = {"model": live.model, "input": QUESTION, "temperature": 0, "max_output_tokens": MAX_TOKENS}
    whole = client.responses.parse(**request, text_format=Temperature)
    check(whole.output_parsed.model_dump())
    with client.responses.stream(**request, text_format=Temperature) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == whole.output_text


def test_embeddings(client: openai.OpenAI, live: LiveServer):
    packed, plain = (
        client.embeddings.create(model=live.embedder, input=["the", "and"], **fields).data
        for fields in ({}, {"encoding_format": "float"})
    )
    assert [len(item.embedding) for item in packed] == [live.embedding_size] * 2
    assert packed[1].embedding == pytest.approx(plain[1].embedding, abs=UNIT_LENGTH_ATOL)


def test_errors(client: openai.OpenAI, live: LiveServer):
    request = {"model": live.model, "messages": MESSAGES, "max_tokens": 8}
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**request | {"model": "other"})
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**request, top_p=7)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(**request)
