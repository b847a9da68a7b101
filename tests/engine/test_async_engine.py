"""Many callers, one engine thread: nobody's tokens mix, a gone caller leaves nothing behind, a dead engine says so.

Where a test needs the engine in a certain state it stands at a gate: one step at a time, so that nothing is a matter
of luck. `settle` waits until the engine thread has carried out everything that was asked before.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minivllm import (
    LLM,
    AsyncEngine,
    ClientError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    SamplingParams,
)
from minivllm.engine.async_engine import RequestStream
from tests.tolerances import UNIT_LENGTH_ATOL

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
PATIENCE = 60.0  # seconds until a test that hangs fails; nothing waits for it to pass


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path]) -> LLM:
    """Two requests run at a time, a step computes 16 tokens; company changes no bit, or a draw could fall otherwise."""
    return LLM(
        tiny_model("llama"),
        dtype="float32",
        num_gpu_blocks_override=64,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        batch_invariant=True,
    )


def assert_idle(llm: LLM) -> None:
    engine = llm.llm_engine
    pool = engine.scheduler.kv_cache.pool
    assert not engine.has_unfinished_requests() and engine.output_processor.num_requests == 0
    assert pool.num_free_blocks == pool.num_blocks - 1
    engine.scheduler.check_integrity()


def settle(engine: AsyncEngine) -> None:
    """Everything that was put into the inbox before has been done."""
    done = threading.Event()
    engine._inbox.put(done.set)
    assert done.wait(PATIENCE)


class Gate:
    """The engine thread waits here before every step until it is let through."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch):
        self._arrived, self._permits = threading.Semaphore(0), threading.Semaphore(0)
        self._is_open = False
        step = llm.llm_engine.step

        def gated() -> list[Any]:
            if not self._is_open:
                self._arrived.release()
                assert self._permits.acquire(timeout=PATIENCE)
            return step()

        monkeypatch.setattr(llm.llm_engine, "step", gated)

    def wait(self) -> None:
        """The thread has taken all messages and stands before a step."""
        assert self._arrived.acquire(timeout=PATIENCE)

    def steps(self, count: int = 1) -> None:
        """Let it do so many steps; afterwards it stands before the next one."""
        for _ in range(count):
            self._permits.release()
            self.wait()

    def open(self) -> None:
        self._is_open = True
        self._permits.release()


@pytest.fixture
def gated(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[AsyncEngine, Gate]]:
    """An engine that does one step at a time."""
    llm.reset_prefix_cache()  # so that every prompt is computed
    gate = Gate(llm, monkeypatch)
    engine = AsyncEngine(llm.llm_engine)
    yield engine, gate
    gate.open()
    engine.shutdown()
    assert_idle(llm)


