"""CUDA C++ kernels of csrc/cuda for rows of given logits. No GPU has run them yet: see docs/gpu-status.md."""
