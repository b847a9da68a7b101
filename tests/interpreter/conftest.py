"""These tests run Triton's kernels in Triton's interpreter, on a CPU: `tox -e interpreter`.

TRITON_INTERPRET is read when triton is imported, and a process that has it set can compile nothing. So they are a
run of their own: without the variable nothing here is collected.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
