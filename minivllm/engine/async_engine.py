"""AsyncEngine: the engine for many callers at once.

    caller threads            one engine thread
    submit() ── inbox ──▶     add, abort, step, step, ...
    for output in stream ◀──  a mailbox per request

Only the engine thread touches LLMEngine's scheduler and worker. Text becomes token ids in the caller's thread, so
that a long prompt does not hold up the others' next token. A mailbox is bounded: outputs are cumulative, so a newer one
replaces an unread older one and a slow reader costs no memory.

Knows no HTTP. Called by the HTTP layer and by anybody with several threads.
Twin in vLLM: vllm/v1/engine/async_llm.py.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from minivllm.engine.input_processor import EngineCoreRequest, PromptType
from minivllm.engine.llm_engine import AnyOutput, LLMEngine
from minivllm.errors import EngineDeadError, InvalidRequestError, OverloadedError
from minivllm.sampling_params import SamplingParams

STOP_TIMEOUT_SECONDS = 30.0


class RequestStream:
    """The answer of one request, as an iterator of cumulative outputs; the last one has finished=True.

    close() (or leaving a `with` block) gives the request up: its blocks are free after the running step.

    Args:
        core_request: what was queued.
        changed: notified with every output; several streams may share one, to be waited for together.
    """

    def __init__(
        self,
        core_request: EngineCoreRequest,
        cancel: Callable[[str], None],
        changed: threading.Condition | None = None,
    ):
        self.core_request = core_request
        self.request_id = core_request.request_id
        self._cancel = cancel
        self._changed = changed or threading.Condition()
        self._latest: AnyOutput | None = None
        self._error: Exception | None = None
        self._done = False

    def put(self, output: AnyOutput) -> None:
        with self._changed:
            self._latest = output
            self._done = self._done or output.finished
            self._changed.notify_all()

    def end(self) -> None:
        """No more outputs: an embedding that was given up has no last one."""
        with self._changed:
            self._done = True
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._done = True
            self._changed.notify_all()

    @property
    def has_news(self) -> bool:
        """next() would not wait."""
        return self._latest is not None or self._done

    def next(self, timeout_seconds: float | None = None) -> AnyOutput | None:
        """The newest output that was not yet handed out; None after the last one.

        Raises TimeoutError when nothing came in time, EngineDeadError when the engine ended.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.has_news, timeout_seconds):
                raise TimeoutError(f"request {self.request_id} had no output for {timeout_seconds} s")
            output, self._latest = self._latest, None
            if output is None and self._error is not None:
                raise self._error
            return output

    def __iter__(self) -> Iterator[AnyOutput]:
        while (output := self.next()) is not None:
            yield output

    def close(self) -> None:
        if not self._done:
            self._cancel(self.request_id)

    def __enter__(self) -> RequestStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncEngine:
    """Runs `engine` in a thread of its own.

    Args:
        max_queue: requests that may be unfinished beyond those that can run; more raise OverloadedError.

    Attributes:
        max_requests: unfinished ones, running or not.
    """

    def __init__(self, engine: LLMEngine, max_queue: int = 256):
        self.engine = engine
        self.max_requests = engine.config.scheduler.max_num_seqs + max_queue
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._streams: dict[str, RequestStream] = {}
        self._death: str | None = None  # why the thread has ended
        self._stopping = False
        self._revision = 0
        self._progress_time = time.monotonic()  # when the thread last came round, or got work after a rest
        self._thread = threading.Thread(target=self._run, name="minivllm-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._death is None and self.engine.is_alive

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._streams)

    @property
    def seconds_without_progress(self) -> float:
        """How long there has been work and no step has ended; 0 at rest."""
        return time.monotonic() - self._progress_time if self._streams else 0.0

    def submit(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        changed: threading.Condition | None = None,
        **options: Any,  # LLMEngine.process_input's; embed=True for an embedding
    ) -> RequestStream:
        """Queue a request. Raises ClientError for a bad one, OverloadedError when the queue is full."""
        self.check_room()  # before the prompt is tokenised
        core_request = self.engine.process_input(prompt, sampling_params, request_id=request_id, **options)
        return self.submit_processed(core_request, changed)

    def submit_processed(
        self, core_request: EngineCoreRequest, changed: threading.Condition | None = None
    ) -> RequestStream:
        """Queue what LLMEngine.process_input has made. Raises OverloadedError when the queue is full."""
        stream = RequestStream(core_request, self.abort, changed)
        with self._lock:
            if self._death is not None or self._stopping:
                raise EngineDeadError(self._death or "the engine is shutting down")
            self.check_room()
            if stream.request_id in self._streams:
                raise InvalidRequestError(f"request_id {stream.request_id!r} is in use", parameter="request_id")
            if not self._streams:
                self._progress_time = time.monotonic()
            self._streams[stream.request_id] = stream
        self._inbox.put(lambda: self._add_now(core_request, stream))
        return stream

    def check_room(self) -> None:
        """Raise OverloadedError when the queue is full."""
        if len(self._streams) >= self.max_requests:
            raise OverloadedError(f"{len(self._streams)} requests are in flight, at most {self.max_requests} may be")

    def abort(self, request_id: str) -> None:
        """Give a request up, wherever it is."""
        self._inbox.put(lambda: self._abort_now(request_id))

    @property
    def revision(self) -> int:
        """Grows with every step and every request that comes or is given up, not with looking."""
        return self._revision

    def call_soon(self, function: Callable[[], None]) -> None:
        """Have the engine thread run `function` between two steps, where nothing changes meanwhile.

        It holds up every request, so it must be quick. Nobody hears of its exceptions but the log. A dead engine
        never calls.
        """

        def call() -> None:
            try:
                function()
            except Exception:
                logging.getLogger(__name__).exception("a call between two steps failed")

        self._inbox.put(call)

    def shutdown(self) -> None:
        """Abort everything and end the thread."""
        self._stopping = True
        self._inbox.put(None)
        self._thread.join(STOP_TIMEOUT_SECONDS)
        self.engine.close()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # ------------------------------------------------------------------ the engine thread
    def _run(self) -> None:
        try:
            while self._take_messages():
                for output in self.engine.step():
                    self._deliver(output)
                self._revision += 1
                self._progress_time = time.monotonic()
            for request_id in list(self._streams):
                self.engine.abort_request(request_id)
            self._end("the engine was shut down")
        except EngineDeadError as error:  # it says why
            self._end(str(error))
            raise
        except BaseException as error:
            self._end(f"the engine loop ended: {type(error).__name__}")
            raise

    def _take_messages(self) -> bool:
        """Carry out what callers asked for; wait for it when there is nothing to compute. False: shut down."""
        may_wait = not self.engine.has_unfinished_requests()
        while True:
            try:
                message = self._inbox.get(block=may_wait)
            except queue.Empty:
                return True
            if message is None:
                return False
            message()
            may_wait = may_wait and not self.engine.has_unfinished_requests()

    def _add_now(self, core_request: EngineCoreRequest, stream: RequestStream) -> None:
        if self._streams.get(stream.request_id) is not stream:  # its abort was faster
            return
        self._revision += 1
        try:
            self.engine.add_processed(core_request)
        except Exception as error:  # one bad request must not end the others
            with self._lock:
                self._streams.pop(core_request.request_id, None)
            stream.fail(error)

    def _abort_now(self, request_id: str) -> None:
        for output in self.engine.abort_request(request_id):
            self._deliver(output)
        self._revision += 1
        with self._lock:
            stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.end()

    def _deliver(self, output: AnyOutput) -> None:
        if output.finished:
            with self._lock:
                stream = self._streams.pop(output.request_id, None)
        else:
            stream = self._streams.get(output.request_id)
        if stream is not None:
            stream.put(output)

    def _end(self, reason: str) -> None:
        with self._lock:
            self._death = reason
            streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.fail(EngineDeadError(reason))  # its own: an exception grows by a traceback each time it is raised
