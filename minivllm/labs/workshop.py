"""Files of a lab: the exercise that a student gets, and the function in the file that comes back.

Knows no example. Called by lab.py and cli/labs.py. Twin in vLLM: none.
"""

from __future__ import annotations

import re
import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from minivllm.errors import ClientError

TO_WRITE = re.compile(r"^( *)# --- your code\n.*?^ *# --- end\n", re.DOTALL | re.MULTILINE)
MARKS = re.compile(r"^ *# --- (your code|end)\n", re.MULTILINE)
SECONDS_TO_LOAD = 20.0  # a file may import torch
NOT_WRITTEN = 'raise NotImplementedError("your code")'

Function = Callable[..., Any]


def solution(name: str) -> str:
    """Source of the solved exercise."""
    text = resources.files("minivllm.labs.exercises").joinpath(f"{name}.py").read_text(encoding="utf-8")
    return MARKS.sub("", text)


def skeleton(name: str) -> str:
    """Source of the exercise: the solution without the lines between the marks."""
    text = resources.files("minivllm.labs.exercises").joinpath(f"{name}.py").read_text(encoding="utf-8")
    return TO_WRITE.sub(rf"\1{NOT_WRITTEN}\n", text)


def start(name: str, folder: Path) -> Path:
    """Write NAME.py into the folder; ClientError where something of that name is there already."""
    path = folder / f"{name}.py"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(skeleton(name))
    except FileExistsError:
        raise ClientError(f"{path} is there already, and nothing is overwritten. Rename it to start anew.") from None
    except OSError as error:
        raise ClientError(f"cannot write {path}: {error.strerror}") from None
    return path


def function_in(source: str, path: str, name: str) -> Function:
    """The function called `name` that the source defines. `path` is what tracebacks say. Raises ClientError with the
    line that Python stumbles over."""
    module = types.ModuleType(Path(path).stem)
    module.__file__ = path
    try:
        with time_limit(SECONDS_TO_LOAD):
            exec(compile(source, path, "exec"), module.__dict__)
    except TooSlow:
        raise ClientError(f"Python is not through with {path} after {SECONDS_TO_LOAD:.0f} seconds.") from None
    except (Exception, SystemExit) as error:
        raise ClientError(f"Python cannot run {path}: {where_it_broke(error, path)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ClientError(f"{path} must define the function {name}, and does not. `minivllm lab start` shows it.")
    return function


def read(path: Path) -> str:
    """The student's file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ClientError(f"there is no file {path}: `minivllm lab start {path.stem}` writes it.") from None
    except (OSError, ValueError) as error:
        raise ClientError(f"cannot read {path}: {error}") from None


def where_it_broke(error: BaseException, path: str) -> str:
    """`IndexError: list index out of range, in line 7`: the last line of the file that was running."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == path:
            line = step.tb_lineno
        step = step.tb_next
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" + (f", in line {line}" if line else "")


class TooSlow(BaseException):
    """Not an Exception, so that an `except Exception` in a student's loop does not eat it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the block when it takes longer. Only in a main thread: elsewhere signals do not come."""

    def stop(signal_number: int, frame: object) -> None:
        raise TooSlow

    try:
        before = signal.signal(signal.SIGALRM, stop)
    except ValueError:  # another thread: no limit
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
