"""Tests of the policy layer: tiny pools, literal block ids, the exact order of the free queue."""
