"""Benchmarks, run through the albor-bench command."""