def in_threads(*functions: Callable[[], None]) -> None:
    """Run all at once; the first exception of any of them is the caller's."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a caller waits for ever"
    if errors:
        raise errors[0]


def prompt(*token_ids: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(token_ids)}


def tokens(output: Any) -> list[int]:
    return output.outputs[0].token_ids


# ------------------------------------------------------------------ many callers
NUM_CALLERS, REQUESTS_PER_CALLER = 64, 4


class Job(NamedTuple):
    """One request of a caller: what it does with the answer, and what its prompt gives alone."""

    action: str
    prompt: dict[str, list[int]]
    params: SamplingParams
    num_reads: int


def random_history(rng: random.Random, caller: int) -> list[Job]:
    history = []
    for _ in range(REQUESTS_PER_CALLER):
        token_ids = [5 + caller, *(rng.randrange(5, 300) for _ in range(rng.randrange(20)))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]), seed=caller, max_tokens=rng.randint(1, 8), ignore_eos=True
        )
        action = rng.choice(["read", "read", "leave", "never read", "embed", "refused"])
        history.append(Job(action, prompt(*token_ids), params, rng.randrange(3)))
    return history


def test_sixty_four_callers_with_random_histories_get_their_own_text_only(llm: LLM):
    """Some read everything, some leave, some never read, some wait for a vector; what they see is a beginning of what
    their prompt gives alone."""
    rng = random.Random(0)
    histories = [random_history(rng, caller) for caller in range(NUM_CALLERS)]
    jobs = [job for history in histories for job in history]
    outputs = llm.generate([job.prompt for job in jobs], [job.params for job in jobs], use_tqdm=False)
    vectors = llm.embed([job.prompt for job in jobs], use_tqdm=False)
    alone = {
        id(job): (tokens(output), vector.outputs.embedding)
        for job, output, vector in zip(jobs, outputs, vectors, strict=True)
    }
    with AsyncEngine(llm.llm_engine, max_queue=len(jobs)) as engine:

        def live(job: Job) -> None:
            expected, vector = alone[id(job)]
            if job.action == "refused":
                with pytest.raises(ClientError):
                    engine.submit(prompt(10**6))
            elif job.action == "embed":
                [output] = engine.submit(job.prompt, embed=True)
                assert output.outputs.embedding == pytest.approx(vector, abs=UNIT_LENGTH_ATOL)
            elif job.action == "read":
                seen = [tokens(output) for output in engine.submit(job.prompt, job.params)]
                assert seen[-1] == expected
                assert all(found == expected[: len(found)] for found in seen)
            else:
                with engine.submit(job.prompt, job.params) as stream:
                    for _ in range(job.num_reads if job.action == "leave" else 0):
                        output = stream.next(PATIENCE)
                        if output is None:
                            break
                        assert tokens(output) == expected[: len(tokens(output))]

        def caller(history: list[Job]) -> None:
            for job in history:
                live(job)

        in_threads(*(partial(caller, history) for history in histories))
        settle(engine)
        assert engine.num_unfinished_requests == 0
        assert_idle(llm)


def test_each_of_n_answers_of_many_callers_is_its_own(llm: LLM):
    params = [SamplingParams(n=3, temperature=1.0, seed=seed, max_tokens=5, ignore_eos=True) for seed in range(8)]
    expected = llm.generate(["the"] * 8, params, use_tqdm=False)
    with AsyncEngine(llm.llm_engine) as engine:

        def ask(index: int) -> None:
            *_, last = engine.submit("the", params[index])
            assert last.outputs == expected[index].outputs

        in_threads(*(partial(ask, index) for index in range(8)))


# ------------------------------------------------------------------ a stream
def test_a_stream_hands_out_every_step_to_a_reader_who_keeps_up(gated: tuple[AsyncEngine, Gate]):
    engine, gate = gated
    stream = engine.submit("the", SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    gate.wait()
    seen = []
    for _ in range(2):
        gate.steps()
        seen.append(stream.next(PATIENCE))
    gate.open()
    seen += list(stream)
    assert [(len(tokens(output)), output.finished) for output in seen] == [(1, False), (2, False), (3, True)]
    assert stream.next() is None and stream.next() is None  # after the last one, always


def test_a_slow_reader_gets_the_newest_output_and_costs_no_memory(gated: tuple[AsyncEngine, Gate]):
    engine, gate = gated
    stream = engine.submit("the", LONG)
    gate.wait()
    gate.steps(7)
    assert len(tokens(stream.next(PATIENCE))) == 7
    with pytest.raises(TimeoutError):
        stream.next(timeout_seconds=0)  # the six before it are not kept
    gate.steps(3)
    assert len(tokens(stream.next(PATIENCE))) == 10


def test_a_reader_who_comes_after_the_end_gets_the_whole_answer_once(llm: LLM):
    [expected] = llm.generate("the", GREEDY, use_tqdm=False)
    with AsyncEngine(llm.llm_engine) as engine:
        stream = engine.submit("the", GREEDY)
        other = list(engine.submit("and", GREEDY))  # equally long, later: the first one has ended, too
        assert other[-1].finished
        settle(engine)
        outputs = list(stream)
        assert [output.finished for output in outputs][-1] and outputs[-1].outputs == expected.outputs


def test_next_gives_up_after_its_timeout_and_the_stream_goes_on(gated: tuple[AsyncEngine, Gate]):
    engine, gate = gated
    stream = engine.submit("the", GREEDY, request_id="mine")
    gate.wait()
    with pytest.raises(TimeoutError, match="request mine had no output for 0 s"):
        stream.next(timeout_seconds=0)
    gate.open()
    assert len(tokens(list(stream)[-1])) == 12


# ------------------------------------------------------------------ giving up
STATES = {  # what runs before it, its prompt, steps until it is in that state
    "in the inbox": ([], prompt(5), 0),
    "queued": ([prompt(6), prompt(7)], prompt(5), 3),  # two run, which is all that may
    "in prefill": ([], prompt(*range(5, 55)), 2),  # 32 of 50 tokens are computed
    "running": ([prompt(6)], prompt(5), 4),
}


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("state", STATES)
def test_a_request_that_is_given_up_frees_its_blocks_whatever_its_state(
    llm: LLM, gated: tuple[AsyncEngine, Gate], state: str, how: str
):
    others, ids, num_steps = STATES[state]
    engine, gate = gated
    other_streams = [engine.submit(other, LONG) for other in others]
    if others:
        gate.wait()  # they are in before it
    stream = engine.submit(ids, LONG, request_id="mine")
    if num_steps:
        if not others:
            gate.wait()
        gate.steps(num_steps)
        request = llm.llm_engine.scheduler.requests["mine"]
        is_running, num_computed = request in llm.llm_engine.scheduler.running, request.num_computed_tokens
        assert (is_running, num_computed) == {"queued": (False, 0), "in prefill": (True, 32), "running": (True, 3)}[
            state
        ]
    stream.close() if how == "close" else engine.abort("mine")
    gate.open()
    settle(engine)
    assert "mine" not in llm.llm_engine.scheduler.requests
    assert "mine" not in llm.llm_engine.scheduler.kv_cache.tables
    assert engine.num_unfinished_requests <= len(others)
    *_, last = stream
    assert last.finished and last.outputs[0].finish_reason == "abort"
    for other in other_streams:
        *_, last = other
        assert (len(tokens(last)), last.outputs[0].finish_reason) == (100, "length")


def test_leaving_the_with_block_gives_the_request_up(llm: LLM, gated: tuple[AsyncEngine, Gate]):
    engine, gate = gated
    with engine.submit("the", LONG) as stream:
        gate.wait()
        gate.steps(2)
        assert len(tokens(stream.next(PATIENCE))) == 2
    gate.open()
    settle(engine)
    assert engine.num_unfinished_requests == 0
    assert_idle(llm)


def test_an_aborted_embedding_ends_its_stream(gated: tuple[AsyncEngine, Gate]):
    """It has no last output; the stream was kept, its reader waited for ever, and the place was lost."""
    engine, gate = gated
    stream = engine.submit(prompt(*range(5, 55)), embed=True)
    gate.wait()
    gate.steps(1)
    stream.close()
    gate.open()
    settle(engine)
    assert engine.num_unfinished_requests == 0
    assert list(stream) == []


def test_an_abort_that_overtakes_its_request_still_ends_it(llm: LLM, gated: tuple[AsyncEngine, Gate]):
    """Somebody who knows the id may abort it between its registration and its way into the inbox."""
    engine, gate = gated
    gate.open()

    class AbortWhenReleased:
        def __init__(self, lock: Any):
            self.lock = lock

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()
            engine._lock = self.lock
            engine.abort("mine")

    engine._lock = AbortWhenReleased(engine._lock)
    stream = engine.submit("the", LONG, request_id="mine")
    settle(engine)
    assert list(stream) == [] and engine.num_unfinished_requests == 0
    assert "mine" not in llm.llm_engine.scheduler.requests


def test_an_abort_of_a_finished_or_unknown_request_is_nothing(llm: LLM):
    with AsyncEngine(llm.llm_engine) as engine:
        stream = engine.submit("the", GREEDY, request_id="mine")
        *_, last = stream
        engine.abort("mine")
        engine.abort("never there")
        stream.close()
        settle(engine)
        assert last.outputs[0].finish_reason == "length" and engine.is_alive
        assert list(engine.submit("the", GREEDY, request_id="mine"))[-1].finished  # the id is free again


# ------------------------------------------------------------------ refusals
def test_a_bad_request_is_refused_in_the_callers_thread(llm: LLM):
    with AsyncEngine(llm.llm_engine) as engine:
        with pytest.raises(ClientError):
            engine.submit("", GREEDY)
        assert engine.num_unfinished_requests == 0
        assert list(engine.submit("the", GREEDY))[-1].finished


def test_a_full_queue_is_refused_with_a_time_to_come_back(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(llm, monkeypatch)
    with AsyncEngine(llm.llm_engine, max_queue=1) as engine:
        streams = [engine.submit("the", LONG) for _ in range(3)]  # two may run, one may wait
        with pytest.raises(OverloadedError, match="3 requests are in flight, at most 3 may be") as caught:
            engine.submit("", LONG)  # before the prompt is looked at
        assert caught.value.status == 429 and caught.value.retry_after_seconds >= 1
        streams[0].close()
        gate.open()
        settle(engine)
        late = engine.submit("the", GREEDY)  # there is room again
        assert list(late)[-1].finished
        for stream in streams:
            stream.close()


def test_callers_who_come_at_once_cannot_share_the_last_place(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """Both saw room before their prompts were tokenised, and both were let in."""
    both_saw_room = threading.Barrier(2)
    process_input = llm.llm_engine.process_input

    def slow(*args: Any, **options: Any) -> Any:
        both_saw_room.wait(PATIENCE)
        return process_input(*args, **options)

    monkeypatch.setattr(llm.llm_engine, "process_input", slow)
    gate = Gate(llm, monkeypatch)
    with AsyncEngine(llm.llm_engine, max_queue=-1) as engine:  # one place
        streams: list[RequestStream] = []
        refused: list[OverloadedError] = []

        def ask() -> None:
            try:
                streams.append(engine.submit("the", GREEDY))
            except OverloadedError as error:
                refused.append(error)

        in_threads(ask, ask)
        assert (len(streams), len(refused), engine.num_unfinished_requests) == (1, 1, 1)
        gate.open()
        assert list(streams[0])[-1].finished


def test_an_id_in_use_is_refused_and_the_first_request_goes_on(gated: tuple[AsyncEngine, Gate]):
    """The second one used to take the first one's stream from it: its reader waited for ever."""
    engine, gate = gated
    first = engine.submit("the", GREEDY, request_id="mine")
    gate.wait()
    with pytest.raises(InvalidRequestError, match="request_id 'mine' is in use") as caught:
        engine.submit("and", GREEDY, request_id="mine")
    assert caught.value.parameter == "request_id"
    gate.open()
    assert list(first)[-1].finished


