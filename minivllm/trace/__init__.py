"""What an engine did, step by step, and why: as data, as pages and figures, and as a recording that can be replayed.

    trace = llm.trace("The capital of France is")       # every decision, block, slot, logit stage and token
    trace.steps[0].rows[0].draws[0].why                 # data: records.py; trace.save("run.jsonl")
    show_trace(trace)                                   # a page to step through; show_blocks, show_schedule: figures

    with record(engine, num_top=0, file="run.jsonl"): ...
    list(compare(recorded, replay(recorded)))           # []: the same decisions, blocks, slots and bits

    records.py document.py   the data and its file        recorder.py stages.py   the one who looks on
    replay.py                again, and the differences    chrome.py terminal.py page.py figures.py   ways to look at it

Called by llm.py, cli/, notebooks and tests. Twin in vLLM: none.
"""

from minivllm.trace.chrome import chrome_trace
from minivllm.trace.document import Trace
from minivllm.trace.figures import Figure, show_blocks, show_schedule, show_trace
from minivllm.trace.page import page
from minivllm.trace.recorder import record
from minivllm.trace.records import SCHEMA_VERSION
from minivllm.trace.replay import compare, replay

__all__ = [
    "SCHEMA_VERSION",
    "Figure",
    "Trace",
    "chrome_trace",
    "compare",
    "page",
    "record",
    "replay",
    "show_blocks",
    "show_schedule",
    "show_trace",
]
