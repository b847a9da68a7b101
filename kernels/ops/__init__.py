"""The operations a model step is made of, each with a contract, a reference and a fast path.

Lives in `kernels/ops/`, imported as `minivllm.kernels`. One folder per operation:

    __init__.py    the contract: arguments with shapes and dtypes, checks, choice of implementation
    reference.py   plain torch, any dtype up to float64: the specification
    cpu.py         the same values, faster, with eager torch on a CPU
    README.md      the mathematics, short

Knows nothing of requests, models or files: tensors and host lists come in, tensors go out; nothing here imports
the rest of minivllm. Called by models/. Twin in vLLM: csrc/ and vllm/v1/attention/backends.
"""
