"""LLM: the engine for offline use. A thin face over LLMEngine.

    llm = LLM()                                   # the default model
    llm.generate("The capital of France is")      # -> [RequestOutput]

Takes any number of prompts at once and runs them together; answers come back in the order of the prompts.
Knows no HTTP. Twin in vLLM: vllm/entrypoints/llm.py (same names; `stream` is ours).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from minivllm.engine.input_processor import EngineCoreRequest, PromptType
from minivllm.engine.llm_engine import AnyOutput, LLMEngine
from minivllm.engine.vectors import check_dimensions, check_pairs, cosine, pairs_of, shorten
from minivllm.errors import InvalidRequestError, ServerError
from minivllm.outputs import (
    BeamSearchOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from minivllm.sample.beam_search import beam_search
from minivllm.sampling_params import BeamSearchParams, SamplingParams
from minivllm.trace.document import Trace
from minivllm.trace.recorder import NUM_TOP, record
from minivllm.worker.capture import Capture
from minivllm.worker.hooks import Hook, HookFunction, Hooks

Message = dict[str, Any]


class LLM:
    """A loaded model with its cache and scheduler.

    Args:
        model: a folder with safetensors, a .gguf file, a Hugging Face id, or None for SmolLM2-135M-Instruct.
        tokenizer: another folder or .gguf file to take the tokenizer from.
        dtype: "float32", "bfloat16", or "auto": what the checkpoint says, as far as the device can compute it.
        max_model_len: tokens of prompt and output together; None = the model's own, at most 8192.
        block_size: tokens per block of the key/value cache.
        max_num_seqs, max_num_batched_tokens: requests and tokens in one step.
        gpu_memory_utilization: share of the device's memory (on a CPU, of the RAM) for weights and cache together;
            None = 0.92 of a GPU, 0.25 of the RAM.
        kv_cache_memory_bytes, num_gpu_blocks_override: the cache's size, said directly.
        scheduling_policy: "fcfs", or "priority" (a lower number runs first).
        batch_invariant: logits do not depend on what else runs, bit for bit. Slower.
        impl: of the kernels: "auto" is the fastest one here; "reference", "cpu", "triton" are for comparisons.
        device: "cpu", "cuda" (the first GPU), "cuda:1", or "auto": a GPU where there is one.
        enforce_eager: on a GPU, no CUDA graphs: slower steps, a faster start.
        speculative_config: guess tokens ahead, to be faster: {"method": "ngram", "num_speculative_tokens": 6}, or
            {"method": "draft_model", "model": "a smaller one", ...}; all fields: config.SpeculativeConfig.
        tensor_parallel_size: this many devices compute one model, each with a part of it: docs/parallel.md.
        distributed_executor_backend: who starts their processes: "mp", this one; "ray", Ray, on any machine of its
            cluster.
        quantization: None: weights in dtype. "int8", "int4": rounded to so many bits. "gguf": a .gguf file's weights of
            4 and 8 bits as they are. Faster for a few requests at a time, not the same numbers, and less memory;
            "int4+bf16", "gguf+bf16": more memory, and as fast as without for many requests.
        generation_config: "auto": sampling defaults are the model's own; "vllm": they are SamplingParams'.
        chat_template: jinja text, or a file with it, in place of the model's own.
        seed: of requests that bring none.
        show_progress: a bar while the weights are read.
        reserved_memory_bytes: of gpu_memory_utilization's share, for others in this process.

    Raises:
        ModelNotFoundError, ConfigError: naming the argument.
    """

    def __init__(
        self,
        model: str | Path | None = None,
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
        speculative_config: dict[str, Any] | None = None,
        tensor_parallel_size: int = 1,
        distributed_executor_backend: str = "mp",
        quantization: str | None = None,
        generation_config: str = "auto",
        chat_template: str | Path | None = None,
        seed: int = 0,
        *,
        show_progress: bool = False,
        reserved_memory_bytes: int = 0,
        device: str = "auto",
        enforce_eager: bool = False,
    ):
        self.llm_engine = LLMEngine.from_model(
            model,
            tokenizer=tokenizer,
            dtype=dtype,
            max_model_len=max_model_len,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            enable_chunked_prefill=enable_chunked_prefill,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            num_gpu_blocks_override=num_gpu_blocks_override,
            scheduling_policy=scheduling_policy,
            long_prefill_token_threshold=long_prefill_token_threshold,
            batch_invariant=batch_invariant,
            impl=impl,
            device=device,
            enforce_eager=enforce_eager,
            speculative_config=speculative_config,
            tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend=distributed_executor_backend,
            quantization=quantization,
            generation_config=generation_config,
            chat_template=chat_template,
            seed=seed,
            show_progress=show_progress,
            reserved_memory_bytes=reserved_memory_bytes,
        )
        self._newest: dict[str, AnyOutput | None] = {}  # of every request that was started here and is still wanted

    # ------------------------------------------------------------------ text
    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt: text, {"prompt": text}, {"prompt_token_ids": ids}, or a list of these.

        sampling_params: one for all, or one per prompt; None = the model's own defaults.
        Raises ClientError for a bad prompt or parameter before anything runs.
        """
        self._require(pooling=False, method="generate")
        prompt_list = _as_prompts(prompts)
        params = _one_each(sampling_params, len(prompt_list), "sampling_params")
        priorities = _one_each(priority, len(prompt_list), "priority")
        jobs = [
            {"prompt": prompt, "sampling_params": param, "priority": rank or 0}
            for prompt, param, rank in zip(prompt_list, params, priorities, strict=True)
        ]
        return self._run(jobs, use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them. A conversation is [{"role": ..., "content": ...}, ...].

        template_options go to the chat template (add_generation_prompt, continue_final_message, tools, ...).
        """
        many = isinstance(messages, list) and messages and isinstance(messages[0], list)
        conversations = messages if many else [messages]
        prompts = [self.llm_engine.render_chat(conversation, **template_options) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: PromptType | list[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Continue one prompt (or answer one conversation), yielding the answer so far after every step.

        Leaving the loop early gives the request up. The loop may use this LLM for other prompts.
        """
        self._require(pooling=False, method="stream")
        is_chat = isinstance(prompt, list) and prompt and isinstance(prompt[0], dict)
        text_or_ids: Any = self.llm_engine.render_chat(prompt) if is_chat else prompt
        request = self.llm_engine.process_input(text_or_ids, sampling_params)
        seen: AnyOutput | None = None
        try:
            self._start(request)
            while seen is None or not seen.finished:
                newest = self._newest[request.request_id]
                if newest is not None and newest is not seen:
                    seen = newest
                    yield _checked([newest])[0]
                elif self.llm_engine.has_unfinished_requests():
                    self._step()
                else:  # somebody else aborted it
                    return
        finally:
            self._forget(request.request_id)

    def trace(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        num_top: int = NUM_TOP,
    ) -> Trace:
        """`generate`, and everything that happened on the way: decisions, blocks, slots, and how each token was drawn.

        num_top: candidates to keep at each stage of the sampler. What to do with a trace: minivllm/trace.
        Raises what generate raises.
        """
        with record(self.llm_engine, num_top=num_top) as trace:
            self.generate(prompts, sampling_params, use_tqdm=False)
        return trace

    def beam_search(
        self, prompts: PromptType | Sequence[PromptType], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, best first."""
        self._require(pooling=False, method="beam_search")
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequestError(
                f"params must be BeamSearchParams, got {type(params).__name__}.", parameter="params"
            )
        engine = self.llm_engine
        num_logprobs = 2 * params.beam_width

        def expand(sequences: Sequence[list[int]]) -> list[dict[int, Logprob]]:
            step = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, ignore_eos=True)
            step.logprobs = num_logprobs  # beyond what a caller may ask for
            outputs: list[Any] = self.generate([{"prompt_token_ids": ids} for ids in sequences], step, use_tqdm=False)
            return [output.outputs[0].logprobs[0] for output in outputs]

        results = []
        for prompt in _as_prompts(prompts):
            prompt_token_ids, room = engine.tokenize_prompt(prompt)
            max_tokens = min(params.max_tokens, room)
            sequences = beam_search(prompt_token_ids, params, max_tokens, engine.eos_token_ids, expand)
            for sequence in sequences:
                ended = sequence.finish_reason == "stop" and not params.include_stop_str_in_output
                output_ids = sequence.tokens[len(prompt_token_ids) : -1 if ended else None]
                sequence.text = engine.decode(output_ids, skip_special_tokens=params.skip_special_tokens)
            results.append(BeamSearchOutput(sequences))
        return results

    # ------------------------------------------------------------------ vectors
    def embed(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """One L2-normalised vector per prompt. A decoder gives its last token's hidden state.

        dimensions: only the first numbers, where the model was trained for that (Matryoshka).
        truncate_prompt_tokens: a longer prompt keeps its beginning; -1: as many tokens as fit. None: it is refused.
        """
        check_dimensions(dimensions, self.llm_engine.config.model)
        options = {"embed": True, "truncate_prompt_tokens": truncate_prompt_tokens}
        outputs = self._run([{"prompt": prompt, **options} for prompt in _as_prompts(prompts)], use_tqdm)
        for output in outputs:
            output.outputs.embedding = shorten(output.outputs.embedding, dimensions)
        return outputs

    def score(
        self,
        text_1: PromptType | Sequence[PromptType],
        text_2: PromptType | Sequence[PromptType],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """Cosine similarity of pairs: one against many, or as many against as many."""
        left, right = _as_prompts(text_1), _as_prompts(text_2)
        check_pairs(len(left), len(right), "text_1", "text_2")
        embedded = self.embed([*left, *right], truncate_prompt_tokens=truncate_prompt_tokens, use_tqdm=use_tqdm)
        return [
            ScoringRequestOutput(
                request_id=b.request_id,
                outputs=ScoringOutput(cosine(a.outputs.embedding, b.outputs.embedding)),
                prompt_token_ids=a.prompt_token_ids + b.prompt_token_ids,
            )
            for a, b in pairs_of(embedded[: len(left)], embedded[len(left) :])
        ]

    # ------------------------------------------------------------------ what the network computes
    def hook(self, name: str, fn: HookFunction, *, prompts: Collection[int] | None = None) -> Hook:
        """Call `fn(values, context)` wherever the network computes `name`, once per request and step.

            with llm.hook("layers.3.mlp", lambda values, context: values + direction, prompts=[1]):
                llm.generate([one, other])              # steers the second answer, and no bit of the first

        Requests that begin while the hook is set have it. They do without the prefix cache.

        Args:
            name: transformers' name of a module, "model.layers.3.self_attn"; its short form, "layers.3.attn"; with
                `.in` behind it for what the module is given; "layers.*.mlp" for one of each layer.
            fn: gets the request's rows of this step, [its tokens, ...], a copy, and a HookContext. Returns None, or
                what takes their place. An error in it ends that request (generate then raises ServerError), no other.
            prompts: only for these of the prompts of one call, counted from 0. None: for all.

        Raises InvalidRequestError: no such name (near ones are listed), or the engine has drafts to verify.
        """
        return self._hooks.add(name, fn, prompts)

    def capture(self, *names: str, prompts: Collection[int] | None = None) -> Capture:
        """Keep what the network computes at `names`, for every request that begins until the capture is closed.

            with llm.capture("layers.3.attn.out") as captured:
                outputs = llm.generate(prompts)
            captured.of(outputs[0])                     # [num_positions, hidden_size]

        Names, prompts and errors as in `hook`. A hook that was set before is seen, one set later is not.
        """
        if not names:
            raise InvalidRequestError("capture needs at least one name.", parameter="names")
        return Capture(self._hooks, names, prompts)

    def hook_points(self) -> list[str]:
        """All names that `hook` and `capture` know, in the order of computation."""
        return list(self._hooks.points)

    @property
    def _hooks(self) -> Hooks:
        if self.llm_engine.config.speculative is not None:
            raise InvalidRequestError(
                "Hooks would also see drafts that are never part of an answer: leave speculative_config out.",
                parameter="speculative_config",
            )
        return self.llm_engine.hooks

    # ------------------------------------------------------------------ the rest
    def get_tokenizer(self) -> Any:
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What sampling_params=None means: the model's generation_config."""
        return self.llm_engine.default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False while requests are running."""
        return self.llm_engine.reset_prefix_cache()

    def _require(self, *, pooling: bool, method: str) -> None:
        if self.llm_engine.config.model.is_pooling != pooling:
            raise InvalidRequestError(
                f"{method} needs a generating model; {self.llm_engine.config.model.name} is an embedding model: "
                "use embed or score.",
                parameter="model",
            )

    def _run(self, jobs: list[dict[str, Any]], use_tqdm: bool) -> list[Any]:
        """Queue all jobs, or none if one of them is bad; step until they are done; answer in their order."""
        requests = [self.llm_engine.process_input(**job) for job in jobs]
        for index, request in enumerate(requests):
            request.prompt_index = index
        finished: dict[str, AnyOutput] = {}
        waiting = {request.request_id for request in requests}
        try:
            for request in requests:
                self._start(request)
            with tqdm(total=len(requests), disable=not use_tqdm, desc="Processed prompts", unit="prompt") as bar:
                while waiting:
                    for output in self._step():
                        if output.finished and output.request_id in waiting:
                            waiting.remove(output.request_id)
                            finished[output.request_id] = output
                            bar.update()
        finally:  # an interrupt must not leave requests behind
            for request in requests:
                self._forget(request.request_id)
        return _checked([finished[request.request_id] for request in requests])

    # A stream's loop may call generate, and several streams may take turns: whoever steps notes everybody's outputs.
    def _start(self, request: EngineCoreRequest) -> None:
        self._newest[request.request_id] = None
        self.llm_engine.add_processed(request)

    def _step(self) -> list[AnyOutput]:
        outputs = self.llm_engine.step()
        for output in outputs:
            if output.request_id in self._newest:
                self._newest[output.request_id] = output
        return outputs

    def _forget(self, request_id: str) -> None:
        """Nobody wants its output any more; if it still runs it is given up."""
        self._newest.pop(request_id, None)
        self.llm_engine.abort_request(request_id)


def _as_prompts(prompts: PromptType | Sequence[PromptType]) -> list[PromptType]:
    """A single prompt becomes a list of one. [1, 2, 3] is one prompt of token ids."""
    if isinstance(prompts, str | bytes | dict) or not isinstance(prompts, Iterable):
        return [prompts]  # what is no prompt at all is refused later, with its name
    prompt_list: list[Any] = list(prompts)
    if not prompt_list:
        raise InvalidRequestError("prompts must hold at least one prompt, got an empty list.", parameter="prompts")
    if all(isinstance(item, int) and not isinstance(item, bool) for item in prompt_list):
        return [{"prompt_token_ids": prompt_list}]
    return prompt_list


def _one_each(value: Any, count: int, name: str) -> list[Any]:
    """The same value for every prompt, or one per prompt."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(
            f"{name} must be one or as many as the prompts ({count}), got {len(value)}.", parameter=name
        )
    return list(value)


def _checked(outputs: list[AnyOutput]) -> list[Any]:
    """Raise if the engine failed a request: an answer that broke off must not pass for one."""
    failed = [output for output in outputs if getattr(output, "error", None)]
    if failed:
        raise ServerError(
            f"{len(failed)} of {len(outputs)} requests failed; request {failed[0].request_id}: {failed[0].error}"
        )
    return outputs
