"""Benchmarks of commentary: what contestants say about a set of videos, what a judge says about that, and what can be counted without one."""