def test_a_request_that_cannot_be_queued_fails_alone(gated: tuple[AsyncEngine, Gate]):
    """Only the engine thread sees that an id is that of a sequence of another request."""
    engine, gate = gated
    parent = engine.submit("the", SamplingParams(n=2, temperature=1.0, max_tokens=4, ignore_eos=True), request_id="x")
    gate.wait()
    child = engine.submit("the", GREEDY, request_id="0_x")
    gate.open()
    with pytest.raises(InvalidRequestError, match="in use"):
        list(child)
    assert [len(completion.token_ids) for completion in list(parent)[-1].outputs] == [4, 4]


# ------------------------------------------------------------------ faults
def test_an_exception_of_the_model_fails_the_requests_of_its_step_only(
    llm: LLM, gated: tuple[AsyncEngine, Gate], monkeypatch: pytest.MonkeyPatch
):
    engine, gate = gated
    running = [engine.submit(prompt(6), LONG), engine.submit(prompt(7), LONG)]
    gate.wait()
    waiting = engine.submit(prompt(8), GREEDY)
    gate.steps(2)
    execute = llm.llm_engine._executor.execute_model
    failures = iter([RuntimeError("out of memory")])

    def failing(step: Any, *masks: Any) -> Any:
        for failure in failures:
            raise failure
        return execute(step, *masks)

    monkeypatch.setattr(llm.llm_engine._executor, "execute_model", failing)
    gate.steps(1)
    for stream in running:
        *_, last = stream
        assert last.finished and last.outputs[0].finish_reason == "error" and "out of memory" in last.error
        assert 1 <= len(tokens(last)) <= 2  # what it had before
    gate.open()
    assert len(tokens(list(waiting)[-1])) == 12
    assert engine.is_alive


