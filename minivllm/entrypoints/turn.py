"""One turn of a conversation: what the model is shown, what its answer must look like, and how the answer is read.

    messages, tools, template options ── begin_turn ──▶ Turn: prompt + sampling fields ──▶ the engine
    text of one choice, as it grows ── MessageReader ──▶ [ContentDelta | ReasoningDelta | ToolCallDelta]

A whole answer is read by the same reader, in one piece (`read_message`): so a stream and a body never differ.

    tool_choice   the model is told about      its answer is, by grammar, behind its thinking
    none          no tool                      free, or what structured_outputs asks for
    auto          all tools                    the same, or calls, or text with calls behind it
    required      all tools                    one call or more
    named         this tool                    its arguments alone, without a mark

Knows no HTTP and no shape of the wire. Called by chat.py and responses.py. Twin in vLLM:
vllm/entrypoints/openai/chat_completion/serving.py (where it is part of the serving class) and vllm/parser/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from minivllm.engine.input_processor import PromptType, normalize_messages
from minivllm.engine.tokenizer import Tokenizer
from minivllm.entrypoints.deltas import ContentDelta, Delta, Message, ReasoningDelta, ToolCall, ToolCallDelta
from minivllm.entrypoints.reasoning import THINK_MARKS, ReasoningReader, thinking_mode
from minivllm.entrypoints.service import Service
from minivllm.entrypoints.tool_calls import CallReader, NamedReader, ToolFormat, find_format
from minivllm.entrypoints.tool_choice import ToolChoice, read_choice
from minivllm.entrypoints.tool_prompt import with_short_ids, with_tools, without_calls
from minivllm.errors import InvalidRequestError
from minivllm.sampling_params import AnswerForm, CallForm, StructuredOutputsParams

__all__ = [
    "ContentDelta",
    "Delta",
    "Message",
    "MessageReader",
    "ReasoningDelta",
    "ToolCall",
    "ToolCallDelta",
    "Turn",
    "begin_turn",
    "read_message",
]
NO_SYSTEM_ROLE = "System role not supported"  # what templates without one say


# ------------------------------------------------------------------ reading
class MessageReader:
    """Reads the answer of one choice. Without arguments it takes everything for content.

    Args:
        thinking: what thinking_mode said.
        calls: reads what follows the thinking.
        is_named: the call was asked for by name.
    """

    def __init__(self, thinking: str = "none", calls: CallReader | NamedReader | None = None, is_named: bool = False):
        self._reasoning = ReasoningReader(thinking)
        self._calls = calls
        self._is_named = is_named

    @property
    def finish_reason(self) -> str | None:
        """Replaces the engine's "stop" when the answer ended in something else; known when all was read."""
        if self._calls is None or not self._calls.num_calls:
            return None
        if self._calls.is_cut:  # by a stop string: the arguments are not whole
            return "length"
        return None if self._is_named else "tool_calls"

    def advance(self, text: str, is_last: bool) -> list[Delta]:
        """What new text means. is_last: nothing follows, so nothing may be held back."""
        thinking, rest = self._reasoning.advance(text, is_last)
        found: list[Delta] = [ReasoningDelta(thinking)] if thinking else []
        if self._calls is not None:
            return found + self._calls.advance(rest, is_last)
        return [*found, ContentDelta(rest)] if rest else found


def read_message(reader: MessageReader, text: str) -> Message:
    """A complete text as a message."""
    message = Message()
    for delta in reader.advance(text, is_last=True):
        message.add(delta)
    return message


# ------------------------------------------------------------------ the turn
@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """sampling_fields: what the turn itself asks of the sampler, such as the form of the answer."""

    prompt: PromptType
    sampling_fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    thinking: str = "none"
    choice: ToolChoice = ToolChoice("none")
    shape: ToolFormat | None = None

    def new_reader(self) -> MessageReader:
        """One for each choice: a reader remembers what it has seen."""
        names = list(self.choice.schemas)
        if self.choice.kind == "named":
            return MessageReader(self.thinking, NamedReader(names[0]), is_named=True)
        calls = None if self.shape is None else CallReader(self.shape, names)
        return MessageReader(self.thinking, calls)


