"""Plain PyTorch operations on any device, chunked over the vocabulary: what serves where no other backend does.

The noise is that of `grade_kernels.noise`, made one chunk at a time, so nothing of the size of the logits is ever held
beside inputs and outputs.
"""