class Killed(BaseException):
    """What no except Exception catches."""


@pytest.mark.parametrize("where", ["executor", "scheduler"])
def test_a_dead_engine_fails_every_stream_and_every_later_request(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, where: str
):
    """A BaseException out of the executor, or any exception of the scheduler: its state can be trusted no more."""
    llm = LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64, max_num_seqs=1)
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    gate = Gate(llm, monkeypatch)
    engine = AsyncEngine(llm.llm_engine)
    streams = [engine.submit(prompt(6), LONG), engine.submit(prompt(7), LONG)]
    gate.wait()
    gate.steps(2)
    streams.append(engine.submit(prompt(8), LONG))  # still in the inbox

    def die(*_: Any) -> Any:
        raise Killed("a secret of this machine") if where == "executor" else KeyError("a secret of this machine")

    if where == "executor":
        monkeypatch.setattr(llm.llm_engine._executor, "execute_model", die)
    else:
        monkeypatch.setattr(llm.llm_engine.scheduler, "schedule", die)
    gate.open()
    engine._thread.join(PATIENCE)
    cause = "Killed" if where == "executor" else "KeyError"
    errors = []
    for index, stream in enumerate(streams):
        if index == 0:
            assert len(tokens(stream.next(PATIENCE))) == 2  # what it was sent before is not lost
        for _ in range(2):  # the second time, too
            with pytest.raises(EngineDeadError, match=f"the engine loop ended: {cause}$") as caught:
                stream.next(PATIENCE)
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 3  # one exception raised in many threads would mix up their tracebacks
    assert not engine.is_alive and engine.num_unfinished_requests == 0
    with pytest.raises(EngineDeadError, match=cause) as caught:
        engine.submit("the", GREEDY)
    assert caught.value.status == 503
    assert [report.exc_type.__name__ for report in reported] == [cause]  # and the log has it all
    engine.shutdown()


