"""The fallback: plain PyTorch operations on any device, chunked over the vocabulary."""

from grade_kernels.backends.torch.rows import one_hot, sample, softmax, softmax_backward

__all__ = ["one_hot", "sample", "softmax", "softmax_backward"]
