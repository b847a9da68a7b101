"""LLMEngine: text in, text out, one step at a time. The only owner of the scheduler and the executor.

    add_request ──▶ input_processor ──▶ scheduler.add_request
    step        ──▶ scheduler.schedule ──▶ executor.execute_model ──▶ scheduler.update_from_output
                                                        │         └──▶ output_processor ──▶ [RequestOutput]
    grammar_steps ─ bitmask rows ────────────────────────┘  and the drawn tokens back to them
    drafting ────── guesses for the next step, where speculative decoding is on

Single-threaded: async_engine.py gives it a thread, llm.py a loop. Knows no HTTP.
Twin in vLLM: vllm/v1/engine/llm_engine.py and core.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import secrets
from pathlib import Path
from typing import Any

import torch

from minivllm.config import (
    DEFAULT_CPU_SHARE,
    DEFAULT_GPU_SHARE,
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    check_generation_config,
    check_quantization,
    choose_max_model_len,
)
from minivllm.core.request import FinishReason, Request
from minivllm.core.scheduler import Scheduler
from minivllm.engine.drafting import Drafting
from minivllm.engine.grammar_steps import GrammarSteps
from minivllm.engine.input_processor import EngineCoreRequest, InputProcessor, PromptType, check_request_id
from minivllm.engine.output_processor import OutputProcessor
from minivllm.engine.stats import EngineStats, SpecDecodeStats
from minivllm.engine.throughput import Throughput
from minivllm.engine.tokenizer import Tokenizer, load_tokenizer, read_chat_template
from minivllm.engine.watcher import Watcher
from minivllm.errors import ConfigError, EngineDeadError, InvalidRequestError, ServerError
from minivllm.hub import ModelSource, resolve_model
from minivllm.kernels.dispatch import IMPLS
from minivllm.models import loader, registry
from minivllm.models.linear import ModelOptions
from minivllm.models.sentence_folder import SentenceConfig, read_sentence_config
from minivllm.outputs import (
    Decision,
    EmbeddingRequestOutput,
    EngineCoreOutput,
    RequestOutput,
    SchedulerOutput,
)
from minivllm.sampling_params import SamplingParams
from minivllm.structured_output.manager import StructuredOutputManager
from minivllm.worker.executor import Executor
from minivllm.worker.gpu import MemorySnapshot, choose_device
from minivllm.worker.hooks import Hooks
from minivllm.worker.kv_cache import KVCachePlan, plan_kv_cache
from minivllm.worker.model_runner import ModelRunner
from minivllm.worker.parallel_executor import ParallelExecutor, check_parallel

AnyOutput = RequestOutput | EmbeddingRequestOutput
logger = logging.getLogger(__name__)


class LLMEngine:
    """Args:
    config: everything that was decided at start-up.
    executor: model loaded, cache reserved.
    tokenizer: None for a model without one: prompts are then token ids, and outputs have no text.
    plan: the cache's arithmetic.
    settings: what from_model was called with, for whoever wants such an engine again.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        tokenizer: Tokenizer | None,
        plan: KVCachePlan,
        generation_config: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.config = config
        self.settings = settings
        self.plan = plan
        self.tokenizer = tokenizer
        self.eos_token_ids = collect_eos_token_ids(tokenizer, generation_config or {})
        self.scheduler = Scheduler(config.scheduler, config.cache, plan.num_blocks)
        self.input_processor = InputProcessor(
            tokenizer,
            vocab_size=config.model.vocab_size,
            max_model_len=config.model.max_model_len,
            eos_token_ids=self.eos_token_ids,
            generation_config=generation_config,
            num_blocks=plan.num_blocks - 1,
            block_size=plan.block_size,
            seed=config.seed,
        )
        speculative = config.speculative
        spec_decode = None if speculative is None else SpecDecodeStats(speculative.num_speculative_tokens)
        self.stats = EngineStats(config.model.max_model_len, spec_decode)
        self.output_processor = OutputProcessor(tokenizer, stats=self.stats)
        self.structured_output = StructuredOutputManager(
            tokenizer.backend if tokenizer is not None else None, config.model.vocab_size, self.eos_token_ids
        )
        self._grammar_steps = GrammarSteps(self.scheduler, self.structured_output, self.eos_token_ids)
        self._drafting: Drafting | None = None
        if speculative is not None and spec_decode is not None:
            self._drafting = Drafting(
                speculative, self.scheduler, self.structured_output, self.eos_token_ids, spec_decode
            )
        self.last_step: SchedulerOutput | None = None  # for the trace and the state endpoint
        self.throughput = Throughput()
        self._watcher: Watcher | None = None
        self._executor = executor
        self._request_numbers = itertools.count(1)  # next() of it is safe in every thread
        self._id_suffix = secrets.token_hex(4)  # behind the number of an id: callers count, too, and ids must not meet

    # ------------------------------------------------------------------ requests
    def process_input(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        embed: bool = False,
        **options: Any,  # priority, cache_salt, add_special_tokens, truncate_prompt_tokens, truncation_side
    ) -> EngineCoreRequest:
        """Check and tokenise a request without queueing it. May be called from any thread.

        Raises ClientError naming the parameter.
        """
        if request_id is None:
            request_id = f"{next(self._request_numbers)}-{self._id_suffix}"
        check_request_id(request_id)
        if embed:
            return self.input_processor.process_pooling(request_id, prompt, **options)
        if self.config.model.is_pooling:
            raise InvalidRequestError(f"{self.config.model.name} is an embedding model and generates no text.")
        request = self.input_processor.process(request_id, prompt, sampling_params, **options)
        if request.sampling_params is not None and request.sampling_params.structured_outputs is not None:
            request.grammar = self.structured_output.compile(request.sampling_params.structured_outputs)
        return request

    def add_processed(self, request: EngineCoreRequest) -> None:
        """Queue a checked request: one sequence per candidate (n, best_of)."""
        for candidate, child in enumerate(self.output_processor.add_request(request)):
            has_hooks = bool(self._executor.hooks) and self._executor.hooks.attach(
                child.request_id, request.request_id, request.prompt_index, candidate
            )
            self.scheduler.add_request(self._to_core(child, has_hooks))
            if child.grammar is not None:
                self.structured_output.add_request(child.request_id, child.grammar)
        if self._watcher is not None:
            self._watcher.request_added(request)

    def add_request(self, prompt: PromptType, sampling_params: SamplingParams | None = None, **options: Any) -> str:
        """process_input and add_processed in one call; returns the request id."""
        request = self.process_input(prompt, sampling_params, **options)
        self.add_processed(request)
        return request.request_id

    def abort_request(self, request_id: str) -> list[AnyOutput]:
        """Give a request up, wherever it is; its blocks are free at once. Returns its last output, if it was there."""
        child_ids, output = self.output_processor.abort_request(request_id)
        for child_id in child_ids:
            self.scheduler.finish_request(child_id)
            self._forget(child_id)
        if child_ids and self._watcher is not None:
            self._watcher.request_aborted(request_id)
        return [output] if output is not None else []

    def _forget(self, sequence_id: str) -> None:
        """It has ended: what others than scheduler and worker keep of it."""
        self.structured_output.remove_request(sequence_id)
        self._executor.hooks.forget(sequence_id)

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests

    def _to_core(self, request: EngineCoreRequest, has_hooks: bool) -> Request:
        """Hooks must see every position, and nobody may find what they changed: such a request looks for no block in
        the prefix cache, and a salt of its own hides its blocks from all others."""
        params = request.sampling_params
        every_position = params is None and self._executor.pooling_type != "LAST"
        return Request(
            request.request_id,
            request.prompt_token_ids,
            params,
            max_tokens=request.max_tokens,
            eos_token_ids=request.eos_token_ids,
            stop_token_ids=request.stop_token_ids - request.eos_token_ids,
            bad_words_token_ids=request.bad_words_token_ids,
            seed=request.seed,
            priority=request.priority,
            arrival=next(self._request_numbers),
            cache_salt=f"hooks {self._id_suffix} {request.request_id}" if has_hooks else request.cache_salt,
            skip_prefix_cache=has_hooks
            or every_position
            or (params is not None and params.prompt_logprobs is not None),
        )

    # ------------------------------------------------------------------ one step
    def step(self) -> list[AnyOutput]:
        """Compute one step and return what it changed for the callers.

        An exception of the model fails the requests of this step; the engine goes on with the others. Raises
        EngineDeadError when there can be no further step: a rank of several has ended.
        """
        if not self.scheduler.has_work:
            return []
        step = self.last_step = self.scheduler.schedule()
        self.output_processor.begin_step(step)
        watcher = self._watcher
        if watcher is not None:
            watcher.step_scheduled(step)
        try:
            result = self._executor.execute_model(step, self._grammar_steps.masks_for(step))
        except EngineDeadError:
            raise
        except Exception as error:
            logger.exception("step %d failed", step.step)
            if watcher is not None:
                watcher.step_computed(None)
            outputs = self.scheduler.fail_step(step, f"the step failed: {type(error).__name__}: {error}")
        else:
            if watcher is not None:
                watcher.step_computed(result)
            outputs = self._grammar_steps.follow(self.scheduler.update_from_output(step, result))
            self.throughput.add(step.total_num_scheduled_tokens, sum(len(output.new_token_ids) for output in outputs))
            if self._drafting is not None:
                self._drafting.follow(step, result)
        request_outputs = self._process_outputs(outputs)
        if watcher is not None:
            watcher.step_ended()
        return request_outputs

    def _process_outputs(self, outputs: list[EngineCoreOutput]) -> list[AnyOutput]:
        processed = self.output_processor.process_outputs(outputs)
        for request_id in processed.stopped_request_ids:  # a stop string: only here is there text to find it in
            self.scheduler.finish_request(request_id, FinishReason.STOP)
            self._forget(request_id)
        for output in outputs:
            if output.finish_reason is not None:
                self._forget(output.request_id)
        return processed.request_outputs

    # ------------------------------------------------------------------ text
    def render_chat(self, messages: Any, **template_options: Any) -> PromptType:
        """A conversation as a prompt, through the model's chat template. Raises ClientError."""
        return self.input_processor.render_chat(messages, **template_options)

    def tokenize_prompt(self, prompt: PromptType) -> tuple[list[int], int]:
        """(token ids, tokens of room left in the context)."""
        prompt_token_ids = self.input_processor.tokenize_prompt(prompt)
        return prompt_token_ids, self.config.model.max_model_len - len(prompt_token_ids)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens) if self.tokenizer else ""

    def default_sampling_params(self) -> SamplingParams:
        """The model's generation_config; what it does not say is SamplingParams' own default."""
        return self.input_processor.default_sampling_params()

    # ------------------------------------------------------------------ looking in
    @property
    def hooks(self) -> Hooks:
        """What sees and changes the network's values: LLM.hook and LLM.capture. Raises InvalidRequestError where this
        process computes a part of them only."""
        if isinstance(self._executor, ParallelExecutor):
            raise InvalidRequestError(
                "Hooks would see the part that one of several ranks computes: leave tensor_parallel_size at 1.",
                parameter="tensor_parallel_size",
            )
        return self._executor.hooks

    @property
    def model_runner(self) -> ModelRunner:
        """Who computes the steps, for profiles (bench/profile.py)."""
        return self._executor.runner

    def decisions(self) -> list[Decision]:
        """What the last step decided for every request, waiting ones included."""
        if self.last_step is None:
            return []
        decided = {decision.request_id for decision in self.last_step.decisions}
        waiting = [d for d in self.scheduler.waiting_reasons(self.last_step) if d.request_id not in decided]
        return [*self.last_step.decisions, *waiting]

    @property
    def kernel_impl(self) -> str:
        """Which implementation of the kernels computes: "cpu", "triton" or "reference"."""
        return self._executor.kernel_impl

    @property
    def is_alive(self) -> bool:
        """False when something has ended that every step needs."""
        return self._executor.is_alive

    def close(self) -> None:
        """End what was started beside this process; there is no step afterwards."""
        self._executor.close()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False while requests are running."""
        was_reset = self.scheduler.kv_cache.pool.reset_prefix_cache()
        if was_reset and self._watcher is not None:
            self._watcher.prefix_cache_reset()
        return was_reset

    def watch(self, watcher: Watcher | None) -> None:
        """Let somebody look on from now on; None: nobody. Raises ServerError where somebody else does."""
        if watcher is not None and self._watcher is not None:
            raise ServerError("this engine is being recorded already; an engine has one watcher at most")
        self._watcher = watcher
        self._executor.watch(watcher)

    # ------------------------------------------------------------------ start-up
    @classmethod
    def from_model(
        cls,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        block_size: int = 16,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 1024,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        gpu_memory_utilization: float | None = None,
        kv_cache_memory_bytes: int | None = None,
        num_gpu_blocks_override: int | None = None,
        scheduling_policy: str = "fcfs",
        long_prefill_token_threshold: int = 0,
        batch_invariant: bool = False,
        impl: str = "auto",
        device: str = "auto",
        enforce_eager: bool = False,
        speculative_config: dict[str, Any] | None = None,
        tensor_parallel_size: int = 1,
        distributed_executor_backend: str = "mp",
        quantization: str | None = None,
        generation_config: str = "auto",
        chat_template: str | Path | None = None,
        seed: int = 0,
        show_progress: bool = False,
        reserved_memory_bytes: int = 0,
        poison: bool = False,
    ) -> LLMEngine:
        """Find, check and load a model. The arguments are LLM's; reserved_memory_bytes of gpu_memory_utilization's
        share are left to others; `poison` fills unwritten cache slots with NaN (tests).

        Everything that can be checked without the weights is checked before they are read.
        Raises ModelNotFoundError, ConfigError.
        """
        asked = {name: value for name, value in locals().items() if name not in ("cls", "show_progress", "poison")}
        speculative = SpeculativeConfig.from_dict(speculative_config)
        parallel = ParallelConfig(tensor_parallel_size, distributed_executor_backend=distributed_executor_backend)
        if impl not in IMPLS:
            raise ConfigError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}.", parameter="impl")
        check_generation_config(generation_config)
        device_config = DeviceConfig(device, enforce_eager)
        torch_device = choose_device(device, impl)
        on_gpu = torch_device.type == "cuda"
        if gpu_memory_utilization is None:
            gpu_memory_utilization = DEFAULT_GPU_SHARE if on_gpu else DEFAULT_CPU_SHARE
        template = None if chat_template is None else read_chat_template(chat_template)
        cache_config = CacheConfig(
            block_size=block_size,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            num_gpu_blocks_override=num_gpu_blocks_override,
            enable_prefix_caching=enable_prefix_caching,
            reserved_memory_bytes=reserved_memory_bytes,
        )
        facts = read_model_facts(
            model, dtype=dtype, max_model_len=max_model_len, show_progress=show_progress, on_gpu=on_gpu
        )
        quantization = check_quantization(quantization, facts.source.kind == "gguf", on_gpu=on_gpu)
        draft_name = None if speculative is None else speculative.model
        check_parallel(parallel, facts.hf_config, torch_device, quantization, draft_name)
        model_config = facts.model_config
        is_encoder = model_config.is_encoder
        if is_encoder:  # nothing is cached, and every token sees every other: whole prompts only
            cache_config = dataclasses.replace(cache_config, enable_prefix_caching=False)
            enable_chunked_prefill = False
            max_num_batched_tokens = max(max_num_batched_tokens, model_config.max_model_len)
        scheduler_config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=model_config.max_model_len,
            enable_chunked_prefill=enable_chunked_prefill,
            long_prefill_token_threshold=long_prefill_token_threshold,
            policy=scheduling_policy,
        )
        config = EngineConfig(
            model_config, cache_config, scheduler_config, batch_invariant, seed, device_config, speculative
        )
        draft_facts = read_draft_facts(speculative, model_config, show_progress=show_progress)
        text_source = facts.source if tokenizer is None else resolve_model(tokenizer, show_progress=show_progress)
        loaded_tokenizer = load_tokenizer(text_source, chat_template=template)
        check_letters(loaded_tokenizer, facts.sentence_config)
        generation = loader.load_generation_config(facts.source)
        if generation_config == "vllm":  # what ends an answer is no default
            generation = {name: value for name, value in generation.items() if name == "eos_token_id"}
        before = MemorySnapshot.of(torch_device) if on_gpu else None
        model_options = ModelOptions(facts.dtype, batch_invariant, impl, torch_device, quantization)
        draft_model = None
        if draft_facts is not None:  # in the target's dtype: one arithmetic for both caches
            draft_options = dataclasses.replace(model_options, quantization=None)
            draft_model = loader.load_model(
                draft_facts.source, draft_facts.hf_config, draft_options, show_progress=show_progress
            )
        settings: dict[str, Any] = {  # plain values, which other ranks get as JSON
            "pooling_type": facts.sentence_config.pooling_type,
            "causal": not is_encoder,
            "batch_invariant": batch_invariant,
            "poison": poison,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "enforce_eager": enforce_eager or tensor_parallel_size > 1,  # graphs that hold collectives: not tried
            "impl": impl,
        }
        max_len = model_config.max_model_len
        if tensor_parallel_size > 1:
            model_of = (facts.source, facts.hf_config, model_options, max_len, settings)
            how: dict[str, Any] = {"backend": distributed_executor_backend, "show_progress": show_progress}
            executor: Executor = ParallelExecutor.load(tensor_parallel_size, *model_of, **how)
        else:
            loaded = loader.load_model(facts.source, facts.hf_config, model_options, show_progress=show_progress)
            executor = Executor(loaded, facts.dtype, max_len, draft_model=draft_model, device=torch_device, **settings)
        plan = plan_kv_cache(
            cache_config,
            executor.kv_cache_specs,
            facts.dtype,
            executor.weight_bytes,
            max_num_seqs * model_config.max_model_len,
            None if before is None else executor.measure_memory(before, block_size),
        )
        executor.initialize_kv_cache(plan, show_progress=show_progress)
        return cls(config, executor, loaded_tokenizer, plan, generation, asked)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model before its weights are read."""

    source: ModelSource
    hf_config: Any
    dtype: torch.dtype
    model_config: ModelConfig
    sentence_config: SentenceConfig


