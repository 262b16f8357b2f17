"""GPU kernels for Q4 decoding, written in Triton; importing them needs torch but not Triton.

`layout` defines how weights lie in device memory, `core` the device functions that every phase
shares. `phases` are the fused steps of one layer as kernels of their own; `persistent` runs the
same steps inside a single kernel. `decoder` owns the buffers and launches either.
"""
