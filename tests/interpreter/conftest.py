"""These tests run Triton's kernels in Triton's interpreter, on a CPU: `tox -e interpreter`.

TRITON_INTERPRET is read when triton is imported, and a process that has it set can compile nothing. So they are a
run of their own: without the variable nothing here is collected.

In every test a load or store outside the kernel's tensors is an error, whatever it finds there.
"""

import os
from collections.abc import Iterator

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def no_access_outside_the_tensors() -> Iterator[None]:
    """On a GPU the same access is another tensor's memory, or an illegal address."""
    from minivllm.kernels.trace.interpreter import watch
    from tests.interpreter.helpers import Fence

    with watch(Fence()):
        yield