def read_model_facts(
    model: str | Path | None,
    *,
    dtype: str = "auto",
    max_model_len: int | None = None,
    show_progress: bool = False,
    on_gpu: bool = False,
) -> ModelFacts:
    """Find a model and read its configuration. Raises ModelNotFoundError, ConfigError."""
    source = resolve_model(model, show_progress=show_progress)
    hf_config = loader.load_hf_config(source)
    torch_dtype = loader.resolve_dtype(dtype, hf_config, source, on_gpu=on_gpu)
    text_config = hf_config.get_text_config()
    is_encoder = registry.is_encoder(hf_config)
    sentence_config = read_sentence_config(source, is_encoder)
    limit = getattr(text_config, "max_position_embeddings", None)
    model_config = ModelConfig(
        name=source.name,
        dtype=str(torch_dtype).removeprefix("torch."),
        max_model_len=choose_max_model_len(max_model_len, limit, sentence_config.max_seq_length),
        vocab_size=text_config.vocab_size,
        is_pooling=not registry.generates_text(hf_config),
        is_encoder=is_encoder,
        embedding_size=text_config.hidden_size,
        matryoshka_dimensions=_matryoshka_dimensions(hf_config),
    )
    return ModelFacts(source, hf_config, torch_dtype, model_config, sentence_config)


