"""The table of labs, in the order in which they are best done. Called by cli/labs.py. Twin in vLLM: none."""

from __future__ import annotations

from minivllm.errors import ClientError
from minivllm.labs.blocks import ALLOCATE, APPEND_SLOT, PREFIX_HASH
from minivllm.labs.lab import Lab
from minivllm.labs.mathematics import ONLINE_SOFTMAX, REJECTION_SAMPLING, TOP_P
from minivllm.labs.scheduling import CHUNK_BUDGET, PREEMPT

LABS: tuple[Lab, ...] = (
    *(ALLOCATE, APPEND_SLOT, PREFIX_HASH),
    *(CHUNK_BUDGET, PREEMPT),
    *(ONLINE_SOFTMAX, TOP_P, REJECTION_SAMPLING),
)


def find(name: str) -> Lab:
    """The lab of this name; `chunk-budget` and `chunk_budget.py` are found too. ClientError lists what there is."""
    wanted = name.removesuffix(".py").replace("-", "_")
    for lab in LABS:
        if lab.name == wanted:
            return lab
    raise ClientError(f"there is no lab {name!r}; there are: {', '.join(lab.name for lab in LABS)}.")
