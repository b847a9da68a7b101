"""LlamaIndex's OpenAI-like classes: completion, chat, stream, a forced tool, an object of a class, embeddings.

In an environment of its own (`tox -e llama-index`): it wants an older client of OpenAI's than the others.
"""

from __future__ import annotations

from typing import Any

import openai
import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

from tests.clients.forced import MAX_TOKENS, QUESTION, Temperature, check
from tests.clients.live import LiveServer
from tests.tolerances import UNIT_LENGTH_ATOL

QUESTIONS = [ChatMessage(role="user", content="Name a colour.")]


def model(live: LiveServer, **fields: Any) -> OpenAILike:
    settings = {"model": live.model, "api_key": live.key, "max_tokens": 8, "temperature": 0, "max_retries": 0}
    capable = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 2048}
    return OpenAILike(api_base=live.url, **settings | capable | fields)


def test_chat_whole_and_streamed(live: LiveServer):
    whole = model(live).chat(QUESTIONS)
    pieces = list(model(live).stream_chat(QUESTIONS))
    assert whole.message.content and pieces[-1].message.content == whole.message.content
    assert "".join(piece.delta or "" for piece in pieces) == whole.message.content


def test_completion_whole_and_streamed(live: LiveServer):
    """Without is_chat_model LlamaIndex asks /v1/completions."""
    plain = model(live, is_chat_model=False)
    whole = plain.complete("Red, green,")
    assert whole.text and "".join(piece.delta or "" for piece in plain.stream_complete("Red, green,")) == whole.text


def test_a_forced_tool(live: LiveServer):
    tool = FunctionTool.from_defaults(
        fn=lambda unit, day: f"{day} degrees {unit}", name="temperature", description="How warm", fn_schema=Temperature
    )
    caller = model(live, max_tokens=MAX_TOKENS)
    answer = caller.chat_with_tools([tool], user_msg=QUESTION, tool_choice="temperature")
    (call,) = caller.get_tool_calls_from_response(answer)
    assert call.tool_name == "temperature"
    check(call.tool_kwargs)


def test_an_object_of_a_class(live: LiveServer):
    answer = model(live, max_tokens=MAX_TOKENS, should_use_structured_outputs=True)
    assert isinstance(answer.as_structured_llm(Temperature).complete(QUESTION).raw, Temperature)


def test_embeddings(live: LiveServer):
    embedder = OpenAILikeEmbedding(model_name=live.embedder, api_base=live.url, api_key=live.key, max_retries=0)
    first, second = embedder.get_text_embedding_batch(["the", "and"])
    assert len(first) == live.embedding_size and first != second
    assert embedder.get_text_embedding("the") == pytest.approx(first, abs=UNIT_LENGTH_ATOL)


def test_errors(live: LiveServer):
    with pytest.raises(openai.NotFoundError):
        model(live, model="other").chat(QUESTIONS)
    with pytest.raises(openai.AuthenticationError):
        model(live, api_key="wrong").chat(QUESTIONS)
