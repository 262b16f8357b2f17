"""Kernels: one file for each idea, with its reference, its kernel and its launcher."""
