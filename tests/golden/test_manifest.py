"""The committed truth is complete, untouched and small, and its models are the ones this machine generates."""

from pathlib import Path

import pytest

from golden import cases as files
from golden.cases import CASES_FOLDER, GOLDEN_FOLDER, file_hash, read_cases, read_file, read_manifest
from golden.tiny import DECODERS, TINY, config_hash, weights_hash, write_tiny_model

MAX_BYTES = 2_500_000


def test_every_case_file_has_the_hash_of_the_manifest() -> None:
    expected = read_manifest()["files"]
    found = {path.relative_to(GOLDEN_FOLDER).as_posix(): file_hash(path) for path in CASES_FOLDER.rglob("*.*")}
    assert found == expected


def test_every_model_has_its_cases_and_the_whole_is_small() -> None:
    assert set(read_manifest()["models"]) == {*TINY, "default"}
    assert all(files.case_path(name).exists() for name in (*TINY, "default"))
    assert sum(path.stat().st_size for path in CASES_FOLDER.rglob("*.json")) < MAX_BYTES


def test_every_file_says_where_it_comes_from() -> None:
    manifest = read_manifest()
    for name in (*TINY, "default"):
        provenance = read_file(name)["provenance"]
        assert provenance["hashes"] == manifest["models"][name], name
        assert provenance["command"] == f"python -m golden.make --only {name}"
        assert {"transformers", "torch", "tokenizers", "numpy"} <= provenance["versions"].keys()


@pytest.mark.parametrize("name", TINY)
def test_the_cases_were_computed_from_the_model_that_this_machine_generates(name: str, tmp_path: Path) -> None:
    folder = write_tiny_model(name, tmp_path / name)
    expected = read_manifest()["models"][name]
    assert {"config": config_hash(folder), "weights": weights_hash(folder)} == expected


@pytest.mark.parametrize("name", DECODERS)
def test_the_cases_take_every_path_of_the_sampler(name: str) -> None:
    cases = read_cases(name)
    fields = {field for case in cases for field in case.get("params", {})}
    fields |= {field for case in cases for entry in case.get("combinations", []) for field in entry["params"]}
    assert fields >= {
        "allowed_token_ids",
        "bad_words",
        "frequency_penalty",
        "logit_bias",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "repetition_penalty",
        "stop_token_ids",
        "temperature",
        "top_k",
        "top_p",
    }
    ends = {(case["finish_reason"], case["stop_reason"] is None) for case in cases if "finish_reason" in case}
    assert ends == {("length", True), ("stop", True), ("stop", False)}  # length, eos, a stop token
    assert {len(case["prompt"]) for case in cases if case.get("prompt_steps")} == {1, 7, 15, 16, 17, 33, 63}
