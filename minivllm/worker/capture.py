"""Capture: hooks that change nothing and keep what they see.

    with llm.capture("layers.*.attn.out") as captured:
        outputs = llm.generate(prompts)
    captured.of(outputs[1], "layers.3.attn")       [num_positions, hidden_size], prompt and answer in one
    captured.steps(outputs[1], "layers.3.attn")    the same as it was computed: a part for each step

The newest token of an answer has no row: it was drawn, and never computed. Values are on the CPU, in the model's dtype.

Knows no step. Made by llm.py. Twin in vLLM: none; in TransformerLens run_with_cache, in nnsight `.output.save()`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from minivllm.errors import InvalidRequestError
from minivllm.outputs import EmbeddingRequestOutput, RequestOutput
from minivllm.worker.hooks import HookContext, Hooks

AnyRequest = str | RequestOutput | EmbeddingRequestOutput  # an id, or what has one


@dataclass(frozen=True, slots=True)
class Captured:
    """What one point had for one request in one step."""

    context: HookContext
    values: torch.Tensor  # [its tokens of the step, ...]


class Capture:
    """Args:
    names: points or patterns.
    prompts: only these of a call's prompts, counted from 0; None: all.

    Raises InvalidRequestError naming near points.
    """

    def __init__(self, hooks: Hooks, names: Sequence[str], prompts: Collection[int] | None = None):
        self.records: list[Captured] = []  # in the order of computation
        self.point_names: list[str] = []  # full ones
        self._hooks = []
        try:
            for name in names:
                hook = hooks.add(name, self._keep, prompts)
                self._hooks.append(hook)
                self.point_names += [point.name for point in hook.points]
        except InvalidRequestError:
            self.close()
            raise

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Capture no more; what there is stays."""
        for hook in self._hooks:
            hook.remove()

    def steps(self, request: AnyRequest, name: str | None = None, candidate: int = 0) -> list[Captured]:
        """What one point had for one request, in the order of the steps.

        Args:
            request: its output or its id.
            name: of a captured point; may be left out where there is only one.
            candidate: which of the request's n answers.

        Raises InvalidRequestError where nothing was captured.
        """
        wanted = self._full_name(name)
        request_id = request if isinstance(request, str) else request.request_id
        found = [
            record
            for record in self.records
            if (record.context.request_id, record.context.candidate) == (request_id, candidate)
            and record.context.name == wanted
        ]
        if not found:
            raise InvalidRequestError(
                f"Nothing was captured of candidate {candidate} of request {request_id!r} at {wanted}: the capture "
                "must be open when the request begins.",
                parameter="request",
            )
        return found

    def of(self, request: AnyRequest, name: str | None = None, candidate: int = 0) -> torch.Tensor:
        """All positions in one: [num_positions, ...]. Arguments and errors as in `steps`.

        A position that was computed again, behind a preemption, has its newest values.
        """
        records = self.steps(request, name, candidate)
        num_positions = max(record.context.positions.stop for record in records)
        joined = records[0].values.new_empty(num_positions, *records[0].values.shape[1:])  # [num_positions, ...]
        for record in records:  # the first step of a request with hooks begins at position 0
            joined[record.context.positions.start : record.context.positions.stop] = record.values
        return joined

    def _keep(self, values: torch.Tensor, context: HookContext) -> None:  # [its tokens of the step, ...]
        with torch.inference_mode(False):  # else autograd would refuse to work with it
            self.records.append(Captured(context, values.cpu().clone()))

    def _full_name(self, name: str | None) -> str:
        from_names = self.point_names if name is None else _matching(self._hooks[0].owner, self.point_names, name)
        if len(from_names) != 1:
            captured = ", ".join(self.point_names[:8]) + (", ..." if len(self.point_names) > 8 else "")
            raise InvalidRequestError(f"name must be one of what was captured: {captured}.", parameter="name")
        return from_names[0]


def _matching(hooks: Hooks, names: Sequence[str], name: str) -> list[str]:
    return [point.name for point in hooks.find(name) if point.name in names]
