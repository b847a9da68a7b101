"""What a kernel does, program by program: the values that each one loads and stores, as data and as a page.

    from minivllm.kernels.rms_norm import rms_norm
    from minivllm.kernels.trace import trace

    steps = trace(rms_norm, {"x": x, "weight": weight, "eps": 1e-5})      # in a notebook: the page
    steps.launches[0].programs[3].accesses                                # data; steps.to_json()
    Path("rms_norm.html").write_text(steps.to_html())

The operation runs in Triton's interpreter, so TRITON_INTERPRET=1 must be set before triton is imported. No kernel knows
of it. The interpreter needs about a tenth of a millisecond per operation and program, and everything is kept: trace
small inputs. Called by readers, notebooks and tests. Twin in vLLM: none; Triton-Viz is the like (SIGCSE 2025).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from minivllm.kernels.trace.document import SCHEMA_VERSION, Trace
from minivllm.kernels.trace.interpreter import require_interpreter, watch
from minivllm.kernels.trace.recorder import Recorder
from minivllm.kernels.trace.records import Access, Launch, Program, TensorInfo, Tile

__all__ = ["SCHEMA_VERSION", "Access", "Launch", "Program", "TensorInfo", "Tile", "Trace", "trace"]


def trace(op: Callable[..., Any], inputs: Mapping[str, Any]) -> Trace:
    """Calls `op(**inputs)` with its Triton kernels, interpreted, and returns what they did.

    op: any operation of minivllm.kernels, or a function that launches kernels. inputs: its arguments by name, tensors
    on the CPU; what it changes in place is changed.

    Raises RuntimeError where Triton's interpreter is off, IndexError's text in Triton's InterpreterError for an access
    outside of the kernel's tensors, and what `op` raises.
    """
    require_interpreter()
    recorder = Recorder()
    chosen = {"impl": "triton"} if "impl" in inspect.signature(op).parameters else {}
    with watch(recorder):
        op(**{**inputs, **chosen})
    return Trace(op.__name__, recorder.launches())
