"""The format of the committed truth: JSON, one case per line, numbers rounded, every file hashed.

    cases/tiny/<model>.json, cases/default.json   {"provenance": {...}, "cases": [...]}
    MANIFEST.json                                 versions, SHA-256 of every case file and of every tiny model

A case is a dict. `kind` says what it holds:
    greedy        prompt, params, steps, prompt_steps or null, finish_reason, stop_reason
    text          greedy, and prompt_text or messages, and text
    distribution  prompt, logits of the position after it, combinations of params and the probabilities they leave
    embedding     prompt, embedding

`steps` is a dict of equally long lists: token_ids, logprobs (raw, of that token), ranks, gaps (between the best two
*processed* logits: what decides a tie), and, where asked for, top_ids and top_logprobs (the best five, raw).
A rank is an int, or [lowest, highest] where neighbours are closer than the tolerance.

Knows neither torch nor transformers. Called by make.py and by tests/golden.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

GOLDEN_FOLDER = Path(__file__).parent
CASES_FOLDER = GOLDEN_FOLDER / "cases"
MANIFEST = GOLDEN_FOLDER / "MANIFEST.json"
SIGNIFICANT_DIGITS = 7  # of a float32

Case = dict[str, Any]


def case_path(name: str) -> Path:
    """Where a model's cases are: `name` is a tiny model's, or "default"."""
    return CASES_FOLDER / "default.json" if name == "default" else CASES_FOLDER / "tiny" / f"{name}.json"


def rounded(value: Any) -> Any:
    """The same structure with every float cut to SIGNIFICANT_DIGITS."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def write_cases(path: Path, provenance: dict[str, Any], cases: list[Case]) -> None:
    """Write one file, one line per case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(_dump(rounded(case)) for case in cases)
    path.write_text(f'{{"provenance": {_dump(provenance)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")


def read_file(name: str) -> dict[str, Any]:
    """{"provenance": ..., "cases": [...]} of one model. FileNotFoundError when it was never made."""
    content: dict[str, Any] = json.loads(case_path(name).read_text(encoding="utf-8"))
    for case in content["cases"]:
        _restore_ids(case.get("params"))
        for combination in case.get("combinations", []):
            _restore_ids(combination["params"])
    return content


def read_cases(name: str, kind: str | None = None) -> list[Case]:
    """The cases of one model, all or those of one kind."""
    return [case for case in read_file(name)["cases"] if kind in (None, case["kind"])]


def write_manifest(versions: dict[str, str], models: dict[str, dict[str, str]]) -> None:
    """Hash every case file. `models`: name -> hashes of what the cases were computed from."""
    files = {
        path.relative_to(GOLDEN_FOLDER).as_posix(): file_hash(path) for path in sorted(CASES_FOLDER.rglob("*.json"))
    }
    content = {"versions": versions, "models": models, "files": files}
    MANIFEST.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return content


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)


def _restore_ids(params: dict[str, Any] | None) -> None:
    """JSON turns the integer keys of logit_bias into strings."""
    if params and "logit_bias" in params:
        params["logit_bias"] = {int(token_id): bias for token_id, bias in params["logit_bias"].items()}
