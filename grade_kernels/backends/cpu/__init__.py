"""The native CPU backend: C++ kernels of csrc/cpu."""
