"""Where the answers of a batch go, one line each: as they come, and in the order of the questions at the end.

    standard output      a line as soon as all lines before it are there
    FILE                 FILE.part takes every answer at once, whoever ends first; at the end FILE appears, in order

So an interrupt after hours leaves what was answered, and nobody ever reads half a FILE.

Knows no engine. Called by batch.py. Twin in vLLM: none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from minivllm.cli.terminal import stderr, to_json
from minivllm.errors import ClientError

Answer = dict[str, Any]


class AnswerSink(Protocol):
    """Takes each answer once."""

    def take(self, index: int, answer: Answer) -> None:
        """One answer. index: of its question."""

    def finish(self, answers: list[Answer]) -> None:
        """That was the last one. answers: all, in order."""


class InOrder:
    """For what can only be written on: standard output, a pipe."""

    def __init__(self, sink: TextIO):
        self._sink = sink
        self._waiting: dict[int, Answer] = {}
        self._next = 0

    def take(self, index: int, answer: Answer) -> None:
        self._waiting[index] = answer
        while self._next in self._waiting:
            self._sink.write(f"{to_json(self._waiting.pop(self._next))}\n")
            self._next += 1
        self._sink.flush()

    def finish(self, answers: list[Answer]) -> None:
        """All lines are out."""


class PartThenWhole:
    """For a file of the disk."""

    def __init__(self, file: Path, part: TextIO):
        self._file = file
        self._part = part

    def take(self, index: int, answer: Answer) -> None:
        with _writing(self._file):
            self._part.write(f"{to_json(answer)}\n")
            self._part.flush()

    def finish(self, answers: list[Answer]) -> None:
        """Put them in order beside the part, then rename: FILE is the old one or the new one, whatever happens."""
        whole = self._file.with_name(f"{self._file.name}.tmp")
        with _writing(self._file), whole.open("w", encoding="utf-8") as sink:
            sink.writelines(f"{to_json(answer)}\n" for answer in answers)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(whole, self._file)
        self._part.close()
        os.unlink(self._part.name)


@contextlib.contextmanager
def answer_sink(file: Path | None, standard_output: TextIO) -> Iterator[AnswerSink]:
    """A sink, opened before the work: that a file cannot be written is known early. Raises ClientError."""
    if file is None:
        yield InOrder(standard_output)
        return
    target = file.resolve()  # the file behind a link is meant, not the link
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        with _writing(file):
            special = target.open("w", encoding="utf-8")  # a pipe or a device; a folder is refused here
        with special:
            yield InOrder(special)
        return
    with _open_part(file, target) as part:
        try:
            yield PartThenWhole(target, part)
        except BaseException:
            _tell_what_is_left(part)
            raise


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ClientError(f"cannot write {file}: {error.strerror}", parameter="output") from error


def _open_part(file: Path, target: Path) -> TextIO:
    part_file = target.with_name(f"{target.name}.part")
    with _writing(file):
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        try:
            return part_file.open("x", encoding="utf-8")
        except FileExistsError:
            raise ClientError(
                f"{part_file} is there: the answers of a run that did not end. Move it away, or delete it.",
                parameter="output",
            ) from None


def _tell_what_is_left(part: TextIO) -> None:
    """An empty part is not worth keeping."""
    if part.tell():
        stderr().print(f"the answers so far are in {part.name}", markup=False, soft_wrap=True)
    else:
        os.unlink(part.name)
