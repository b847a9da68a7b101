"""Recorder: looks on while an engine works and writes down what happened, as the events of a trace.

    with record(engine) as trace:              # to read: every stage of the sampler, texts
        ...                                    # anything that makes the engine step
    with record(engine, num_top=0, file=f):    # to replay: tokens and digests, written as they come

The engine's one Watcher. Nothing of it runs when nobody records: the engine asks `is None`, a few times in a step.

Knows no model. Called by llm.py, cli/ and replay.py. Twin in vLLM: none.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from minivllm.core.request import Request
from minivllm.engine.input_processor import EngineCoreRequest
from minivllm.engine.llm_engine import LLMEngine
from minivllm.errors import ClientError
from minivllm.kernels.paged_attention.cpu_plan import StepPlan
from minivllm.outputs import ModelRunnerOutput, NewRequestData, SchedulerOutput
from minivllm.sample.metadata import SamplingMetadata
from minivllm.trace.document import Trace, event_line, header_line
from minivllm.trace.records import SCHEMA, SCHEMA_VERSION, Aborted, Added, CacheReset, Event, Row, Step
from minivllm.trace.stages import Drawing, digest_of, explain_rows
from minivllm.version import __version__
from minivllm.worker.input_batch import InputBatch, RequestState

NUM_TOP = 10
HASH_CHARS = 16


@contextlib.contextmanager
def record(engine: LLMEngine, *, num_top: int = NUM_TOP, file: str | Path | None = None) -> Iterator[Trace]:
    """Record what `engine` does inside the `with`; the trace grows as it happens.

    num_top: tokens to keep at each stage of the sampler; 0: tokens and digests only, which is what a replay needs.
    file: events are written there as they come, and not kept in the trace.
    Raises ClientError where the file cannot be written, ServerError where the engine is being recorded already.
    """
    with contextlib.ExitStack() as stack:
        try:
            sink = None if file is None else stack.enter_context(Path(file).open("w", encoding="utf-8"))
        except OSError as error:
            raise ClientError(f"cannot write {file}: {error.strerror}", parameter="record") from None
        recorder = Recorder(engine, num_top, sink)
        engine.watch(recorder)
        stack.callback(engine.watch, None)
        yield recorder.trace


class Recorder:
    """Args:
    num_top, sink: record()'s num_top and file.
    """

    def __init__(self, engine: LLMEngine, num_top: int = NUM_TOP, sink: TextIO | None = None):
        self.trace = Trace(describe(engine) | {"num_top": num_top})
        self._engine, self._num_top, self._sink = engine, num_top, sink
        self._start_seconds = time.perf_counter()
        self._told_seconds = 0.0  # spent here, to explain draws
        self._step = Step(0)
        self._requests: dict[str, tuple[Request, int]] = {}  # who computes in this step, and its tokens before
        self._drawings: dict[str, list[Drawing]] = {}
        self._batch: InputBatch | None = None
        if sink is not None:
            self._write(header_line(self.trace.header))

    # ------------------------------------------------------------------ between steps
    def request_added(self, request: EngineCoreRequest) -> None:
        """See engine/watcher.py, as for the other methods."""
        added = Added(
            request.request_id,
            list(request.prompt_token_ids),
            request.sampling_params,
            request.prompt,
            sorted(request.eos_token_ids),
            sorted(request.stop_token_ids),
            request.bad_words_token_ids,
            request.cache_salt,
            request.priority,
            request.seed,
            request.max_tokens,
            added_seconds=self._now(),
        )
        if self._num_top:
            added.prompt_texts = [self._text_of(token_id) for token_id in request.prompt_token_ids]
        self._add(added)

    def request_aborted(self, request_id: str) -> None:
        self._add(Aborted(request_id))

    def prefix_cache_reset(self) -> None:
        self._add(CacheReset())

    # ------------------------------------------------------------------ in a step
    def step_scheduled(self, step: SchedulerOutput) -> None:
        scheduler = self._engine.scheduler
        computed = {new.request_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        computed |= {cached.request_id: cached.num_computed_tokens for cached in step.scheduled_cached_reqs}
        blocks = {new.request_id: new.block_ids for new in step.scheduled_new_reqs}
        blocks |= {cached.request_id: cached.new_block_ids for cached in step.scheduled_cached_reqs}
        self._step = Step(step.step, num_free_blocks=scheduler.kv_cache.pool.num_free_blocks)
        self._step.rows = [
            Row(
                decision.request_id,
                decision.action,
                decision.reason,
                step.num_scheduled_tokens.get(decision.request_id, 0),
                computed.get(decision.request_id, 0),
                list(blocks.get(decision.request_id, ())),
                draft_token_ids=list(step.draft_token_ids.get(decision.request_id, ())),
            )
            for decision in self._engine.decisions()
        ]
        for new in step.scheduled_new_reqs:
            self._note_prefix_hits(new)
        requests = [scheduler.requests[request_id] for request_id in step.num_scheduled_tokens]
        self._requests = {request.request_id: (request, request.num_tokens) for request in requests}
        self._note_named_blocks()
        self._drawings, self._batch = {}, None
        self._step.scheduled_seconds = self._now()

    def batch_built(self, batch: InputBatch) -> None:
        self._batch = batch
        starts, slots = batch.attention.query_start_loc, batch.attention.slot_mapping.tolist()
        for index, state in enumerate(batch.states):
            row = self._step.row(state.request_id)
            if row is not None:
                row.slot_mapping = slots[starts[index] : starts[index + 1]]

    def logits_ready(
        self,
        states: Sequence[RequestState],
        logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
        metadata: SamplingMetadata,
    ) -> None:
        with self._clock_stands_still():
            drawings = explain_rows(logits, metadata, self._text_of, self._num_top)
        for state, drawing in zip(states, drawings, strict=True):
            self._drawings.setdefault(state.request_id, []).append(drawing)

    def step_computed(self, result: ModelRunnerOutput | None) -> None:
        self._step.computed_seconds = self._now()
        self._step.failed = result is None
        if result is None:
            return
        kernels = self._kernels()
        with self._clock_stands_still():
            for row in self._step.rows:
                drawn = result.sampled_token_ids.get(row.request_id, ())
                drawings = self._drawings.get(row.request_id, ())
                row.draws = [drawing.finish(t, self._text_of) for t, drawing in zip(drawn, drawings, strict=False)]
                row.embedding_digest = digest_of(result.pooler_output.get(row.request_id))
                row.error = result.errors.get(row.request_id)
                row.kernel = kernels.get(row.request_id, "")

    def step_ended(self) -> None:
        for row in self._step.rows:
            if row.request_id not in self._requests:
                continue
            request, num_tokens = self._requests[row.request_id]
            row.new_token_ids = request.all_token_ids[num_tokens:]
            if self._num_top:
                row.new_texts = [self._text_of(token_id) for token_id in row.new_token_ids]
            if request.finish_reason is not None:
                row.finish_reason = str(request.finish_reason)
        self._step.ended_seconds = self._now()
        self._add(self._step)

    # ------------------------------------------------------------------ details
    def _note_prefix_hits(self, new: NewRequestData) -> None:
        row, request = self._step.row(new.request_id), self._engine.scheduler.requests[new.request_id]
        num_hits = new.num_computed_tokens // self._engine.plan.block_size
        if row is not None:
            hashes = [block_hash.hex()[:HASH_CHARS] for block_hash in request.block_hashes[:num_hits]]
            row.prefix_hits = dict(zip(new.block_ids, hashes, strict=False))

    def _note_named_blocks(self) -> None:
        """Blocks that this step fills have their hash by now (core/kv_cache_manager.py says why)."""
        size, tables = self._engine.plan.block_size, self._engine.scheduler.kv_cache.tables
        for request_id in self._requests:
            row, table = self._step.row(request_id), tables[request_id]
            if row is not None:
                for block in table.blocks[row.num_computed_tokens // size : table.num_cached_blocks]:
                    if block.block_hash is not None:
                        self._step.named_blocks[block.block_id] = block.block_hash.hex()[:HASH_CHARS]

    def _kernels(self) -> dict[str, str]:
        """{request: whose kernel computed its attention}; a CPU's kernel has several ways (cpu_plan.py)."""
        if self._batch is None or self._engine.config.model.is_encoder:
            return {}
        impl, attention = self._engine.kernel_impl, self._batch.attention
        ways = attention.plan.ways() if isinstance(attention.plan, StepPlan) else {}
        named: dict[str, str] = {}
        for state, first_row in zip(self._batch.states, attention.query_start_loc, strict=False):
            way = ways.get(first_row)
            named[state.request_id] = impl if way is None else f"{impl}, {way}"
        return named

    def _text_of(self, token_id: int) -> str:
        tokenizer = self._engine.tokenizer
        return tokenizer.token_text(token_id) if tokenizer is not None else f"<{token_id}>"

    def _now(self) -> float:
        """Seconds on a clock that stands still while draws are explained."""
        return round(time.perf_counter() - self._start_seconds - self._told_seconds, 6)

    @contextlib.contextmanager
    def _clock_stands_still(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._told_seconds += time.perf_counter() - started

    def _add(self, event: Event) -> None:
        if self._sink is None:
            self.trace.events.append(event)
        else:
            self._write(event_line(event))

    def _write(self, line: str) -> None:
        """A full disk ends the recording, not the engine."""
        if self._sink is None or self._sink.closed:
            return
        try:
            self._sink.write(line + "\n")
            self._sink.flush()
        except OSError as error:
            logging.getLogger(__name__).error("the recording ends here: %s", error)
            with contextlib.suppress(OSError):
                self._sink.close()


def describe(engine: LLMEngine) -> dict[str, Any]:
    """The header: how to make this engine again, and what else the bits of its logits depend on."""
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in (engine.settings or {}).items()
    }
    for name in ("model", "tokenizer", "chat_template"):
        if settings.get(name) is not None and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    scheduler, pool = engine.config.scheduler, engine.scheduler.kv_cache.pool
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "settings": settings,
        "engine": {
            "model": engine.config.model.name,
            "dtype": engine.config.model.dtype,
            "kernels": engine.kernel_impl,
            "block_size": engine.plan.block_size,
            "num_blocks": pool.num_blocks,
            "max_model_len": engine.config.model.max_model_len,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "enable_prefix_caching": engine.config.cache.enable_prefix_caching,
        },
        "environment": {
            "minivllm": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        },
        "tables": {key: table.block_ids for key, table in engine.scheduler.kv_cache.tables.items()},
        "named_blocks": [
            [block.block_id, block.block_hash.hex()[:HASH_CHARS]] for block in pool.blocks if block.block_hash
        ],
        "is_fresh": engine.last_step is None and not engine.has_unfinished_requests(),
    }
