"""minivllm bench: how fast this machine runs a model, and where a step's time goes.

    workloads.py   who asks for what: a single stream, and 32 requests of mixed lengths
    measure.py     tokens per second, times to the first token and between tokens
    profile.py     one decode step, part by part

Figures of one machine and one moment. A claim about speed is a ratio, measured beside the peer: benchmarks/compare.py.
Knows no terminal. Called by cli/bench.py. Twin in vLLM: vllm/benchmarks/ (throughput.py, latency.py).
"""
