"""Lab: an exercise with its examples, and the check that says what is wrong with an answer.

    for each example, small ones first:   student's outcome == engine's outcome?
    the first that differs is shown:      the call, expected, got, what it is about
    and explained:                        which mistake gives the same wrong outcome here, and agrees most elsewhere?
                                          (the solution with a line changed, run on the same examples)

Knows no exercise and no terminal. Called by cli/labs.py; the labs are in the modules beside it. Twin in vLLM: none.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minivllm.labs import workshop
from minivllm.labs.workshop import Function, TooSlow

SECONDS_PER_EXAMPLE = 5.0  # they take microseconds; only an endless loop gets here
SECONDS_PER_CHECK = 30.0
CLOSE = 1e-9  # two floats that differ less, relative or absolute, are the same
SHOWN_CHARACTERS = 300  # of one value in a message
ENDLESS = "does not end"
MOMENT_SECONDS = 0.1  # what is left to an example when the others took all of the time

Arguments = dict[str, Any]
Outcome = dict[str, Any]  # "returns" and each argument that the function may change, or "error"


@dataclass(frozen=True)
class Example:
    """One call. `about` says what it shows, and hints at what to think about."""

    about: str
    arguments: Arguments


@dataclass(frozen=True)
class Mistake:
    """A common wrong solution: `old`, which stands once in the solution, is `new`; and what to tell who wrote that."""

    old: str
    new: str
    message: str


@dataclass(frozen=True)
class Lab:
    """Args:
    name: of the lab and of its file. function: what the file must define.
    title: one line for the list. engine: the files of the engine that do it.
    examples: yields the examples, the same ones each time. expected: what the engine makes of an example's arguments.
    changes: arguments that the function changes in place; they belong to the outcome.
    once: arguments that are handed over as iterators, to be read once.
    """

    name: str
    function: str
    title: str
    engine: str
    examples: Callable[[], Iterable[Example]]
    expected: Callable[..., Outcome]
    mistakes: tuple[Mistake, ...]
    changes: tuple[str, ...] = ()
    once: tuple[str, ...] = ()

    def solution(self) -> Function:
        """The function of the solved exercise."""
        return workshop.function_in(workshop.solution(self.name), f"{self.name}.py (solution)", self.function)

    def wrong(self, mistake: Mistake) -> Function:
        """The solution with a mistake in it."""
        source = workshop.solution(self.name)
        if source.count(mistake.old) != 1:
            raise ValueError(f"{self.name}: the solution must contain {mistake.old!r} once")
        return workshop.function_in(source.replace(mistake.old, mistake.new), f"{self.name}.py (wrong)", self.function)

    def outcome(
        self, function: Function, arguments: Arguments, path: str = "", seconds: float = SECONDS_PER_EXAMPLE
    ) -> Outcome:
        """What a function makes of (a copy of) the arguments. `path` is the file whose line an error names."""
        own = copy.deepcopy(arguments)
        handed = {name: iter(value) if name in self.once else value for name, value in own.items()}
        try:
            with workshop.time_limit(seconds):
                returned = plain(function(**handed))
        except TooSlow:
            return {"error": f"{ENDLESS}: stopped after {seconds:.1f} seconds"}
        except (Exception, SystemExit) as error:
            return {"error": f"raises {workshop.where_it_broke(error, path)}"}
        return {"returns": returned, **{name: plain(own[name]) for name in self.changes}}


@dataclass(frozen=True)
class Verdict:
    """The result of a check; the fields from `example` on are of the first example that failed."""

    name: str
    num_passed: int
    num_examples: int
    example: str = ""
    call: str = ""
    expected: str = ""
    got: str = ""
    message: str = ""  # what to think about
    engine: str = ""

    @property
    def passed(self) -> bool:
        """Whether every example was right."""
        return self.num_passed == self.num_examples


def check(lab: Lab, function: Function, path: str = "") -> Verdict:
    """Compare the function with the engine on every example of the lab."""
    examples = list(lab.examples())
    expected = [lab.expected(**copy.deepcopy(example.arguments)) for example in examples]
    found: list[Outcome] = []
    deadline = time.monotonic() + SECONDS_PER_CHECK
    for example in examples:
        seconds = min(SECONDS_PER_EXAMPLE, max(MOMENT_SECONDS, deadline - time.monotonic()))
        found.append(lab.outcome(function, example.arguments, path, seconds))
        if ENDLESS in str(found[-1].get("error")):  # one is enough
            break
    right = [same(one, other) for one, other in zip(found, expected, strict=False)]
    if all(right) and len(right) == len(examples):
        return Verdict(lab.name, len(examples), len(examples), engine=lab.engine)
    first = right.index(False)
    example = examples[first]
    if "NotImplementedError" in str(found[first].get("error")):
        message = f"It is not written yet. Replace the line `{workshop.NOT_WRITTEN}`; the example shows what is wanted."
    elif ENDLESS in str(found[first].get("error")):
        message = f"It never ends here. Is there a loop whose condition nothing changes? The example: {example.about}"
    else:
        message = explain(lab, examples, found, expected[first], first) or example.about
    return Verdict(
        lab.name,
        sum(right),
        len(examples),
        example.about,
        call(lab.function, example.arguments),
        in_words(expected[first], found[first]),
        in_words(found[first], expected[first]),
        message,
        lab.engine,
    )


def explain(lab: Lab, examples: list[Example], found: list[Outcome], expected: Outcome, first: int) -> str:
    """The message of the mistake that explains most of what is wrong at example `first`, and agrees most often
    elsewhere; empty when none explains anything. "Perhaps" when it does not agree everywhere: a file may have two."""
    best, message = (0, 0), ""
    for mistake in lab.mistakes:
        wrong = lab.wrong(mistake)
        theirs = [lab.outcome(wrong, example.arguments) for example in examples[: len(found)]]
        num_explained = explained(theirs[first], found[first], expected)
        num_agreeing = sum(same_kind(one, other) for one, other in zip(theirs, found, strict=True))
        if num_explained and (num_explained, num_agreeing) > best:
            best = num_explained, num_agreeing
            message = mistake.message if num_agreeing == len(found) else f"Perhaps this: {mistake.message}"
    return message


def explained(theirs: Outcome, found: Outcome, expected: Outcome) -> int:
    """How many parts of the outcome are wrong in the same way."""
    if "error" in theirs or "error" in found or overflowed(found):
        return int(same_kind(theirs, found))
    return sum(same(theirs[part], found[part]) for part in found if not same(found[part], expected[part]))


# ------------------------------------------------------------------ values
def plain(value: Any) -> Any:
    """Lists and numbers instead of tuples, tensors and arrays, so that they compare and print."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def same(one: Any, other: Any) -> bool:
    """Equal, with floats that may differ by rounding, and NaN equal to itself."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(itertools.starmap(same, zip(one, other, strict=True)))
    if isinstance(one, float) and isinstance(other, float | int) or isinstance(other, float) and isinstance(one, int):
        return (one != one and other != other) or math.isclose(one, other, rel_tol=CLOSE, abs_tol=CLOSE)
    return type(one) is type(other) and bool(one == other)


def same_kind(one: Outcome, other: Outcome) -> bool:
    """`same`; of errors only the type counts, and an overflow may be an error or an inf, as the library has it."""
    if overflowed(one) and overflowed(other):
        return True
    if "error" in one and "error" in other:
        return str(one["error"]).split(":")[0] == str(other["error"]).split(":")[0]
    return same(one, other)


def overflowed(outcome: Outcome) -> bool:
    """An arithmetic error, or a number that is not finite."""
    if "error" in outcome:
        return str(outcome["error"]).startswith(("raises OverflowError", "raises ZeroDivisionError"))
    return any(number in repr(outcome["returns"]) for number in ("nan", "inf"))


# ------------------------------------------------------------------ words
def call(function: str, arguments: Arguments) -> str:
    """The call as one would write it."""
    return f"{function}({', '.join(f'{name}={short(value)}' for name, value in arguments.items())})"


def in_words(outcome: Outcome, other: Outcome) -> str:
    """`returns [3, 7], leaves free_queue = [5]`: what is returned, and those changes that differ."""
    if "error" in outcome:
        return str(outcome["error"])
    parts = [f"returns {short(outcome['returns'])}"]
    parts += [
        f"leaves {name} = {short(value)}"
        for name, value in outcome.items()
        if name != "returns" and not same(value, other.get(name))
    ]
    return ", ".join(parts)


def short(value: Any) -> str:
    """Its repr; floats with six digits, bytes with their first ones, the middle of what is long left out."""
    text = repr(_rounded(value))
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, bytes):
        return value[:4].hex()
    if isinstance(value, Mapping):
        return {_rounded(key): _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value] if isinstance(value, list) else tuple(map(_rounded, value))
    return value


def small_ones_first(examples: Iterable[Example]) -> Iterator[Example]:
    """Sorted by the length of their call, so that the first that fails is easy to follow."""
    yield from sorted(examples, key=lambda example: len(repr(example.arguments)))