def read_draft_facts(
    config: SpeculativeConfig | None, target: ModelConfig, *, show_progress: bool = False
) -> ModelFacts | None:
    """Find the draft model, if there is to be one. Raises ModelNotFoundError, ConfigError (it does not fit)."""
    problem = None
    if config is not None and target.is_pooling:
        problem = f"speculative_config must be left out: {target.name} is an embedding model and generates no text."
    facts = None
    if problem is None and config is not None and config.model is not None:
        facts = read_model_facts(config.model, show_progress=show_progress)
        draft = facts.model_config
        limit = getattr(facts.hf_config.get_text_config(), "max_position_embeddings", None)
        if draft.is_pooling:
            problem = f"speculative_config.model must generate text: {draft.name} is an embedding model."
        elif draft.vocab_size != target.vocab_size:
            problem = (
                f"speculative_config.model must have the vocabulary of {target.name}, {target.vocab_size} tokens; "
                f"{draft.name} has {draft.vocab_size}."
            )
        elif limit is not None and limit < target.max_model_len:
            problem = (
                f"speculative_config.model must be made for {target.max_model_len} tokens as {target.name} is used; "
                f"{draft.name} is for {limit}. Set max_model_len to {limit} or less."
            )
    if problem is not None:
        raise ConfigError(problem, parameter="speculative_config")
    return facts