def begin_turn(
    service: Service,
    messages: Any,
    *,
    tools: Sequence[dict[str, Any]] = (),
    tool_choice: str | dict[str, Any] | None = None,
    parallel_tool_calls: bool = True,
    structured_outputs: StructuredOutputsParams | None = None,
    **template_options: Any,
) -> Turn:
    """Decide what one answer must be. Raises ClientError.

    Args:
        tools: as chat has them: {"type": "function", "function": {name, description, parameters, strict}}.
        tool_choice: "auto" (also None), "none", "required", or {"type": "function", "function": {"name": ...}}.
        parallel_tool_calls: False: at most one call.
        structured_outputs: the form of the answer's text; calls and thinking are not text.
        template_options: as InputProcessor.render_chat takes them.
    """
    choice = read_choice(tools, tool_choice, parallel_tool_calls)
    engine, tokenizer = service.engine.engine, service.engine.engine.tokenizer
    if tokenizer is None:
        return Turn(engine.render_chat(messages, **template_options))  # refused, in the engine's words
    template = tokenizer.tool_template or ""
    shape, is_known = find_format(service.config.tool_call_parser, template)
    is_known = is_known and tokenizer.template_traits(with_tools=True).knows_tools
    shown = _shown_messages(tokenizer, messages, choice, shape, is_known)
    if is_known and choice.offered:
        template_options["tools"] = list(choice.offered)
    prompt: Any = engine.render_chat(shown, **template_options)
    if template_options.get("continue_final_message"):
        thinking = _continued_thinking(messages)
    else:
        thinking = thinking_mode(service.config.reasoning_parser, template, prompt["prompt"])
    fields = _sampling_fields(tokenizer, choice, shape, thinking, structured_outputs)
    return Turn(prompt, fields, thinking, choice, shape if choice.kind in ("auto", "required") else None)


def _continued_thinking(messages: Any) -> str:
    """A message that is continued says itself whether it is still thinking."""
    content = messages[-1].get("content")
    text = content if isinstance(content, str) else ""
    opened, closed = THINK_MARKS
    return "begun" if opened in text and closed not in text else "none"


def _shown_messages(tokenizer: Tokenizer, messages: Any, choice: ToolChoice, shape: ToolFormat, is_known: bool) -> Any:
    """The messages as this model's template can show them, tools and earlier calls included."""
    if isinstance(messages, list | tuple):
        messages = [_with_one_reasoning(message) for message in messages]
    if is_known and not shape.id_chars:
        return messages
    traits = dataclasses.replace(tokenizer.template_traits(), loops_over_content=False)
    normalized = normalize_messages(messages, traits)
    if is_known:
        return with_short_ids(normalized, shape.id_chars)
    shown = without_calls(normalized)
    if choice.offered:
        shown = with_tools(shown, choice.offered, NO_SYSTEM_ROLE not in (tokenizer.chat_template or ""))
    return shown


def _with_one_reasoning(message: Any) -> Any:
    """Thinking has two names on the wire; templates know one."""
    if isinstance(message, dict) and isinstance(message.get("reasoning"), str) and "reasoning_content" not in message:
        return {**message, "reasoning_content": message["reasoning"]}
    return message


# ------------------------------------------------------------------ the form of the answer
def _sampling_fields(
    tokenizer: Tokenizer,
    choice: ToolChoice,
    shape: ToolFormat,
    thinking: str,
    structured_outputs: StructuredOutputsParams | None,
) -> dict[str, Any]:
    marks = _special_marks(tokenizer, choice, shape, thinking)
    fields: dict[str, Any] = {"skip_special_tokens": False} if marks else {}
    form: dict[str, Any] = {"thinking": "begun" if thinking == "begun_or_not" else thinking, "think_marks": THINK_MARKS}
    if choice.kind == "named":
        calls = tuple(CallForm("", schema, label=label) for schema, label in choice.schemas.values())
        return {**fields, "structured_outputs": AnswerForm(**form, allows_text=False, calls=calls)}
    if choice.kind == "none":
        if structured_outputs is not None and thinking == "none":
            return {"structured_outputs": structured_outputs}
        if structured_outputs is None and not marks:
            return {}
        return {**fields, "structured_outputs": AnswerForm(**form, text=structured_outputs)}
    if choice.kind == "auto":
        if structured_outputs is not None and shape.only_at_start:
            raise InvalidRequestError(
                "tools cannot be combined with a form of the text for this model: its calls begin as a JSON text may. "
                "Set tool_choice, or leave one of the two out.",
                parameter="tools",
            )
        form["text"] = structured_outputs
    form |= shape.answer_fields(choice.schemas) | {"allows_text": choice.kind == "auto", "max_calls": choice.max_calls}
    return {**fields, "structured_outputs": AnswerForm(**form)}


def _special_marks(tokenizer: Tokenizer, choice: ToolChoice, shape: ToolFormat, thinking: str) -> list[str]:
    """The marks in this answer that are special tokens: they must be shown to the reader, and no others drawn."""
    marks = "" if thinking == "none" else "".join(THINK_MARKS)
    if choice.kind in ("auto", "required"):
        marks += shape.opening + shape.before + shape.between + shape.after + shape.closing
    special = [tokenizer.added_tokens[token_id] for token_id in tokenizer.all_special_ids]
    return [token for token in special if token in marks]
