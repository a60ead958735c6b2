"""Fused Triton kernels, for any device with an active Triton driver and for the CPU through Triton's interpreter.

`philox` holds the device functions that turn (seed, row, token) into noise; each other module holds the kernels and the
launcher of one function of the backend interface, or of those that share a kernel. `head` holds the tile of a product
with an LM head that `head_sampling` and `head_relaxation` consume, `head_support` what becomes of its candidates.
`availability` and `backend` do not import Triton, the others do.
"""
