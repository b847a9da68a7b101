"""Is the engine right? Everything that a model computes and answers, compared with transformers or between servers.

    verify.py      verify_model(model) -> Report: all parts in order
    ├── reference.py    transformers' network, and its intermediate values
    ├── observe.py      our network's, for a request that runs through the engine
    ├── localise.py     layer by layer: where the fault is          diagnose.py    what it looks like
    ├── behaviour.py    tokenizer, next tokens, greedy runs, prompt logprobs, sampler
    └── invariance.py   what must not change an answer              interpreter.py on Triton's kernels
    remote.py      verify_server, diff_servers: the same over HTTP, through echo and logprobs
    engines.py     engines on one network           records.py     Check, Finding, Report: JSON and JUnit
    html.py        one page with plots

Read in this order. Twin in vLLM: none (tests/models compare outputs, not layers).
"""