def _matryoshka_dimensions(hf_config: Any) -> tuple[int, ...] | None:
    """As vLLM: a list in config.json's matryoshka_dimensions, or is_matryoshka: true for every length."""
    dimensions = getattr(hf_config, "matryoshka_dimensions", None)
    if isinstance(dimensions, list | tuple) and dimensions:
        return tuple(dimensions)
    return () if getattr(hf_config, "is_matryoshka", None) is True else None


def check_letters(tokenizer: Tokenizer | None, sentence_config: SentenceConfig) -> None:
    """Raise ConfigError where capitals should be made small before a text is tokenised, and the tokenizer does not."""
    if sentence_config.lower_cases and tokenizer is not None and tokenizer.encode("A") != tokenizer.encode("a"):
        raise ConfigError(
            "sentence_bert_config.json has do_lower_case, but the model's tokenizer tells capitals from small letters; "
            "that is not supported.",
            parameter="model",
        )


def collect_eos_token_ids(tokenizer: Tokenizer | None, generation_config: dict[str, Any]) -> frozenset[int]:
    """The tokenizer's eos and generation_config's, which may be several."""
    eos = generation_config.get("eos_token_id")
    token_ids = {eos} if isinstance(eos, int) else set(eos or ())
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        token_ids.add(tokenizer.eos_token_id)
    return frozenset(token_ids)
