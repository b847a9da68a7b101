"""LangChain's OpenAI classes: chat whole and streamed, forced tools, structured output, Responses, embeddings."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.clients.forced import MAX_TOKENS, QUESTION, Temperature, check
from tests.clients.live import LiveServer
from tests.tolerances import UNIT_LENGTH_ATOL


def chat(live: LiveServer, **fields: Any) -> ChatOpenAI:
    settings = {"max_tokens": 8, "temperature": 0, "max_retries": 0, "api_key": live.key, "model": live.model}
    return ChatOpenAI(base_url=live.url, **settings | fields)


@tool(args_schema=Temperature)
def temperature(unit: str, day: int) -> str:
    """How warm it is on a day"""
    return f"{day} degrees {unit}"


def test_invoke(live: LiveServer):
    answer = chat(live).invoke("Name a colour.")
    assert answer.text and answer.response_metadata["finish_reason"] in ("stop", "length")
    usage = answer.usage_metadata
    assert usage and usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0


def test_stream(live: LiveServer):
    """Usage comes only to those who ask: LangChain does so of itself only at OpenAI's own address."""
    whole, *pieces = chat(live, stream_usage=True).stream("Name a colour.")
    for piece in pieces:
        whole = whole + piece
    expected = chat(live).invoke("Name a colour.")
    assert len(pieces) > 1 and whole.text == expected.text
    assert whole.usage_metadata and expected.usage_metadata
    assert whole.usage_metadata["output_tokens"] == expected.usage_metadata["output_tokens"]


def test_batch(live: LiveServer):
    first, second = chat(live).batch(["Name a colour.", "Name a town."])
    assert first.text and second.text and first.text != second.text


@pytest.mark.parametrize("use_responses_api", [False, True], ids=["chat", "responses"])
def test_a_forced_tool_is_called_and_its_result_is_taken_back(live: LiveServer, use_responses_api: bool):
    model = chat(live, max_tokens=MAX_TOKENS, use_responses_api=use_responses_api)
    question = HumanMessage(QUESTION)
    answer = model.bind_tools([temperature], tool_choice="temperature").invoke([question])
    (call,) = answer.tool_calls
    assert call["name"] == "temperature" and call["id"]
    check(call["args"])
    result = temperature.invoke(call)
    assert isinstance(result, ToolMessage)
    after = model.bind_tools([temperature], tool_choice="none").invoke([question, answer, result])
    assert after.text and not after.tool_calls


def test_a_forced_tool_streams(live: LiveServer):
    model = chat(live, max_tokens=MAX_TOKENS).bind_tools([temperature], tool_choice="any", parallel_tool_calls=False)
    first, *pieces = list(model.stream(QUESTION))
    for piece in pieces:
        first = first + piece
    (call,) = first.tool_calls
    assert call["name"] == "temperature"
    check(call["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(live: LiveServer, method: Any):
    answer = chat(live, max_tokens=MAX_TOKENS).with_structured_output(Temperature, method=method).invoke(QUESTION)
    assert isinstance(answer, Temperature)


def test_json_mode(live: LiveServer):
    """Any JSON object: what is in it is the model's affair, so only the parser's verdict counts."""
    model = chat(live, max_tokens=200).with_structured_output(None, method="json_mode", include_raw=True)
    answer = model.invoke('Answer with the JSON object {"a": 1} and nothing else.')
    finished = answer["raw"].response_metadata["finish_reason"] == "stop"
    assert isinstance(answer["parsed"], dict) if finished else answer["parsing_error"]


def test_embeddings(live: LiveServer):
    """The length check would cut texts into token ids of OpenAI's own vocabulary."""
    embeddings = OpenAIEmbeddings(
        base_url=live.url, api_key=live.key, model=live.embedder, check_embedding_ctx_length=False, max_retries=0
    )
    first, second = embeddings.embed_documents(["the", "and"])
    assert len(first) == len(second) == live.embedding_size and first != second
    assert embeddings.embed_query("the") == pytest.approx(first, abs=UNIT_LENGTH_ATOL)


def test_errors_are_of_the_class_that_the_client_has_for_them(live: LiveServer):
    with pytest.raises(openai.NotFoundError):
        chat(live, model="other").invoke("hi")
    with pytest.raises(openai.AuthenticationError):
        chat(live, api_key="wrong").invoke("hi")
    with pytest.raises(openai.BadRequestError):
        chat(live, top_p=7).invoke("hi")
