"""Tests of the operations: the CPU path against the reference in float64, on poisoned memory and odd sizes."""
