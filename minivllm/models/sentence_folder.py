"""What sentence-transformers writes into the folder of an embedding model: how a text becomes one vector.

    modules.json                 the steps: Transformer, Pooling, and perhaps Normalize; anything else is refused
    1_Pooling/config.json        which rows of the hidden states count: the first, all, or the last
    sentence_bert_config.json    the longest text it was made for, which may be less than the network's positions

Vectors are L2-normalised whether a Normalize step is there or not, as vLLM does.

Knows no tensor. Called by: engine/llm_engine.py. Twin in vLLM: get_pooling_config and
get_sentence_transformer_tokenizer_config in vllm/transformers_utils/config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minivllm.hub import ModelSource
from minivllm.models.model_folder import read_json, read_json_list, refuse

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SWITCHES: Mapping[str, str] = MappingProxyType(
    {
        "pooling_mode_cls_token": "CLS",
        "pooling_mode_mean_tokens": "MEAN",
        "pooling_mode_lasttoken": "LAST",
    }
)
_STEPS = (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize"))


@dataclass(frozen=True, slots=True)
class SentenceConfig:
    """pooling_type: CLS, MEAN or LAST. max_seq_length: None where nobody says.
    lower_cases: texts are to be written in small letters before they are tokenised."""

    pooling_type: str
    max_seq_length: int | None = None
    lower_cases: bool = False


def read_sentence_config(source: ModelSource, is_encoder: bool) -> SentenceConfig:
    """Without a word in the folder (and for a GGUF): CLS for an encoder, LAST for a decoder.

    Raises ConfigError for a step or a kind of pooling that is not here: left out, it would give other vectors.
    """
    default = "CLS" if is_encoder else "LAST"
    if source.kind != "folder":
        return SentenceConfig(default)
    folder = source.path
    content = read_json(folder / _pooling_folder(folder), "config.json") or {}
    limits = read_json(folder, "sentence_bert_config.json") or {}
    length = limits.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise refuse(
            folder, f"sentence_bert_config.json: max_seq_length must be a number of tokens, got {length!r:.80}"
        )
    return SentenceConfig(_pooling_type(folder, content, default), length, limits.get("do_lower_case") is True)


def _pooling_folder(folder: Path) -> str:
    """Where the pooling is described, according to modules.json."""
    modules = read_json_list(folder, "modules.json")
    if modules is None:
        return "1_Pooling"
    steps = {_step(module): module for module in modules}
    if tuple(steps) not in _STEPS or len(steps) < len(modules):
        raise refuse(
            folder,
            "modules.json must name Transformer and Pooling of sentence_transformers.models, and perhaps Normalize, "
            f"got {', '.join(_step(module) for module in modules)[:200] or 'nothing'}",
            "Use a model of these steps.",
        )
    name = steps["Pooling"].get("path")
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise refuse(folder, f"modules.json: the path of Pooling must be a plain folder name, got {name!r:.80}")
    return name


def _step(module: Any) -> str:
    """sentence_transformers.models.Pooling -> Pooling; anybody else's class keeps its whole name."""
    name = str(module.get("type")) if isinstance(module, dict) else type(module).__name__
    return name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name


def _pooling_type(folder: Path, content: dict[str, Any], default: str) -> str:
    modes = {name for name, is_on in content.items() if name.startswith("pooling_mode_") and is_on is True}
    if not modes:
        return default
    if len(modes) > 1 or not modes <= _SWITCHES.keys():
        raise refuse(
            folder,
            f"1_Pooling/config.json: exactly one of {', '.join(sorted(_SWITCHES))} must be on, "
            f"got {', '.join(sorted(modes))}",
            "Use a model with one of these.",
        )
    return _SWITCHES[modes.pop()]
