"""Measure a model: held-out text, infilling, and programs that are run."""
