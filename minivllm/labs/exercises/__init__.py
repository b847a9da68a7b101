"""One file per lab: the solved exercise. `minivllm lab start` cuts out what stands between the two marks.

Read by labs/workshop.py as text and never imported. Twin in vLLM: none.
"""
