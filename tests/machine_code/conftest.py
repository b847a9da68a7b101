"""These tests compile every kernel for four GPUs, which takes minutes: `tox -e machine-code`.

Triton compiles nothing in a process with TRITON_INTERPRET set. Without MINIVLLM_COMPILE_KERNELS=1 nothing here is
collected.
"""

import os

collect_ignore_glob = [] if os.environ.get("MINIVLLM_COMPILE_KERNELS") == "1" else ["test_*.py"]
