"""The truth from Hugging Face transformers: tiny models, committed cases, and the program that makes them.

    tiny.py       deterministic models from a config and a seed (numpy only, no transformers)
    reference.py  what transformers says about a model: greedy loops, log-probabilities, distributions
    cases.py      the file format, rounding, the manifest
    make.py       python -m golden.make: writes or checks cases/ and MANIFEST.json

Not part of the installed package. Used by the tests; knows nothing of minivllm except the default model's place.
"""
