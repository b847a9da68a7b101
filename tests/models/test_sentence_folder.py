"""The files of sentence-transformers decide how a text becomes a vector; what is not understood is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minivllm.errors import ConfigError
from minivllm.hub import ModelSource
from minivllm.models.sentence_folder import SentenceConfig, read_sentence_config

MEAN = {"pooling_mode_mean_tokens": True}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def read(folder: Path, is_encoder: bool = True) -> SentenceConfig:
    return read_sentence_config(ModelSource("folder", folder, "m"), is_encoder)


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# ------------------------------------------------------------------ pooling
@pytest.mark.parametrize(
    ("mode", "expected"),
    [("pooling_mode_cls_token", "CLS"), ("pooling_mode_mean_tokens", "MEAN"), ("pooling_mode_lasttoken", "LAST")],
)
def test_the_three_kinds_of_pooling(tmp_path: Path, mode: str, expected: str):
    others = {"pooling_mode_max_tokens": False, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 64}
    write(tmp_path, "1_Pooling/config.json", others | {mode: True})
    assert read(tmp_path).pooling_type == expected


@pytest.mark.parametrize(
    "content",
    [None, {}, {"pooling_mode_mean_tokens": False}, {"pooling_mode_mean_tokens": "true"}],
    ids=["no file", "nothing", "off", "text"],
)
def test_without_a_word_an_encoder_takes_its_first_token_and_a_decoder_its_last(tmp_path: Path, content: Any):
    if content is not None:
        write(tmp_path, "1_Pooling/config.json", content)
    assert read(tmp_path, is_encoder=True) == SentenceConfig("CLS")
    assert read(tmp_path, is_encoder=False) == SentenceConfig("LAST")
    gguf = ModelSource("gguf", tmp_path / "m.gguf", "m")
    assert read_sentence_config(gguf, is_encoder=False) == SentenceConfig("LAST")


@pytest.mark.parametrize(
    "modes",
    [
        ["pooling_mode_max_tokens"],
        ["pooling_mode_cls_token", "pooling_mode_mean_tokens"],
        ["pooling_mode_weightedmean_tokens"],
    ],
    ids=["max", "two", "weighted"],
)
def test_another_kind_of_pooling_or_two_at_once_are_refused(tmp_path: Path, modes: list[str]):
    write(tmp_path, "1_Pooling/config.json", dict.fromkeys(modes, True))
    message = refused(tmp_path)
    assert "exactly one of" in message and f"got {', '.join(sorted(modes))}" in message


# ------------------------------------------------------------------ steps
@pytest.mark.parametrize("num_steps", [2, 3])
def test_modules_say_where_the_pooling_is(tmp_path: Path, num_steps: int):
    modules = [dict(module) for module in MODULES[:num_steps]]
    modules[1]["path"] = "7_Pooling"
    write(tmp_path, "modules.json", modules)
    write(tmp_path, "7_Pooling/config.json", MEAN)
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode_cls_token": True})  # not the one that is named
    assert read(tmp_path).pooling_type == "MEAN"


DENSE = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
FOREIGN = {"idx": 0, "path": "", "type": "custom_st.Transformer"}


@pytest.mark.parametrize(
    ("modules", "shown"),
    [
        ([*MODULES[:2], DENSE], "Dense"),
        ([*MODULES[:2], DENSE, MODULES[2]], "Dense"),
        ([FOREIGN, *MODULES[1:]], "custom_st.Transformer"),
        ([MODULES[1], MODULES[0]], "Pooling, Transformer"),
        (MODULES[:1], "got Transformer"),
        ([*MODULES[:2], MODULES[1]], "Transformer, Pooling, Pooling"),
        ([], "got nothing"),
        ([*MODULES[:2], 5], "int"),
        ([MODULES[0], {**MODULES[1], "type": None}], "None"),
    ],
    ids=["dense", "dense inside", "foreign", "order", "no pooling", "twice", "empty", "number", "null"],
)
def test_a_step_that_is_not_here_is_refused_because_the_vectors_would_be_others(
    tmp_path: Path, modules: list[Any], shown: str
):
    write(tmp_path, "modules.json", modules)
    write(tmp_path, "1_Pooling/config.json", MEAN)
    message = refused(tmp_path)
    assert "modules.json must name Transformer and Pooling" in message and shown in message


@pytest.mark.parametrize("path", ["../other", "/etc", "a/b", "", ".", "..", None, 5], ids=repr)
def test_the_pooling_lies_in_the_folder_itself(tmp_path: Path, path: Any):
    write(tmp_path, "modules.json", [MODULES[0], {**MODULES[1], "path": path}])
    assert "must be a plain folder name" in refused(tmp_path)


def test_modules_are_a_list(tmp_path: Path):
    write(tmp_path, "modules.json", {"0": MODULES[0]})
    assert "modules.json must hold a JSON list, got dict" in refused(tmp_path)


# ------------------------------------------------------------------ limits
def test_the_longest_text_and_small_letters(tmp_path: Path):
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": True})
    assert read(tmp_path) == SentenceConfig("CLS", 256, lower_cases=True)
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": None, "do_lower_case": False})
    assert read(tmp_path) == SentenceConfig("CLS")


@pytest.mark.parametrize("length", [0, -1, "256", 1.5, True, [256]], ids=repr)
def test_a_length_that_is_none_is_refused(tmp_path: Path, length: Any):
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": length})
    assert "max_seq_length must be a number of tokens" in refused(tmp_path)
