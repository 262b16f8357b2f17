"""Kernels for Q4 decoding: `cpu_decode` for CPUs (C++), all else for GPUs (Triton).

The GPU modules need torch, but importing them does not need Triton. `layout` defines how weights
lie in device memory, `core` the device functions that every phase shares. `phases` are the fused
steps of one layer as kernels of their own, `sampling` chooses the next token; `decoder` owns the
buffers and launches them.
"""
