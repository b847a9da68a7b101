"""Structured output: what a request's text must look like -> which tokens may come next.

    StructuredOutputsParams ── schema.py, grammar.py ──▶ CompiledGrammar      once per request, before it is queued
    CompiledGrammar ── GrammarMatcher ──▶ one bitmask row per drawn token     manager.py, every step

Knows no model, no scheduler and no HTTP. Owned by engine/llm_engine.py. Twin in vLLM: vllm/v1/structured_output/.
"""
