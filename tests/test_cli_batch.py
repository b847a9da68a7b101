"""run-batch writes as answers come, and a file appears whole or not at all."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from minivllm.cli.answer_files import answer_sink
from minivllm.errors import ClientError
from tests.command import Run

ANSWERS = [{"custom_id": name, "n": number} for number, name in enumerate("abcd")]


def lines_of(text: str) -> list[str]:
    return [json.loads(line)["custom_id"] for line in text.splitlines()]


def take(sink: Any, *indices: int) -> None:
    for index in indices:
        sink.take(index, ANSWERS[index])


# ------------------------------------------------------------------ standard output
def test_a_line_is_printed_when_all_before_it_are_there():
    out = io.StringIO()
    with answer_sink(None, out) as sink:
        take(sink, 2, 1)
        assert out.getvalue() == ""
        take(sink, 0)
        assert lines_of(out.getvalue()) == ["a", "b", "c"]
        take(sink, 3)
        sink.finish(ANSWERS)
    assert lines_of(out.getvalue()) == ["a", "b", "c", "d"]


# ------------------------------------------------------------------ a file
def test_answers_are_on_the_disk_when_they_come_and_the_file_is_whole_at_the_end(tmp_path: Path):
    target, part = tmp_path / "out", tmp_path / "out.part"
    target.write_text("older")
    with answer_sink(target, io.StringIO()) as sink:
        take(sink, 2, 0)
        assert lines_of(part.read_text()) == ["c", "a"] and target.read_text() == "older"
        take(sink, 3, 1)
        sink.finish(ANSWERS)
    assert lines_of(target.read_text()) == ["a", "b", "c", "d"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_what_was_answered_and_the_older_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target, part = tmp_path / "out", tmp_path / "out.part"
    target.write_text("older")
    with pytest.raises(KeyboardInterrupt), answer_sink(target, io.StringIO()) as sink:
        take(sink, 3, 1)
        raise KeyboardInterrupt
    assert target.read_text() == "older" and lines_of(part.read_text()) == ["d", "b"]
    assert f"the answers so far are in {part}" in capsys.readouterr().err
    with (
        pytest.raises(ClientError, match="out.part is there: the answers of a run that did not end") as caught,
        answer_sink(target, io.StringIO()),
    ):
        pass
    assert caught.value.parameter == "output" and lines_of(part.read_text()) == ["d", "b"]


def test_an_interrupt_before_the_first_answer_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), answer_sink(tmp_path / "out", io.StringIO()):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_end_keeps_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "out"
    target.write_text("older")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ClientError, match="cannot write .*: No space"), answer_sink(target, io.StringIO()) as sink:
        take(sink, 0, 1, 2, 3)
        monkeypatch.setattr(os, "fsync", no_space)
        sink.finish(ANSWERS)
    assert target.read_text() == "older" and len(lines_of((tmp_path / "out.part").read_text())) == 4


def test_the_file_behind_a_link_is_meant(tmp_path: Path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "real" / "file")
    with answer_sink(link, io.StringIO()) as sink:
        take(sink, 0, 1, 2, 3)
        sink.finish(ANSWERS)
    assert link.is_symlink() and lines_of((tmp_path / "real" / "file").read_text()) == ["a", "b", "c", "d"]


def test_a_pipe_is_written_on_in_order(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    with answer_sink(pipe, io.StringIO()) as sink:
        take(sink, 1, 0, 3, 2)
        sink.finish(ANSWERS)
    reader.join()
    assert lines_of(read[0]) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("where", ["no/such/folder", "."], ids=["no folder", "a folder"])
def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path, where: str):
    target = tmp_path / where
    with (
        pytest.raises(ClientError, match="cannot write .*: (No such file|Is a directory)"),
        answer_sink(target, io.StringIO()),
    ):
        pass


# ------------------------------------------------------------------ the command
def test_an_interrupted_batch_says_where_its_answers_are(minivllm: Run, tiny_model: Any, tmp_path: Path):
    """Everything that was answered is there, however long the rest would have taken."""
    body = {"prompt": "the", "temperature": 0, "ignore_eos": True}
    lengths = {"long": 100, "short": 1, "other": 2}
    lines = [
        json.dumps({"custom_id": name, "url": "/v1/completions", "body": {**body, "max_tokens": length}})
        for name, length in lengths.items()
    ]
    (tmp_path / "in").write_text("\n".join(lines))
    target = tmp_path / "out"
    taken = []

    from minivllm.cli import answer_files

    to_json = answer_files.to_json

    def full_after_two(answer: Any) -> str:
        taken.append(answer)
        if len(taken) == 3:
            raise OSError(28, "No space left on device")
        return to_json(answer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_files, "to_json", full_after_two)
        result = minivllm("run-batch", tmp_path / "in", "-o", target, "-m", tiny_model("llama"), "--dtype", "float32")
    assert result.code == 1 and f"the answers so far are in {target}.part" in result.message
    assert f"error: cannot write {target}: No space left on device" in result.message
    assert lines_of((tmp_path / "out.part").read_text()) == ["short", "other"] and not target.exists()
