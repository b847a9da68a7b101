"""Replay: the requests of a recording once more, each after the same step as then, and what came out differently.

    recording ──▶ make_engine(header, change) ──▶ its events ──▶ a second trace ──▶ compare

Chance is a function of seed and position, and the scheduler knows no clock, so the same requests between the same steps
give the same decisions, blocks, slots and bits: the first difference is a finding. With a changed setting decisions do
differ, and `outcomes` says for each request how far.

Knows no file. Called by cli/tracing.py. Twin in vLLM: none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from minivllm.engine.input_processor import EngineCoreRequest
from minivllm.engine.llm_engine import LLMEngine
from minivllm.errors import ClientError, show
from minivllm.trace.document import Trace, plain
from minivllm.trace.recorder import record
from minivllm.trace.records import Aborted, Added, CacheReset, Event, Step

TIMES = frozenset({"scheduled_seconds", "computed_seconds", "ended_seconds"})
DECISIONS = frozenset({"the step", "decision", "action", "num_scheduled_tokens"})
ABSENT = "nothing"


class Difference(NamedTuple):
    """One field of one step that is not as it was. request_id: None where it is the whole step's."""

    step: int
    request_id: str | None
    field: str
    recorded: Any
    replayed: Any

    @property
    def is_decision(self) -> bool:
        """Somebody computes other tokens; not only other blocks, slots or bits."""
        return self.field in DECISIONS

    def __str__(self) -> str:
        whose = "" if self.request_id is None else f", request {self.request_id}"
        return f"step {self.step}{whose}: {self.field} was {show(self.recorded)}, is {show(self.replayed)}"


class Outcome(NamedTuple):
    """What became of one sequence."""

    num_steps: int  # that computed something for it
    num_preemptions: int
    num_cached_tokens: int  # found at its first admission
    token_ids: list[int]
    finish_reason: str | None


def replay(trace: Trace, change: Mapping[str, Any] | None = None, *, until: int | None = None) -> Trace:
    """Do it again in a new engine. change: settings of LLM that are to be others; until: the last step.

    Raises ClientError for a trace that does not begin with an empty engine, or a setting that is none.
    """
    engine = make_engine(trace.header, change or {})
    with record(engine, num_top=trace.header["num_top"]) as again:
        num_recorded = rerun(engine, trace.events, until)
        while engine.scheduler.has_work and (until is None or _num_steps(engine) < until):
            if not engine.has_unfinished_requests() and _num_steps(engine) >= num_recorded:
                break  # only the worker has yet to hear of those that ended, and then it did not either
            engine.step()
    return again


def rerun(engine: LLMEngine, events: list[Event], until: int | None) -> int:
    """Hand in every request after as many steps as then, sooner where the engine has nothing to do any more.

    Returns the number of recorded steps.
    """
    num_steps = 0
    for event in events:
        if isinstance(event, Step):
            num_steps += 1
            continue
        while _num_steps(engine) < num_steps and engine.scheduler.has_work:
            if until is not None and _num_steps(engine) >= until:
                return until
            engine.step()
        if isinstance(event, Added):
            engine.add_processed(to_request(engine, event))
        elif isinstance(event, Aborted):
            engine.abort_request(event.request_id)
        elif isinstance(event, CacheReset):
            engine.reset_prefix_cache()
    return num_steps


def _num_steps(engine: LLMEngine) -> int:
    return engine.last_step.step if engine.last_step is not None else 0


def make_engine(header: Mapping[str, Any], change: Mapping[str, Any]) -> LLMEngine:
    """An engine like the recorded one. Its pool has as many blocks, or, with another block_size, as many tokens."""
    settings = dict(header["settings"])
    if not settings or not header["is_fresh"]:
        raise ClientError("this trace cannot be replayed: it begins in the middle of an engine's life.")
    for name in change:
        if name not in settings:
            raise ClientError(f"there is no setting {name!r}; there are {', '.join(sorted(settings))}.", parameter=name)
    then = header["engine"]
    num_blocks = then["num_blocks"]
    if "block_size" in change and isinstance(change["block_size"], int) and change["block_size"] > 0:
        num_blocks = (num_blocks - 1) * then["block_size"] // change["block_size"] + 1
    settings |= {"num_gpu_blocks_override": num_blocks, "max_model_len": then["max_model_len"], **change}
    return LLMEngine.from_model(**settings)


def to_request(engine: LLMEngine, added: Added) -> EngineCoreRequest:
    """The request as it was queued."""
    request = EngineCoreRequest(
        added.request_id,
        added.prompt,
        added.prompt_token_ids,
        added.sampling_params,
        eos_token_ids=frozenset(added.eos_token_ids),
        stop_token_ids=frozenset(added.stop_token_ids),
        bad_words_token_ids=added.bad_words_token_ids,
        cache_salt=added.cache_salt,
        priority=added.priority,
        seed=added.seed,
        max_tokens=added.max_tokens,
    )
    if added.sampling_params is not None and added.sampling_params.structured_outputs is not None:
        request.grammar = engine.structured_output.compile(added.sampling_params.structured_outputs)
    return request


# ------------------------------------------------------------------ what is different
def compare(recorded: Trace, replayed: Trace, *, until: int | None = None) -> Iterator[Difference]:
    """Every field of every step that differs, first ones first; times are not compared."""
    then, now = recorded.steps[:until], replayed.steps[:until]
    for old, new in zip(then, now, strict=False):
        yield from _compare_steps(old, new)
    if len(then) != len(now):
        longer, names = max(then, now, key=len), ("a step", ABSENT)
        number = longer[min(len(then), len(now))].number
        yield Difference(number, None, "the step", *(names if longer is then else reversed(names)))


def _compare_steps(old: Step, new: Step) -> Iterator[Difference]:
    rows = [{row.request_id: plain(row) for row in step.rows} for step in (old, new)]
    fields = [{name: value for name, value in plain(step).items() if name not in TIMES} for step in (old, new)]
    for request_id in dict.fromkeys([*rows[0], *rows[1]]):
        if not (request_id in rows[0] and request_id in rows[1]):
            reasons = [row.reason if (row := step.row(request_id)) is not None else ABSENT for step in (old, new)]
            yield Difference(old.number, request_id, "decision", *reasons)
            continue
        for name, was, now in _differing(rows[0][request_id], rows[1][request_id]):
            yield Difference(old.number, request_id, name, was, now)
    for name, was, now in _differing(*fields):
        if name != "rows" or list(rows[0]) != list(rows[1]):
            yield Difference(old.number, None, name, *((was, now) if name != "rows" else map(list, rows)))


def _differing(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Draws are compared one by one: their tokens first, then their bits."""
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name, ABSENT), new.get(name, ABSENT)
        if was != now and name == "draws" and ABSENT not in (was, now) and len(was) == len(now):
            for one, other in zip(was, now, strict=True):
                yield from ((f"draws.{key}", a, b) for key, a, b in _differing(one, other))
        elif was != now:
            yield name, was, now


def outcomes(trace: Trace) -> dict[str, Outcome]:
    """{sequence: what became of it}."""
    found = {}
    for request_id in trace.request_ids:
        rows = [row for step in trace.steps if (row := step.row(request_id)) is not None]
        computing = [row for row in rows if row.num_scheduled_tokens]
        found[request_id] = Outcome(
            len(computing),
            sum(row.action == "preempt" for row in rows),
            len(computing[0].prefix_hits) * trace.block_size if computing else 0,
            [token_id for row in rows for token_id in row.new_token_ids],
            next((row.finish_reason for row in rows if row.finish_reason), None),
        )
    return found
