"""Hooks: functions that see, and may change, what a network computes, request by request and step by step.

    hook = hooks.add("layers.3.attn", fn)      fn(values, context) -> None, or new values of the same shape
    hooks.attach(...)                          a request that begins has the hooks that are set then, for its whole life
    hooks.forward(...)                         a step with hooks; without any, model_runner.py does not come here

A step's tensors have one row per token, whatever requests the tokens belong to. fn gets one request's rows at a time,
cut by query_start_loc: [its tokens of this step, ...], a copy. What it returns replaces those rows and no other bit.
Later modules, and later tokens through the keys and values, see what it returned.

An error in fn, or a result that does not fit, ends the request it was called for, and no other: its message names the
hook and the line. The step goes on with the values as they were.

A request with hooks neither takes blocks from the prefix cache (their positions would not be computed, so fn would not
see them) nor leaves blocks there that others find (they may hold changed keys and values); see llm_engine.py.

Knows no queue and no client. Owned by executor.py. Twin in vLLM: none; in nnsight the tracing context, in
TransformerLens run_with_hooks.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from minivllm.errors import InvalidRequestError
from minivllm.models.hook_points import HookPoint, find_points, hook_points
from minivllm.worker.cpu import CPUPath
from minivllm.worker.input_batch import InputBatch, RequestState


@dataclass(frozen=True, slots=True)
class HookContext:
    """Whose values these are.

    positions are those of the rows, in the request. A position can come again: a preempted request begins anew.
    """

    name: str  # of the point, in full
    request_id: str  # as in RequestOutput
    prompt_index: int  # which of the prompts of one generate(), embed() or chat()
    candidate: int  # which of the request's n answers
    step: int  # of the engine
    positions: range
    token_ids: list[int]  # at these positions
    num_prompt_tokens: int
    block_ids: list[int]  # where the request's keys and values are


HookFunction = Callable[[torch.Tensor, HookContext], torch.Tensor | None]


@dataclass(eq=False, slots=True)
class Hook:
    """A function at one or more points; as a context manager it is removed at the end.

    prompts: only these of a call's prompts, counted from 0; None: all.
    """

    owner: Hooks
    fn: HookFunction
    prompts: frozenset[int] | None
    points: list[HookPoint]
    handles: list[Any] = field(default_factory=list)  # torch's

    def remove(self) -> None:
        """Call fn no more, for running requests neither. A second time changes nothing."""
        self.owner.remove(self)

    def __enter__(self) -> Hook:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@dataclass(frozen=True, slots=True)
class Attached:
    """What is remembered of a request with hooks."""

    request_id: str  # the caller's: a request with n answers runs as n sequences
    prompt_index: int
    candidate: int
    hooks: tuple[Hook, ...]


@dataclass(slots=True)
class _Step:
    """The step that is being computed."""

    number: int
    num_tokens: int
    parts: list[tuple[RequestState, Attached, slice]]  # the requests with hooks, and their rows
    errors: dict[str, str]  # sequence -> why it ends
    called: set[tuple[Hook, str]] = field(default_factory=set)  # and the names of the points


class Hooks:
    """All hooks of one model. False when none is set, and nothing then costs anything.

    Args:
        model: a class of models/registry.py.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._hooks: list[Hook] = []
        self._attached: dict[str, Attached] = {}  # by the sequence's id
        self._step: _Step | None = None

    def __bool__(self) -> bool:
        return bool(self._hooks)

    @cached_property
    def points(self) -> dict[str, HookPoint]:
        """By full name, in the order of computation."""
        return hook_points(self._model)

    # ------------------------------------------------------------------ setting
    def add(self, name: str, fn: HookFunction, prompts: Collection[int] | None = None) -> Hook:
        """Set a hook, behind those that are there already. Raises InvalidRequestError naming near points."""
        if not callable(fn):
            raise InvalidRequestError(f"fn must be a function, got {type(fn).__name__}.", parameter="fn")
        hook = Hook(self, fn, None if prompts is None else frozenset(prompts), self.find(name))
        for point in hook.points:
            if point.is_input:
                call = partial(self._on_input, hook, point)
                hook.handles.append(point.module.register_forward_pre_hook(call, with_kwargs=True))
            else:
                hook.handles.append(point.module.register_forward_hook(partial(self._on_output, hook, point)))
        self._hooks.append(hook)
        return hook

    def find(self, name: str) -> list[HookPoint]:
        """The points that a name or a pattern stands for. Raises InvalidRequestError naming near ones."""
        return find_points(self.points, name)

    def remove(self, hook: Hook) -> None:
        """As Hook.remove."""
        for handle in hook.handles:
            handle.remove()
        hook.handles.clear()
        if hook in self._hooks:
            self._hooks.remove(hook)
        if not self._hooks:
            self._attached.clear()

    def attach(self, sequence_id: str, request_id: str, prompt_index: int, candidate: int) -> bool:
        """A request begins. True: it has hooks."""
        hooks = tuple(hook for hook in self._hooks if hook.prompts is None or prompt_index in hook.prompts)
        if hooks:
            self._attached[sequence_id] = Attached(request_id, prompt_index, candidate, hooks)
        return bool(hooks)

    def forget(self, sequence_id: str) -> None:
        """It has ended, and a later one may have its id."""
        self._attached.pop(sequence_id, None)

    # ------------------------------------------------------------------ one step
    def forward(
        self, path: CPUPath, batch: InputBatch, step: int, errors: dict[str, str]
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        """path.forward with hooks; errors: gets those of fn, by sequence. batch: prepared."""
        starts = batch.attention.query_start_loc
        parts = [
            (state, self._attached[state.request_id], slice(starts[index], starts[index + 1]))
            for index, state in enumerate(batch.states)
            if state.request_id in self._attached
        ]
        if not parts:
            return path.forward(batch)
        self._step = current = _Step(step, starts[-1], parts, errors)
        try:
            hidden_states = path.call_modules(batch)  # a whole step, and the replay of a graph, call no module
        finally:
            self._step = None
        for state, attached, _ in parts:
            for hook in attached.hooks:
                missed = [point.name for point in hook.points if (hook, point.name) not in current.called]
                if hook.handles and missed:
                    errors.setdefault(state.request_id, f"hook {missed[0]}: the network does not call this module")
        return hidden_states

    def _on_output(self, hook: Hook, point: HookPoint, module: Any, args: Any, output: Any) -> Any:
        return self._apply(hook, point, output)

    def _on_input(self, hook: Hook, point: HookPoint, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            changed = self._apply(hook, point, args)
            return None if changed is None else (changed, kwargs)
        changed = self._apply(hook, point, kwargs.get("hidden_states"))
        return None if changed is None else ((), {**kwargs, "hidden_states": changed})

    def _apply(self, hook: Hook, point: HookPoint, payload: Any) -> Any:
        """Call fn for every request that has this hook. None: nothing is to be changed."""
        step = self._step
        if step is None:  # not a step: kernels being compiled
            return None
        step.called.add((hook, point.name))
        changes = []
        values: torch.Tensor | None = None  # [num_tokens, ...]
        for state, attached, rows in step.parts:
            if hook not in attached.hooks or state.request_id in step.errors:
                continue
            try:
                if values is None:
                    values = point.view.read(payload, step.num_tokens)
                context = _context(point, state, attached, step.number, rows)
                result = hook.fn(values[rows].clone(), context)
                if result is not None:
                    changes.append((rows, _fitting(result, values[rows])))
            except Exception as error:  # the caller's code: whatever it raises ends its request
                logging.getLogger(__name__).exception("hook %s of request %s", point.name, attached.request_id)
                step.errors[state.request_id] = _message(point, error)
        return point.view.write(payload, step.num_tokens, changes) if changes else None


def _context(point: HookPoint, state: RequestState, attached: Attached, step: int, rows: slice) -> HookContext:
    start = state.num_computed_tokens
    positions = range(start, start + rows.stop - rows.start)
    return HookContext(
        name=point.name,
        request_id=attached.request_id,
        prompt_index=attached.prompt_index,
        candidate=attached.candidate,
        step=step,
        positions=positions,
        token_ids=state.token_ids[positions.start : positions.stop].tolist(),
        num_prompt_tokens=state.num_prompt_tokens,
        block_ids=state.block_ids[: state.num_blocks].tolist(),
    )


def _fitting(result: Any, values: torch.Tensor) -> torch.Tensor:  # as values: [its tokens, ...]
    """What fn returned. Raises TypeError, ValueError: it cannot take the place of the values."""
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"fn must return a tensor or None, got {type(result).__name__}")
    if result.shape != values.shape:
        raise ValueError(f"fn must return the shape that it was given, {list(values.shape)}, got {list(result.shape)}")
    return result.to(values)


def _message(point: HookPoint, error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"hook {point.name}: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
