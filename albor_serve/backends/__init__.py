"""What computes logits: llama.cpp on the CPU, Triton on the GPU, plain torch as reference."""