# ------------------------------------------------------------------ shutdown
def test_a_shutdown_ends_what_is_running_waiting_and_in_the_inbox(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(llm, monkeypatch)
    engine = AsyncEngine(llm.llm_engine)
    streams = [engine.submit(prompt(5 + index), LONG) for index in range(3)]  # two run, one waits
    gate.wait()
    gate.steps(3)
    streams.append(engine.submit(prompt(9), LONG))
    stopper = threading.Thread(target=engine.shutdown)
    stopper.start()
    gate.open()
    stopper.join(PATIENCE)
    assert not stopper.is_alive() and not engine.is_alive and engine.num_unfinished_requests == 0
    for stream in streams:
        with pytest.raises(EngineDeadError, match="the engine was shut down"):
            list(stream)
    assert_idle(llm)


def test_after_a_shutdown_nothing_is_taken_and_the_engine_itself_can_be_used(llm: LLM):
    with AsyncEngine(llm.llm_engine) as engine:
        expected = tokens(list(engine.submit("the", GREEDY))[-1])
    with pytest.raises(EngineDeadError, match="the engine was shut down"):
        engine.submit("the", GREEDY)
    assert engine.num_unfinished_requests == 0
    engine.shutdown()  # twice is once
    assert tokens(llm.generate("the", GREEDY, use_tqdm=False)[0]) == expected


def test_while_it_shuts_down_nothing_more_is_taken(gated: tuple[AsyncEngine, Gate]):
    engine, gate = gated
    stream = engine.submit("the", LONG)
    gate.wait()
    engine._stopping = True  # shutdown has begun, the thread is in its last step
    with pytest.raises(EngineDeadError, match="shutting down"):
        engine.submit("the", GREEDY)
    engine._stopping = False
    stream.close()
