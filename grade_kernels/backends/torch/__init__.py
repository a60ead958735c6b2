"""Plain PyTorch operations on any device. They serve where no other backend does.

The vocabulary is taken a chunk at a time, noise included, so that beside inputs and results nothing of the logits' size is
ever in memory.
"""
