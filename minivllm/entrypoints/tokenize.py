"""POST /tokenize and /detokenize: what the model sees of a text or a conversation, and back. GET /tokenizer_info.

Called by app.py. Twin in vLLM: vllm/entrypoints/serve/tokenize/serving.py.
"""

from __future__ import annotations

from flask import Response

from minivllm.entrypoints.answers import json_response
from minivllm.entrypoints.protocol import DetokenizeRequest, TokenizeRequest
from minivllm.entrypoints.service import Service
from minivllm.errors import InvalidRequestError


def tokenize(service: Service, body: TokenizeRequest) -> Response:
    """Raises ClientError."""
    engine = service.engine_named(body.model).engine
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("Send either prompt or messages.", parameter="prompt")
    if body.prompt is not None:
        token_ids = engine.input_processor.encode_text(body.prompt, body.add_special_tokens is not False)
    else:
        token_ids = engine.input_processor.render_chat(
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            add_special_tokens=bool(body.add_special_tokens),
            chat_template_kwargs=body.chat_template_kwargs,
        )["prompt_token_ids"]
    tokenizer = engine.tokenizer
    strings = tokenizer.convert_ids_to_tokens(token_ids) if body.return_token_strs and tokenizer is not None else None
    return json_response(
        {
            "count": len(token_ids),
            "max_model_len": engine.config.model.max_model_len,
            "tokens": token_ids,
            "token_strs": strings,
        }
    )


def detokenize(service: Service, body: DetokenizeRequest) -> Response:
    """Raises ClientError."""
    engine = service.engine_named(body.model).engine
    if engine.tokenizer is None:
        raise InvalidRequestError("This model has no tokenizer.", parameter="tokens")
    token_ids = engine.input_processor.check_token_ids(body.tokens, "tokens", allow_empty=True)
    return json_response({"prompt": engine.decode(token_ids, skip_special_tokens=False)})


def show_tokenizer_info(service: Service) -> Response:
    """The tokenizer's own settings, special tokens and chat template. Raises InvalidRequestError."""
    tokenizer = service.engine.engine.tokenizer
    if tokenizer is None:
        raise InvalidRequestError("This model has no tokenizer.")
    return json_response(tokenizer.info())
